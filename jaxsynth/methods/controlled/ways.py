"""The ways to follow conditions that are compared: a ControlNet, and adapters inside the base."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from jaxsynth.adapters import registry
from jaxsynth.adapters.kinds.affiner import AffinerConfig
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.adapters.registry import AdapterChoice
from jaxsynth.data.conditions import CHANNELS
from jaxsynth.models.diffusion.controlled import Controlled
from jaxsynth.models.diffusion.unet import UNet2DCondition
from jaxsynth.tasks.controlled import with_adapters, with_controlnet

# Every layer but the first, which the condition's own input wraps.
ALL = (
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    "conv1", "conv2", "conv_shortcut", "conv", "conv_out", "time_emb_proj", "linear_1", "linear_2",
)  # fmt: skip
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# The way that a run's `--config.adapter=` means.
CHOSEN = "adapter"

# Of the base, pixels per latent, the condition's channels, the rank, the chosen adapter and a key.
Build = Callable[[UNet2DCondition, int, int, int, AdapterChoice, jax.Array], Controlled]


def _by_adapters(make: Callable[[int], Any]) -> Build:
    def build(unet, downscale, channels, rank, _, key) -> Controlled:
        return _adapted(unet, downscale, channels, make(rank), key)

    return build


def _adapted(
    unet: UNet2DCondition, downscale: int, channels: int, config: Any, key: jax.Array
) -> Controlled:
    maker, targets = (None, ()) if config is None else (registry.maker(config), config.targets)
    return with_adapters(unet, downscale, channels, maker, targets, rngs=nnx.Rngs(key))


def _chosen(unet, downscale, channels, rank, adapter: AdapterChoice, key) -> Controlled:
    config = adapter.config(targets=ALL, defaults={"rank": rank})
    return _adapted(unet, downscale, channels, config, key)


def _controlnet(unet, downscale, channels, _, __, key) -> Controlled:
    return with_controlnet(unet, downscale, channels, rngs=nnx.Rngs(key))


def _affiner(targets: tuple[str, ...]) -> Build:
    return _by_adapters(lambda rank: AffinerConfig(rank=rank, targets=targets, gate=False))


WAYS: dict[str, tuple[str, Build]] = {
    "controlnet": ("ControlNet", _controlnet),
    "affiner": ("Affiner (all layers)", _affiner(ALL)),
    "affiner_attention": ("Affiner (attention)", _affiner(ATTENTION)),
    "lora": ("LoRA (all layers)", _by_adapters(lambda rank: LoRAConfig(rank=rank, targets=ALL))),
    "input": ("new input alone", _by_adapters(lambda _: None)),
    CHOSEN: ("chosen adapter", _chosen),
}


@dataclass(frozen=True)
class Way:
    """A way with all that decides what it makes of a base, for conditions of a kind.

    `adapter` is the kind of the way that a run chooses, None for every other one.
    """

    name: str
    rank: int
    adapter: AdapterChoice | None
    kind: str
    seed: int

    def apply(self, unet: UNet2DCondition, downscale: int) -> Controlled:
        """The network to train, of a base whose latents have `downscale` pixels along a side."""
        _, build = WAYS[self.name]
        adapter, key = self.adapter or AdapterChoice(), jax.random.key(self.seed)
        return build(unet, downscale, CHANNELS[self.kind], self.rank, adapter, key)
