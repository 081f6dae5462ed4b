"""peft's adapters beside LoRA: what its folders hold of each kind, there and back.

LoHa, LoKr, AdaLoRA, (IA)^3, OFT, BOFT, GLoRA, VeRA, prompt and prefix tuning, as peft 0.21 writes
and reads them. Where peft means something else by a setting, the values are changed so that its
outputs are ours (a whole LoKr's alpha, the sense of a rotation, VeRA's projections); what it cannot
say is refused.

Files do not say which layers are convolutions: flattened factors and (IA)^3 need the network for
that, and VeRA for the sizes of its projections.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.lokr import LoKrConfig, factorization
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.adapters.kinds.prefix import PrefixConfig
from jaxsynth.adapters.kinds.vera import VeRAConfig, projections
from jaxsynth.core.documents import take
from jaxsynth.core.errors import UserError, shown
from jaxsynth.weights.adapters import factors
from jaxsynth.weights.adapters.lora_files import renamed
from jaxsynth.weights.adapters.peft_settings import FORMS, Fields, Form, kind_of, targets_of

Tensors = dict[str, np.ndarray]

# The version whose conventions these are: peft asks for it, because OFT's have changed.
_VERSION = "0.21.2"
_KEYS, _VALUES = ("to_k", "k_proj", "key"), ("to_v", "v_proj", "value")


def to_peft(
    state: inject.AdapterState, model: nnx.Module | None
) -> tuple[dict[str, Any], Tensors, Tensors]:
    """A state's settings, its tensors by module path and end, and those that all layers share."""
    kind, config = kind_of(state), state.config
    form = FORMS[kind]
    if getattr(config, "bias", False):
        raise ValueError(f"peft's {kind} changes no biases by a factor of its own")
    if getattr(config, "use_rslora", False) or getattr(config, "decompose", "none") != "none":
        raise ValueError(f"peft's {kind} has neither a rank-stabilised scale nor DoRA's magnitudes")
    fields = {"peft_type": kind, "peft_version": _VERSION}
    if form.config is not PrefixConfig:
        fields["target_modules"] = targets_of(config.targets)
    fields |= form.write(config)
    if form.config is PrefixConfig:
        return fields, {}, {"prompt_embeddings": _joined_prompts(kind, state)}
    own = _by_layer(state.arrays)
    if kind == "LOKR":
        fields |= _whole(config, own)
    if kind == "VERA":
        shared, own = _with_projections(config, own, model)
    else:
        shared = {}
    layers = {} if model is None else inject.layers(model)
    tensors: Tensors = {}
    kept: dict[str, list[bool]] = {}
    for path, values in own.items():
        _check_layer(kind, path, layers.get(path))
        _check_names(form, path, values, kind)
        if kind == "ADALORA":
            mask = np.asarray(values["lora_E"]) != 0
            kept[f"{path}.lora_E"] = mask.tolist()
        for factor, value in values.items():
            found = _to_torch(kind, config, path, factor, np.asarray(value), values, layers)
            tensors[f"{path}.{form.names[factor]}"] = found
    if kind == "ADALORA" and not all(all(mask) for mask in kept.values()):
        fields["rank_pattern"] = kept
        for name, mask in kept.items():
            path = name.removesuffix(".lora_E")
            tensors[f"{path}.lora_A"] = tensors[f"{path}.lora_A"][mask]
            tensors[f"{path}.lora_E"] = tensors[f"{path}.lora_E"][mask]
            tensors[f"{path}.lora_B"] = np.ascontiguousarray(tensors[f"{path}.lora_B"][:, mask])
    return fields, tensors, shared


