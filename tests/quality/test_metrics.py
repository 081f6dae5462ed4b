"""The figures against independent formulas: scipy's sqrtm, numpy loops, closed forms."""

import json
import warnings

import numpy as np
import pytest
from scipy import linalg

from jaxsynth.core.errors import UserError
from jaxsynth.quality import distances, metrics
from jaxsynth.quality.metrics import (
    QualityConfig,
    Statistics,
    evaluate,
    fid,
    kid,
    manifold,
    statistics,
)

SMALL = QualityConfig(kid_subsets=5, repeats=3)


def normal(n, d=8, seed=0, mean=0.0, scale=1.0):
    """Correlated Gaussian features."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(d, d)) / d**0.5 + np.eye(d)
    return (rng.normal(size=(n, d)) @ mix * scale + mean).astype(np.float32)


def by_sqrtm(x, y):
    """The Frechet distance as Heusel et al. wrote it, with a matrix root by Schur decomposition."""
    sx, sy = (np.atleast_2d(np.cov(s.astype(np.float64), rowvar=False)) for s in (x, y))
    difference = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)
    with warnings.catch_warnings():
        # The product of singular covariances; the tests that have them allow for it.
        warnings.simplefilter("ignore", linalg.LinAlgWarning)
        root = linalg.sqrtm(sx @ sy).real
    return difference @ difference + np.trace(sx + sy - 2 * root)


def frechet_of(mu_a, sigma_a, mu_b, sigma_b):
    return fid(Statistics(mu_a, sigma_a), Statistics(mu_b, sigma_b))


class TestFID:
    @pytest.mark.parametrize("d", [1, 3, 40])
    def test_matches_the_matrix_root(self, d):
        x, y = normal(300, d), normal(500, d, seed=1, mean=0.3, scale=1.4)
        assert fid(x, y) == pytest.approx(by_sqrtm(x, y), rel=1e-6)

    @pytest.mark.parametrize("counts", [(30, 50), (30, 300), (300, 30)])
    def test_fewer_samples_than_dimensions(self, counts):
        """The singular case, in which scipy's root of the product is only good to 1e-4 or so."""
        x, y = normal(counts[0], 64), normal(counts[1], 64, seed=1, mean=0.3)
        assert fid(x, y) == pytest.approx(by_sqrtm(x, y), rel=1e-3)
        # The same from the covariances, which takes another way than from so few samples.
        assert fid(statistics(x), statistics(y)) == pytest.approx(fid(x, y), rel=1e-6)
        assert fid(statistics(x), y) == pytest.approx(fid(x, y), rel=1e-6)

    def test_closed_form_of_commuting_gaussians(self):
        """|m1 - m2|^2 + sum (s1 - s2)^2 in a common basis, which need not be that of the axes."""
        rng = np.random.default_rng(0)
        basis, _ = np.linalg.qr(rng.normal(size=(6, 6)))
        s1, s2, m1, m2 = rng.uniform(0.1, 3, (4, 6))
        found = frechet_of(m1, basis * s1**2 @ basis.T, m2, basis * s2**2 @ basis.T)
        expected = np.square(m1 - m2).sum() + np.square(s1 - s2).sum()
        assert found == pytest.approx(expected, rel=1e-10)

    def test_orthogonal_subspaces(self):
        """No direction in common: the roots' product is zero, so nothing is subtracted."""
        a, b = np.diag([1.0, 4, 0, 0]), np.diag([0.0, 0, 9, 16])
        assert frechet_of(np.zeros(4), a, np.ones(4), b) == pytest.approx(4 + 5 + 25)

    @pytest.mark.parametrize("n", [20, 400])
    def test_a_set_against_itself_is_zero(self, n):
        x = normal(n, 64, mean=3)
        assert fid(x, x) < 1e-9 * np.trace(np.cov(x, rowvar=False))
        assert fid(statistics(x), statistics(x)) < 1e-9

    def test_constant_features(self):
        x = np.ones((9, 4), np.float32)
        assert fid(x, x + 1) == pytest.approx(4)
        y = normal(9, 4)
        expected = np.square(y.mean(0) - 1).sum() + np.trace(np.cov(y.T))
        assert fid(y, x) == fid(x, y) == pytest.approx(expected)

    def test_shifts_and_scales_as_a_squared_distance(self):
        x, y = normal(200), normal(200, seed=1, mean=0.5)
        assert fid(x + 7, y + 7) == pytest.approx(fid(x, y), rel=1e-5)
        assert fid(3 * x, 3 * y) == pytest.approx(9 * fid(x, y), rel=1e-5)

    def test_statistics_are_numpys(self):
        x = normal(5000, 7, mean=100)
        found = statistics(x)
        np.testing.assert_allclose(found.mu, x.mean(0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(found.sigma, np.cov(x.astype(np.float64).T), rtol=1e-9)
        assert found.count == 5000

    @pytest.mark.parametrize(
        ("mu", "sigma", "message"),
        [
            (np.zeros(3), np.eye(4), r"mu \(3,\) and sigma \(4, 4\)"),
            (np.zeros(2), np.array([[1, 0.5], [-0.5, 1]]), "not symmetric"),
            (np.zeros(2), np.diag([1.0, -1]), "eigenvalue -1"),
            (np.array([0, np.nan]), np.eye(2), "not finite"),
        ],
    )
    def test_statistics_that_are_none(self, mu, sigma, message):
        with pytest.raises(UserError, match=message):
            fid(Statistics(mu, sigma), normal(9, 2))

    def test_statistics_of_different_networks(self):
        a, b = (statistics(normal(9), network=name) for name in ("inception", "clip"))
        with pytest.raises(UserError, match="different networks, clip and inception"):
            fid(a, b)


def mmd2_loop(x, y):
    """The unbiased estimate by its definition, one pair at a time."""
    x, y = x.astype(np.float64), y.astype(np.float64)

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


class TestKID:
    def test_matches_a_loop_over_pairs(self):
        x, y = normal(20, 5), normal(20, 5, seed=1, mean=0.4)
        found = kid(x, y, seed=0, subsets=2, subset_size=20)
        # Subsets of all samples are the sets themselves.
        assert found.mean == pytest.approx(mmd2_loop(x, y), rel=1e-5)
        assert found.std == pytest.approx(0, abs=1e-6)

    def test_subsets_are_drawn_by_the_seed(self):
        x, y = normal(60, 5), normal(90, 5, seed=1, mean=0.4)
        first = kid(x, y, seed=0, subsets=8)
        assert first.subset_size == 30 and first.std > 0
        assert first == kid(x, y, seed=0, subsets=8)
        assert first != kid(x, y, seed=1, subsets=8)

    def test_unbiased_on_one_distribution(self):
        """Over independent pairs of sets the mean is zero within its error; the V-statistic's, with
        its diagonals, is not."""
        values, biased = [], []
        for seed in range(60):
            x, y = normal(24, 6, seed=2 * seed), normal(24, 6, seed=2 * seed + 1)
            values.append(kid(x, y, seed=0, subsets=2, subset_size=24).mean)
            diagonal = sum(((s * s).sum(1) / 6 + 1) ** 3 for s in (x, y)).mean()
            biased.append(values[-1] + diagonal / 24)
        error = np.std(values, ddof=1) / len(values) ** 0.5
        assert abs(np.mean(values)) < 3 * error
        assert np.mean(biased) > 10 * error

    def test_tells_distributions_apart(self):
        same = kid(normal(400), normal(400, seed=1), seed=0, subsets=20)
        moved = kid(normal(400), normal(400, seed=1, mean=0.5), seed=0, subsets=20)
        assert abs(same.mean) < 3 * same.std
        assert moved.mean > 5 * moved.std

    def test_small_differences_survive_large_features(self):
        """The distance is a few thousandths of the kernel's values, whose means it is made of."""
        x, y = normal(100, 16, mean=4), normal(100, 16, seed=1, mean=4)
        found = kid(x, y, seed=0, subsets=2, subset_size=100).mean
        assert found == pytest.approx(mmd2_loop(x, y), rel=1e-2)

    @pytest.mark.parametrize("size", [1, 31])
    def test_subset_sizes_that_do_not_fit(self, size):
        with pytest.raises(UserError, match=r"kid_subset_size: .* expected 2 to 30"):
            kid(normal(30), normal(40), seed=0, subset_size=size)


def manifold_loop(real, generated, precision_k, coverage_k):
    """Precision, recall, density and coverage from all distances at once, in float64."""
    real, generated = real.astype(np.float64), generated.astype(np.float64)

    def distances_of(a, b):
        return np.sqrt(np.square(a[:, None] - b[None]).sum(-1))

    def radius(x, k):
        return np.sort(distances_of(x, x), axis=1)[:, k]

    cross = distances_of(real, generated)
    return {
        "precision": (cross <= radius(real, precision_k)[:, None]).any(0).mean(),
        "recall": (cross <= radius(generated, precision_k)[None]).any(1).mean(),
        "density": (cross < radius(real, coverage_k)[:, None]).sum(0).mean() / coverage_k,
        "coverage": (cross < radius(real, coverage_k)[:, None]).any(1).mean(),
    }


def clusters(centres, per_cluster, seed):
    """Tight clouds far apart, in 4 dimensions."""
    rng = np.random.default_rng(seed)
    points = [rng.normal(size=(per_cluster, 4)) + 100 * c for c in centres]
    return np.concatenate(points).astype(np.float32)


class TestManifold:
    @pytest.mark.parametrize("counts", [(50, 70), (129, 64)])
    @pytest.mark.parametrize("ks", [(3, 5), (7, 2)])
    def test_matches_all_distances_at_once(self, counts, ks, monkeypatch):
        # Several blocks either way, none of which the counts fill.
        monkeypatch.setattr(distances, "ROWS", 32)
        monkeypatch.setattr(distances, "COLUMNS", 16)
        x, y = normal(counts[0], mean=5), normal(counts[1], seed=1, mean=5.4)
        found = manifold(x, y, precision_k=ks[0], coverage_k=ks[1])
        expected = manifold_loop(x, y, *ks)
        assert found == pytest.approx(expected, abs=1e-9)
        assert all(value > 0 for value in found.values())

    def test_radii_match_all_distances_at_once(self, monkeypatch):
        monkeypatch.setattr(distances, "ROWS", 16)
        monkeypatch.setattr(distances, "COLUMNS", 32)
        x = normal(45)
        found = distances.neighbour_radii(x, 4)
        every = np.square(x[:, None].astype(np.float64) - x[None]).sum(-1)
        np.testing.assert_allclose(found, np.sort(every, axis=1)[:, 1:5], rtol=1e-5)

    def test_identical_sets(self):
        x = normal(200)
        assert manifold(x, x.copy()) == {
            "precision": 1,
            "recall": 1,
            "density": 1,
            "coverage": 1,
        }

    def test_a_sample_on_the_edge_of_a_ball(self):
        """Closed balls hold it, which decide precision and recall, open ones do not."""
        real, generated = (np.array(v, np.float32)[:, None] for v in ([0, 1, 2], [3, 4, 5]))
        found = manifold(real, generated, precision_k=1, coverage_k=1)
        third = pytest.approx(1 / 3)
        assert found == {"precision": third, "recall": third, "density": 0, "coverage": 0}

    def test_disjoint_sets(self):
        assert set(manifold(normal(50), normal(50, mean=1e3)).values()) == {0}

    def test_one_distribution(self):
        """Density is near 1 on average and coverage near 1 - 2^-k (Naeem et al., section 3.2)."""
        found = manifold(normal(800, 3), normal(800, 3, seed=1))
        assert found["density"] == pytest.approx(1, abs=0.1)
        assert found["coverage"] == pytest.approx(1 - 2**-5, abs=0.03)

    def test_dropped_modes_lower_recall_and_coverage_only(self):
        real, all_modes = clusters(range(4), 50, 0), clusters(range(4), 50, 1)
        half = clusters([0, 0, 1, 1], 50, 1)
        whole, dropped = manifold(real, all_modes), manifold(real, half)
        assert dropped["recall"] <= 0.5 < whole["recall"]
        assert dropped["coverage"] <= 0.5 < whole["coverage"]
        assert dropped["precision"] > 0.9 * whole["precision"]
        assert dropped["density"] > 0.9 * whole["density"]

    def test_invented_modes_lower_precision_and_density_only(self):
        real = clusters(range(2), 50, 0)
        extra = np.concatenate([clusters(range(2), 50, 1), clusters([5, 6], 50, 2)])
        whole, wrong = manifold(real, clusters(range(2), 50, 1)), manifold(real, extra)
        assert wrong["precision"] == pytest.approx(whole["precision"] / 2)
        assert wrong["density"] == pytest.approx(whole["density"] / 2)
        assert wrong["recall"] == whole["recall"] and wrong["coverage"] == whole["coverage"]

    def test_an_outlier_inflates_recall_but_not_coverage(self):
        """Naeem et al.'s point: one generated outlier's ball covers all that is real."""
        real = normal(60)
        generated = np.concatenate([normal(60, seed=1, mean=50), np.full((1, 8), -300, np.float32)])
        found = manifold(real, generated)
        assert found["recall"] == 1 and found["coverage"] == 0

    def test_too_few_for_a_ball(self):
        with pytest.raises(UserError, match="the 5-th neighbour among 5 real samples"):
            manifold(normal(5), normal(50))


class TestEvaluate:
    def test_all_is_each_figure_and_the_result_is_json(self):
        x, y = normal(60), normal(40, seed=1, mean=0.5)
        found = evaluate(x, y, SMALL, seed=3)
        kernel = kid(x, y, seed=3, subsets=5)
        expected = {"fid": fid(x, y), "kid": kernel.mean, "kid_std": kernel.std, **manifold(x, y)}
        assert found["all"] == pytest.approx(expected)
        assert found["samples"] == {"real": 60, "generated": 40, "matched": 30, "dimensions": 8}
        assert found["settings"]["seed"] == 3 and found["settings"]["precision_k"] == 3
        assert json.loads(json.dumps(found)) == found
        assert found == evaluate(x, y, SMALL, seed=3)

    def test_matched_sets_have_the_floors_counts(self):
        """Few generated images: every figure but "all" is between sets of 10."""
        found = evaluate(normal(60), normal(10, seed=1), SMALL, seed=0)
        assert found["samples"]["matched"] == 10
        for part in ("matched", "floor"):
            assert found[part].keys() == found["all"].keys() - {"kid_std"}
            for figure in found[part].values():
                assert len(figure["values"]) == SMALL.repeats
                assert figure["mean"] == pytest.approx(np.mean(figure["values"]))
                assert figure["std"] == pytest.approx(np.std(figure["values"], ddof=1))
        # A share of 10 samples.
        shares = 10 * np.array(found["matched"]["recall"]["values"])
        np.testing.assert_allclose(shares, shares.round(), atol=1e-9)

    def test_a_perfect_generator_is_at_the_floor_and_a_poor_one_is_not(self):
        config = QualityConfig(kid_subsets=10, repeats=4)
        real = normal(400)
        perfect = evaluate(real, normal(200, seed=1), config, seed=0)
        poor = evaluate(real, normal(200, seed=1, mean=1.5), config, seed=0)
        assert poor["floor"] == perfect["floor"]
        for name, floor in perfect["floor"].items():
            good, bad = perfect["matched"][name]["mean"], poor["matched"][name]["mean"]
            assert abs(bad - floor["mean"]) > 4 * abs(good - floor["mean"]), name
            assert (bad > good) == (name in ("fid", "kid")), name
        # At 400 against 200 FID is lower than the floor only because the counts are larger.
        assert perfect["all"]["fid"] < perfect["floor"]["fid"]["mean"]

    def test_the_two_real_sets_share_no_image(self, monkeypatch):
        compared = []

        def record(first, second, config, seed):
            compared.append((first.features[:, 0], second.features[:, 0]))
            return {"fid": 0.0}

        monkeypatch.setattr(metrics, "_figures", record)
        real = np.arange(41.0, dtype=np.float32)[:, None]
        evaluate(real, real + 100, SMALL, seed=0)
        # Those of two real sets: the floor.
        compared = [pair for pair in compared if pair[1].max() < 100]
        assert len(compared) == SMALL.repeats
        for first, second in compared:
            assert len(first) == len(second) == 20
            assert len({*first, *second}) == 40
        # Each repeat splits in its own way.
        assert len({frozenset(first) for first, _ in compared}) == SMALL.repeats

    def test_one_repeat_has_no_spread(self):
        config = QualityConfig(kid_subsets=2, repeats=1)
        assert evaluate(normal(20), normal(20), config, seed=0)["floor"]["fid"]["std"] is None

    @pytest.mark.parametrize(
        ("real", "generated", "config", "message"),
        [
            (normal(11), normal(50), SMALL, "real: 11 samples, expected 12 or more"),
            (normal(50), normal(5), SMALL, "generated: 5 samples, expected 6 or more"),
            (normal(50), normal(50, 7), SMALL, "generated: features of 7 .* have 8"),
            (normal(50)[:, 0], normal(50), SMALL, r"real: expected float features \(n, d\)"),
            (normal(50), normal(50).astype(int), SMALL, "generated: expected float features"),
            (normal(50), normal(50), QualityConfig(repeats=0), "repeats: expected 1 or more"),
            (normal(50), normal(50), QualityConfig(precision_k=0), "the 0-th neighbour"),
            (normal(50), normal(50), QualityConfig(kid_subsets=1), "kid_subsets: expected 2"),
            (
                normal(50),
                normal(50),
                QualityConfig(kid_subset_size=30),
                "real: 50 samples, expected 60 or more",
            ),
        ],
    )
    def test_errors(self, real, generated, config, message):
        with pytest.raises(UserError, match=message):
            evaluate(real, generated, config, seed=0)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_features_that_are_not_finite(self, bad):
        x, broken = normal(50), normal(50)
        broken[[7, 9], 3] = bad
        for function in (fid, manifold, lambda a, b: kid(a, b, seed=0)):
            with pytest.raises(UserError, match=r"real: 2 of 50 .* the first is row 7"):
                function(broken, x)
            with pytest.raises(UserError, match=r"generated: 2 of 50 .* the first is row 7"):
                function(x, broken)
