"""What adapter made the factors of each layer of a file: its kind and its settings.

Files say neither, and their layers differ: attention with one divisor of a LoKr and feed-forward
with another, convolutions with Tucker factors or without, norms changed as a whole beside LoRA, a
change of the bias where a layer has one. So each layer is judged by its own factors, layers of the
same settings are put together, and what is left are as few configurations as there can be.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.full import FullConfig
from jaxsynth.adapters.kinds.glora import GLoRAConfig
from jaxsynth.adapters.kinds.ia3 import IA3Config
from jaxsynth.adapters.kinds.loha import LoHaConfig
from jaxsynth.adapters.kinds.lokr import LoKrConfig, shapes
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.adapters.kinds.place import Place
from jaxsynth.core.errors import UserError
from jaxsynth.weights.adapters import factors

# What tells a kind, by one of its factors.
SIGNS: dict[str, type] = {
    "lora_A": LoRAConfig,
    "lora_B": LoRAConfig,
    "hada_w1_a": LoHaConfig,
    "lokr_w1": LoKrConfig,
    "lokr_w1_a": LoKrConfig,
    "a1": GLoRAConfig,
    "ia3_l": IA3Config,
    "diff": FullConfig,
}
# Single numbers beside the factors.
NUMBERS = ("alpha", "on_input")
_TUCKER = ("lora_mid", "hada_t1", "lokr_t2")

Own = Mapping[str, np.ndarray]


def config_of(found: Mapping[str, Own], places: Mapping[str, Place | None], source: Any) -> Any:
    """The configuration of these factors, by layer in the file's layout, and of their layers.

    A layer without a kernel (a norm) has no place. Raises UserError naming a layer whose factors
    are of no kind, or of no LoKr that its layer can have.
    """
    kinds = {path: _kind(path, own, source) for path, own in found.items()}
    windows = {path for path, place in places.items() if place and math.prod(place.size) > 1}
    tucker = {any(name in found[path] for name in _TUCKER) for path in windows & found.keys()}
    groups: dict[tuple, list[str]] = {}
    for path, own in found.items():
        own_tucker = any(name in own for name in _TUCKER)
        # A layer without a window has no Tucker factors in either setting.
        with_tucker = own_tucker if path in windows else tucker == {True}
        key = (kinds[path], _side(path, own, found), with_tucker)
        groups.setdefault(key, []).append(path)
    configs = []
    for (kind, side, with_tucker), paths in groups.items():
        own = {path: found[path] for path in paths}
        if kind is FullConfig:
            configs += _full(own)
        elif kind is IA3Config:
            inner = [path for path, values in own.items() if float(values.get("on_input", 0))]
            configs.append(IA3Config(_exact(own), _exact(inner), scales_bias=False))
        else:
            options = _ranked(own) | {"decompose": side, "detach_norm": side == "none"}
            if kind is not GLoRAConfig:
                options["use_tucker"] = with_tucker
            if kind is LoKrConfig:
                configs += _lokr(own, places, options, source)
            else:
                configs.append(kind(**options))
    return configs[0] if len(configs) == 1 else inject.MixedConfig(tuple(configs))


def _kind(path: str, own: Own, source: Any) -> type:
    kinds = {kind for sign, kind in SIGNS.items() if sign in own}
    if not kinds and "diff_b" in own:
        return FullConfig
    if len(kinds) != 1:
        raise UserError(f"{source}: {path} has the factors {sorted(own)}, of no one kind")
    return kinds.pop()


def _exact(paths: Any) -> tuple[str, ...]:
    return tuple(f"^{re.escape(path)}$" for path in sorted(paths))


def _side(path: str, own: Own, found: Mapping[str, Own]) -> str:
    """The axis of DoRA's magnitudes: (out, 1, ...) or (1, in, ...); of (1, 1) as elsewhere."""
    scale = own.get("magnitude")
    if scale is None:
        return "none"
    others = [values["magnitude"] for values in found.values() if "magnitude" in values]
    judged = [one for one in (scale, *others) if one.size > 1] or [scale]
    return "output" if judged[0].shape[0] > 1 or judged[0].size == 1 else "input"


def _full(found: Mapping[str, Own]) -> list[FullConfig]:
    groups: dict[Any, list[str]] = {}
    for path, own in found.items():
        names = {"diff", "diff_b"} & own.keys()
        which = "all" if len(names) == 2 else "weight" if "diff" in names else "bias"
        groups.setdefault(which, []).append(path)
    return [FullConfig(_exact(paths), which) for which, paths in groups.items()]


