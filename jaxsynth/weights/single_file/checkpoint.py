"""Stable Diffusion 1.x, 2.x and XL in one file, as Civitai, A1111 and ComfyUI have them.

Such a file holds the networks' tensors under the original code's names (`original_names`), and
neither configs nor a tokenizer. What shapes tell is read from them (`shapes`); what all files of a
family share is in `families`. The rest comes, in this order, from the settings that a file written
here states in its metadata, and from a folder that is given behind an @
("model.safetensors@FOLDER"): a pipeline's, of which configs, scheduler and tokenizers are taken, or
one with a tokenizer alone. Keys that say how the networks were trained hold whatever a folder says.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxsynth.core.documents import parse_json, read_json, take
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.core.words import counted
from jaxsynth.weights import hub, recognize
from jaxsynth.weights.original_names import TEXT_PROJECTION, open_clip_name, unet_name, vae_name
from jaxsynth.weights.pipeline_parts import (
    REFINER,
    Tokenizing,
    paired,
    zeroes_empty,
)
from jaxsynth.weights.safetensors import opened
from jaxsynth.weights.single_file import families
from jaxsynth.weights.single_file.shapes import inferred
from jaxsynth.weights.tensors import PICKLED, SUFFIXES, Tensors
from jaxsynth.weights.tokenizer import Tokenizer
from jaxsynth.weights.torch_files.reader import read_nested

Read = Callable[[], np.ndarray]
# The entry of a file's metadata with what its tensors do not tell.
SETTINGS = "jaxsynth.settings"
PREDICTION = "modelspec.prediction_type"
# Keys without values that say how a network was trained: to velocities (arXiv 2202.00512), and with
# them on a schedule that ends in noise alone (arXiv 2305.08891), which is sampled from its end on.
VELOCITIES, ZERO_SNR = "v_pred", "ztsnr"
ZERO_SNR_SCHEDULE = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# In `SETTINGS` and in model_index.json, of SDXL.
ZEROES = "force_zeros_for_empty_prompt"
# Buffers of the original code, averages of the weights, and what only training needed.
_UNUSED = re.compile(
    r"model_ema\.|(first_stage_model\.)?loss\."
    r"|cond_stage_model\.(model\.)?(logit_scale|attn_mask|text_projection)$"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.)?text_projection(\.weight)?$"
    r"|conditioner\.embedders\.[01]\.(model\.)?(logit_scale|attn_mask)$"
    r"|(sqrt_|log_|posterior_|lvlb_)\w+$|(betas|alphas_cumprod|alphas_cumprod_prev|logvar)$"
    r"|(global_step|v_pred|ztsnr|scale_factor|denoiser\.sigmas)$|state_dict$"
)
# What ComfyUI knows networks by that were trained with the noise of EDM (arXiv 2206.00364).
_EDM = re.compile(r"edm_(mean|std|vpred\.sigma_m(ax|in))$")
_TOKENIZER = "openai/clip-vit-large-patch14"


def find_checkpoint(name_or_path: str | os.PathLike) -> "Checkpoint | None":
    """The checkpoint that a base names, FILE or FILE@FOLDER; None where it names no file.

    UserError for a file that is missing or is something else, which is named.
    """
    text = os.fspath(name_or_path)
    if Path(text).expanduser().is_file():
        return Checkpoint(Path(text).expanduser())
    name, _, folder = text.rpartition("@")
    if name and Path(name).expanduser().is_file():
        return Checkpoint(Path(name).expanduser(), folder)
    if Path(name or text).suffix in SUFFIXES and not Path(text).expanduser().exists():
        raise UserError(f"{name or text}: no such file")
    return None


class Checkpoint:
    """A file with a whole Stable Diffusion: `configs` by part, scheduler, tokenizer, tensors."""

    def __init__(self, path: Path, folder: str = ""):
        self.path = path
        self._tensors = _tensors_of(path)
        self.shapes = self._tensors.shapes()
        kind, key = recognize.kind_of(sorted(self.shapes))
        whole = "a checkpoint of whole networks in one file"
        if kind not in (whole, f"{whole} of SDXL"):
            what = recognize.said(kind) if kind else "holds nothing known here"
            hint = ""
            if kind.startswith("an adapter"):
                hint = "; with a base, adapters are for --adapter= and `jaxsynth convert`"
            raise UserError(
                f"{path}: {what}{f' ({key}, ...)' if key else ''}, expected as a base a checkpoint "
                f"of Stable Diffusion 1.x, 2.x or XL{hint}"
            )
        if families.is_refiner(self.shapes):
            raise UserError(f"{path}: {REFINER}")
        if found := next(filter(_EDM.match, sorted(self.shapes)), None):
            raise UserError(
                f"{path}: key {found!r} marks a network that was trained with the noise of EDM "
                "(CosXL, Playground 2.5), from which nothing is drawn here; expected SDXL itself"
            )
        self.family = families.family_of(self.shapes, xl=kind != whole)
        self._given = hub.resolve(folder, weights=False) if folder else None
        self._pipeline = self._pipeline_given()
        self.metadata: dict[str, str] = {}
        if path.suffix not in PICKLED:
            with opened(path) as file:
                self.metadata = file.metadata
        self.notes: list[str] = []
        if any(key.startswith("model_ema.") for key in self.shapes):
            self.notes.append("the weights are read, not their averages (model_ema)")
        where = f"{path}: metadata: {SETTINGS}"
        stated = parse_json(self.metadata.get(SETTINGS, "{}").encode(), where)
        names = (*self.family.parts, "scheduler")
        self._settings = {name: take(stated, name, dict[str, Any], where, {}) for name in names}
        self._zeroes = take(stated, ZEROES, bool, where, True)

    def _pipeline_given(self) -> Path | None:
        """The folder given where it is a pipeline's; UserError for one of another family."""
        given = self._given
        if given is None or not (given / "model_index.json").is_file():
            return None
        double = (given / "text_encoder_2").is_dir()
        if double != self.family.double:
            raise UserError(
                f"{given}: has {counted(1 + double, 'text encoder')}, but {self.path} is "
                f"{self.family.name}; expected behind the @ a folder of that"
            )
        return given

    @cached_property
    def configs(self) -> dict[str, Any]:
        """Of each network by part; UserError where shapes make no such network."""
        kinds = {part: config for part, (_, config) in self.family.parts.items()}
        if self._pipeline is not None:
            return {part: _config(self._pipeline, part, kind) for part, kind in kinds.items()}
        try:
            found = inferred(self.family, self.shapes, v_prediction=self.v_prediction)
            return {
                part: kinds[part].from_dict(fields | self._settings[part])
                for part, fields in found.items()
            }
        except KeyError as error:
            message = f"{self.path}: key {error.args[0]!r} is missing"
            raise UserError(f"{message}{self._way_out}") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path}: {error}{self._way_out}") from None

    @property
    def _way_out(self) -> str:
        xl = "XL" * self.family.double
        return (
            f"; where diffusers reads the file, StableDiffusion{xl}Pipeline.from_single_file(FILE)"
            ".save_pretrained(FOLDER) makes a folder that is read here"
        )

    @cached_property
    def v_prediction(self) -> bool:
        """Whether the network predicts velocities, as keys, metadata or the family say."""
        if VELOCITIES in self.shapes:  # put there for this; metadata may be of an earlier training
            return True
        stated = self.metadata.get(PREDICTION)
        if stated in ("v", "epsilon") or self.family is not families.SECOND:
            return stated == "v"
        step = self._value("global_step")
        return step is None or not np.any(step == 875000)  # 2-base, the only one without

    @property
    def _says_what_it_predicts(self) -> bool:
        return VELOCITIES in self.shapes or PREDICTION in self.metadata

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config, as the published pipelines have it."""
        if self._pipeline is not None:
            where = self._pipeline / "scheduler" / "scheduler_config.json"
            return self._marked(read_json(where), where)
        if stated := self._settings["scheduler"]:
            return stated
        kind = "v_prediction" if self.v_prediction else "epsilon"
        if self.family is families.SECOND and not self._says_what_it_predicts:
            self.notes.append(
                f"{kind} is assumed of a Stable Diffusion 2 that does not say; FILE@FOLDER takes "
                "another prediction_type from a pipeline's folder"
            )
        own = {"prediction_type": kind}
        betas = self._value("betas")
        if betas is not None and not np.allclose(betas, _betas(len(betas)), rtol=1e-3):
            own |= {"trained_betas": betas.tolist(), "num_train_timesteps": len(betas)}
        marks = self._marks(kind)
        usual = self.family.scheduler
        if self.family is families.FIRST and marks.keys() & ZERO_SNR_SCHEDULE:
            usual = families.SECOND.scheduler  # its own, PNDM, has no schedule that ends so
        return {**usual, **own, **marks}

    def _marks(self, kind: str) -> dict[str, Any]:
        """What keys say of the schedule; `kind` is what is predicted where they do not."""
        marks = {"prediction_type": "v_prediction"} if VELOCITIES in self.shapes else {}
        # Of noise alone the noise says nothing, so that the other key counts for velocities alone.
        ends = ZERO_SNR in self.shapes and marks.get("prediction_type", kind) == "v_prediction"
        return marks | (ZERO_SNR_SCHEDULE if ends else {})

    def _marked(self, config: dict[str, Any], where: Path) -> dict[str, Any]:
        """A folder's scheduler with what keys of the file say, which is noted where it differs."""
        marks = self._marks(config.get("prediction_type", "epsilon"))
        others = {name: x for name, x in marks.items() if config.get(name) != x}
        if not others:
            return config
        stated = ", ".join(f"{name} {value}" for name, value in others.items())
        keys = " and ".join(key for key in (VELOCITIES, ZERO_SNR) if key in self.shapes)
        self.notes.append(f"{stated}: so says the file by its {keys}, other than {where}")
        # What is listed there would count as not set.
        unset = [name for name in config.get("_use_default_values", ()) if name not in others]
        return {**config, **others, "_use_default_values": unset}

    @cached_property
    def tokenizer(self) -> Tokenizing:
        """CLIP's, from the folder given, from beside the file, or from the hub; both of SDXL.

        UserError naming the ways to give one, or one of another vocabulary than the text encoder's.
        """
        each = [
            self._tokenizer_of(part, folder)
            for part, folder in zip(self.family.texts, self._tokenizer_folders, strict=True)
        ]
        return paired(*each, self._tokenizer_folders[-1]) if self.family.double else each[0]

    def _tokenizer_of(self, part: str, folder: Path) -> Tokenizer:
        vocabulary = self.configs[part].vocab_size
        # OpenCLIP fills texts up with zeros, and "!" is the word of that number.
        own = "!" if part == self.family.open_clip else "<|endoftext|>"
        found = Tokenizer(folder, pad_token=own if self._pipeline is None else None)
        if found.vocab_size != vocabulary:
            raise UserError(
                f"{folder}: a tokenizer of {found.vocab_size} ids, but the "
                f"{part.replace('_', ' ')} of {self.path} has {vocabulary}; give its own as "
                f"{self.path}@FOLDER"
            )
        return found

    @cached_property
    def _tokenizer_folders(self) -> list[Path]:
        """One for each text encoder: SDXL's second differs in nothing but what fills texts up."""
        first = self._tokenizer_folder
        if not self.family.double:
            return [first]
        if self._pipeline is not None:
            return [first, self._pipeline / "tokenizer_2"]
        second = first.parent / "tokenizer_2"
        return [first, second if first.name == "tokenizer" and second.is_dir() else first]

    @cached_property
    def _tokenizer_folder(self) -> Path:
        beside = self.path.parent
        places = (beside / "tokenizer", beside)
        if self._given is not None:
            places = (self._given / "tokenizer", self._given)
        for place in places:
            if any((place / name).is_file() for name in ("vocab.json", "tokenizer.json")):
                return place
        if self._given is not None:
            raise UserError(f"{self._given}: no tokenizer in it, which {self.path} needs")
        try:
            return hub.resolve(_TOKENIZER, weights=False)
        except UserError as error:
            raise UserError(
                f"{self.path}: a checkpoint in one file has no tokenizer; lay CLIP's (vocab.json "
                "and merges.txt, from the folder tokenizer of any Stable Diffusion) into a folder "
                f"'tokenizer' beside it, or name its folder behind an @: {self.path}@FOLDER "
                f"({error}){self._way_out}"
            ) from None

    @property
    def zeroes_empty(self) -> bool:
        """Whether SDXL's pipeline takes zeros where no negative prompt is given."""
        if self._pipeline is None:
            return self.family.double and self._zeroes
        index = read_json(self._pipeline / "model_index.json")
        return zeroes_empty(self._pipeline, index, self.family.parts)

    @property
    def settings_files(self) -> list[Path]:
        """What is read beside the file."""
        given, found = self._pipeline, list(dict.fromkeys(self._tokenizer_folders))
        if given is not None:
            parts = self.family.parts
            found += [given / "scheduler", *(given / part / "config.json" for part in parts)]
            found += [given / "model_index.json"] * self.family.double
        return found

    def check(self) -> None:
        """UserError naming a key that is of no network here."""
        known = tuple(self.family.prefixes.values())
        for key in self.shapes:
            if not key.startswith(known) and not _UNUSED.match(key):
                raise UserError(f"{self.path}: unknown key {quoted(key)}, of none of its networks")

    def tensors(self, part: str, keys: Sequence[str]) -> Iterator[tuple[Path, str, Read]]:
        """The tensors of a part under `keys`, its network's.

        UserError for a U-Net or an autoencoder that the original code cannot have, or a key of
        theirs that is missing.
        """
        prefix, config = self.family.prefixes[part], self.configs[part]
        try:
            names = names_of(part, config, keys)
        except KeyError as error:
            raise UserError(f"{self.path}: no checkpoint in one file has {error}") from None
        missing = sorted(name for name in names if prefix + name not in self.shapes)
        if missing and part not in self.family.texts:
            raise UserError(f"{self.path}: key {prefix + missing[0]!r} is missing")
        for file, key, read in self._tensors.items():
            if key.startswith(prefix) and not _UNUSED.match(key):
                yield from self._named(part, file, key, read, names)

    def _named(
        self, part: str, file: Path, key: str, read: Read, names: Mapping[str, str]
    ) -> Iterator[tuple[Path, str, Read]]:
        name = key.removeprefix(self.family.prefixes[part])
        if part == self.family.open_clip:
            # The last layer of 2.x.
            unread = f".resblocks.{self.configs[part].num_hidden_layers}."
            if unread not in name:
                yield from _open_clip(file, name, read, names)
        elif part in self.family.texts:
            yield file, name, read
        else:
            # The autoencoder's attention is in 1x1 convolutions there, in linear layers here.
            flat = part == "vae" and ".attn_1." in name
            yield file, names.get(name, key), partial(_pointwise, read) if flat else read

    def _value(self, name: str) -> np.ndarray | None:
        if name not in self.shapes:
            return None
        return next(read() for _, key, read in self._tensors.items() if key == name)


