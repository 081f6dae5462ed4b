"""Under fsdp a network's parameters are gathered layer by layer, never all of them at once."""

import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.adapters import registry
from jaxsynth.models import repeat
from jaxsynth.models.clip import CLIPEncoder, CLIPTextConfig
from jaxsynth.training import sharding, trainer
from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.sharding import make_mesh
from jaxsynth.training.trainer import Resident, Task

LAYERS, WIDTH, INNER, TOKENS = 4, 128, 512, 64


class Tower(nnx.Module):
    def __init__(self):
        config = CLIPTextConfig(
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
        )
        self.encoder = CLIPEncoder(config, dtype=jnp.float32, rngs=nnx.Rngs(jax.random.key(0)))

    def __call__(self, x):
        return self.encoder(x, remat="block")[-1]


@dataclass(frozen=True)
class Energy:
    def __call__(self, model, constants, batch, key):
        return jnp.square(model(batch["x"])).mean(), {}


@dataclass(frozen=True)
class First:
    def __call__(self, step, data):
        return {"x": data["x"][:16]}


@pytest.mark.parametrize("fewest", [LAYERS, LAYERS + 1], ids=["scanned", "unrolled"])
def test_parameters_are_gathered_layer_by_layer(fewest, monkeypatch):
    monkeypatch.setattr(repeat, "FEWEST", fewest)
    config = registry.make_config("lora", rank=2, targets=("q_proj", "v_proj"))
    model = nnx.eval_shape(lambda: registry.add(Tower(), config, rngs=jax.random.key(1)))
    task = Task(
        model=model,
        loss=Energy(),
        batches=Resident(
            {"x": jax.ShapeDtypeStruct((16, TOKENS, WIDTH), np.float32)}, First(), sharded=("x",)
        ),
        table=sharding.CLIP,
        key=jax.random.key(0),
    )
    mesh = make_mesh(data=2, fsdp=4)
    plan = trainer.plan("tower", task, TrainingConfig(steps=1, batch_size=16), mesh)
    gathers = next(one for one in plan.collectives if one.kind == "all-gather")
    # The two kernels of each layer's perceptron alone, forward and recomputed.
    assert gathers.count >= 2 * 2 * LAYERS
    shape = dict(plan.largest)["all-gather"]
    largest = math.prod(map(int, re.findall(r"\d+", shape.partition("[")[2])))
    assert largest <= WIDTH * INNER
