"""Stable Diffusion 1.x and 2.x in one file, as Civitai, A1111 and ComfyUI have them.

Such a file holds the networks' tensors under the original code's names (`original_names`), and
neither configs nor a tokenizer. What shapes tell is read from them; numbers of heads, groups and
the like are those of the published models, as all programs take them. The rest comes, in this
order, from the settings that a file written here states in its metadata, and from a folder that is
given behind an @ ("model.safetensors@FOLDER"): a pipeline's, of which configs, scheduler and
tokenizer are taken, or one with a tokenizer alone.
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxsynth.core.documents import parse_json, read_json, take
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.models.clip import CLIPTextConfig
from jaxsynth.models.diffusion.unet import UNet2DConditionConfig
from jaxsynth.models.diffusion.vae import AutoencoderKLConfig
from jaxsynth.weights import hub, recognize
from jaxsynth.weights.original_names import open_clip_name, unet_name, vae_name
from jaxsynth.weights.safetensors import opened
from jaxsynth.weights.tensors import PICKLED, SUFFIXES, Tensors
from jaxsynth.weights.tokenizer import Tokenizer
from jaxsynth.weights.torch_files.reader import read_nested

Read = Callable[[], np.ndarray]
CONFIGS = {
    "unet": UNet2DConditionConfig,
    "vae": AutoencoderKLConfig,
    "text_encoder": CLIPTextConfig,
}
UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
OPEN_CLIP, HF_CLIP = f"{CLIP}model.", f"{CLIP}transformer."
PREFIXES = {"unet": UNET, "vae": VAE, "text_encoder": CLIP}
# The entry of a file's metadata with what its tensors do not tell.
SETTINGS = "jaxsynth.settings"
PREDICTION = "modelspec.prediction_type"
# Buffers of the original code, averages of the weights, and what only training needed.
_UNUSED = re.compile(
    r"model_ema\.|(first_stage_model\.)?loss\.|cond_stage_model\.(model\.)?(logit_scale|attn_mask|text_projection)$"
    r"|cond_stage_model\.(transformer\.)?text_projection(\.weight)?$"
    r"|(sqrt_|log_|posterior_|lvlb_)\w+$|(betas|alphas_cumprod|alphas_cumprod_prev|logvar)$"
    r"|(global_step|v_pred|ztsnr|scale_factor)$|state_dict$"
)
_TOKENIZER = "openai/clip-vit-large-patch14"
_WAY_OUT = (
    "; where diffusers reads the file, StableDiffusionPipeline.from_single_file(FILE)"
    ".save_pretrained(FOLDER) makes a folder that is read here"
)
# The schedule of all published 1.x and 2.x models.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# Of the published models: channels of a head, and groups of a norm.
_HEAD, _GROUPS = 64, 32


def find(name_or_path: str | os.PathLike) -> "Checkpoint | None":
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


def read_config(folder: Path, part: str) -> Any:
    """The config of a network in a pipeline's folder; UserError naming its file."""
    path = folder / part / "config.json"
    try:
        return CONFIGS[part].from_dict(read_json(path))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