def _ranked(found: Mapping[str, Own]) -> dict[str, Any]:
    """Ranks and alphas, the commonest for all and the others by path, and biases."""
    ranks = {path: rank for path, own in found.items() if (rank := rank_of(own))}
    # Of equally common ranks the smaller, so that the result does not depend on an order.
    common = max(sorted(Counter(ranks.values()).items()), key=lambda i: i[1])[0] if ranks else 1
    alphas = {
        path: float(own["alpha"]) if "alpha" in own else float(ranks.get(path, common))
        for path, own in found.items()
    }
    return {
        "rank": common,
        "alpha": common,
        "targets": _exact(found),
        "rank_pattern": {f"^{re.escape(p)}": r for p, r in sorted(ranks.items()) if r != common},
        "alpha_pattern": {f"^{re.escape(p)}": a for p, a in sorted(alphas.items()) if a != common},
        "bias": _bias(found),
    }


def _bias(found: Mapping[str, Own]) -> bool | tuple[str, ...]:
    """The layers that change their bias too."""
    return _exact(path for path, own in found.items() if "diff_b" in own) or False


def rank_of(own: Own) -> int | None:
    """The rank of a layer's factors in the file's layout; None for a LoKr of whole ones."""
    for name in ("lora_A", "hada_w1_b", "a2", "lokr_w2_b", "lokr_w1_b"):
        if name in own:
            return own[name].shape[0]
    return None


def _lokr(
    found: Mapping[str, Own],
    places: Mapping[str, Place | None],
    options: dict[str, Any],
    source: Any,
) -> list[LoKrConfig]:
    """The divisors, which the file does not say: those that give the most layers their shapes."""
    sizes = {
        size
        for own in found.values()
        for name, value in own.items()
        if name.startswith("lokr_w")
        for size in value.shape[:2]
    }
    whole = all(rank_of(own) is None for own in found.values())
    ways = [
        {"factor": factor, "decompose_both": both, "full_matrix": full, "unbalanced": turned}
        for full, both, factor, turned in itertools.product(
            (whole, not whole), (False, True), (-1, *sorted(sizes - {1})), (False, True)
        )
    ]
    configs = [LoKrConfig(**options, **way) for way in ways]
    fitting = {
        path: {number for number, one in enumerate(configs) if _fits(one, path, own, places[path])}
        for path, own in found.items()
    }
    result = []
    while fitting:
        counts = Counter(number for numbers in fitting.values() for number in numbers)
        for path in [path for path, numbers in fitting.items() if not numbers]:
            # Of a size, or of a rank for its size, that no rule gives: as it is.
            own = found[path]
            config = LoKrConfig(**options, **_as_it_is(own))
            if not _fits(config, path, own, places[path]):
                raise UserError(
                    f"{source}: {path} has {_said(own)}, which make no kernel of the layer's "
                    f"shape {_kernel(places[path])}"
                )
            configs.append(config)
            fitting[path].add(len(configs) - 1)
            counts[len(configs) - 1] += 1
        best = max(sorted(counts), key=lambda number: counts[number])
        paths = [path for path, numbers in fitting.items() if best in numbers]
        fitting = {path: numbers for path, numbers in fitting.items() if path not in paths}
        own = {"targets": _exact(paths), "bias": _bias({path: found[path] for path in paths})}
        for name in ("rank_pattern", "alpha_pattern"):
            known = {f"^{re.escape(path)}" for path in paths}
            own[name] = {p: x for p, x in options[name].items() if p in known}
        result.append(replace(configs[best], **own))
    return result


def _as_it_is(own: Own) -> dict[str, Any]:
    """The settings that name the size of w1, and which of both factors are whole."""
    whole = "lokr_w1" in own, "lokr_w2" in own
    if whole[0]:
        a, c = own["lokr_w1"].shape[:2]
    else:
        a, c = own["lokr_w1_a"].shape[0], own["lokr_w1_b"].shape[1]
    return {"first": (c, a), "whole": whole}


def _fits(config: LoKrConfig, path: str, own: Own, place: Place | None) -> bool:
    if place is None:
        return False
    try:
        wanted = shapes(config, config.rank_at(path), place)
    except ValueError:
        return False
    names = {name for name in own if name.startswith("lokr_")}
    if names != wanted.keys():
        return False
    tucker = "lokr_t2" in own
    return all(
        factors.torch_shape(name, wanted[name], tucker=tucker) == tuple(own[name].shape)
        for name in names
    )


def _said(own: Own) -> str:
    return ", ".join(
        f"{name} {tuple(value.shape)}" for name, value in sorted(own.items()) if name not in NUMBERS
    )


def _kernel(place: Place | None) -> tuple[int, ...]:
    return () if place is None else (place.c_out, place.c_in, *place.size)
