"""Attacks against foolbox, torch, closed forms of linear models, and each other."""

import importlib
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial
from scipy import optimize

from jaxsynth.robustness.attacks import common
from jaxsynth.robustness.attacks.apgd import apgd, checkpoints
from jaxsynth.robustness.attacks.autoattack import autoattack, standard
from jaxsynth.robustness.attacks.common import fold_each, image_keys, random_start
from jaxsynth.robustness.attacks.evaluate import attacked, correct, eps_sweep
from jaxsynth.robustness.attacks.fab import fab, fab_distance, to_boundary
from jaxsynth.robustness.attacks.gradient import fgsm, pgd
from jaxsynth.robustness.attacks.masking import check_model, check_results
from jaxsynth.robustness.attacks.square import bump, sides, square
from jaxsynth.training.sharding import make_mesh
from tests.robustness import torch_apgd
from tests.robustness.digits import torch_predict

EPS = 0.06
# Of every APGD and FAB here, so that the tests share their programs.
STEPS = 30


def accuracy(digits, images):
    return correct(digits.predict, images, digits.labels).mean()


def sizes(digits, moved, norm="linf"):
    change = np.asarray(moved - digits.images).reshape(len(moved), -1)
    return np.abs(change).max(1) if norm == "linf" else np.linalg.norm(change, axis=1)


@pytest.fixture(scope="module")
def foolbox():
    with warnings.catch_warnings():
        # It imports a namespace of scipy's that goes away.
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("foolbox")


@pytest.fixture(scope="module")
def result(digits):
    return autoattack(
        digits.predict,
        digits.images,
        digits.labels,
        jax.random.key(0),
        eps=EPS,
        attacks=standard(steps=STEPS, queries=500),
    )