def from_peft(
    fields: dict[str, Any],
    tensors: Tensors,
    source: Any,
    model: nnx.Module | None,
    targets: Iterable[str] = (),
    prefix: str = "",
) -> inject.AdapterState:
    """The state of a folder of any of `FORMS`; `tensors` by module path and end.

    `targets` say where prompts and prefixes go; `prefix` is what the paths begin with here and not
    in the settings. Raises UserError naming what does not fit.
    """
    kind = fields["peft_type"]
    if kind not in FORMS:
        raise UserError(f"{source}: peft_type is {kind}, expected LORA, {', '.join(FORMS)}")
    form = FORMS[kind]
    if form.config is PrefixConfig:
        fields = {**fields, "target_modules": list(targets)}
    shared = {key: tensors.pop(key) for key in ("vera_A", "vera_B") if key in tensors}
    found: dict[str, Tensors] = {}
    ends = {end: factor for factor, end in form.names.items()}
    for key, value in tensors.items() if ends else ():
        end = next((e for e in ends if key.endswith(f".{e}")), None)
        if end is None:
            raise UserError(
                f"{source}: key {key} is none of a {kind} adapter, whose keys end in {sorted(ends)}"
            )
        found.setdefault(key.removesuffix(f".{end}"), {})[ends[end]] = value
    names = {path.removeprefix(prefix): path for path in found}
    taken = Fields(fields, source, list(names))
    try:
        config = renamed(form.read(taken), names)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: {error}") from error
    taken.finish()
    layers = {} if model is None else inject.layers(model)
    if not ends:
        return inject.AdapterState(_split_prompts(kind, tensors, config, layers, source), config)
    if not found:
        raise UserError(f"{source}: holds no {kind} factors")
    arrays = {}
    kept = fields.get("rank_pattern") if kind == "ADALORA" else None
    kept = take({"rank_pattern": kept or {}}, "rank_pattern", dict[str, list[bool]], source)
    kept = {prefix + name.removeprefix(prefix): mask for name, mask in kept.items()}
    for path, own in sorted(found.items()):
        if not any(inject.matches(target, path) for target in config.targets):
            raise UserError(f"{source}: {path} is not among the targets {shown(config.targets)}")
        try:
            _check_names(form, path, own, kind)
            _check_layer(kind, path, layers.get(path))
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
        if kept:
            _fill_up(own, path, kept, config.rank, source)
        _check_rank(own, path, config, source)
        layer = layers.get(path)
        window = tuple(layer.kernel_size) if isinstance(layer, nnx.Conv) else ()
        for factor, value in own.items():
            arrays[f"{path}.{factor}"] = _from_torch(kind, config, factor, value, own, window)
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()}
    if kind == "VERA":
        return _with_our_projections(config, arrays, shared, layers, source)
    return inject.AdapterState(arrays, config)


def _by_layer(arrays: Mapping[str, Any]) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    for name, value in sorted(arrays.items()):
        path, _, factor = name.rpartition(".")
        found.setdefault(path, {})[factor] = np.asarray(value, np.float32)
    return found


def _check_layer(kind: str, path: str, layer: nnx.Module | None) -> None:
    """Raises ValueError where peft's kind does something else on a layer like that."""
    window = isinstance(layer, nnx.Conv) and math.prod(layer.kernel_size) > 1
    if kind in ("OFT", "BOFT") and window:
        raise ValueError(f"{path}: peft's {kind} of a convolution rotates its taps too")


def _check_names(form: Form, path: str, values: Tensors, kind: str) -> None:
    names = set(values)
    if unknown := names - set(form.names):
        raise ValueError(f"{path}: peft's {kind} has no {sorted(unknown)}")
    needed = {
        "LOHA": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
        "LOKR": {"lokr_w1"} if "lokr_w1" in names else {"lokr_w1_a", "lokr_w1_b"},
        "GLORA": {"A_down", "A_up", "B_down", "B_up"},
    }.get(kind, set(form.names))
    if kind == "LOKR":
        needed = needed | ({"lokr_w2"} if "lokr_w2" in names else {"lokr_w2_a", "lokr_w2_b"})
    if missing := needed - names:
        raise ValueError(f"{path} has no {sorted(missing)[0]}, only {sorted(names)}")


def _check_rank(own: Tensors, path: str, config: Any, source: Any) -> None:
    for name in ("hada_w1_b", "hada_w2_b", "lokr_w2_b", "lokr_w1_b", "lora_E", "A_down"):
        if name in own and own[name].shape[0] != config.rank_at(path):
            raise UserError(
                f"{source}: {path}.{name} has shape {own[name].shape}, expected rank "
                f"{config.rank_at(path)} first"
            )


def _to_torch(
    kind: str, config: Any, path: str, factor: str, value: np.ndarray, own: Tensors, layers: dict
) -> np.ndarray:
    if factor == "ia3_l":
        inner = any(inject.matches(target, path) for target in config.feedforward)
        layer = layers.get(path)
        if isinstance(layer, nnx.Conv):
            return value.reshape(1, -1, *(1,) * len(layer.kernel_size))
        return value.reshape((1, -1) if inner else (-1, 1))
    if factor == "oft_R":
        if kind == "BOFT":  # Q is half of what is there less its transpose, and turns back
            return factors.upper_blocks(-2 * value)[None]
        return value if config.cayley == "neumann" else -value
    if factor in ("rescale", "lora_E"):
        return value.reshape(-1, 1)
    if kind == "LOKR" and factor == "lokr_w1" and "lokr_w2" in own:
        value = value * _whole_scale(config, path)
    tucker = any(name in own for name in ("hada_t1", "lokr_t2"))
    turned = factors.to_torch(factor, value, tucker=tucker)
    return turned.reshape(len(turned), -1) if kind == "ADALORA" else turned


