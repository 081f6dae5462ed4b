"""LyCORIS and kohya files: adapters as `<module>.<factor>` in safetensors.

Factors are LyCORIS 4.1's: lora_up, lora_down, lora_mid, hada_*, lokr_*, a1 to b2 (GLoRA), `weight`
and `on_input` ((IA)^3), `diff` and `diff_b` (full) or `w_norm` and `b_norm`, `dora_scale`, with an
`alpha` for each module; `diff_b` may stand beside any. How modules are called is `layer_names`'
matter, what adapter a layer's factors make `layer_configs`'.

Conventions that the files leave open are read from shapes: DoRA's axis from `dora_scale` (one value
for each output, or one for each input), a LoKr whose factors are both whole has no alpha. LyCORIS
lets gradients through DoRA's norm, and so does what is read here.

Reading is strict: a key that no layer has, or of a kind that is not known, is an error.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.kinds.place import Place
from jaxsynth.adapters.kinds.update import UpdateLayer
from jaxsynth.core import io
from jaxsynth.core.errors import UserError
from jaxsynth.core.words import counted
from jaxsynth.weights import hub, recognize
from jaxsynth.weights.adapters import factors, layer_configs
from jaxsynth.weights.adapters.layer_configs import NUMBERS, SIGNS
from jaxsynth.weights.adapters.layer_names import kohya_names

# The prefixes of a pipeline's networks; LyCORIS' own, for any module, is "lycoris".
PREFIXES = ("lora_unet", "lora_te", "lora_te1", "lora_te2", "lycoris")

T = TypeVar("T", bound=nnx.Module)

_OURS = {
    # peft's and diffusers' spellings, which other tools mix in; LyCORIS' own comes last.
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora.down.weight": "lora_A",
    "lora.up.weight": "lora_B",
    "lora_linear_layer.down.weight": "lora_A",
    "lora_linear_layer.up.weight": "lora_B",
    "lora_B.bias": "lora_B_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_down.weight": "lora_A",
    "lora_up.weight": "lora_B",
    "lora_mid.weight": "lora_mid",
    "dora_scale": "magnitude",
    **{f"{name}.weight": name for name in ("a1", "a2", "b1", "b2")},
    "weight": "ia3_l",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
}
# Factors that are convolutions on a convolution.
_CONVOLUTIONS = ("lora_A", "lora_B", "lora_mid", "diff", "b2")
_SAME = re.compile(r"hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2)")
_THEIRS = {ours: theirs for theirs, ours in _OURS.items() if not theirs.endswith("_norm")}
_NORMS = {"diff": "w_norm", "diff_b": "b_norm"}


def write_networks(
    target: str | Path, adapted: Mapping[str, nnx.Module], *, dtype: Any = np.float32
) -> None:
    """Writes the adapters of several networks, by prefix, as one file."""
    tensors: dict[str, np.ndarray] = {}
    for prefix, model in adapted.items():
        if prefix not in PREFIXES:
            raise ValueError(f"prefix {prefix!r}: expected one of {PREFIXES}")
        names = {path: f"{prefix}_{path.replace('.', '_')}" for path in inject.layers(model)}
        tensors |= tensors_of(model, names)
    save(target, tensors, dtype=dtype)


def write_kohya(target: str | Path, adapted: Mapping[str, nnx.Module], *, double: bool) -> None:
    """Writes the adapters of a pipeline's networks as one file, in kohya's names.

    `double` is whether the pipeline has two text encoders. ValueError for a layer or a network that
    such files have no name for.
    """
    tensors: dict[str, np.ndarray] = {}
    for component, model in adapted.items():
        try:
            names = kohya_names(component, model, double=double)
        except KeyError as error:
            raise ValueError(f"kohya's files of SDXL have no layer {error}") from None
        tensors |= tensors_of(model, names)
    save(target, tensors)


def save(
    target: str | Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: Any = np.float32,
) -> None:
    """Writes tensors as one file, through a temporary one."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    cast = {name: np.asarray(value, dtype) for name, value in tensors.items()}
    io.write_bytes(target, hub.to_bytes(cast, {"format": "pt", **(metadata or {})}))


