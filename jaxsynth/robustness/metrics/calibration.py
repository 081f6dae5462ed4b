"""Whether a classifier's confidence is its accuracy, from logits (n, c) and labels (n,).

- Expected calibration error, ECE (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599): the mean
  gap between confidence (the largest probability) and accuracy over bins of confidence, each bin
  weighted by its share. Bins are of equal width and right-closed, (low, high].
- Adaptive: bins of equal mass. Classwise: the ECE of each class's probability, averaged over the
  classes (Nixon et al. 2019, arXiv 1904.01685).
- Debiased: finite samples let even a calibrated model have gaps. For squared gaps that part is
  known and subtracted (Kumar et al. 2019, arXiv 1909.10155): the root of what is left.
- Negative log likelihood and Brier score, which also reward being right.
- One temperature for all logits (Guo et al.), fitted on validation images of the distribution that
  the model was trained on; the ECE after it, on shifted images too, tells how far one such number
  repairs the model.

`restrict` cuts the logits to the classes of a smaller set before any of it, as ImageNet-R and -A
with 200 of 1000 classes need it: confidence is then the probability among those. Every function
compiles once per shape and number of bins.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsynth.core.words import counted
from jaxsynth.robustness.checks import check_classes, check_labels, check_logits, check_whole

# The synthetic-clone study's (arXiv 2405.20469); 15 are Guo et al.'s and most libraries'.
PAPER_BINS = 20
# More are no diagram, and would only fill memory.
_MOST_BINS = 10_000
# Where the temperature is looked for: 1 / T in this range.
_INVERSE_TEMPERATURES = (1e-6, 1e6)


class Reliability(NamedTuple):
    """A reliability diagram: bins with `edges` (bins + 1,), each (low, high].

    `count` of images, their mean `confidence` and `accuracy`, both NaN where a bin is empty.
    """

    edges: Float[np.ndarray, " edges"]
    count: Int[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]
    accuracy: Float[np.ndarray, " bins"]


def restrict(
    logits: Float[Array, "n c"], labels: Int[Array, " n"], classes: Sequence[int]
) -> tuple[Float[Array, "n k"], Int[Array, " n"]]:
    """The logits of some classes only, and the labels' places among them.

    ValueError where a class is unknown or twice there, or where a label is none of them.
    """
    logits = check_logits(logits)
    labels = np.asarray(check_labels(labels, *logits.shape))
    classes = check_classes(classes, logits.shape[1])
    places = np.full(logits.shape[1], -1, np.int32)
    places[classes] = np.arange(len(classes))
    places = places[labels]
    if (places < 0).any():
        first = labels[np.argmax(places < 0)]
        raise ValueError(
            f"labels: {np.count_nonzero(places < 0)} of {len(labels)} are none of the "
            f"{counted(len(classes), 'class')}, the first is class {first}"
        )
    return logits[:, classes], jnp.asarray(places)


def expected_calibration_error(
    logits: Float[Array, "n c"], labels: Int[Array, " n"], *, bins: int = 15
) -> float:
    """ECE over bins of equal width, a fraction."""
    return float(_top_error(*_checked(logits, labels, bins), bins, mass=False))


def adaptive_calibration_error(
    logits: Float[Array, "n c"], labels: Int[Array, " n"], *, bins: int = 15
) -> float:
    """ECE over bins of equal mass, a fraction. Equal confidences share a bin."""
    return float(_top_error(*_checked(logits, labels, bins), bins, mass=True))


def debiased_calibration_error(
    logits: Float[Array, "n c"], labels: Int[Array, " n"], *, bins: int = 15
) -> float:
    """Root of the debiased mean squared gap over bins of equal mass; 0 where that is negative."""
    return float(_debiased(*_checked(logits, labels, bins), bins))


def classwise_calibration_error(
    logits: Float[Array, "n c"], labels: Int[Array, " n"], *, bins: int = 15
) -> float:
    """Mean over classes of the ECE of that class's probability, over bins of equal width."""
    return float(_classwise(*_checked(logits, labels, bins), bins))