def _from_torch(
    kind: str, config: Any, factor: str, value: np.ndarray, own: Tensors, window: tuple[int, ...]
) -> np.ndarray:
    value = np.asarray(value, np.float32)
    if factor in ("ia3_l", "rescale", "lora_E"):
        return value.ravel()
    if factor == "oft_R":
        if kind == "BOFT":
            return -factors.upper_values((value - np.swapaxes(value, -1, -2)) / 2)[0]
        return value if config.cayley == "neumann" else -value
    if kind == "ADALORA" and factor == "lora_A" and window:
        value = value.reshape(len(value), -1, *window)
    tucker = any(name in own for name in ("hada_t1", "lokr_t2"))
    return factors.from_torch(factor, value, window=window, tucker=tucker)


def _fill_up(own: Tensors, path: str, kept: dict, rank: int, source: Any) -> None:
    """AdaLoRA's pruned factors at their full rank, zero where a rank is gone."""
    mask = np.asarray(kept.get(f"{path}.lora_E", [True] * rank), bool)
    found = {name: own[name].shape[1 if name == "lora_B" else 0] for name in own}
    if mask.size != rank or set(found.values()) != {int(mask.sum())}:
        raise UserError(
            f"{source}: {path} has ranks {found}, expected {int(mask.sum())} of {mask.size} as "
            f"rank_pattern says, and init_r {rank}"
        )
    for name, value in own.items():
        axis = 1 if name == "lora_B" else 0
        shape = list(value.shape)
        shape[axis] = rank
        whole = np.zeros(shape, np.float32)
        whole[(slice(None),) * axis + (mask,)] = value
        own[name] = whole


def _whole_scale(config: LoKrConfig, path: str) -> float:
    """Our scale of a LoKr of two whole factors, over peft's."""
    own = config.scaling_at(path)
    ours = own if config.full_alpha else 1.0
    return ours if config.full_matrix else ours / own


def _whole(config: LoKrConfig, own: dict[str, Tensors]) -> dict[str, Any]:
    """The settings by which peft splits as we did; ValueError where none do."""
    most = 1
    for path, values in own.items():
        (c, a), (d, b) = _lokr_sizes(values)
        for side, pair in (("input", (c, d)), ("output", (a, b))):
            made = factorization(math.prod(pair), config.factor, ordered=False)
            if made != pair:
                raise ValueError(
                    f"{path}: its {side} is split into {pair}, which peft's decompose_factor "
                    f"{config.factor} splits into {made}"
                )
        most = max(most, a, b, c, d)
    # peft has no switch for whole factors, but takes them where the rank is no saving.
    if not config.full_matrix:
        return {}
    return {"r": most, "alpha": most, "rank_pattern": {}, "alpha_pattern": {}}


def _lokr_sizes(own: Tensors) -> tuple[tuple[int, int], tuple[int, int]]:
    """(c, a) of the first factor and (d, b) of the second, in our layout."""
    if "lokr_w1" in own:
        first = own["lokr_w1"].shape[-2:]
    else:
        first = own["lokr_w1_b"].shape[-2], own["lokr_w1_a"].shape[-1]
    if "lokr_w2" in own:
        return first, own["lokr_w2"].shape[-2:]
    return first, (own["lokr_w2_b"].shape[-2], own["lokr_w2_a"].shape[-1])