def tensors_of(adapted: nnx.Module, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The tensors of a network's adapters as "<name>.<factor>", `names` by layers' paths.

    ValueError naming an adapter that LyCORIS has no form for.
    """
    found = [
        (p, x) for p, x in inject.layers(adapted).items() if isinstance(x, inject.AdapterLayer)
    ]
    if not found:
        raise ValueError("the network holds no adapters")
    tensors = {}
    for path, layer in found:
        if type(layer.config) not in set(SIGNS.values()):
            raise ValueError(f"{path}: a {layer.kind} layer has no form in LyCORIS' files")
        for suffix, value in _tensors(path, layer).items():
            tensors[f"{names[path]}.{suffix}"] = value
    return tensors


def fill(
    tensors: dict[str, np.ndarray],
    model: T,
    modules: Mapping[str, str],
    source: Any,
    *,
    family: str = "",
) -> T:
    """A copy of the plain network `model` with adapters of these tensors around its layers.

    `modules` are the paths of its layers by the names that files have for them; `family` is the
    base's (`recognize.family_of`).

    Raises UserError naming the file and a key that fits no layer, a layer whose factors are not one
    kind's, or a shape that does not fit, in the file's layout.
    """
    layers = inject.layers(model)
    found: dict[str, dict[str, np.ndarray]] = {}
    keys: dict[tuple[str, str], str] = {}
    for key, value in tensors.items():
        module = next((key[:at] for at in _dots(key) if key[:at] in modules), None)
        if module is None:
            raise UserError(f"{source}: {_unknown(key, tensors, modules, family)}")
        suffix, path = key[len(module) + 1 :], modules[module]
        factor = suffix if suffix in NUMBERS else _ours(suffix)
        if factor is None:
            raise UserError(f"{source}: key {key} is of no kind known here")
        if (path, factor) in keys:
            raise UserError(f"{source}: key {key} gives {keys[path, factor]} a second time")
        keys[path, factor] = key
        found.setdefault(path, {})[factor] = value
    if not found:
        raise UserError(f"{source}: holds no adapters")
    try:
        places = {path: _place(path, layers[path]) for path in found}
        for path, own in found.items():
            _shape(own, places[path])
        config = layer_configs.config_of(found, places, source)
        adapted = registry.add(model, config, rngs=jax.random.key(0))
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: {error}") from error
    arrays = {}
    for path, own in found.items():
        place = places[path]
        for factor, value in own.items():
            if factor not in NUMBERS:
                window = () if place is None else place.size
                arrays[f"{path}.{factor}"] = _from_torch(factor, value, own, window)
    _check(arrays, inject.trainable_variables(adapted), found, keys, source)
    arrays = {name: jnp.asarray(value) for name, value in arrays.items()}
    return inject.load_state(adapted, inject.AdapterState(arrays, config))


def _unknown(key: str, tensors: Mapping[str, Any], modules: Mapping[str, str], base: str) -> str:
    """What is wrong with a key whose module no layer is called."""
    family = recognize.family_of(tensors)
    if family != base:
        # Parts of an SDXL's file look as those of Stable Diffusion 1 and 2 do.
        what = f"the file is of {family}" if family else "the file's layers are not"
        is_not = "the base is not" if family else f"the base is of {base}"
        return (
            f"key {key} names no layer of the network: {what}, and {is_not}; give a base of the "
            "file's model"
        )
    others = sorted({name[: next(_dots(name), len(name))] for name in tensors})[:3]
    return (
        f"key {key} names no layer of the network, whose layers are called {min(modules)}, ...; "
        f"the file's {others}"
    )


def _place(path: str, layer: nnx.Module) -> Place | None:
    """Where the layer's kernel lies; None for a layer without one."""
    return Place.of(layer, "an adapter", path) if type(layer) in (nnx.Linear, nnx.Conv) else None


def _shape(own: dict[str, np.ndarray], place: Place | None) -> None:
    """Gives a layer's factors the number of axes that its layer has, and a bias its scale."""
    if "lora_B_bias" in own:
        rank = layer_configs.rank_of(own) or 1
        own["diff_b"] = own.pop("lora_B_bias") * (float(own.get("alpha", rank)) / rank)
    if place is None:
        return
    taps = math.prod(place.size)
    for name, value in own.items():
        ends = value.shape[2:]
        if not place.size and value.ndim > 2 and math.prod(ends) == 1 and name != "magnitude":
            own[name] = value.reshape(value.shape[:2])
        elif place.size and value.ndim == 2 and name in _CONVOLUTIONS:
            pointwise = name == "lora_B" or (name == "lora_A" and "lora_mid" in own)
            whole = not pointwise
            window = place.size if whole and value.shape[1] % taps == 0 else place.ones
            # Some tools flatten a window with the inputs.
            if window == place.ones or value.shape[1] // taps in (place.c_in, len(value)):
                own[name] = value.reshape(len(value), -1, *window)
        elif name == "lokr_w2" and place.size and taps == 1 and value.ndim == 2:
            own[name] = value.reshape(*value.shape, *place.size)


def _check(
    arrays: Mapping[str, np.ndarray],
    expected: Mapping[str, nnx.Variable],
    found: Mapping[str, Mapping[str, np.ndarray]],
    keys: Mapping[tuple[str, str], str],
    source: Any,
) -> None:
    """UserError where the factors are not those that the adapted network has."""
    for name in sorted(expected.keys() - arrays.keys()):
        path, _, factor = name.rpartition(".")
        if path in found:
            raise UserError(
                f"{source}: {path} has no {_THEIRS.get(factor, factor)}, only {sorted(found[path])}"
            )
    for name, value in arrays.items():
        path, _, factor = name.rpartition(".")
        key = keys.get((path, factor), name)
        if name not in expected:
            raise UserError(f"{source}: key {key} is of a parameter that the layer {path} has not")
        wanted = expected[name].get_value().shape
        if value.shape != wanted:
            own = found[path]
            tucker = "hada_t1" in own or "lokr_t2" in own
            name = "kernel" if factor == "diff" else factor
            theirs = factors.torch_shape(name, wanted, tucker=tucker)
            raise UserError(f"{source}: {key} has shape {own[factor].shape}, expected {theirs}")


def conventions(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """What these tensors leave open, and how they are read: a line for each convention."""
    ends = {key.rpartition(".")[2] for key in tensors} | {
        ".".join(key.split(".")[-2:]) for key in tensors
    }
    alphas = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
    ranked = {
        key[: -len(end)]
        for key in tensors
        for end in (".lora_down.weight", ".lora_A.weight", ".hada_w1_b", ".lokr_w2_b")
        if key.endswith(end)
    }
    notes = []
    if lacking := len(ranked - alphas):
        notes.append(
            f"{lacking} of {counted(len(ranked), 'layer')} have no alpha: read as alpha = rank"
        )
    if {"lokr_w1", "lokr_w2"} <= ends:
        notes.append("LoKr of two whole factors: alpha does not count, as in LyCORIS")
    scales = [value for key, value in tensors.items() if key.endswith(".dora_scale")]
    if scales:
        side = "outputs" if _on_output(scales) else "inputs"
        notes.append(
            f"DoRA's magnitudes are of {side}, by their shapes, and divided by the norm of the "
            "changed weight"
        )
    return notes


def _dots(key: str) -> Iterator[int]:
    return (at for at, letter in enumerate(key) if letter == ".")


def _on_output(scales: Iterable[np.ndarray]) -> bool:
    """Whether magnitudes are of outputs: (out, 1, ...) and not (1, in, ...)."""
    return all(scale.shape[0] > 1 or scale.size == 1 for scale in scales)


def _ours(suffix: str) -> str | None:
    return suffix if _SAME.fullmatch(suffix) else _OURS.get(suffix)


def _tensors(path: str, layer: Any) -> dict[str, np.ndarray]:
    """The tensors of one layer by suffix, in float32."""
    own = {
        name: np.asarray(value.get_value())
        for name, value in vars(layer).items()
        if isinstance(value, inject.Trainable)
    }
    place = getattr(layer, "place", None)
    if isinstance(layer.base, nnx.Embed) or "A_down" in own:
        raise ValueError(f"{path}: this {layer.kind} layer has no form in LyCORIS' files")
    if getattr(layer, "start_A", None) is not None:
        raise ValueError(f"{path}: its start is kept apart; write `to_lora.as_lora` of it")
    if place is not None and place.lead:
        raise ValueError(f"{path}: layers stacked for a scan have no form in such files")
    if "lokr_w1" in own and "lokr_w2" in own:
        # Readers leave alpha out of whole factors.
        own["lokr_w1"] = own["lokr_w1"] * layer.scaling
    theirs = _NORMS if "diff" in own and own["diff"].ndim == 1 else _THEIRS
    tucker = any(name in own for name in ("hada_t1", "lokr_t2"))
    result = {
        theirs.get(name, name): _to_torch(name, value, layer, tucker) for name, value in own.items()
    }
    if isinstance(layer, UpdateLayer):
        rank = layer.config.rank_at(path)
        # Readers divide by the rank: of rsLoRA alpha * sqrt(rank) is left.
        result["alpha"] = np.asarray(layer.scaling * rank)
    if "ia3_l" in own:
        result["on_input"] = np.asarray(float(layer.side == "input"))
    return result


def _to_torch(name: str, value: np.ndarray, layer: Any, tucker: bool) -> np.ndarray:
    if name == "magnitude":
        axes = len(layer.place.size)
        on_output = layer.config.decompose == "output"
        return value.reshape(*((-1, 1) if on_output else (1, -1)), *(1,) * axes)
    if name == "ia3_l":
        axes = len(layer.place.size)
        return (value - 1).reshape(*((1, -1, *(1,) * axes) if axes else (-1,)))
    turned = factors.to_torch("kernel" if name == "diff" else name, value, tucker=tucker)
    if name in ("a1", "a2", "b1"):
        return turned.reshape(*turned.shape, *layer.place.ones)
    return turned


def _from_torch(
    factor: str, value: np.ndarray, own: dict[str, np.ndarray], window: tuple[int, ...]
) -> np.ndarray:
    value = np.asarray(value, np.float32)
    if factor in ("magnitude", "diff_b"):
        return value.ravel()
    if factor == "ia3_l":
        return 1 + value.ravel()
    if factor in ("a1", "a2", "b1"):
        value = value.reshape(value.shape[:2])
    tucker = "hada_t1" in own or "lokr_t2" in own
    return factors.from_torch(factor, value, window=window, tucker=tucker)
