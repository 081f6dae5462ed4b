"""Adapters of several ranks in one compiled program: zeros make a small one as large as another.

A server that swaps adapters, or a batch that mixes them, has one program for one set of shapes.
Ranks of zeros add nothing, so a state of any rank up to that of the program fits it exactly; what
its scale alpha / rank differs is put into a factor.
"""

import jax.numpy as jnp
from jaxtyping import Array

from jaxsynth.adapters.inject import AdapterState
from jaxsynth.adapters.kinds.adalora import AdaLoRAConfig
from jaxsynth.adapters.kinds.glora import GLoRAConfig
from jaxsynth.adapters.kinds.loha import LoHaConfig
from jaxsynth.adapters.kinds.lokr import LoKrConfig
from jaxsynth.adapters.kinds.lora import LoRAConfig

_KINDS = (LoRAConfig, LoHaConfig, LoKrConfig, AdaLoRAConfig, GLoRAConfig)
# The axes of the rank in each factor.
_AXES = {
    **dict.fromkeys(("lora_A", "lora_embedding_A", "lora_E"), (-1,)),
    **dict.fromkeys(("lora_B", "lora_embedding_B"), (-2,)),
    **dict.fromkeys(("lora_mid", "hada_t1", "hada_t2", "lokr_t2"), (-1, -2)),
    **dict.fromkeys(("hada_w1_b", "hada_w2_b", "lokr_w1_b", "lokr_w2_b", "a2", "b2"), (-1,)),
    **dict.fromkeys(("hada_w1_a", "hada_w2_a", "lokr_w1_a", "lokr_w2_a", "a1", "b1"), (-2,)),
}
# The factors that take the scale: one of each product.
_SCALED = ("lora_B", "lora_embedding_B", "hada_w1_a", "lokr_w2_a", "a2", "b2")


def padded(state: AdapterState, config: LoRAConfig) -> AdapterState:
    """The state as one of `config`, of the same kind with a rank at least as large everywhere.

    Raises ValueError for a kind whose factors depend on the rank itself (VeRA, a start from W), a
    smaller rank, or a LoKr that the larger rank no longer splits.
    """
    old = state.config
    if type(old) is not type(config) or type(old) not in _KINDS:
        kinds = ", ".join(kind.__name__.removesuffix("Config") for kind in _KINDS)
        names = [type(x).__name__.removesuffix("Config") for x in (old, config)]
        raise ValueError(f"padded: {names[0]} as {names[1]}, expected one kind of {kinds}")
    if getattr(old, "init", "") in ("pissa", "olora"):
        raise ValueError(f"padded: init {old.init!r} starts from as many parts as there are ranks")
    arrays = {}
    for name, value in state.arrays.items():
        path, _, factor = name.rpartition(".")
        rank, wanted = old.rank_at(path), config.rank_at(path)
        if wanted < rank:
            raise ValueError(f"padded: {path} has rank {rank}, more than {wanted}")
        ratio = old.scaling_at(path) / config.scaling_at(path)
        if factor in ("lora_B", "lora_E") and isinstance(old, AdaLoRAConfig):
            # The scale there is alpha / (rank + 1e-5), and E carries it.
            own, other = (n / (n + 1e-5) for n in (rank, wanted))
            ratio = ratio * own / other if factor == "lora_E" else 1.0
        elif factor not in _SCALED:
            ratio = 1.0
        axes = _AXES.get(factor, ())
        value = jnp.asarray(value) * ratio
        arrays[name] = _grown(value, axes, wanted - rank)
    return AdapterState(arrays, config)


def _grown(value: Array, axes: tuple[int, ...], more: int) -> Array:
    """Zeros at the end of these axes."""
    if not axes or not more:
        return value
    pads = [(0, more if axis - value.ndim in axes else 0) for axis in range(value.ndim)]
    return jnp.pad(value, pads)
