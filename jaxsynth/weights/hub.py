"""Folders of Hugging Face files: finding them, hub downloads, and streaming safetensors.

Which of a folder's files holds its weights is decided here, for local folders and downloads alike.
Their tensors are read by `tensors.Tensors`.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import numpy as np
from huggingface_hub import errors as hub_errors
from safetensors.numpy import save_file

from jaxsynth.core import io
from jaxsynth.core.documents import read_json, take
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.core.io import file_digests_cached
from jaxsynth.core.places import local_model
from jaxsynth.weights.safetensors import opened

T = TypeVar("T")

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"
# A file of weights or the index of its shards, as diffusers, transformers and timm name them.
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(\.(?P<variant>\w+))?"
    r"\.(?P<kind>safetensors|bin)(?P<index>\.index(\.(?P<index_variant>\w+))?\.json)?"
)
_SHARD = re.compile(r"(\.(?P<variant>\w+))?-\d+-of-\d+\.(?P<kind>safetensors|bin)")
# The order in which variants are taken; "" is the file of none. Others are taken where alone.
_VARIANTS = ("", "fp32", "fp16", "bf16")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
_WRITTEN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# What a hub snapshot may hold besides the weights that `_wanted` picks.
_TEXT_FILES = (".json", ".txt")
_SKIPPED_FOLDERS = ("safety_checker", "feature_extractor", "image_encoder")


def resolve(name_or_path: str | os.PathLike, *, weights: bool = True) -> Path:
    """The local folder of a model: a folder, "tiny" or "tiny/clip", or a hub id.

    An existing folder is taken as it is; "tiny" and what is below it come with the package;
    anything else that looks like "owner/name" or "owner/name@revision" is downloaded (only json,
    txt and, where `weights` are wanted, the files of `weight_files`) or found in the hub's cache.
    UserError if none of it works.
    """
    folder = local_model(name_or_path)
    if folder is not None:
        return folder
    name, _, revision = os.fspath(name_or_path).partition("@")
    return _download(name, revision, weights)


@cache
def check_there(hub_id: str) -> None:
    """UserError where a repository is neither in the hub's cache nor shown by the hub."""
    name, _, revision = hub_id.partition("@")
    at = {"revision": revision or None}
    if _cached(name, at) is None:
        ask = partial(huggingface_hub.HfApi().model_info, name, timeout=20, **at)
        _of_hub(name, ask, lambda: None)


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = 2) -> None:
    """Write JSON, sorted by key where it is indented, through a temporary file."""
    io.write_json(path, content, indent=indent, sort_keys=indent is not None)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: one, or all the shards of an index.

    Safetensors before PyTorch's own, and of several variants the full precision. UserError if there
    are none, if a shard is missing, or for several variants of which none is known to be better.
    """
    names = sorted(file.name for file in folder.glob("*"))
    chosen = choose_weights(folder, names)
    if chosen is not None:
        path = folder / chosen
        return _shards(path) if chosen.endswith(".json") else [path]
    found = [name for name in names if name.endswith((".safetensors", *_PICKLED))]
    state = f"only {', '.join(found)} here" if found else "no weights"
    state = state if folder.is_dir() else "no such folder, expected one"
    raise UserError(
        f"{folder}: {state}; expected {DIFFUSERS_WEIGHTS} or {TRANSFORMERS_WEIGHTS} (or such a "
        "name with a variant, or .bin)"
    )


def choose_weights(folder: str | os.PathLike, names: Sequence[str]) -> str | None:
    """The file among `names` that a folder's weights are read from, an index first; None if none.

    UserError naming `folder` for several variants of which none is known to be better.
    """
    ranked = []
    for name in names:
        match = _WEIGHTS.fullmatch(name)
        if match is None:
            continue
        variant = match["index_variant"] or match["variant"] or ""
        order = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
        stem = ("diffusion_pytorch_model", "model", "pytorch_model").index(match["stem"])
        rank = (match["kind"] == "bin", order, stem, match["index"] is not None)
        ranked.append((rank, variant, name))
    if not ranked:
        return None
    rank, _, chosen = min(ranked)
    rivals = {variant for other, variant, _ in ranked if other[:2] == rank[:2]}
    if len(rivals) > 1:
        raise UserError(
            f"{folder}: weights of the variants {', '.join(sorted(rivals))}, and none without; "
            f"rename the file to be read to {_WEIGHTS.fullmatch(chosen)['stem']}.safetensors"
        )
    return chosen


def _shards(index: Path) -> list[Path]:
    mapping = take(read_json(index), "weight_map", dict[str, str], index)
    if not mapping:
        raise UserError(f"{index}: weight_map is empty")
    keys: dict[str, set[str]] = {}
    for name in sorted(set(mapping.values())):
        # A name alone: with a folder before it, it could be any file of this machine.
        if Path(name).name != name or Path(name).suffix not in (".safetensors", ".bin"):
            raise UserError(
                f"{index}: weight_map: {quoted(name)}, expected files of weights in its folder"
            )
        path = index.parent / name
        if not path.is_file():
            raise UserError(f"{path}: missing, though {index.name} lists it")
        if path.suffix == ".safetensors":
            with opened(path) as file:
                keys[name] = set(file.keys)
    for key, name in sorted(mapping.items()):
        if name in keys and key not in keys[name]:
            raise UserError(
                f"{index.parent / name}: key {quoted(key)} missing, though {index.name} puts it "
                "there"
            )
    return [index.parent / name for name in sorted(set(mapping.values()))]


def write_tensors(
    path: Path, tensors: dict[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file that torch libraries read, through a temporary file.

    Of a view the library writes the memory below it as it lies: here a view is copied first.
    """
    whole = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    with io.replacing(path) as temporary:
        save_file(whole, temporary, metadata={"format": "pt", **(metadata or {})})