class TestGradientAttacks:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_pgd_is_foolboxes(self, digits, foolbox, norm):
        eps, size = (EPS, 0.02) if norm == "linf" else (0.5, 0.1)
        name = {"linf": "LinfPGD", "l2": "L2PGD"}[norm]
        attack = getattr(foolbox.attacks, name)(abs_stepsize=size, steps=20, random_start=False)
        model = foolbox.JAXModel(digits.predict, bounds=(0, 1))
        _, expected, _ = attack(model, digits.images, digits.labels, epsilons=eps)
        found = pgd(
            digits.predict,
            digits.images,
            digits.labels,
            jax.random.key(0),
            eps=eps,
            step_size=size,
            norm=norm,
            from_random=False,
        )
        np.testing.assert_allclose(found, expected, rtol=0, atol=0 if norm == "linf" else 1e-5)

    def test_fgsm_is_foolboxes(self, digits, foolbox):
        model = foolbox.JAXModel(digits.predict, bounds=(0, 1))
        attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
        _, expected, _ = attack(model, digits.images, digits.labels, epsilons=EPS)
        found = fgsm(digits.predict, digits.images, digits.labels, eps=EPS)
        np.testing.assert_array_equal(found, expected)

    def test_an_eps_for_each_image(self, digits, key):
        eps = jnp.linspace(0, 0.2, 64)
        moved = pgd(digits.predict, digits.images, digits.labels, key, eps=eps)
        np.testing.assert_array_equal(moved[0], digits.images[0])
        assert (sizes(digits, moved) <= eps + 1e-6).all()
        assert (sizes(digits, moved)[1:] > 0.99 * eps[1:]).all()

    def test_restarts_find_no_less(self, digits, key):
        """Of the same first start, and each image keeps the worst."""
        run = partial(pgd, digits.predict, digits.images, digits.labels, key, eps=EPS, steps=3)
        one, many = run(), run(restarts=4)
        losses = [common.cross_entropy(digits.predict(x), digits.labels) for x in (one, many)]
        broken = [~correct(digits.predict, x, digits.labels) for x in (one, many)]
        assert (broken[1] >= broken[0]).all()
        kept = np.asarray(broken[0] == broken[1])
        assert (losses[1] >= losses[0])[kept].all() and (losses[1] > losses[0])[kept].any()

    def test_accuracy_falls_with_eps(self, digits, key):
        epsilons = jnp.array([0, 0.02, 0.04, 0.06, 0.1, 0.2, 0.5])
        right = eps_sweep(pgd, digits.predict, digits.images, digits.labels, key, epsilons)
        shares = np.asarray(right.mean(1))
        assert (np.diff(shares) <= 0).all()
        clean = correct(digits.predict, digits.images, digits.labels)
        np.testing.assert_array_equal(right[0], clean)
        assert shares[-1] == 0 < shares[3] < clean.mean()

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_starts_fill_the_ball(self, key, norm):
        centre = jnp.full((4000, 1, 3, 1), 0.5)
        eps = jnp.full((4000, 1, 1, 1), 0.2)
        moved = random_start(image_keys(key, 4000), centre, eps, norm) - 0.5
        radius = np.asarray(common.distance(moved, norm)) / 0.2
        assert radius.max() <= 1 + 1e-5
        # In three dimensions the cube of the radius is uniform, in either norm.
        np.testing.assert_allclose(
            np.quantile(radius**3, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03
        )
        np.testing.assert_allclose(moved.mean(0), 0, atol=0.01)


class TestAutoPGD:
    def test_losses_are_the_formulas(self):
        rng = np.random.default_rng(0)
        logits, labels = rng.normal(size=(20, 6)).astype(np.float32), np.arange(20) % 6
        targets = (labels + 1 + np.arange(20) % 5) % 6
        for found, each in (
            (common.dlr(logits, labels), lambda z, y, t: torch_apgd.dlr(z, y)),
            (common.targeted_dlr(logits, labels, targets), torch_apgd.targeted_dlr),
            (common.cross_entropy(logits, labels), lambda z, y, t: torch_apgd.cross_entropy(z, y)),
        ):
            expected = [
                each(torch.tensor(z), int(y), int(t)).item()
                for z, y, t in zip(logits, labels, targets, strict=True)
            ]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_checkpoints_are_the_papers(self):
        assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
        for steps in range(2, 120):
            mine = [mark for mark in torch_apgd.checkpoints(steps)[1:] if mark <= steps]
            assert checkpoints(steps) == mine or checkpoints(steps) == mine[:-1]

    @pytest.mark.parametrize("loss", ["ce", "dlr"])
    def test_a_run_is_the_algorithm(self, digits, key, loss):
        """From the same start, in torch. Where two pixels tie, rounding may part the paths."""
        count = 10
        images, labels = digits.images[:count], digits.labels[:count]
        keys = image_keys(key, 64)
        eps = jnp.full((64, 1, 1, 1), EPS)
        start = random_start(fold_each(keys, 0), digits.images, eps, "linf")[:count]
        found = apgd(
            digits.predict, digits.images, digits.labels, key, eps=EPS, loss=loss, steps=STEPS
        )
        model, measure = (
            torch_predict(digits.predict),
            {"ce": torch_apgd.cross_entropy, "dlr": torch_apgd.dlr}[loss],
        )

        def value(x, label):
            return measure(model(x[None])[0], int(label))

        def torched(x):
            return torch.tensor(np.asarray(x).transpose(2, 0, 1))

        compared = 0
        for i in range(count):
            best, best_value = torch_apgd.apgd(
                partial(value, label=labels[i]), torched(images[i]), torched(start[i]), EPS, STEPS
            )
            mine = torched(found[i])
            if model(mine[None])[0].argmax() != int(labels[i]):
                # Misclassified: the last such point comes back, and the best is one too.
                assert model(best[None])[0].argmax() != int(labels[i])
                continue
            assert value(mine, labels[i]).item() == pytest.approx(best_value, rel=1e-3)
            compared += (mine - best).abs().max() < 1e-5
        assert compared >= 3

    def test_it_beats_pgd_without_a_step_size(self, digits, key):
        """The targeted form breaks whatever the others do; none leaves the ball."""
        run = partial(apgd, digits.predict, digits.images, digits.labels, key, eps=EPS)
        targeted = run(loss="targeted", steps=STEPS)
        assert sizes(digits, targeted).max() <= EPS + 1e-6
        by_pgd = pgd(digits.predict, digits.images, digits.labels, key, eps=EPS)
        assert accuracy(digits, targeted) <= accuracy(digits, by_pgd)


class TestFAB:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_the_way_to_the_boundary_is_the_shortest(self, norm):
        """Against a linear program, or a quadratic one, with the box as bounds."""
        rng = np.random.default_rng(0)
        x = rng.uniform(size=(6, 2, 3, 1)).astype(np.float32)
        gradient = rng.normal(size=x.shape).astype(np.float32)
        gradient[0, 0, 0] = 0
        gap = np.array([0.3, -0.3, -0.8, 0.8, 0.05, 50], np.float32)
        moved = np.asarray(to_boundary(x, gradient, gap, norm)).reshape(6, -1)
        for i in range(5):
            w, start = gradient[i].ravel().astype(float), x[i].ravel().astype(float)
            assert gap[i] + w @ moved[i] == pytest.approx(0, abs=1e-5)
            assert ((start + moved[i] >= -1e-6) & (start + moved[i] <= 1 + 1e-6)).all()
            if norm == "linf":
                # Over (d, t): least t with -t <= d <= t.
                eye, ones = np.eye(6), np.ones((6, 1))
                best = optimize.linprog(
                    np.r_[np.zeros(6), 1],
                    A_ub=np.r_[np.c_[eye, -ones], np.c_[-eye, -ones]],
                    b_ub=np.zeros(12),
                    A_eq=[np.r_[w, 0]],
                    b_eq=[-gap[i]],
                    bounds=[*zip(-start, 1 - start, strict=True), (0, None)],
                ).fun
            else:
                best = (
                    optimize.minimize(
                        lambda d: d @ d,
                        np.zeros(6),
                        jac=lambda d: 2 * d,
                        constraints={"type": "eq", "fun": lambda d, w=w, g=gap[i]: g + w @ d},
                        bounds=list(zip(-start, 1 - start, strict=True)),
                        method="SLSQP",
                    ).fun
                    ** 0.5
                )
            size = np.abs(moved[i]).max() if norm == "linf" else np.linalg.norm(moved[i])
            assert size == pytest.approx(best, rel=1e-4)
        # Out of reach: every pixel goes to the end that comes closest.
        end = x[5].ravel() + moved[5]
        np.testing.assert_allclose(end, gradient[5].ravel() < 0, atol=1e-6)

    def test_distances_of_a_linear_model_are_exact(self):
        """From the middle of [0, 1] the box does not matter: |gap| over the dual norm."""
        rng = np.random.default_rng(0)
        kernel = rng.normal(size=(12, 5)).astype(np.float32)
        images = rng.uniform(0.45, 0.55, (8, 3, 4, 1)).astype(np.float32)
        predict = Partial(lambda kernel, x: x.reshape(len(x), -1) @ kernel, kernel)
        logits = images.reshape(8, -1) @ kernel
        labels = logits.argmax(1).astype(np.int32)
        nearest, found = fab_distance(predict, images, labels, steps=10)
        gaps = logits[np.arange(8), labels][:, None] - logits
        slopes = np.abs(kernel.T[labels][:, None] - kernel.T[None]).sum(-1)
        expected = np.where(slopes > 0, gaps / np.where(slopes > 0, slopes, 1), np.inf).min(1)
        # It stops a little beyond the boundary.
        assert (found >= expected - 1e-6).all()
        np.testing.assert_allclose(found, expected, rtol=0.06)
        assert not correct(predict, nearest, labels).any()


class TestSquare:
    def test_squares_shrink_as_published(self):
        """Sides at 0.8 of 32 by 32 pixels, halved in area nine times."""
        found = sides(10_000, 32, 32, 0.8, "linf")
        assert found == [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]
        assert sides(10_000, 32, 32, 0.8, "l2") == [29, 21, 15, 11, 7, 5, 5, 3, 3, 3]

    def test_a_bump_has_two_halves_of_length_one(self):
        pattern = bump(7)
        assert np.linalg.norm(pattern) == pytest.approx(1, rel=1e-6)
        assert (pattern[:3] > 0).all() and (pattern[3:] < 0).all()
        # A peak in the middle of either half.
        assert np.unravel_index(pattern.argmax(), (7, 7)) == (1, 3)
        assert np.unravel_index(pattern.argmin(), (7, 7)) == (5, 3)

    def test_it_needs_no_gradient(self, digits, key):
        """Logits cut to steps have no gradient: PGD stands still, Square does not."""

        def stepped(weights, images):
            return jnp.round(20 * digits.predict.func(weights, images)) / 20

        predict = Partial(stepped, digits.predict.args[0])
        moved = {
            "pgd": pgd(
                predict, digits.images, digits.labels, key, eps=EPS, from_random=False, steps=5
            ),
            "square": square(predict, digits.images, digits.labels, key, eps=EPS, steps=500),
        }
        np.testing.assert_array_equal(moved["pgd"], digits.images)
        accuracy = {
            name: float(correct(predict, images, digits.labels).mean())
            for name, images in moved.items()
        }
        clean = correct(predict, digits.images, digits.labels).mean()
        assert accuracy["pgd"] == clean > accuracy["square"]
        assert sizes(digits, moved["square"]).max() <= EPS + 1e-6
        assert [w.sign for w in check_model(predict, digits.images, digits.labels)] == [
            "zero gradients"
        ]
        assert [w.sign for w in check_results(accuracy)] == ["black box"]


class TestAutoAttack:
    def test_it_is_never_weaker_than_pgd_20(self, digits, key, result):
        by_pgd = pgd(digits.predict, digits.images, digits.labels, key, eps=EPS)
        withstood = correct(digits.predict, by_pgd, digits.labels)
        assert not (result.correct & ~withstood).any()
        assert 0 < result.correct.mean() <= withstood.mean()

    def test_it_says_what_broke_each_image(self, digits, result):
        clean = correct(digits.predict, digits.images, digits.labels)
        np.testing.assert_array_equal(result.broken_by == -2, ~clean)
        np.testing.assert_array_equal(result.correct, result.broken_by == -1)
        np.testing.assert_array_equal(
            correct(digits.predict, result.images, digits.labels), result.correct
        )
        shares = list(result.accuracy.values())
        assert shares[0] == clean.mean() and shares[-1] == result.correct.mean()
        assert (np.diff(shares) <= 0).all() and shares[1] < shares[0]
        assert sizes(digits, result.images).max() <= EPS + 1e-6
        untouched = result.correct | ~clean
        np.testing.assert_array_equal(result.images[untouched], digits.images[untouched])

    def test_images_within_their_euclidean_balls(self, digits, key):
        attacks = standard("l2", steps=STEPS, queries=500)
        # The weaker first, so that both have something to do.
        attacks = {name: attacks[name] for name in ("square", "fab-t")}
        found = autoattack(
            digits.predict, digits.images, digits.labels, key, eps=0.4, norm="l2", attacks=attacks
        )
        assert sizes(digits, found.images, "l2").max() <= 0.4 + 1e-5
        assert found.accuracy["clean"] > found.accuracy["square"] > found.accuracy["fab-t"]

    def test_two_classes_have_no_difference_of_ratios(self, digits, key):
        """The sum of the even classes' logits against that of the odd ones."""

        def predict(images):
            logits = digits.predict(images)
            return jnp.stack([logits[:, ::2].sum(1), logits[:, 1::2].sum(1)], axis=1)

        labels = predict(digits.images).argmax(1)
        assert [w.sign for w in check_model(predict, digits.images, labels)] == ["few classes"]
        moved = apgd(predict, digits.images, labels, key, eps=EPS, loss="targeted", steps=10)
        assert correct(predict, moved, labels).mean() < 1
        with pytest.raises(ValueError, match="'dlr' needs 3 or more classes, found 2"):
            apgd(predict, digits.images, labels, key, eps=EPS, loss="dlr")


class TestBatches:
    @pytest.mark.parametrize(
        "attack",
        [
            partial(pgd, steps=5, restarts=2),
            partial(apgd, loss="targeted", steps=8, targets=2),
            partial(fab, steps=8, targets=2),
        ],
        ids=["pgd", "apgd", "fab"],
    )
    def test_one_program_does_what_single_steps_do(self, digits, key, attack):
        """Under a trace all loops are compiled in, as on accelerators; on CPU steps are called."""
        args = digits.predict, digits.images[:8], digits.labels[:8], key
        stepped, whole = attack(*args, eps=EPS), jax.jit(partial(attack, eps=EPS))(*args)
        assert not np.array_equal(stepped, args[1])
        # Where a gradient is rounding noise, another order of sums may turn its sign.
        apart = np.abs(np.asarray(whole - stepped)).reshape(8, -1).max(1)
        assert (apart < 1e-4).sum() >= 7

    def test_neither_batch_nor_devices_change_an_image(self, digits, key):
        run = partial(pgd, eps=EPS, steps=5)
        whole = run(digits.predict, digits.images, digits.labels, key)
        cut = attacked(
            partial(pgd, steps=5), digits.predict, digits.images, digits.labels, key,
            eps=EPS, batch_size=24,
        )  # fmt: skip
        np.testing.assert_allclose(cut, whole, atol=1e-6)
        mesh = make_mesh(data=8)
        images, labels = (
            jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
            for x in (digits.images, digits.labels)
        )
        placed = run(digits.predict, images, labels, key)
        assert len(placed.sharding.device_set) == 8
        np.testing.assert_allclose(placed, whole, atol=1e-6)

    def test_signs_of_masking(self, digits):
        labels = digits.labels
        assert check_model(digits.predict, digits.images, labels) == []
        found = check_model(lambda x: jax.nn.softmax(digits.predict(x)), digits.images, labels)
        assert [w.sign for w in found] == ["probabilities"]
        rng = np.random.default_rng(0)

        def noisy(images):
            return digits.predict(images) + rng.normal()

        found = check_model(noisy, digits.images, labels)
        assert [w.sign for w in found] == ["stochastic"]
        found = check_results({"fgsm": 0.1, "pgd": 0.2, "square": 0.3, "large": 0.05})
        assert [w.sign for w in found] == ["one step", "large eps"]
        assert check_results({"pgd": 0.2, "square": 0.3, "large": 0.0}) == []

    def test_bad_input_is_named(self, digits, key):
        run = partial(pgd, digits.predict)
        for args, settings, message in (
            ((digits.images * 255, digits.labels), {}, r"images: values from 0 to 255, expected"),
            ((np.zeros((2, 8, 8, 1), np.uint8), [0, 1]), {}, "found uint8; divide 8-bit pixels"),
            ((digits.images, digits.labels + 5), {}, r"labels: \d+ of 64 outside 0 to 9"),
            ((digits.images, digits.labels), {"norm": "l1"}, "norm: expected 'linf' or 'l2'"),
            (
                (digits.images, digits.labels),
                {"eps": -1},
                "eps: expected finite numbers, 0 or more, found -1",
            ),
            ((digits.images, digits.labels), {"steps": 0}, "steps 0, restarts 1: expected 1"),
        ):
            with pytest.raises(ValueError, match=message):
                run(*args, key, **{"eps": EPS, **settings})
        with pytest.raises(ValueError, match=r"predict: expected logits \(64, classes\)"):
            pgd(lambda x: x, digits.images, digits.labels, key, eps=EPS)


class Stored:
    """Images that are only read by the batch, as from a file."""

    def __init__(self, images):
        self._images, self.shape = images, images.shape

    def __len__(self):
        return len(self._images)

    def __getitem__(self, rows):
        return self._images[rows]

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("all images were asked for at once")


def test_only_a_batch_of_images_is_read_and_put_on_the_device_at_once(key):
    images = np.random.default_rng(0).random((10, 4, 4, 3)).astype(np.float32)
    labels = np.zeros(10, int)
    seen = []

    def attack(predict, images, labels, keys, *, eps):
        seen.append((images.shape, labels.shape, keys.shape))
        return images

    def predict(images):
        return jnp.stack([images.sum((1, 2, 3)), 0 * images.sum((1, 2, 3))], 1)

    stored = Stored(images)
    moved = attacked(attack, predict, stored, labels, key, eps=0.1, batch_size=4)
    np.testing.assert_array_equal(moved, images)
    assert seen == [((4, 4, 4, 3), (4,), (4,))] * 3
    assert correct(predict, stored, labels, batch_size=4).all()
