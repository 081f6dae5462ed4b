"""Statistics and logits keep float32 where products are rounded to bfloat16 by default.

TPUs and recent GPUs do so; the tests' CPU does not, whatever it is told. So the programs are looked
at, under that default, and those of products that carry a figure must ask for full precision.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxsynth.quality import distances
from jaxsynth.robustness.corruptions import weather
from jaxsynth.robustness.corruptions.filters import gaussian_blur
from jaxsynth.robustness.metrics import calibration, ood, table
from jaxsynth.robustness.metrics.bootstrap import difference, evaluate, mean, quotient, ratio
from jaxsynth.robustness.metrics.corruption import corruption_figures
from jaxsynth.tasks import clip_predictions
from jaxsynth.weights.hf import load_clip

COUNT = 600
RNG = np.random.default_rng(0)
RIGHT, OTHER = RNG.random((2, COUNT)) < 0.7
WEIGHTS = jnp.asarray(RNG.integers(0, 5, COUNT), jnp.float32)
LOGITS = jnp.asarray(RNG.normal(size=(COUNT, 5)) * 3, jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, 5, COUNT))
FEATURES = RNG.normal(size=(COUNT, 16)).astype(np.float32)


@pytest.fixture(autouse=True)
def default_of_a_tpu():
    with jax.default_matmul_precision("bfloat16"):
        yield


def products(jaxpr):
    """Every matrix product and convolution of a program and of those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


def rounded(function, *arguments):
    """The products that do not ask for full precision, and how many there are."""
    found = list(products(jax.make_jaxpr(function)(*arguments).jaxpr))
    highest = jax.lax.Precision.HIGHEST
    return [x for x in found if x.params["precision"] not in (highest, (highest,) * 2)], len(found)


def _mce():
    rows = RNG.random((2, COUNT)) < 0.6
    made = [
        {
            "clean/logits": np.asarray(LOGITS), "clean/labels": np.asarray(LABELS),
            "corruption/fog/correct": x, "corruption/fog/severities": np.arange(1, 3),
        }
        for x in (rows, ~rows)
    ]  # fmt: skip
    return corruption_figures(made[0], RIGHT, paper=False, baseline=made[1])["mCE"]


FIGURES = {
    "mean": lambda: mean(RIGHT),
    "ratio": lambda: ratio(RIGHT & OTHER, OTHER),
    "difference": lambda: difference(mean(RIGHT), mean(OTHER)),
    "quotient": lambda: quotient(mean(RIGHT), mean(OTHER)),
    "mCE": _mce,
    "ECE": lambda: (
        table.figures({"clean/logits": LOGITS, "clean/labels": np.asarray(LABELS)})["ECE"].figure
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_and_their_resamples(name):
    figure = FIGURES[name]()
    for program in (figure, jax.grad(figure)):
        wrong, count = rounded(program, WEIGHTS)
        assert count and not wrong


def test_values_are_float64s():
    value = evaluate(difference(mean(RIGHT), mean(OTHER)), COUNT)
    assert value == pytest.approx(RIGHT.mean() - OTHER.mean(), abs=1e-6)
    weights = np.asarray(WEIGHTS, np.float64)
    expected = (weights * (RIGHT & OTHER)).sum() / (weights * OTHER).sum()
    assert float(ratio(RIGHT & OTHER, OTHER)(WEIGHTS)) == pytest.approx(expected, rel=1e-6)


VIM = ood.fit_vim(FEATURES, np.eye(16, 5), np.zeros(5))
GAUSSIANS = ood.fit_mahalanobis(FEATURES, np.asarray(LABELS), classes=5)
IMAGE = np.ones((32, 32, 3), np.float32)
PROGRAMS = {
    "reliability": (lambda x: calibration._diagram(x, LABELS, 15, False), LOGITS),
    "knn": (lambda x: ood._knn(ood.KNN(jnp.asarray(FEATURES)), x, 5), FEATURES),
    "vim": (lambda x: ood._vim(VIM, x, LOGITS), FEATURES),
    "mahalanobis": (lambda x: ood._mahalanobis(GAUSSIANS, x, relative=True), FEATURES),
    "distances": (lambda x: distances._squared(x, x), FEATURES),
    "blur": (lambda x: gaussian_blur(x, 2.0), IMAGE),
    "snow": (
        lambda x: weather.snow(x, weather.draw_snow(jax.random.key(0), (32, 32, 3)), 3), IMAGE
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_scores_and_corruptions(name):
    wrong, _ = rounded(*PROGRAMS[name])
    assert not wrong


def test_logits_of_a_clip_are_full_products_of_its_embeddings():
    """Its towers' products follow the default; the cosines, which are scaled by 100, do not."""
    clip = load_clip("tiny/clip")
    predict = clip_predictions.of_pixels(clip, clip.model, ["cat", "dog", "ship"])
    assert isinstance(predict, Partial)
    images = jnp.zeros((2, clip.image_size, clip.image_size, 3))
    found = list(products(jax.make_jaxpr(predict)(images).jaxpr))
    cosines = [x for x in found if x.outvars[0].aval.shape == (2, 3)]
    assert len(cosines) == 1
    highest = jax.lax.Precision.HIGHEST
    assert cosines[0].params["precision"] in (highest, (highest,) * 2)