class Checkpoint:
    """A file with a whole Stable Diffusion: `configs` by part, scheduler, tokenizer, tensors."""

    def __init__(self, path: Path, folder: str = ""):
        self.path = path
        self._tensors = _tensors_of(path)
        self.shapes = self._tensors.shapes()
        kind, key = recognize.kind_of(sorted(self.shapes))
        if kind != "a checkpoint of whole networks in one file":
            what = recognize.said(kind) if kind else "holds nothing known here"
            hint = ""
            if kind.startswith("an adapter"):
                hint = "; with a base, adapters are for --adapter= and `jaxsynth convert`"
            elif kind.endswith("of SDXL"):
                hint = _WAY_OUT.replace("StableDiffusionP", "StableDiffusionXLP")
            raise UserError(
                f"{path}: {what}{f' ({key}, ...)' if key else ''}, expected as a base a checkpoint "
                f"of Stable Diffusion 1.x or 2.x{hint}"
            )
        self.open_clip = any(key.startswith(OPEN_CLIP) for key in self.shapes)
        self._given = hub.resolve(folder, weights=False) if folder else None
        self.metadata: dict[str, str] = {}
        if path.suffix not in PICKLED:
            with opened(path) as file:
                self.metadata = file.metadata
        self.notes: list[str] = []
        if any(key.startswith("model_ema.") for key in self.shapes):
            self.notes.append("the weights are read, not their averages (model_ema)")
        where = f"{path}: metadata: {SETTINGS}"
        stated = parse_json(self.metadata.get(SETTINGS, "{}").encode(), where)
        names = (*CONFIGS, "scheduler")
        self._settings = {name: take(stated, name, dict[str, Any], where, {}) for name in names}

    @cached_property
    def configs(self) -> dict[str, Any]:
        """Of `unet`, `vae` and `text_encoder`; UserError where shapes make no such network."""
        if self._is_pipeline:
            return {part: read_config(self._given, part) for part in CONFIGS}
        try:
            found = inferred(self.shapes, v_prediction=self.v_prediction)
            return {
                part: CONFIGS[part].from_dict(fields | self._settings[part])
                for part, fields in found.items()
            }
        except KeyError as error:
            raise UserError(f"{self.path}: key {error.args[0]!r} is missing{_WAY_OUT}") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path}: {error}{_WAY_OUT}") from None

    @property
    def _is_pipeline(self) -> bool:
        return self._given is not None and (self._given / "model_index.json").is_file()

    @cached_property
    def v_prediction(self) -> bool:
        """Whether the network predicts velocities, as metadata, keys or the family say."""
        stated = self.metadata.get(PREDICTION)
        if stated in ("v", "epsilon"):
            return stated == "v"
        if "v_pred" in self.shapes or not self.open_clip:
            return "v_pred" in self.shapes
        step = self._value("global_step")
        return step is None or not np.any(step == 875000)  # 2-base, the only one without

    @cached_property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's config, as the published pipelines have it."""
        if self._is_pipeline:
            return read_json(self._given / "scheduler" / "scheduler_config.json")
        if stated := self._settings["scheduler"]:
            return stated
        kind = "v_prediction" if self.v_prediction else "epsilon"
        if self.open_clip and PREDICTION not in self.metadata:
            self.notes.append(
                f"{kind} is assumed of a Stable Diffusion 2 that does not say; FILE@FOLDER takes "
                "another prediction_type from a pipeline's folder"
            )
        own = {"prediction_type": kind}
        betas = self._value("betas")
        if betas is not None and not np.allclose(betas, _betas(len(betas)), rtol=1e-3):
            own |= {"trained_betas": betas.tolist(), "num_train_timesteps": len(betas)}
        if self.open_clip:
            return {"_class_name": "DDIMScheduler", **SCHEDULE, **own}
        return {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **SCHEDULE, **own}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """CLIP's, from the folder given, from beside the file, or from the hub.

        UserError naming the ways to give one, or one of another vocabulary than the text encoder's.
        """
        vocabulary = self.configs["text_encoder"].vocab_size
        folder = self._tokenizer_folder
        # OpenCLIP fills texts up with zeros, and "!" is the word of that number.
        pad = None if self._is_pipeline else "!" if self.open_clip else "<|endoftext|>"
        found = Tokenizer(folder, pad_token=pad)
        if found.vocab_size != vocabulary:
            raise UserError(
                f"{folder}: a tokenizer of {found.vocab_size} ids, but the text encoder of "
                f"{self.path} has {vocabulary}; give its own as {self.path}@FOLDER"
            )
        return found

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
                f"({error}){_WAY_OUT}"
            ) from None

    @property
    def settings_files(self) -> list[Path]:
        """What is read beside the file."""
        given, found = self._given, [self._tokenizer_folder]
        if given is not None and self._is_pipeline:
            found += [given / "scheduler", *(given / part / "config.json" for part in CONFIGS)]
        return found

    def check(self) -> None:
        """UserError naming a key that is of no network here."""
        for key in self.shapes:
            if not key.startswith((UNET, VAE, CLIP)) and not _UNUSED.match(key):
                raise UserError(f"{self.path}: unknown key {quoted(key)}, of none of its networks")

    def tensors(self, part: str, keys: Sequence[str]) -> Iterator[tuple[Path, str, Read]]:
        """The tensors of a part under `keys`, its network's.

        UserError for a U-Net or an autoencoder that the original code cannot have, or a key of
        theirs that is missing.
        """
        prefix, config = PREFIXES[part], self.configs[part]
        try:
            names = names_of(part, config, keys)
        except KeyError as error:
            raise UserError(f"{self.path}: no checkpoint in one file has {error}") from None
        missing = sorted(names.keys() - _Shapes(self.shapes, prefix).keys())
        if missing and part != "text_encoder":
            raise UserError(f"{self.path}: key {prefix + missing[0]!r} is missing")
        for file, key, read in self._tensors.items():
            if key.startswith(prefix) and not _UNUSED.match(key):
                yield from self._named(part, file, key, read, names)

    def _named(
        self, part: str, file: Path, key: str, read: Read, names: Mapping[str, str]
    ) -> Iterator[tuple[Path, str, Read]]:
        name = key.removeprefix(PREFIXES[part])
        if key.startswith(OPEN_CLIP):
            name = key.removeprefix(OPEN_CLIP)
            unread = f".resblocks.{self.configs[part].num_hidden_layers}."
            if unread not in name:
                yield from _open_clip(file, name, read, names)
        elif part == "text_encoder":
            yield file, key.removeprefix(HF_CLIP), read
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