def _sizes(model_layers: dict[str, nnx.Module], paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(in, out) of linear layers; ValueError for another one."""
    found = {}
    for path in paths:
        layer = model_layers.get(path)
        if not isinstance(layer, nnx.Linear):
            name = "no layer" if layer is None else type(layer).__name__
            raise ValueError(f"{path}: peft's VeRA adapts linear layers, found {name}")
        found[path] = layer.kernel.get_value().shape
    return found


def _with_projections(
    config: VeRAConfig, own: dict[str, Tensors], model: nnx.Module | None
) -> tuple[Tensors, dict[str, Tensors]]:
    """The projections that all layers cut theirs from, and the vectors that go with them."""
    if model is None:
        raise ValueError("peft's VeRA holds its projections: give the network, for their sizes")
    sizes = _sizes(inject.layers(model), own)
    widest, longest = (max(size[i] for size in sizes.values()) for i in (0, 1))
    a, b = projections(config, config.rank, widest, longest)
    shared = {"vera_A": np.asarray(a).T, "vera_B": np.asarray(b).T}
    shared = {name: np.ascontiguousarray(value) for name, value in shared.items()}
    changed = {}
    for path, values in own.items():
        # Here each layer's projection has the deviation of its own width.
        factor = math.sqrt(widest / sizes[path][0])
        changed[path] = {
            "vera_lambda_d": values["vera_lambda_d"] * factor,
            "vera_lambda_b": values["vera_lambda_b"] * config.scaling_at(path),
        }
    return shared, changed


def _with_our_projections(
    config: VeRAConfig, arrays: dict, shared: Tensors, layers: dict, source: Any
) -> inject.AdapterState:
    """VeRA where the file's projections are those of its seed here; else the LoRA that it is."""
    if set(shared) != {"vera_A", "vera_B"} or not layers:
        what = "give the network" if shared else "vera_A and vera_B are missing"
        raise UserError(f"{source}: VeRA needs its projections and the sizes of layers: {what}")
    paths = sorted({name.rpartition(".")[0] for name in arrays})
    try:
        sizes = _sizes(layers, paths)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    a, b = (np.asarray(shared[name], np.float32).T for name in ("vera_A", "vera_B"))
    made = projections(config, config.rank, a.shape[0], b.shape[1])
    pairs = zip(made, (a, b), strict=True)
    if all(x.shape == y.shape and np.allclose(x, y, atol=1e-6) for x, y in pairs):
        for path in paths:
            name = f"{path}.vera_lambda_d"
            arrays[name] = arrays[name] * math.sqrt(sizes[path][0] / a.shape[0])
        return inject.AdapterState(arrays, config)
    found = {}
    for path in paths:
        c_in, c_out = sizes[path]
        found[f"{path}.lora_A"] = a[:c_in] * arrays[f"{path}.vera_lambda_d"]
        found[f"{path}.lora_B"] = b[:, :c_out] * arrays[f"{path}.vera_lambda_b"]
    lora = LoRAConfig(config.rank, config.rank, config.dropout, config.targets)
    return inject.AdapterState({name: jnp.asarray(x) for name, x in found.items()}, lora)


def _prompt_order(paths: Iterable[str]) -> list[str]:
    """Prefixed layers as peft counts them: by the numbers in their paths, keys before values."""

    def place(path: str) -> tuple:
        parent, _, last = path.rpartition(".")
        parts = [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parent.split(".")]
        if last not in (*_KEYS, *_VALUES):
            raise ValueError(f"{path}: expected keys and values, named {_KEYS} and {_VALUES}")
        return parts, last in _VALUES

    ordered = sorted(paths, key=place)
    for first, second in zip(ordered[::2], ordered[1::2], strict=len(ordered) % 2 == 0):
        if first.rpartition(".")[0] != second.rpartition(".")[0]:
            raise ValueError(f"{first}: peft's prefixes are for keys and values, found one of them")
    if len(ordered) % 2:
        raise ValueError(f"{ordered[-1]}: peft's prefixes are for keys and values, found one")
    return ordered


def _joined_prompts(kind: str, state: inject.AdapterState) -> np.ndarray:
    rows = {name.removesuffix(".prefix"): np.asarray(x) for name, x in state.arrays.items()}
    order = list(rows) if kind == "PROMPT_TUNING" else _prompt_order(rows)
    if len({rows[path].shape for path in order}) > 1:
        raise ValueError("peft's prefixes are of one width in all layers")
    return np.concatenate([rows[path] for path in order], axis=-1)


def _split_prompts(kind: str, tensors: Tensors, config: Any, layers: dict, source: Any) -> dict:
    if set(tensors) != {"prompt_embeddings"}:
        raise UserError(f"{source}: holds {sorted(tensors)}, expected prompt_embeddings alone")
    value = tensors["prompt_embeddings"]
    paths = [p for p in layers if any(inject.matches(t, p) for t in config.targets)]
    try:
        order = paths if kind == "PROMPT_TUNING" else _prompt_order(paths)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    count = max(len(order), 1)
    if not order or (kind == "PROMPT_TUNING" and count > 1) or value.shape[1] % count:
        raise UserError(
            f"{source}: prompts of shape {value.shape} for the layers {order} that the targets "
            f"{config.targets} match in the given network"
        )
    parts = np.split(np.asarray(value, np.float32), count, axis=1)
    return {f"{path}.prefix": jnp.asarray(p) for path, p in zip(order, parts, strict=True)}
