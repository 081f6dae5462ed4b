"""Adapters of other kinds as plain LoRA, exactly: for readers that know nothing else.

The added kernel of every `UpdateLayer` is a product of two factors (`low_rank`): LoHa of rank r is
LoRA of rank r^2, LoKr of rank c r (or fewer), VeRA, AdaLoRA and Tucker factors keep their rank, and
PiSSA, OLoRA and Delta-LoRA double it. No singular values are cut off, as in peft's
`convert_to_lora`. DoRA's magnitudes stay beside the factors.
"""

import re
from collections import Counter
from typing import Any

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
        own = config.at(path) if isinstance(config, inject.MixedConfig) else config
        plain = LoRA(layer.base, own, path, jax.random.key(0))
        down, up = factors[path]
        for end, value in (("A", down), ("B", up)):
            variable = getattr(plain, f"{plain.prefix}{end}")
            variable.set_value(jnp.asarray(value.reshape(variable.get_value().shape)))
        for name in ("magnitude", "diff_b"):
            if (value := getattr(layer, name)) is not None:
                setattr(plain, name, inject.Trainable(value[...]))
        return plain

    return inject.map_layers(replace, model)


def _config(found: dict[str, UpdateLayer], ranks: dict[str, int]) -> Any:
    """One configuration of LoRA for all layers, unless only some have DoRA's magnitudes."""
    groups: dict[tuple, list[str]] = {}
    for path, layer in sorted(found.items()):
        groups.setdefault((layer.config.decompose, layer.config.detach_norm), []).append(path)
    configs = []
    for (decompose, detach_norm), paths in groups.items():
        # Of equally common ranks the smaller, so that the result does not depend on an order.
        counts = Counter(ranks[path] for path in paths)
        rank = max(sorted(counts.items()), key=lambda item: item[1])[0]
        others = {f"^{re.escape(path)}": ranks[path] for path in paths if ranks[path] != rank}
        config = LoRAConfig(
            rank=rank,
            alpha=rank,
            targets=tuple(paths),
            rank_pattern=others,
            alpha_pattern=dict(others),
            decompose=decompose,
            detach_norm=detach_norm,
            bias=tuple(path for path in paths if found[path].diff_b is not None) or False,
        )
        configs.append(config)
    return configs[0] if len(configs) == 1 else inject.MixedConfig(tuple(configs))
