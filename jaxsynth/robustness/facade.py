"""Judge a classifier that is a function of images: metrics with intervals in one call."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from jaxsynth.data.dataset import Record
from jaxsynth.robustness import suite
from jaxsynth.robustness.attacks.evaluate import Attack
from jaxsynth.robustness.attacks.gradient import PAPER_EPS
from jaxsynth.robustness.checks import (
    as_array,
    check_function,
    check_images,
    check_labels,
    check_names,
    check_number,
    check_whole,
)
from jaxsynth.robustness.corruptions.predictions import Corruptions
from jaxsynth.robustness.corruptions.registry import SEVERITIES
from jaxsynth.robustness.metrics import table
from jaxsynth.robustness.metrics.bootstrap import Interval
from jaxsynth.robustness.metrics.details import ood_figures
from jaxsynth.robustness.predictors import Features

ATTACKS = ("FGSM", "PGD", "AutoAttack")
Images = Float[Array, "n h w 3"]
Labels = Int[Array, " n"]


def evaluate(
    predict: Callable[[Any], Any],
    images: Images,
    labels: Labels,
    *,
    shifted: Mapping[str, tuple[Images, Labels]] | None = None,
    ood: Mapping[str, Images] | None = None,
    corruptions: Sequence[str] = (),
    severities: Sequence[int] = SEVERITIES,
    attacks: Sequence[str] | Mapping[str, Attack] = (),
    eps: float = PAPER_EPS,
    features: Callable[[Any], Any] | None = None,
    training: tuple[Images, Labels] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    resamples: int = 2000,
) -> dict[str, Interval | None]:
    """Accuracy, calibration and robustness of a classifier, each with its 95 % interval.

    `predict` takes float32 pixels (b, h, w, 3) in [0, 1] and returns logits (b, classes); what
    normalisation the model needs is its own. A function of JAX operations is compiled; any other
    gets numpy arrays and may return numpy's or a torch tensor on the CPU. `images` are uint8 or in
    [0, 1], `labels` places among the logits.

    `shifted` sets add accuracy and ECE each, `ood` sets (of no class of the model's) AUROC and
    FPR95 by each score (also of features (b, d), where `features` and `training` images
    are given), `corruptions` (of `CORRUPTIONS`, or groups such as "imagenet_c") accuracy under
    each and R_cc, `attacks` (of `ATTACKS`, or functions by name) R_adv at radius `eps`: they need a
    `predict` of JAX operations, or `from_torch`. A metric is None where it is undefined, such as
    R_adv of a model that is never right. ValueError says which argument is not as it should be.
    """
    check_whole(seed, "seed", 0, 2**63 - 1)
    eps = check_number(eps, "eps")
    for name, changed, other, used in (
        ("eps", eps != PAPER_EPS, "attacks", attacks),
        ("severities", severities != SEVERITIES, "corruptions", corruptions),
    ):
        if changed and not used:
            raise ValueError(f"{name}: not used without {other}; leave it out, or give {other}")
    for name, given in (("shifted", shifted), ("ood", ood)):
        if not isinstance(given, Mapping | None):
            raise ValueError(f"{name}: expected sets by name, found {type(given).__name__}")
        if strange := [key for key in given or () if not isinstance(key, str) or not key]:
            raise ValueError(f"{name}: {strange[0]!r}: expected a name")
    key = jax.random.key(seed)
    sources = {"images": _source(images, labels, "images")}
    for name, given in (shifted or {}).items():
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise ValueError(f"shifted: {name!r}: expected (images, labels)")
        sources[name] = _source(*given, f"shifted {name}")
    strange = {name: _source(given, None, f"ood {name}") for name, given in (ood or {}).items()}
    clean = sources.pop("images")
    made, with_autoattack = _attacks(attacks)
    if (features is None) != (training is None):
        raise ValueError("features and training: expected both, the scores are fitted on training")
    known = None
    if features is not None and training is not None:
        if not isinstance(training, tuple | list) or len(training) != 2:
            raise ValueError("training: expected (images, labels)")
        check_function(features, "features")
        known = Features(features, _source(*training, "training"))
    answers = suite.answer(
        predict,
        suite.Sets(clean=clean, shifted=sources, ood=strange),
        key,
        preprocess=_as_it_is,
        attacks=made,
        eps=eps,
        with_autoattack=with_autoattack,
        corruptions=Corruptions(
            check_names(corruptions, "corruptions"), check_names(severities, "severities")
        ),
        features=known,
        batch_size=check_whole(batch_size, "batch_size", 1),
    )
    found = table.measure(answers, key, resamples=resamples)
    for name, scores in ood_figures(answers).items():
        for score, both in scores.items():
            for column, measured in zip(("AUROC", "FPR95"), both, strict=True):
                value = table.interval_of(measured, key, f"{column} {name} by {score}", resamples)
                found[f"{column} {name} by {score}"] = value
    return found


def from_torch(model: Any, *, channels_first: bool = True) -> Partial:
    """A torch module as a `predict` that JAX can differentiate, so that attacks take it.

    The module, or a function of tensors, gives logits, or an object that has `logits` as those of
    transformers do. It gets float32 (b, 3, h, w) in [0, 1] (or (b, h, w, 3)) where its parameters
    lie, in the mode that it is in: call `model.eval()` first. JAX calls it for values, and torch
    for gradients, so both are the module's own; each call copies the batch. Normalisation belongs
    into the module. The number of classes is asked for with the first batch.
    """
    import torch  # a user's own: the package does not need it

    def place(images: np.ndarray) -> "torch.Tensor":
        first = next(model.parameters(), None) if hasattr(model, "parameters") else None
        pixels = torch.from_numpy(np.array(images, np.float32))
        pixels = pixels.permute(0, 3, 1, 2) if channels_first else pixels
        return pixels if first is None else pixels.to(first.device)

    def logits_of(pixels: "torch.Tensor") -> "torch.Tensor":
        found = model(pixels)
        found = getattr(found, "logits", found)
        if not isinstance(found, torch.Tensor):
            raise ValueError(f"predict: the model gives {type(found).__name__}, expected logits")
        return found.float()

    def forward(images) -> np.ndarray:
        with torch.no_grad():
            return logits_of(place(images)).cpu().numpy()

    def backward(images, cotangents) -> np.ndarray:
        with torch.enable_grad():
            pixels = place(images).requires_grad_()
            logits = logits_of(pixels)
            weights = torch.from_numpy(np.array(cotangents, np.float32)).to(logits.device)
            (gradient,) = torch.autograd.grad((logits * weights).sum(), pixels)
        gradient = gradient.permute(0, 2, 3, 1) if channels_first else gradient
        return np.ascontiguousarray(gradient.float().cpu().numpy())

    classes: dict[tuple[int, ...], int] = {}

    def shape_of(images) -> jax.ShapeDtypeStruct:
        if images.shape[1:] not in classes:
            classes[images.shape[1:]] = forward(np.zeros((1, *images.shape[1:]))).shape[-1]
        return jax.ShapeDtypeStruct((len(images), classes[images.shape[1:]]), np.float32)

    @jax.custom_vjp
    def predict(images):
        return jax.pure_callback(forward, shape_of(images), images, vmap_method="sequential")

    def pull(images, cotangents):
        like = jax.ShapeDtypeStruct(images.shape, np.float32)
        return (jax.pure_callback(backward, like, images, cotangents, vmap_method="sequential"),)

    predict.defvjp(lambda images: (predict(images), images), pull)
    return Partial(predict)


@dataclass(frozen=True)
class _Images:
    """Arrays as a source."""

    images: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return Record(self.images[index], int(self.labels[index]), self.ids[index])

    def record_digests(self, indices: Sequence[int] | None = None) -> list[str]:
        rows = range(len(self)) if indices is None else indices
        return [hashlib.sha256(self.images[row].tobytes()).hexdigest() for row in rows]


def _source(images: Any, labels: Any, name: str) -> _Images:
    """ValueError for images that are neither 8 bits nor in [0, 1]; without labels all are 0."""
    found = np.asarray(as_array(images, name))
    if found.dtype != np.uint8:
        found = np.asarray(check_images(found, name))
    if found.ndim != 4 or found.shape[-1] != 3 or not len(found):
        raise ValueError(f"{name}: expected (images, height, width, 3), found {found.shape}")
    if labels is None:  # of no class of the model's
        labels = np.zeros(len(found), np.int32)
    # The classes are known when the model has answered: `suite.answer` checks the range.
    labels = np.asarray(check_labels(labels, len(found), np.iinfo(np.int32).max, f"{name}: labels"))
    return _Images(found, labels, tuple(f"{name} {i}" for i in range(len(found))))


def _as_it_is(image: np.ndarray) -> np.ndarray:
    return image if image.dtype == np.uint8 else np.clip(image, 0, 1)


def _attacks(asked: Sequence[str] | Mapping[str, Attack]) -> tuple[dict[str, Attack], bool]:
    if isinstance(asked, Mapping):
        for name, attack in asked.items():
            if not callable(attack):
                raise ValueError(
                    f"attacks: {name!r}: expected a function, found {type(attack).__name__}"
                )
        return dict(asked), False
    for name in check_names(asked, "attacks"):
        if name not in ATTACKS:
            raise ValueError(f"attacks: {name!r}: expected some of {', '.join(ATTACKS)}")
    made = suite.gradient_attacks()
    return {name: made[name] for name in asked if name in made}, "AutoAttack" in asked
