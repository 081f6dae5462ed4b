"""Recipes that are compared with each other differ in what they are named for alone."""

import math

import numpy as np
import pytest

from jaxsynth.adapters.inject import AdapterLayer, extract, layers
from jaxsynth.methods.diffscaler.recipes import Adaptation
from jaxsynth.models.diffusion.dit import DiT, DiTConfig
from tests.methods.small_base import random_network

DIT = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    out_channels=8,
    sample_size=4,
    num_embeds_ada_norm=3,
)


@pytest.fixture(scope="module")
def base() -> DiT:
    return random_network(DiT, DIT, 0)


def adapted(base: DiT, recipe: str) -> DiT:
    return Adaptation(recipe, rank=4, lora_rank=8, adapter=None, seed=0).apply(base, 2)


def test_ranks_by_layer_start_from_one_scale(base):
    """Of both recipes, so that neither has the larger steps."""
    for recipe, down in (("lora_ranked", "lora_A"), ("affiner_ranked", "down")):
        found = {
            name: np.asarray(value)
            for name, value in extract(adapted(base, recipe)).arrays.items()
            if name.rsplit(".", 1)[-1] == down
        }
        assert len(found) == 10
        ranks = {value.shape[-1] for value in found.values()}
        assert len(ranks) == 4, "of query and key, the ends, the feed-forward block, the others"
        unit = [value.ravel() * math.sqrt(fan_in(name, value)) for name, value in found.items()]
        assert np.concatenate(unit).std() == pytest.approx(math.sqrt(2), rel=0.05)


def fan_in(name: str, value: np.ndarray) -> int:
    """Inputs of the down factor; blocks' parameters are stacked on a leading axis."""
    own = value.shape[1:] if name.startswith("transformer_blocks") else value.shape
    return math.prod(own[:-1])


def test_every_ranked_layer_has_the_scale_1(base):
    model = adapted(base, "lora_ranked")
    scales = {
        path: layer.scaling
        for path, layer in layers(model).items()
        if isinstance(layer, AdapterLayer) and hasattr(layer, "scaling")
    }
    assert len(scales) == 10 and set(scales.values()) == {1.0}
