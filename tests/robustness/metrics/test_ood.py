"""Detection figures against scikit-learn, scores against NumPy in float64."""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax
from sklearn import metrics
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors

from jaxsynth.robustness.metrics import ood
from jaxsynth.robustness.metrics.detection import detection, weighted_detection

DIM, CLASSES = 12, 4


def scored(seed=0, *, levels=0):
    """Overlapping scores of 300 ID and 200 OOD images; `levels` rounds them, which makes ties."""
    rng = np.random.default_rng(seed)
    one, other = rng.normal(1, 1, 300), rng.normal(0, 1.2, 200)
    if levels:
        one, other = (np.round(x * levels) / levels for x in (one, other))
    return one.astype(np.float32), other.astype(np.float32)


def fpr_at_95(positive, negative):
    truth = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    scores = np.r_[positive, negative]
    fpr, tpr, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
    return fpr[np.argmax(tpr >= 0.95)]


def fpr_at_the_nearest(positive, negative):
    """Every threshold from the highest score down to the first that recalls all positives."""
    rows = []
    for threshold in np.unique(np.r_[positive, negative])[::-1]:
        recall = (positive >= threshold).mean()
        rows.append((abs(recall - 0.95), -recall, -(negative >= threshold).mean()))
        if recall == 1:
            break
    return -min(rows)[2]


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("seed", range(3))
def test_figures_are_scikit_learns(seed, levels):
    one, other = scored(seed, levels=levels)
    truth = np.r_[np.ones(300), np.zeros(200)]
    scores = np.r_[one, other]
    assert detection(one, other) == pytest.approx(
        {
            "auroc": metrics.roc_auc_score(truth, scores),
            "aupr_id": metrics.average_precision_score(truth, scores),
            "aupr_ood": metrics.average_precision_score(1 - truth, -scores),
            "fpr95_id": fpr_at_95(one, other),
            "fpr95_ood": fpr_at_95(-other, -one),
            "fpr95_nearest": fpr_at_the_nearest(one, other),
        },
        abs=1e-6,
    )


def test_nearest_recall_differs_from_the_first_that_is_enough():
    """Of 10 ID images 9 recall .9 and 10 recall 1: as near, and the higher is taken."""
    one, other = np.arange(10.0), np.array([-1, 0.5, 1.5, 20])
    found = detection(one, other)
    assert found["fpr95_nearest"] == found["fpr95_id"] == 0.75
    # Of 18 images 17 recall .944, nearer than 1: the lowest threshold that does is the OOD 0.5.
    one = np.arange(18.0)
    found = detection(one, other)
    assert found["fpr95_nearest"] == 0.75 and found["fpr95_id"] == 0.75
    found = detection(one, np.array([-1, -0.5, 0, 20]))
    assert found["fpr95_nearest"] == 0.25 and found["fpr95_id"] == 0.5


def test_weights_are_repetitions():
    one, other = scored(levels=2)
    rng = np.random.default_rng(1)
    weights = rng.integers(0, 3, 300), rng.integers(0, 3, 200)
    found = jax.jit(weighted_detection)(one, other, *(w.astype(np.float32) for w in weights))
    expected = detection(one.repeat(weights[0]), other.repeat(weights[1]))
    assert {name: float(x) for name, x in found._asdict().items()} == pytest.approx(expected)


def test_separated_and_equal_scores():
    perfect = detection(np.array([2.0, 3.0]), np.array([0.0, 1.0]))
    assert perfect == {
        "auroc": 1, "aupr_id": 1, "aupr_ood": 1,
        "fpr95_id": 0, "fpr95_ood": 0, "fpr95_nearest": 0,
    }  # fmt: skip
    equal = detection(np.zeros(30), np.zeros(10))
    assert equal["auroc"] == 0.5 and equal["fpr95_id"] == equal["fpr95_ood"] == 1
    assert equal["aupr_id"] == pytest.approx(0.75) and equal["aupr_ood"] == pytest.approx(0.25)


