"""Folders of Hugging Face files: finding them, hub downloads, and streaming safetensors.

Tensors are read one at a time through numpy, so loading never holds a second copy of a network, and
pickled weights are never opened, because opening one runs code.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxsynth.core import io
from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"

# diffusers' and transformers' file names; half precision is only taken where it is all there is.
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"
_STEMS = ("diffusion_pytorch_model", "model")
_CANDIDATES = [
    name.format(stem)
    for half in (False, True)
    for stem in _STEMS
    for name in (
        ("{}.fp16.safetensors", "{}.fp16.safetensors.index.json", "{}.safetensors.index.fp16.json")
        if half
        else ("{}.safetensors", "{}.safetensors.index.json")
    )
]
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_WRITTEN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
# What a hub snapshot may hold besides the weights that `_wanted` picks.
_TEXT_FILES = (".json", ".txt")
_SKIPPED_FOLDERS = ("safety_checker", "feature_extractor", "image_encoder")


def resolve(name_or_path: str | os.PathLike) -> Path:
    """The local folder of a model: a folder, "tiny" or "tiny/clip", or a hub id.

    An existing folder is taken as it is; "tiny" and what is below it come with the package;
    anything else that looks like "owner/name" or "owner/name@revision" is downloaded (only
    safetensors, json and txt files) or found in the hub's cache. UserError if none of it works.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: is a file, expected a folder")
    if text == "tiny" or text.startswith("tiny/"):
        packaged = ASSETS / text
        if packaged.is_dir():
            return packaged
        raise UserError(f"{text!r}: not among the package's files (looked for {packaged})")
    if not text or text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
        raise UserError(f"{text!r}: no such folder, and not a hub id (owner/name)")
    return _download(*text.partition("@")[::2])


def write_json(path: str | os.PathLike, content: Any, *, indent: int | None = 2) -> None:
    """Write JSON, sorted by key where it is indented, through a temporary file."""
    io.write_json(path, content, indent=indent, sort_keys=indent is not None)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights, all shards of an index included.

    UserError if there are none (saying how to convert pickled ones) or if a shard is missing.
    """
    for name in _CANDIDATES:
        path = folder / name
        if not path.is_file():
            continue
        return _shards(path) if name.endswith(".json") else [path]
    pickled = sorted(file.name for file in folder.glob("*") if file.suffix in _PICKLED)
    if pickled:
        raise UserError(
            f"{folder}: only {', '.join(pickled)} here, and loading pickled weights runs code. "
            "Convert them once with the library that wrote them: "
            "`Model.from_pretrained(folder).save_pretrained(new_folder)` writes safetensors"
        )
    state = "no weights" if folder.is_dir() else "no such folder, expected one"
    raise UserError(f"{folder}: {state} ({DIFFUSERS_WEIGHTS} or {TRANSFORMERS_WEIGHTS})")


def _shards(index: Path) -> list[Path]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{index}: no weight_map")
    files = sorted({index.parent / name for name in mapping.values()})
    keys: set[str] = set()
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: missing, though {index.name} lists it")
        with opened(path) as handle:
            keys.update(handle.keys())
        listed = sorted(key for key, name in mapping.items() if index.parent / name == path)
        absent = [key for key in listed if key not in keys]
        if absent:
            raise UserError(f"{path}: key {absent[0]!r} missing, though {index.name} puts it there")
    return files


@contextmanager
def opened(path: Path):
    """A safetensors file, opened lazily; UserError if it is cut short or no safetensors at all."""
    try:
        with safe_open(path, framework="numpy") as handle:
            yield handle
    except SafetensorError as error:
        raise UserError(f"{path}: not a complete safetensors file: {error}") from None


def read_tensor(handle, path: Path, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor; UserError naming file and key if it is no float or its shape is not `shape`."""
    entry = handle.get_slice(key)
    found, dtype = tuple(entry.get_shape()), entry.get_dtype()
    if dtype not in _FLOATS:
        raise UserError(f"{path}: {key}: dtype {dtype}, expected one of {', '.join(_FLOATS)}")
    if found != tuple(shape):
        raise UserError(f"{path}: {key}: shape {found}, expected {tuple(shape)}")
    return handle.get_tensor(key)


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file that torch libraries read, through a temporary file."""
    with io.replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


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


def digest(files: Sequence[Path]) -> str:
    """sha256 over the contents of these files, in this order."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as handle:
            whole.update(hashlib.file_digest(handle, "sha256").digest())
    return whole.hexdigest()


def _download(name: str, revision: str) -> Path:
    """A snapshot of a hub repository, or the cached one where the hub cannot be reached."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    # Its warnings about every retry would bury the one error below.
    logger.setLevel(logging.ERROR)
    at = {"revision": revision or None}
    try:
        try:
            info = huggingface_hub.HfApi().model_info(name, timeout=20, **at)
            wanted = _wanted(name, [file.rfilename for file in info.siblings or ()])
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, **at))
        except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError) as error:
            # Also what the hub answers for private and gated repositories without a token.
            reason = f"the hub does not show it ({type(error).__name__}); {_first_line(error)}"
        except (hub_errors.HTTPError, hub_errors.HFValidationError, OSError) as error:
            reason = f"the download failed ({_first_line(error)})"
            cached = _cached(name, at)
            if cached is not None:
                return cached
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
    if not any(file.endswith(".safetensors") for file in files):
        pickled = ", ".join([file for file in files if file.endswith(_PICKLED)][:3])
        only = f", only {pickled}, and loading pickled weights runs code" if pickled else ""
        raise UserError(
            f"{name!r}: the hub's repository has no safetensors{only}. "
            f"Name a revision that has them, if there is one ({name}@refs/pr/1, say), or convert"
        )
    files = [file for file in files if file.split("/")[0] not in _SKIPPED_FOLDERS]
    wanted = [file for file in files if file.endswith(_TEXT_FILES)]
    for folder in {file.rpartition("/")[0] for file in files}:
        prefix = f"{folder}/" if folder else ""
        present = [name for name in _CANDIDATES if prefix + name in files]
        if present and present[0].endswith(".json"):
            stem = present[0].split(".")[0]
            half = ".fp16" in present[0]
            wanted += [
                file
                for file in files
                if file.startswith(f"{prefix}{stem}")
                and file.endswith(".safetensors")
                and ("fp16" in file) == half
            ]
        elif present:
            wanted.append(prefix + present[0])
    return sorted(wanted)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