def negative_log_likelihood(logits: Float[Array, "n c"], labels: Int[Array, " n"]) -> float:
    """Mean of -log p(label), in nats."""
    return float(_nll(*_checked(logits, labels)))


def brier_score(logits: Float[Array, "n c"], labels: Int[Array, " n"]) -> float:
    """Mean over images of the squared distance to the one-hot label: 0 to 2."""
    return float(_brier(*_checked(logits, labels)))


def reliability(
    logits: Float[Array, "n c"],
    labels: Int[Array, " n"],
    *,
    bins: int = 15,
    equal_mass: bool = False,
) -> Reliability:
    """What a reliability diagram draws."""
    logits, labels = _checked(logits, labels, bins)
    edges, count, confidence, right = map(np.asarray, _diagram(logits, labels, bins, equal_mass))
    with np.errstate(invalid="ignore"):
        return Reliability(edges, count.astype(np.int64), confidence / count, right / count)


def fit_temperature(logits: Float[Array, "n c"], labels: Int[Array, " n"]) -> float:
    """The T whose logits / T have the least negative log likelihood.

    The likelihood is concave in 1 / T, so its derivative is followed to the sign change. ValueError
    where there is none between T 1e-6 and 1e6: every image right, say, which any smaller
    temperature makes likelier.
    """
    inverse, ends = _fit_temperature(*_checked(logits, labels))
    if not ends[0] < 0 < ends[1]:
        raise ValueError(
            "temperature: the likelihood has no maximum between T 1e-6 and 1e6: fit it on images "
            "of which some are classified wrongly, and most rightly"
        )
    return 1 / float(inverse)


def summary(
    logits: Float[Array, "n c"],
    labels: Int[Array, " n"],
    *,
    bins: int = 15,
    temperature: float | None = None,
) -> dict[str, float]:
    """Every figure: "accuracy", "ece", "adaptive", "classwise", "debiased", "nll" and "brier".

    With a `temperature` (fitted on other images) also "ece_scaled" and "nll_scaled".
    """
    logits, labels = _checked(logits, labels, bins)
    found = {
        "accuracy": float((logits.argmax(1) == labels).mean()),
        "ece": expected_calibration_error(logits, labels, bins=bins),
        "adaptive": adaptive_calibration_error(logits, labels, bins=bins),
        "classwise": classwise_calibration_error(logits, labels, bins=bins),
        "debiased": debiased_calibration_error(logits, labels, bins=bins),
        "nll": negative_log_likelihood(logits, labels),
        "brier": brier_score(logits, labels),
    }
    if temperature is not None:
        scaled = logits / temperature
        found["ece_scaled"] = expected_calibration_error(scaled, labels, bins=bins)
        found["nll_scaled"] = negative_log_likelihood(scaled, labels)
    return found


def binned_error(
    confidence: Float[Array, " n"],
    correct: Bool[Array, " n"],
    edges: Float[Array, " edges"],
    weights: Float[Array, " n"] | None = None,
) -> Float[Array, ""]:
    """The ECE of confidences over given bins; traceable, and with a weight for each image.

    Whole numbers as weights are repetitions of images: what a bootstrap draws.
    """
    mass, signed = _sums(confidence, correct, edges, weights)
    return jnp.abs(signed).sum() / mass.sum()


def width_edges(bins: int) -> Float[np.ndarray, " edges"]:
    """Edges of `bins` bins of equal width over [0, 1]."""
    return (np.arange(bins + 1) / bins).astype(np.float32)


def mass_edges(values: Float[Array, " n"], bins: int) -> Float[Array, " edges"]:
    """Edges between `bins` bins of about the same number of `values`: their empirical quantiles."""
    count = len(values)
    places = np.minimum(np.linspace(0, count, bins + 1), count - 1)
    low = np.floor(places).astype(np.int32)
    share = jnp.asarray(places - low, jnp.float32)
    ordered = jnp.sort(values)
    return ordered[low] * (1 - share) + ordered[np.minimum(low + 1, count - 1)] * share