def test_logit_scores_are_the_formulas():
    logits = np.random.default_rng(0).normal(0, 3, (50, 7)).astype(np.float32)
    wide = logits.astype(np.float64)
    chances = softmax(wide, axis=1)
    for found, expected in (
        (ood.max_softmax(logits), np.log(chances.max(1))),
        (ood.max_logit(logits), wide.max(1)),
        (ood.energy(logits), logsumexp(wide, axis=1)),
        (ood.energy(logits, temperature=2.0), 2 * logsumexp(wide / 2, axis=1)),
        (ood.negative_entropy(logits), (chances * np.log(chances)).sum(1)),
        (ood.gen(logits), -((chances * (1 - chances)) ** 0.1).sum(1)),
        (
            ood.gen(logits, gamma=0.5, top=3),
            -((np.sort(chances)[:, -3:] * (1 - np.sort(chances)[:, -3:])) ** 0.5).sum(1),
        ),
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_certain_images_keep_their_order():
    """In float32 both largest probabilities are 1."""
    logits = np.array([[30, 0, 0], [40, 0, 0]], np.float32)
    assert softmax(logits, axis=1).max(1).tolist() == [1, 1]
    low, high = np.asarray(ood.max_softmax(logits))
    wide = log_softmax(logits.astype(np.float64), axis=1).max(1)
    assert low < high < 0
    assert low == pytest.approx(wide[0], rel=1e-3)
    low, high = np.asarray(ood.gen(logits))
    assert low < high


@pytest.fixture(scope="module")
def trained():
    """Features of four classes, a last layer fitted to them, and features of other images."""
    rng = np.random.default_rng(0)
    centres = np.zeros((CLASSES, DIM))
    centres[:, :5] = rng.normal(0, 3, (CLASSES, 5))
    spread = np.r_[np.ones(5), np.full(DIM - 5, 0.2)]
    labels = np.arange(240) % CLASSES
    features = (centres[labels] + rng.normal(size=(240, DIM)) * spread).astype(np.float32)
    wanted = 4 * np.eye(CLASSES)[labels] - 1
    solution, *_ = np.linalg.lstsq(np.c_[features, np.ones(240)], wanted)
    # Near no class, and off the space that the classes span.
    strange = rng.normal(size=(60, DIM)).astype(np.float32)
    return features, labels, solution[:-1].astype(np.float32), solution[-1], strange


def test_knn_is_scikit_learns(trained):
    features, *_, strange = trained

    def unit(x):
        return x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)

    nearest = NearestNeighbors(n_neighbors=5).fit(unit(features))
    expected = -nearest.kneighbors(unit(strange))[0][:, -1]
    np.testing.assert_allclose(ood.knn(ood.fit_knn(features), strange, k=5), expected, rtol=1e-4)


def test_mahalanobis_is_scikit_learns(trained):
    features, labels, *_, strange = trained
    fitted = ood.fit_mahalanobis(features, labels, classes=CLASSES)
    wide, other = features.astype(np.float64), strange.astype(np.float64)
    means = np.stack([wide[labels == c].mean(0) for c in range(CLASSES)])
    within = EmpiricalCovariance(assume_centered=True).fit(wide - means[labels])
    nearest = np.min([within.mahalanobis(other - mean) for mean in means], axis=0)
    np.testing.assert_allclose(ood.mahalanobis(fitted, strange), -nearest, rtol=1e-4)
    total = EmpiricalCovariance().fit(wide).mahalanobis(other)
    found = ood.relative_mahalanobis(fitted, strange)
    np.testing.assert_allclose(found, total - nearest, rtol=1e-3, atol=1e-2)


def test_vim_is_the_formula(trained):
    features, _, kernel, bias, strange = trained
    fitted = ood.fit_vim(features, kernel, bias, dimension=5)
    origin = -np.linalg.pinv(kernel.T.astype(np.float64)) @ bias
    covariance = EmpiricalCovariance(assume_centered=True).fit(features - origin).covariance_
    _, _, rows = np.linalg.svd(covariance)
    residual = rows[5:].T

    def length(x):
        return np.linalg.norm((x - origin) @ residual, axis=1)

    scale = (features @ kernel + bias).max(1).mean() / length(features).mean()
    logits = (strange @ kernel + bias).astype(np.float32)
    expected = logsumexp(logits, axis=1) - scale * length(strange)
    np.testing.assert_allclose(ood.vim(fitted, strange, logits), expected, rtol=1e-3, atol=1e-3)


def test_feature_scores_find_what_logits_miss(trained):
    features, labels, kernel, bias, strange = trained
    own = features + np.float32(0.05)
    gaussians = ood.fit_mahalanobis(features, labels, classes=CLASSES)
    vim, bank = ood.fit_vim(features, kernel, bias, dimension=5), ood.fit_knn(features)

    def logits(x):
        return (x @ kernel + bias).astype(np.float32)

    for score in (
        lambda x: ood.mahalanobis(gaussians, x),
        lambda x: ood.relative_mahalanobis(gaussians, x),
        lambda x: ood.vim(vim, x, logits(x)),
        lambda x: ood.knn(bank, x, k=5),
    ):
        assert detection(score(own), score(strange))["auroc"] > 0.9


def test_bad_input_is_named(trained):
    features, labels, kernel, bias, strange = trained
    with pytest.raises(ValueError, match="ood_scores: 1 of 2 rows hold NaN"):
        detection(np.ones(3), np.array([0, np.nan]))
    with pytest.raises(ValueError, match=r"id_scores: expected one score an image, found shape"):
        detection(np.ones((3, 2)), np.ones(3))
    with pytest.raises(ValueError, match="k: expected a whole number, 1 to 240, found 500"):
        ood.knn(ood.fit_knn(features), strange, k=500)
    with pytest.raises(ValueError, match="features: 3 dimensions, fitted on 12"):
        ood.knn(ood.fit_knn(features), strange[:, :3])
    with pytest.raises(ValueError, match=r"kernel: expected \(12, 4\)"):
        ood.fit_vim(features, kernel.T, bias)
    with pytest.raises(ValueError, match="labels: class 4 of 5 has no features"):
        ood.fit_mahalanobis(features, labels, classes=5)