def inferred(
    shapes: Mapping[str, tuple[int, ...]], *, v_prediction: bool
) -> dict[str, dict[str, Any]]:
    """The fields of each part's config that the tensors' shapes and the published models tell.

    KeyError with a tensor that is missing, ValueError for a network of another kind.
    """
    side = 768 if v_prediction and any(key.startswith(OPEN_CLIP) for key in shapes) else 512
    vae = _vae(_Shapes(shapes, VAE), side)
    return {
        "unet": _unet(_Shapes(shapes, UNET), side // 2 ** (len(vae["block_out_channels"]) - 1)),
        "vae": vae,
        "text_encoder": _text(shapes),
    }


class _Shape(tuple):
    """A shape that names its tensor where it has too few axes."""

    key: str

    def __new__(cls, key: str, shape: tuple[int, ...]):
        made = super().__new__(cls, shape)
        made.key = key
        return made

    def __getitem__(self, axis):
        try:
            return super().__getitem__(axis)
        except IndexError:
            raise self._too_few() from None

    def pair(self) -> tuple[int, int]:
        """The two axes of a matrix."""
        if len(self) != 2:
            raise self._too_few()
        return self[0], self[1]

    def _too_few(self) -> ValueError:
        return ValueError(f"key {self.key!r} has shape {tuple(self)}, expected other axes")


class _Shapes(dict):
    """Shapes by key behind a prefix; errors have the whole key."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], prefix: str):
        self._prefix = prefix
        inside = {key: shape for key, shape in shapes.items() if key.startswith(prefix)}
        super().__init__({k.removeprefix(prefix): _Shape(k, v) for k, v in inside.items()})

    def __missing__(self, key: str) -> _Shape:
        raise KeyError(self._prefix + key)

    def count(self, pattern: str) -> int:
        """One more than the highest number that the pattern finds; 0 for none."""
        found = [re.match(pattern, key) for key in self]
        return max((int(match[1]) + 1 for match in found if match), default=0)


def _unet(shapes: _Shapes, side: int) -> dict[str, Any]:
    if any(key.startswith("label_emb") for key in shapes):
        raise ValueError("has label_emb, as unCLIP, SDXL and upscalers: expected a plain U-Net")
    widths, attends, counts, depths = [], [], [], []
    fresh = True
    for i in range(1, shapes.count(r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            fresh = True
            continue
        width = shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0]
        depth = shapes.count(rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.")
        if fresh:
            widths.append(width), attends.append(depth > 0), depths.append(depth), counts.append(0)
            fresh = False
        counts[-1] += 1
    if len(set(counts)) != 1:
        raise ValueError(f"has {counts} residual blocks by level, expected as many at each")
    first = next((key for key in sorted(shapes) if key.endswith("attn2.to_k.weight")), None)
    if first is None:
        raise ValueError("its U-Net attends to no text (attn2.to_k)")
    linear = len(shapes[first.partition("transformer_blocks")[0] + "proj_in.weight"]) == 2
    down = ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends]
    return {
        "sample_size": side,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "block_out_channels": widths,
        "layers_per_block": counts[0],
        "norm_num_groups": math.gcd(_GROUPS, *widths),
        "cross_attention_dim": shapes[first][1],
        "transformer_layers_per_block": max(depths),
        # Of one size where the transformers' ends are linear layers (2.x), else of one number.
        "attention_head_dim": [max(1, width // _HEAD) for width in widths] if linear else 8,
        "use_linear_projection": linear,
    }


def _vae(shapes: _Shapes, side: int) -> dict[str, Any]:
    levels = shapes.count(r"encoder\.down\.(\d+)\.")
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "norm_num_groups": math.gcd(_GROUPS, *widths),
        "layers_per_block": shapes.count(r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "sample_size": side,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }


def _text(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    if any(key.startswith(OPEN_CLIP) for key in shapes):
        found = _Shapes(shapes, OPEN_CLIP)
        layers = found.count(r"transformer\.resblocks\.(\d+)\.")
        # Of the whole tower, which has a projection, the networks read all layers but the last.
        whole = "text_projection" in found or layers == 24
        vocabulary, width = found["token_embedding.weight"].pair()
        length = found["positional_embedding"][0]
        inner, act = found["transformer.resblocks.0.mlp.c_fc.weight"][0], "gelu"
        layers -= whole
    else:
        found = _Shapes({k.replace("text_model.", ""): v for k, v in shapes.items()}, HF_CLIP)
        layers = found.count(r"encoder\.layers\.(\d+)\.")
        vocabulary, width = found["embeddings.token_embedding.weight"].pair()
        length = found["embeddings.position_embedding.weight"][0]
        inner, act = found["encoder.layers.0.mlp.fc1.weight"][0], "quick_gelu"
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // _HEAD),
        "max_position_embeddings": length,
        "hidden_act": act,
        "eos_token_id": vocabulary - 1,
    }


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
        yield file, names.get(key, key), read
        return
    for number, part in enumerate(("q_proj", "k_proj", "v_proj")):
        name = f"{head}.{part}.{leaf}"
        yield file, names.get(name, name), partial(_third, read, number)


def _third(read: Read, number: int) -> np.ndarray:
    return np.split(read(), 3)[number]


def _pointwise(read: Read) -> np.ndarray:
    """A 1x1 convolution as the linear layer that it is."""
    value = read()
    return value[:, :, 0, 0] if value.ndim == 4 else value


def _betas(count: int) -> np.ndarray:
    ends = SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5
    return np.linspace(*ends, count) ** 2