def _checked(logits, labels, bins: int = 1):
    check_whole(bins, "bins", 1, _MOST_BINS)
    logits = check_logits(logits)
    return logits, check_labels(labels, *logits.shape)


def _sums(confidence, correct, edges, weights):
    """Per bin, the weight of its images and the weighted sum of correct - confidence.

    Sums are products with the bins' one-hot rows, which round less than adding up one by one, and
    of the difference, whose bins do not cancel.
    """
    # The inner edges alone: what lies outside belongs to the first or the last bin.
    bins = jnp.searchsorted(edges[1:-1], confidence, side="left")
    members = jax.nn.one_hot(bins, len(edges) - 1, dtype=jnp.float32)
    weights = jnp.ones_like(confidence) if weights is None else weights
    rows = jnp.stack([weights, weights * (correct - confidence)])
    return jnp.matmul(rows, members, precision="highest")


def _top(logits, labels):
    """(confidence, correct): the largest probability, and whether its class is the label."""
    return jax.nn.softmax(logits).max(1), (logits.argmax(1) == labels).astype(jnp.float32)


@partial(jax.jit, static_argnums=(2,), static_argnames=("mass",))
def _top_error(logits, labels, bins, *, mass):
    confidence, correct = _top(logits, labels)
    edges = mass_edges(confidence, bins) if mass else jnp.asarray(width_edges(bins))
    return binned_error(confidence, correct, edges)


@partial(jax.jit, static_argnums=2)
def _debiased(logits, labels, bins):
    confidence, correct = _top(logits, labels)
    edges = mass_edges(confidence, bins)
    mass, signed = _sums(confidence, correct, edges, None)
    right, _ = _sums(confidence, correct, edges, correct)
    share = right / jnp.maximum(mass, 1)
    noise = share * (1 - share) / jnp.maximum(mass - 1, 1)
    # Of a single image nothing is known of the noise.
    squared = jnp.where(mass > 1, jnp.square(signed / jnp.maximum(mass, 1)) - noise, 0)
    return jnp.sqrt(jnp.maximum((mass * squared).sum() / mass.sum(), 0))


@partial(jax.jit, static_argnums=2)
def _classwise(logits, labels, bins):
    edges = jnp.asarray(width_edges(bins))

    def one(column):
        probability, index = column
        return binned_error(probability, (labels == index).astype(jnp.float32), edges)

    columns = jax.nn.softmax(logits).T, jnp.arange(logits.shape[1])
    return jax.lax.map(one, columns).mean()


@jax.jit
def _nll(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


@jax.jit
def _brier(logits, labels):
    wanted = jax.nn.one_hot(labels, logits.shape[1])
    return jnp.square(jax.nn.softmax(logits) - wanted).sum(1).mean()


@partial(jax.jit, static_argnums=(2, 3))
def _diagram(logits, labels, bins, equal_mass):
    confidence, correct = _top(logits, labels)
    edges = mass_edges(confidence, bins) if equal_mass else jnp.asarray(width_edges(bins))
    mass, signed = _sums(confidence, correct, edges, None)
    right, _ = _sums(confidence, correct, edges, correct)
    return edges, mass, right - signed, right


@jax.jit
def _fit_temperature(logits, labels):
    # Softmax does not change with a common shift, and the largest logit at 0 cannot overflow.
    logits = logits - logits.max(1, keepdims=True)
    at_label = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]

    def slope(log_inverse):
        """d NLL / d (1 / T), which rises with 1 / T."""
        probability = jax.nn.softmax(logits * jnp.exp(log_inverse))
        return ((probability * logits).sum(1) - at_label).mean()

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        rising = slope(middle) > 0
        return jnp.where(rising, low, middle), jnp.where(rising, middle, high)

    low, high = (jnp.float32(np.log(end)) for end in _INVERSE_TEMPERATURES)
    ends = slope(low), slope(high)
    low, high = jax.lax.fori_loop(0, 50, halve, (low, high))
    return jnp.exp((low + high) / 2), ends
