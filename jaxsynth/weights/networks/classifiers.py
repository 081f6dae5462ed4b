"""Image classifiers from the checkpoints that people have, ready for `jaxsynth.robustness`.

`load_classifier` takes a folder (or hub id) in transformers' layout (config.json with `model_type`
and preprocessor_config.json) or timm's (config.json with `architecture` and `pretrained_cfg`), or a
ResNet's weights alone, and a linear head in a file of its own where the network has none (DINOv2,
MAE, SigLIP). Reading is strict both ways, and the preprocessing is the checkpoint's own or an
error.

    classifier = load_classifier("facebook/deit-base-patch16-224")
    logits = classifier.predict(images)  # (n, 224, 224, 3) in [0, 1]
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array

from jaxsynth.core.documents import read_json, take
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.core.words import counted
from jaxsynth.models.classifiers.convnext import ConvNextConfig, ConvNextForImageClassification
from jaxsynth.models.classifiers.dinov2 import (
    HEAD_LAYERS,
    Dinov2Config,
    Dinov2ForImageClassification,
)
from jaxsynth.models.classifiers.resnet import REDUCTION, ResNetConfig, ResNetForImageClassification
from jaxsynth.models.classifiers.siglip import (
    SiglipClassifierConfig,
    SiglipForImageClassification,
)
from jaxsynth.models.classifiers.swin import SwinConfig, SwinForImageClassification
from jaxsynth.models.classifiers.vit import ViTConfig, ViTForImageClassification
from jaxsynth.weights import hub, preprocessing
from jaxsynth.weights.checks import check_counts
from jaxsynth.weights.hub import resolve
from jaxsynth.weights.layout import Filling, keys_of, to_file
from jaxsynth.weights.models import describe_of
from jaxsynth.weights.networks import timm
from jaxsynth.weights.networks.heads import LinearHead
from jaxsynth.weights.preprocessing import Preprocessing
from jaxsynth.weights.siglip import check_fixed
from jaxsynth.weights.tensors import PICKLED, Tensors, expect_floats

_NETWORKS: dict[str, tuple[type[nnx.Module], Any]] = {
    "convnext": (ConvNextForImageClassification, ConvNextConfig),
    "deit": (ViTForImageClassification, ViTConfig),
    "dinov2": (Dinov2ForImageClassification, Dinov2Config),
    "dinov2_with_registers": (Dinov2ForImageClassification, Dinov2Config),
    "resnet": (ResNetForImageClassification, ResNetConfig),
    "siglip": (SiglipForImageClassification, SiglipClassifierConfig),
    "siglip_vision_model": (SiglipForImageClassification, SiglipClassifierConfig),
    "swin": (SwinForImageClassification, SwinConfig),
    "vit": (ViTForImageClassification, ViTConfig),
    "vit_mae": (ViTForImageClassification, ViTConfig),
}
_WITH_HEAD, _DISTILLED = "ForImageClassification", "ForImageClassificationWithTeacher"
# In transformers' files, but not part of a classifier: a decoder or pooler of other tasks, the
# token of masked patches, and buffers.
_UNUSED = re.compile(
    r"decoder\..*|mask_token|(.*\.)?embeddings\.mask_token|(\w+\.)?pooler\.dense\.(weight|bias)"
    r"|.*\.(num_batches_tracked|relative_position_index)"
)
_CLASSIFIER = re.compile(r"(cls_|distillation_)?classifier\.(1\.)?(weight|bias)")
_LISTED = 8
_LABELS = dict[str, str] | list[str] | None


@dataclass(frozen=True)
class Classifier:
    """A network with its head, and what its images need.

    class_names is () where the checkpoint does not tell them. digest is the sha256 of the files
    that the weights came from.
    """

    model: nnx.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()
    folder: Path | None = None
    digest: str = ""

    @property
    def image_size(self) -> int:
        return self.preprocessing.image_size

    @property
    def num_classes(self) -> int:
        return self.model.config.num_labels

    @cached_property
    def predict(self) -> Partial:
        """A function of images (b, size, size, 3) in [0, 1] to float32 logits (b, num_classes).

        The normalisation is inside, and the weights are its arguments: differentiable, and as
        `jaxsynth.robustness` wants it.
        """
        mean, std = (jnp.asarray(x) for x in (self.preprocessing.mean, self.preprocessing.std))
        return Partial(_predict, self.model, mean, std)


def _predict(model: nnx.Module, mean: Array, std: Array, images: Array) -> Array:
    return model((images - mean) / std).astype(jnp.float32)


def load_classifier(
    path: str | os.PathLike,
    head: str | os.PathLike | None = None,
    *,
    preprocess: Preprocessing | None = None,
    headless: bool = False,
) -> Classifier:
    """A classifier from a folder, a hub id, or a file of a ResNet's weights in torchvision's names.

    head: a .safetensors, .pth or .pt file with a linear layer (`weight`, `bias`), before which a
    batch norm's `running_mean` and `running_var` may stand; it takes the place of the checkpoint's
    own. Its width says what it reads of DINOv2. preprocess: takes the place of the checkpoint's
    own, or of what it lacks. headless: a network without a head is taken as well, which tells no
    classes apart before it gets one (`tasks.networks.started`). Weights are float32. UserError
    naming the file for unknown or missing keys (all of them), a shape or config field that does not
    fit, or preprocessing that is nowhere told.
    """
    given = Path(path).expanduser()
    linear = None if head is None else LinearHead.read(Path(head).expanduser())
    if given.is_file():
        return _from_file(given, linear, preprocess, headless)
    folder = resolve(path)
    config_path = folder / "config.json"
    config = read_json(config_path)
    weights = Tensors(_weight_files(folder))
    if "architecture" in config:
        return _from_timm(config_path, config, weights, linear, preprocess, headless)
    return _from_transformers(config_path, config, weights, linear, preprocess, headless)


def save_classifier(classifier: Classifier, folder: str | os.PathLike) -> None:
    """Write a folder that `load_classifier` and transformers load.

    ValueError for a network that transformers does not have: DeiT III's layer scale, CLIP's norm
    before the blocks, a head without bias, one that reads other tokens of DINOv2, or what SigLIP
    pools by attention.
    """
    folder = Path(folder)
    config = classifier.model.config
    fields = dataclasses.asdict(config)
    for name, usual in (
        ("layer_scale", False),
        ("pre_norm", False),
        ("head_bias", True),
        ("head_layers", 1),
        ("vision_use_head", False),
    ):
        if fields.pop(name, usual) != usual:
            raise ValueError(
                f"save_classifier: transformers' {config.model_type} has no {name} other than "
                f"{usual}"
            )
    count, distilled = fields.pop("num_labels"), fields.pop("distilled", False)
    # MAE's encoder with a head is a ViT.
    fields["model_type"] = "vit" if config.model_type == "vit_mae" else config.model_type
    if config.model_type == "convnext":
        fields["num_stages"] = len(config.depths)
    if isinstance(config, SiglipClassifierConfig):
        tower = {**fields, "model_type": "siglip_vision_model", "vision_use_head": False}
        fields = {"model_type": "siglip", "vision_config": tower}
    kind = _ARCHITECTURES[fields["model_type"]] + (_DISTILLED if distilled else _WITH_HEAD)
    names = classifier.class_names or tuple(f"LABEL_{i}" for i in range(count))
    labels = {str(i): name for i, name in enumerate(names)}
    tensors = to_file(classifier.model)
    for key in [key for key in tensors if key.endswith("running_mean")]:
        # How many batches torch's batch norm has seen.
        counter = key.removesuffix("running_mean") + "num_batches_tracked"
        tensors[counter] = np.zeros((), np.int64)
    folder.mkdir(parents=True, exist_ok=True)
    hub.write_tensors(folder / hub.TRANSFORMERS_WEIGHTS, tensors)
    hub.write_json(folder / "config.json", {"architectures": [kind], "id2label": labels, **fields})
    hub.write_json(
        folder / preprocessing.PREPROCESSOR, preprocessing.to_transformers(classifier.preprocessing)
    )


_ARCHITECTURES = {
    "convnext": "ConvNext",
    "deit": "DeiT",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
    "resnet": "ResNet",
    "siglip": "Siglip",
    "swin": "Swin",
    "vit": "ViT",
}


def _weight_files(folder: Path) -> list[Path]:
    """Safetensors, or else a single .pth or .pt file, which is read without running it."""
    pickled = sorted(file for file in folder.glob("*") if file.suffix in PICKLED)
    if len(pickled) == 1 and not list(folder.glob("*.safetensors*")):
        return pickled
    return hub.weight_files(folder)


def _from_transformers(
    path: Path,
    config: dict[str, Any],
    weights: Tensors,
    head: LinearHead | None,
    preprocess: Preprocessing | None,
    headless: bool,
) -> Classifier:
    kind = take(config, "model_type", str, path, "")
    check_fixed(path, kind)
    if kind not in _NETWORKS:
        raise UserError(
            f"{path}: model_type {quoted(kind)}, expected one of {', '.join(sorted(_NETWORKS))}, "
            "or a timm architecture"
        )
    network, config_cls = _NETWORKS[kind]
    architecture = [*(take(config, "architectures", list[str] | None, path, None) or []), ""][0]
    labels = take(config, "id2label", dict[str, str] | None, path, None)
    own = architecture.endswith((_WITH_HEAD, _DISTILLED))
    names = _class_names(path, labels) if own else ()
    fields = dict(config)
    # A classifier without a table of labels has transformers' default of two.
    fields["num_labels"] = len(labels or "ab") if own else 0
    if architecture.endswith(_DISTILLED):
        fields["distilled"] = True
    try:
        made = config_cls.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    made = _with_head(made, head, path, headless)
    check_counts(path, made, *weights.counts())
    model = _fill(describe_of(path, network, made), weights, _renamer(made, head), head)
    own_path = path.parent / preprocessing.PREPROCESSOR
    if preprocess is None:
        if not own_path.is_file():
            raise UserError(
                f"{own_path}: missing: it tells size, crop, interpolation, mean and std, which are "
                "not guessed; add it, or give the preprocessing"
            )
        preprocess = preprocessing.from_transformers(own_path)
    return _made(model, preprocess, names, path.parent, weights, head)


def _from_timm(
    path: Path,
    config: dict[str, Any],
    weights: Tensors,
    head: LinearHead | None,
    preprocess: Preprocessing | None,
    headless: bool,
) -> Classifier:
    # Files before timm 0.9 have its fields at the top.
    pretrained = {**config, **take(config, "pretrained_cfg", dict, path, {})}
    shape = take(pretrained, "input_size", tuple[int, int, int] | None, path, None)
    size = (shape or (3, 224, 224))[1]
    found = timm.describe(path, config, size, weights.keys)
    made = _with_head(found.config, head, path, headless)
    if isinstance(made, Dinov2Config) and head is None:
        # timm's classifiers read the class token alone.
        made = dataclasses.replace(made, head_layers=0)
    check_counts(path, made, *weights.counts())
    model = _fill(
        describe_of(path, found.network, made),
        weights,
        _without_head(found.rename) if head else found.rename,
        head,
        padded=found.padded,
    )
    preprocess = preprocess or preprocessing.from_timm(path, pretrained)
    names = take({**pretrained, **config}, "label_names", _LABELS, path, None)
    names = names or take(pretrained, "label_names", _LABELS, path, None)
    if isinstance(names, dict):
        names = _class_names(path, names)
    return _made(model, preprocess, tuple(names or ()), path.parent, weights, head)


def _from_file(
    path: Path, head: LinearHead | None, preprocess: Preprocessing | None, headless: bool
) -> Classifier:
    """A ResNet whose shape its tensors tell."""
    if preprocess is None:
        raise UserError(
            f"{path}: a file of weights does not tell size, crop, interpolation, mean and std, "
            "which are not guessed; give the preprocessing"
        )
    weights = Tensors([path])
    shapes = {key: read().shape for _, key, read in weights.items()}
    config = _resnet_shape(path, shapes)
    made = _with_head(config, head, path, headless)
    rename = _without_head(timm.rename_resnet) if head else timm.rename_resnet
    model = _fill(describe_of(path, ResNetForImageClassification, made), weights, rename, head)
    return _made(model, preprocess, (), path, weights, head)


def _resnet_shape(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> ResNetConfig:
    if "conv1.weight" not in shapes or "layer1.0.conv1.weight" not in shapes:
        raise UserError(
            f"{path}: no ResNet in torchvision's names (it begins with "
            f"{', '.join(list(shapes)[:3])}); for another network put the file into a folder with "
            "its config.json"
        )
    bottleneck = "layer1.0.conv3.weight" in shapes
    widths, depths = [], []
    while f"layer{len(widths) + 1}.0.conv1.weight" in shapes:
        stage = f"layer{len(widths) + 1}"
        depth = 0
        while f"{stage}.{depth}.conv1.weight" in shapes:
            depth += 1
        depths.append(depth)
        widths.append(shapes[f"{stage}.0.conv{3 if bottleneck else 2}.weight"][0])
        inner = shapes[f"{stage}.0.conv1.weight"][0]
        if bottleneck and inner * REDUCTION != widths[-1]:
            raise UserError(
                f"{path}: {stage}: {inner} inner of {widths[-1]} channels, expected a quarter "
                "(wide and grouped residual networks are not supported)"
            )
    return ResNetConfig(
        embedding_size=shapes["conv1.weight"][0],
        hidden_sizes=tuple(widths),
        depths=tuple(depths),
        layer_type="bottleneck" if bottleneck else "basic",
        num_labels=shapes.get("fc.weight", (0,))[0],
        head_bias="fc.bias" in shapes or "fc.weight" not in shapes,
    )


def _with_head(config: Any, head: LinearHead | None, path: Path, headless: bool) -> Any:
    """The config with the classes of a separate head, and what it reads; UserError if neither."""
    if head is None:
        if not config.num_labels and not headless:
            raise UserError(f"{path}: a {config.model_type} without a classifier: give its head")
        return config
    changes: dict[str, Any] = {"num_labels": head.classes}
    if getattr(config, "distilled", False):
        raise UserError(f"{path}: a distilled DeiT has two heads, {head.path} is one")
    width = head.weight.shape[1]
    if isinstance(config, Dinov2Config):
        times, left = divmod(width, config.hidden_size)
        if left or times not in HEAD_LAYERS:
            raise UserError(
                f"{head.path}: weight reads {width} features, expected 1, 2 or 5 times "
                f"{config.hidden_size}, the hidden size of {path}"
            )
        changes["head_layers"] = HEAD_LAYERS[times]
    if isinstance(config, ResNetConfig):
        changes["head_bias"] = True
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        raise UserError(f"{head.path}: {error}") from None


def _renamer(config: Any, head: LinearHead | None) -> timm.Rename:
    """Names of transformers' keys: a base model alone has no prefix."""
    prefix = getattr(config, "prefix", config.model_type)
    unused = re.compile(f"{_UNUSED.pattern}|{getattr(config, 'left_out', '(?!)')}")

    def rename(key: str) -> tuple[str, ...]:
        if unused.fullmatch(key) or (head and _CLASSIFIER.fullmatch(key)):
            return ()
        if key.startswith(f"{prefix}.") or _CLASSIFIER.fullmatch(key):
            return (key,)
        return (f"{prefix}.{key}",)

    return rename


