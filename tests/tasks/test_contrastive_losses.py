"""The clones' losses against their formulas in float64, on a mesh, and in bfloat16."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding

from jaxsynth.tasks import contrastive_losses as losses
from jaxsynth.training.sharding import BATCH, make_mesh

ROWS, DIMS, PROTOTYPES = 16, 8, 12
IDS = np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 5, 5, 5])


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def multi_positive(q, k, ids, temperature, leave_out_self) -> float:
    """Row by row, as the paper writes it."""
    q, k, values = unit(q), unit(k), []
    for i in range(len(q)):
        others = [j for j in range(len(k)) if not (leave_out_self and i == j)]
        positives = [j for j in others if ids[i] == ids[j]]
        if not positives:
            continue
        scores = {j: q[i] @ k[j] / temperature for j in others}
        whole = math.log(sum(math.exp(score) for score in scores.values()))
        values.append(-sum(scores[j] - whole for j in positives) / len(positives))
    return float(np.mean(values))


def sinkhorn(scores, temperature, iterations=3) -> np.ndarray:
    """SwAV's, in its own order of operations."""
    q = np.exp(scores.astype(np.float64) / temperature).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * q.shape[0]
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


@pytest.mark.parametrize("own", [True, False])
def test_multi_positive_is_the_papers_sum(own):
    q, k = arrays(0, (ROWS, DIMS), (ROWS, DIMS))
    k = q if own else k
    left_out = jnp.eye(ROWS, dtype=bool) if own else None
    found = losses.multi_positive(
        *map(jnp.asarray, (q, k, IDS, IDS)), temperature=0.1, left_out=left_out
    )
    np.testing.assert_allclose(found, multi_positive(q, k, IDS, 0.1, own), rtol=1e-5)


def test_with_two_views_of_each_image_it_is_nt_xent():
    """SimCLR's loss: the one positive is the other view."""
    (z,) = arrays(1, (ROWS, DIMS))
    ids = np.tile(np.arange(ROWS // 2), 2)
    scores = unit(z) @ unit(z).T / 0.5
    np.fill_diagonal(scores, -np.inf)
    partner = (np.arange(ROWS) + ROWS // 2) % ROWS
    wanted = -np.log(softmax(scores)[np.arange(ROWS), partner]).mean()
    found = losses.multi_positive(
        *map(jnp.asarray, (z, z, ids, ids)), temperature=0.5, left_out=jnp.eye(ROWS, dtype=bool)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_sinkhorn_and_the_patch_loss():
    scores, student = arrays(2, (ROWS, PROTOTYPES), (ROWS, PROTOTYPES))
    weights = np.zeros(ROWS, np.float32)
    weights[: ROWS // 2] = 1
    found = losses.sinkhorn(jnp.asarray(scores), temperature=0.04, weights=jnp.asarray(weights))
    wanted = sinkhorn(scores[: ROWS // 2], 0.04)
    np.testing.assert_allclose(found[: ROWS // 2], wanted, atol=1e-5)
    assert not np.asarray(found[ROWS // 2 :]).any()
    np.testing.assert_allclose(np.asarray(found[: ROWS // 2]).sum(1), 1, atol=1e-5)
    value = losses.patch_loss(jnp.asarray(student), found, jnp.asarray(weights), temperature=0.1)
    logs = np.log(softmax(student[: ROWS // 2].astype(np.float64) / 0.1))
    np.testing.assert_allclose(value, -(wanted * logs).sum(1).mean(), rtol=1e-5)


def test_clip_is_torchs_cross_entropy_in_both_directions():
    image, text = arrays(3, (ROWS, DIMS), (ROWS, DIMS))
    found = losses.image_text(*map(jnp.asarray, (image, text, np.arange(ROWS))), scale=10.0)
    one, other = (torch.nn.functional.normalize(torch.tensor(x)) for x in (image, text))
    logits, target = 10 * one @ other.T, torch.arange(ROWS)
    loss = torch.nn.functional.cross_entropy
    wanted = (loss(logits, target) + loss(logits.T, target)) / 2
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_sigmoid_is_the_papers_sum():
    image, text = arrays(4, (ROWS, DIMS), (ROWS, DIMS))
    found = losses.image_text_sigmoid(*map(jnp.asarray, (image, text, IDS)), scale=10.0, bias=-10.0)
    wanted = 0.0
    for i in range(ROWS):
        for j in range(ROWS):
            score = 10 * unit(image)[i] @ unit(text)[j] - 10
            sign = 1 if IDS[i] == IDS[j] else -1
            wanted += math.log1p(math.exp(-sign * score)) / ROWS
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


LOSSES = {
    "multi-positive": lambda x, y, ids: losses.multi_positive(
        x, y, ids, ids, temperature=0.1, left_out=jnp.eye(len(x), dtype=bool)
    ),
    "softmax": lambda x, y, ids: losses.image_text(x, y, ids, scale=10.0),
    "sigmoid": lambda x, y, ids: losses.image_text_sigmoid(x, y, ids, scale=10.0, bias=-10.0),
    "patches": lambda x, y, ids: losses.patch_loss(
        x, losses.sinkhorn(y, temperature=0.04), (ids % 2).astype(jnp.float32), temperature=0.1
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_eight_devices_have_the_loss_of_one_and_gather_features_alone(name):
    rows = 128
    x, y = arrays(5, (rows, DIMS), (rows, DIMS))
    ids = np.repeat(np.arange(rows // 4), 4)
    step = jax.jit(jax.value_and_grad(LOSSES[name], argnums=(0, 1)))
    one = step(*map(jnp.asarray, (x, y, ids)))
    place = NamedSharding(make_mesh(), BATCH)
    cut = [jax.device_put(array, place) for array in (x, y, ids)]
    compiled = step.lower(*cut).compile()
    for wanted, found in zip(jax.tree.leaves(one), jax.tree.leaves(compiled(*cut)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    gathered = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]*all-gather\(", compiled.as_text())
    assert gathered or name == "patches", "nothing is gathered: the pattern finds none"
    for _, dims in gathered:
        assert math.prod(int(n) for n in dims.split(",") if n) <= rows * DIMS, (name, dims)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_features_give_finite_losses_and_gradients(name):
    x, y = (jnp.asarray(a, jnp.bfloat16) * 100 for a in arrays(6, (ROWS, DIMS), (ROWS, DIMS)))
    found = jax.value_and_grad(LOSSES[name])(x, y, jnp.asarray(IDS))
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(found))


def test_the_measures_of_collapse_tell_it():
    even, point = arrays(7, (512, DIMS))[0], np.ones((64, DIMS), np.float32)
    line = np.outer(np.linspace(-1, 1, 64), np.eye(DIMS)[0]).astype(np.float32) + 0.5
    found = {name: losses.spread(jnp.asarray(x)) for name, x in
             (("even", even), ("point", point), ("line", line))}  # fmt: skip
    assert found["even"]["feature_std"] > 0.9 and found["even"]["effective_rank"] > DIMS - 0.2
    assert found["point"]["feature_std"] < 1e-3
    assert found["line"]["effective_rank"] < 1.2
