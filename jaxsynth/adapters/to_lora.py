"""Adapters of other kinds as plain LoRA, exactly: for readers that know nothing else.

The added kernel of every `UpdateLayer` is a product of two factors (`low_rank`): LoHa of rank r is
LoRA of rank r^2, LoKr of rank c r (or fewer), VeRA, AdaLoRA and Tucker factors keep their rank, and
PiSSA, OLoRA and Delta-LoRA double it. No singular values are cut off, as in peft's
`convert_to_lora`. DoRA's magnitudes stay beside the factors.
"""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.lora import LoRA, LoRAConfig
from jaxsynth.adapters.kinds.update import UpdateLayer


def as_lora(model: inject.T) -> inject.T:
    """A copy of an adapted network whose adapters are plain LoRA and compute the same.

    Ranks whose part is zero (what AdaLoRA pruned) are left out, but for one. Raises ValueError
    naming the first layer of a kind that adds no kernel.
    """
    found = {
        path: layer
        for path, layer in inject.layers(model).items()
        if isinstance(layer, inject.AdapterLayer)
    }
    if not found:
        raise ValueError("as_lora: the network holds no adapters")
    factors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for path, layer in found.items():
        if not isinstance(layer, UpdateLayer):
            raise ValueError(f"{path}: a {layer.kind} layer adds no kernel, and is no LoRA")
        down, up = map(np.asarray, layer.low_rank())
        kept = np.flatnonzero(np.any(down, axis=tuple(range(down.ndim - 1))))
        kept = kept if kept.size else np.arange(1)
        factors[path] = down[..., kept], layer.scaling * up[..., kept, :]
    config = _config(found, {path: down.shape[-1] for path, (down, _) in factors.items()})

    def replace(path: str, layer: nnx.Module) -> nnx.Module:
        if path not in factors:
            return layer
        # All its values are replaced: any key will do.
        plain = LoRA(layer.base, config, path, jax.random.key(0))
        down, up = factors[path]
        for end, value in (("A", down), ("B", up)):
            variable = getattr(plain, f"{plain.prefix}{end}")
            variable.set_value(jnp.asarray(value.reshape(variable.get_value().shape)))
        if layer.magnitude is not None:
            plain.magnitude = inject.Trainable(layer.magnitude[...])
        return plain

    return inject.map_layers(replace, model)


def _config(found: dict[str, UpdateLayer], ranks: dict[str, int]) -> LoRAConfig:
    """The commonest rank for all layers, the others' by their paths; alpha = rank everywhere."""
    first = next(iter(found.values())).config
    # Of equally common ranks the smaller, so that the result does not depend on an order.
    rank = max(sorted(Counter(ranks.values()).items()), key=lambda item: item[1])[0]
    others = {f"^{re.escape(path)}": own for path, own in sorted(ranks.items()) if own != rank}
    return LoRAConfig(
        rank=rank,
        alpha=rank,
        targets=tuple(sorted(found)),
        rank_pattern=others,
        alpha_pattern=dict(others),
        decompose=first.decompose,
        detach_norm=first.detach_norm,
    )