def _without_head(rename: timm.Rename) -> timm.Rename:
    """Leaves the checkpoint's own head out."""
    return lambda key: tuple(n for n in rename(key) if not _CLASSIFIER.fullmatch(n))


def _fill(
    abstract: nnx.Module,
    weights: Tensors,
    rename: timm.Rename,
    head: LinearHead | None,
    *,
    padded: str = "",
) -> nnx.Module:
    """The network with the values of `weights` and `head`; UserError for keys too many or too few.

    `padded` is the key whose tensor may lack rows before the first, which are then zero.
    """
    expected = {name for keys in keys_of(abstract).values() for name in keys.names}
    of_head = {name for name in expected if head and _CLASSIFIER.fullmatch(name)}
    names = {key: rename(key) for key in weights.keys}
    unexpected = sorted(key for key, found in names.items() if not expected.issuperset(found))
    missing = sorted(expected - of_head - {name for found in names.values() for name in found})
    if unexpected or missing:
        kinds = (("unexpected", unexpected), ("missing", missing))
        told = "; ".join(f"{kind} {_listed(keys)}" for kind, keys in kinds if keys)
        raise UserError(f"{weights.where}: does not fit the network: {told}")
    filling = Filling(abstract, jnp.float32)
    for path, key, read in weights.items():
        for number, name in enumerate(names[key]):
            count, pad = len(names[key]), key == padded

            def tensor(shape, path=path, key=key, read=read, number=number, count=count, pad=pad):
                return _part(path, key, read(), shape, number, count, pad)

            filling.put(path, name, tensor)
    for name in sorted(of_head):
        value = head.weight if name.endswith("weight") else head.bias
        filling.put(
            head.path, name, lambda shape, v=value, n=name: _part(head.path, n, v, shape, 0, 1)
        )
    return filling.finish(weights.where)