def names_of(part: str, config: Any, keys: Iterable[str]) -> dict[str, str]:
    """The original code's names of a part's keys, without the part's prefix, with those keys.

    KeyError for a network that the original code cannot have.
    """
    found = {}
    for key in keys:
        if part == "unet":
            path, _, leaf = key.rpartition(".")
            name = f"{unet_name(path, config)}.{leaf}"
        elif part == "vae":
            name = vae_name(key, len(config.block_out_channels))
        else:
            name = open_clip_name(key)
        found[name] = key
    return found


def _config(folder: Path, part: str, kind: Any) -> Any:
    path = folder / part / "config.json"
    try:
        return kind.from_dict(read_json(path))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def _tensors_of(path: Path) -> Tensors:
    try:
        return Tensors([path])
    except UserError:
        if path.suffix in PICKLED and path.is_file():
            content = read_nested(path)
            for kind, found in (
                ("a hypernetwork (A1111)", any(type(key) is int for key in content)),
                ("an embedding (textual inversion)", "string_to_param" in content),
            ):
                if found:
                    raise UserError(f"{path}: is {kind}, expected as a base a checkpoint") from None
        raise


def _open_clip(
    file: Path, key: str, read: Read, names: Mapping[str, str]
) -> Iterator[tuple[Path, str, Read]]:
    head, fused, leaf = key.partition(".in_proj_")
    if not fused:
        turned = key == TEXT_PROJECTION
        yield file, names.get(key, key), partial(_transposed, read) if turned else read
        return
    for number, part in enumerate(("q_proj", "k_proj", "v_proj")):
        name = f"{head}.{part}.{leaf}"
        yield file, names.get(name, name), partial(_third, read, number)


def _transposed(read: Read) -> np.ndarray:
    return read().T


def _third(read: Read, number: int) -> np.ndarray:
    return np.split(read(), 3)[number]


def _pointwise(read: Read) -> np.ndarray:
    """A 1x1 convolution as the linear layer that it is."""
    value = read()
    return value[:, :, 0, 0] if value.ndim == 4 else value


def _betas(count: int) -> np.ndarray:
    ends = [families.SCHEDULE[name] ** 0.5 for name in ("beta_start", "beta_end")]
    return np.linspace(*ends, count) ** 2
