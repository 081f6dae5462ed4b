"""What fills an accelerator, in one command: Stable Diffusion 2.1 at 512 pixels in bfloat16.

A training step of one LoRA on 32 images and of ten LoRAs at once, drawing, PGD and corruptions.
torch's side is diffusers and peft under torch.compile, on the same GPU. On a CPU, where nobody
waits for such a network, the shipped base takes its place.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jaxsynth.bench.cases import attacks, corruptions, generate, train_step
from jaxsynth.bench.cases.attacked_networks import AttackCase
from jaxsynth.bench.cases.corruptions import CorruptionCase
from jaxsynth.bench.cases.generate import GenerateCase
from jaxsynth.bench.cases.train_step import TrainCase

_FULL: dict[str, Any] = {"networks": "sd21", "dtype": "bfloat16", "compiled": True}
_TOY: dict[str, Any] = {"networks": "tiny", "dtype": "bfloat16"}
CASES = (
    TrainCase("sd21", batch_size=32, **_FULL),
    TrainCase("sd21-cls", batch_size=4, adapters=10, **_FULL),
    GenerateCase("sd21-generate", images=16, steps=50, **_FULL),
    AttackCase("resnet20", "resnet20", images=1024),
    CorruptionCase("all 19", corruptions.CASES[0].corruptions, images=64),
    TrainCase("toy", batch_size=2, **_TOY),
    TrainCase("toy-cls", batch_size=2, adapters=2, **_TOY),
    GenerateCase("toy-generate", images=2, steps=2, **_TOY),
    AttackCase("toy-mlp", "mlp", images=8),
    CorruptionCase("toy-contrast", ("contrast",), images=1),
)
_MODULES: dict[type, ModuleType] = {
    TrainCase: train_step,
    GenerateCase: generate,
    AttackCase: attacks,
    CorruptionCase: corruptions,
}


def default() -> list[str]:
    """The cases that this machine is for."""
    toy = jax.default_backend() == "cpu"
    return [case.name for case in CASES if case.name.startswith("toy") == toy]


def build(case: Any) -> Any:
    """Our side of a case, with random weights."""
    return _MODULES[type(case)].build(case)


def connect(ours: Any, peer: str) -> Any:
    """torch's side of training and drawing; None where only we run on the accelerator."""
    module = _MODULES[type(ours.case)]
    return module.connect(ours) if module in (train_step, generate) else None


def compare(ours: Any, found: list, peer: Any) -> float | None:
    """The difference of both sides' results, as the case's own benchmark measures it."""
    return _MODULES[type(ours.case)].compare(ours, found, peer)


def peer_call(ours: Any, peer: Any) -> Callable[[], object]:
    """What torch does instead of `ours.step`."""
    return _MODULES[type(ours.case)].peer_call(ours, peer)


def same_bits(case: Any, found: list) -> bool:
    """Whether our side, made anew, gives the bits that it gave."""
    ours = build(case)
    again = [ours.step() for _ in found]
    return all(
        np.array_equal(one, other, equal_nan=True)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True)
    )