def _part(
    path: Path,
    key: str,
    value: np.ndarray,
    shape: tuple[int, ...],
    number: int,
    count: int,
    pad: bool = False,
) -> np.ndarray:
    """Part `number` of `count` along the first axis, of `shape`; UserError if it is another."""
    if pad and value.ndim == 3 and 0 < shape[1] - value.shape[1] <= 2:
        value = np.pad(value, ((0, 0), (shape[1] - value.shape[1], 0), (0, 0)))
    whole = (count * shape[0], *shape[1:]) if shape else shape
    value = expect_floats(path, key, value, whole)
    return value if count == 1 else np.split(value, count)[number]


def _made(
    model: nnx.Module,
    preprocess: Preprocessing,
    names: tuple[str, ...],
    folder: Path,
    weights: Tensors,
    head: LinearHead | None,
) -> Classifier:
    config: Any = model.config
    fixed = isinstance(config, ViTConfig | SwinConfig | SiglipClassifierConfig)
    if fixed and config.image_size != preprocess.image_size:
        raise UserError(
            f"{folder}: the preprocessing gives {preprocess.image_size} pixels a side, the network "
            f"takes {config.image_size}"
        )
    if head is not None:
        names = ()
    if names and len(names) != config.num_labels:
        raise UserError(
            f"{folder}: {counted(len(names), 'class name')} for "
            f"{counted(config.num_labels, 'class')}"
        )
    paths = [*weights.paths, *([head.path] if head else [])]
    return Classifier(model, preprocess, names, folder, hub.digest(paths))


def _class_names(path: Path, labels: Mapping[str, str] | None) -> tuple[str, ...]:
    """The names by index; () where they are transformers' placeholders or there are none."""
    if not labels:
        return ()
    if wrong := [index for index in labels if not (index.isascii() and index.isdecimal())]:
        raise UserError(f"{path}: labels: {quoted(wrong[0])}, expected an index")
    by_index = {int(index[:9]): str(name) for index, name in labels.items()}
    if sorted(by_index) != list(range(len(by_index))):
        raise UserError(f"{path}: labels: expected the indices 0 to {len(by_index) - 1}")
    names = tuple(by_index[i] for i in range(len(by_index)))
    placeholders = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return () if placeholders else names


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return f"{len(keys)} ({', '.join(keys[:_LISTED])}{more})"
