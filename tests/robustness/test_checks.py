"""What a person may give by mistake is taken, or refused in one line that says what to give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxsynth.robustness.attacks.apgd import apgd
from jaxsynth.robustness.attacks.autoattack import autoattack
from jaxsynth.robustness.attacks.evaluate import attacked
from jaxsynth.robustness.attacks.fab import fab
from jaxsynth.robustness.attacks.gradient import fgsm, pgd
from jaxsynth.robustness.attacks.square import square
from jaxsynth.robustness.corruptions.predictions import Corruptions
from jaxsynth.robustness.corruptions.registry import corrupt, corrupt_3d
from jaxsynth.robustness.metrics import calibration, ood
from jaxsynth.robustness.metrics.bootstrap import interval, mean, ratio
from jaxsynth.robustness.metrics.detection import detection

RNG = np.random.default_rng(0)
IMAGES = RNG.random((4, 16, 16, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3])
LOGITS = RNG.normal(size=(40, 4))
CLASSES = RNG.integers(0, 4, 40)


def predict(images):
    return jnp.asarray(images).mean((1, 2)) @ jnp.eye(3, 4)


ATTACKS = {
    "fgsm": fgsm, "pgd": pgd, "apgd": apgd, "fab": fab, "square": square, "autoattack": autoattack
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 8}, "eps: 8 is more than images in .0, 1. can move .* give 8 / 255"),
        ({"eps": np.inf}, "eps: expected finite numbers"),
        ({"eps": 30, "norm": "l2"}, r"eps: 30 is more than .* \(27.7128 in l2\)"),
        ({"key": 0}, r"key: found the number 0; give jax.random.key\(0\)"),
        ({"key": jax.random.PRNGKey(1)}, r"key: found a key of the old style \(uint32 \(2,\)\)"),
        ({"key": "seed"}, "key: expected a random key as of jax.random.key, found str"),
        ({"predict": lambda x: np.asarray(x).mean((1, 2))}, "predict: JAX cannot trace it"),
        ({"predict": lambda x: x}, r"predict: expected logits \(\d, classes\)"),
        ({"predict": LOGITS}, "predict: expected a function, found ndarray"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, r"images: expected .* shape \(0, 16"),
        ({"labels": ["cat", "dog", "cat", "dog"]}, "labels: expected integers, found <U3"),
    ],
)
def test_attacks_say_what_they_take(name, change, message):
    given = {
        "predict": predict, "images": IMAGES, "labels": LABELS, "key": jax.random.key(0), "eps": 0.1
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ATTACKS[name](**given | change)


def test_an_attack_of_many_batches_refuses_a_seed_too():
    with pytest.raises(ValueError, match="key: found the number 3"):
        attacked(pgd, predict, IMAGES, LABELS, 3, eps=0.1)
    with pytest.raises(ValueError, match=r"eps: expected one number .* found shape \(4,\)"):
        autoattack(predict, IMAGES, LABELS, jax.random.key(0), eps=np.full(4, 0.1))


@pytest.mark.parametrize("severity", [0, 6, 3.0, 2.5, True, "3", None])
def test_severities_are_whole_numbers(severity, key):
    message = f"expected a whole number, 1 to 5, found {severity!r}"
    with pytest.raises(ValueError, match=f"severity: {message}"):
        corrupt("contrast", IMAGES, severity, key)
    with pytest.raises(ValueError, match=f"severity: {message}"):
        corrupt_3d("flash", IMAGES, np.ones((4, 16, 16)), severity, key)
    with pytest.raises(ValueError, match=f"severities: {message}"):
        Corruptions(("contrast",), (severity,))


def test_corruptions_take_numpy_whole_numbers_and_lists_but_no_seed(key):
    found = corrupt("contrast", IMAGES, 3, key)
    np.testing.assert_array_equal(corrupt("contrast", IMAGES, np.int64(3), key), found)
    np.testing.assert_array_equal(corrupt("contrast", torch.tensor(IMAGES), 3, key), found)
    for seed, message in ((0, "key: found the number 0"), (jax.random.PRNGKey(0), "old style")):
        with pytest.raises(ValueError, match=message):
            corrupt("gaussian_noise", IMAGES, 3, seed)
    with pytest.raises(ValueError, match="key: found the number 0"):
        interval(mean(np.ones(9)), 9, 0)


METRICS = {
    "ece": calibration.expected_calibration_error,
    "adaptive": calibration.adaptive_calibration_error,
    "debiased": calibration.debiased_calibration_error,
    "classwise": calibration.classwise_calibration_error,
    "reliability": lambda *x, **options: calibration.reliability(*x, **options).count.sum(),
}


@pytest.mark.parametrize("name", METRICS)
def test_calibration_takes_lists_and_tensors_and_whole_bins(name):
    metric = METRICS[name]
    expected = metric(LOGITS, CLASSES)
    assert metric(LOGITS.tolist(), CLASSES.tolist()) == expected
    assert metric(torch.tensor(LOGITS), torch.tensor(CLASSES)) == expected
    assert metric(jnp.asarray(LOGITS), CLASSES.astype(np.uint8)) == expected
    for bins in (0, 2.5, 15.0, True, "15", 10**9):
        with pytest.raises(ValueError, match=f"bins: expected a whole number, 1 .* {bins!r}"):
            metric(LOGITS, CLASSES, bins=bins)
    for logits, labels, message in (
        ([[1.0, 2.0], [1.0]], CLASSES, "logits: list is no array"),
        (
            torch.tensor(LOGITS, requires_grad=True),
            CLASSES,
            "logits: .*Tensor is no array .*detach",
        ),
        (object(), CLASSES, "logits: object is no array of numbers"),
        (LOGITS, CLASSES.astype(str), "labels: expected integers, found <U"),
    ):
        with pytest.raises(ValueError, match=message):
            metric(logits, labels)


def test_scores_keep_the_precision_they_have():
    """Differences that float32 does not resolve, of probabilities near 1 and of log-likelihoods."""
    for middle, step in ((1.0, 1e-12), (1e6, 1e-4), (0.0, 1e-60)):
        low, high = middle + step * np.arange(20), middle + step * np.arange(20, 40)
        assert detection(high, low)["auroc"] == 1
        assert detection(low, high)["auroc"] == 0
        assert detection(low, low)["auroc"] == pytest.approx(0.5)
    assert detection([1e300, 2e300], [0.5e300])["fpr95_id"] == 0
    with pytest.raises(ValueError, match="id_scores: 1 of 2 rows hold NaN or infinity"):
        detection(np.array([np.inf, 1]), np.ones(2))
    with pytest.raises(ValueError, match="id_scores: expected numbers, found <U1"):
        detection(["a", "b"], [1.0])


@pytest.mark.parametrize(
    "score", [ood.max_softmax, ood.max_logit, ood.energy, ood.negative_entropy, ood.gen]
)
def test_scores_of_float64_logits_are_float64(score):
    """Two images whose logits differ by less than float32 tells apart."""
    logits = np.array([[7.0, 1.0, 0.5], [7.0 + 1e-12, 1.0, 0.5]])
    found = score(logits)
    assert found.dtype == np.float64 and found[0] < found[1]
    narrow = score(logits.astype(np.float32))
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, found, rtol=1e-5)
    assert score(logits.tolist()).dtype == np.float64


KEYS = jax.random.split(jax.random.key(0), 2)
FOUR, NINE = np.ones(4), np.ones(9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key: corrupt("contrast", IMAGES, 3, KEYS), r"key: expected one random .* \(2,\)"),
        (lambda key: corrupt("fog", IMAGES, 3, key, first=-1), "first: expected a whole number, 0"),
        (
            lambda key: ood.energy(LOGITS, temperature=0),
            "temperature: expected one num.* above 0",
        ),
        (lambda key: ood.energy(LOGITS, temperature=np.nan), "temperature: .* found nan"),
        (lambda key: ood.energy(LOGITS, temperature=FOUR), r"an array of shape \(4,\)"),
        (lambda key: ood.gen(LOGITS, gamma=-1), "gamma: expected one number, above 0, found -1"),
        (lambda key: ood.gen(LOGITS, top=0), "top: expected a whole number, 1 or more, found 0"),
        (lambda key: ratio(FOUR, NINE), r"below: expected shape \(4,\), one .* found \(9,\)"),
        (lambda key: mean(FOUR, NINE), r"among: expected shape \(4,\), one .* found \(9,\)"),
        (lambda key: interval(mean(FOUR), 9, key), "figure: it is none of 9 images"),
        (lambda key: interval(mean(FOUR), 0, key), "count: expected a whole number, 1 or more"),
        (lambda key: interval(mean(FOUR), 4, KEYS), "key: expected one random key"),
        (
            lambda key: attacked(
                lambda *args, **options: "x", predict, IMAGES, LABELS, key, eps=0.1
            ),
            r"attack: expected images \(4, 16, 16, 3\), made \(\)",
        ),
    ],
)
def test_numbers_and_keys_are_refused_by_name(key, call, message):
    with pytest.raises(ValueError, match=message):
        call(key)