def to_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same values.

    The safetensors library orders metadata at random, so its files, and the digests of what is
    made with them, differ from run to run. TypeError naming a tensor that is no float of 16 or 32
    bits.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset, payload = 0, []
    # The widest first, as the library has them, so that all lie at multiples of their own width.
    for name, value in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        if value.dtype.name not in _WRITTEN:
            raise TypeError(f"{name}: {value.dtype}, expected one of {', '.join(_WRITTEN)}")
        data = np.ascontiguousarray(value).tobytes()
        header[name] = {
            "dtype": _WRITTEN[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
        payload.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format aligns the data to 8 bytes with spaces.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(payload)


def digest(files: Sequence[Path], settings: Sequence[Path] = ()) -> str:
    """sha256 over the contents of these files, in this order, and of `settings`.

    Settings are files of configs and tokenizers beside the weights, or folders of them: the same
    weights under another schedule are another model.
    """
    small = [
        file
        for path in settings
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file() and file.suffix in (".json", ".txt", ".model")
    ]
    whole = hashlib.sha256()
    for value in file_digests_cached([*files, *small]):
        whole.update(bytes.fromhex(value))
    return whole.hexdigest()


def _download(name: str, revision: str, weights: bool) -> Path:
    """A snapshot of a hub repository, or the cached one where the hub cannot be reached."""
    at = {"revision": revision or None}

    def download() -> Path:
        info = huggingface_hub.HfApi().model_info(name, timeout=20, **at)
        wanted = _wanted(name, [file.rfilename for file in info.siblings or ()])
        if not weights:
            wanted = [file for file in wanted if file.endswith(_TEXT_FILES)]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, **at))

    return _of_hub(name, download, lambda: _cached(name, at))


def _of_hub(name: str, ask: Callable[[], T], otherwise: Callable[[], T | None]) -> T:
    """What the hub answers; what there is `otherwise` where it does not, or one UserError."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    # Its warnings about every retry would bury the one error below.
    logger.setLevel(logging.ERROR)
    try:
        return ask()
    except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError) as error:
        # Also what the hub answers for private and gated repositories without a token.
        reason = f"the hub does not show it ({type(error).__name__}); {_first_line(error)}"
    except (hub_errors.HTTPError, hub_errors.HFValidationError, OSError) as error:
        reason = f"the download failed ({_first_line(error)})"
        found = otherwise()
        if found is not None:
            return found
    finally:
        logger.setLevel(level)
    raise UserError(
        f"{name!r} is no local folder, and as a hub id it failed: {reason}. "
        "Give a local folder instead (one that has the files of that repository), "
        "for example one made by `hf download` on a machine with access"
    )


def _cached(name: str, at: dict) -> Path | None:
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True, **at))
    except (OSError, ValueError):
        return None


def _wanted(name: str, files: Sequence[str]) -> list[str]:
    """The files of a repository to download: per folder, the weights `weight_files` would take."""
    folders: dict[str, list[str]] = {}
    for file in files:
        folder, _, last = file.rpartition("/")
        if folder.split("/")[0] not in _SKIPPED_FOLDERS:
            folders.setdefault(folder, []).append(last)
    wanted, weights = [], 0
    for folder, names in folders.items():
        taken = [last for last in names if last.endswith(_TEXT_FILES)]
        chosen = choose_weights(f"{name}/{folder}", names)
        if chosen is not None:
            weights += 1
            taken += [chosen, *(_shard_names(chosen, names) if chosen.endswith(".json") else ())]
        wanted += [f"{folder}/{last}" if folder else last for last in set(taken)]
    if not weights:
        others = ", ".join([file for file in files if file.endswith(_PICKLED)][:3])
        only = f", only {others}" if others else ""
        raise UserError(
            f"{name!r}: the hub's repository has no {DIFFUSERS_WEIGHTS} and no "
            f"{TRANSFORMERS_WEIGHTS} (or such a name with a variant, or .bin){only}. "
            f"Name a revision that has them, if there is one ({name}@refs/pr/1, say), or convert"
        )
    return sorted(wanted)


def _shard_names(index: str, names: Sequence[str]) -> list[str]:
    """The names of an index's shards, which `weight_map` lists, before it can be read."""
    match = _WEIGHTS.fullmatch(index)
    stem, kind = match["stem"], match["kind"]
    variant = match["index_variant"] or match["variant"]
    shards = []
    for name in names:
        shard = _SHARD.fullmatch(name.removeprefix(stem)) if name.startswith(stem) else None
        if shard and (shard["variant"], shard["kind"]) == (variant, kind):
            shards.append(name)
    return shards


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
