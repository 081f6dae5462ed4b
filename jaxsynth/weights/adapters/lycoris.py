"""LyCORIS and kohya files: adapters of one network as `<prefix>_<module>.<factor>` in safetensors.

A module's path has underscores for its dots ("lora_unet_mid_block_attentions_0_proj_in"), which is
ambiguous by itself, so names are looked up among the layers of the network that the file is for.
Factors are LyCORIS 4.1's: lora_up, lora_down, lora_mid, hada_*, lokr_*, a1 to b2 (GLoRA), `weight`
and `on_input` ((IA)^3), `diff` and `diff_b` (full) or `w_norm` and `b_norm`, `dora_scale`, with an
`alpha` for each module.

Conventions that the files leave open are read from shapes: DoRA's axis from `dora_scale` (one value
for each output, or one for each input), a LoKr whose factors are both whole has no alpha. LyCORIS
lets gradients through DoRA's norm, and so does what is read here.

Reading is strict: a key that no layer has, or of a kind that is not known, is an error.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.kinds.full import FullConfig
from jaxsynth.adapters.kinds.glora import GLoRAConfig
from jaxsynth.adapters.kinds.ia3 import IA3Config
from jaxsynth.adapters.kinds.loha import LoHaConfig
from jaxsynth.adapters.kinds.lokr import LoKrConfig
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.adapters.kinds.place import Place
from jaxsynth.adapters.kinds.update import UpdateLayer
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import replacing
from jaxsynth.weights import hub
from jaxsynth.weights.adapters import factors
from jaxsynth.weights.safetensors import opened

# The prefixes of a pipeline's networks; LyCORIS' own, for any module, is "lycoris".
PREFIXES = ("lora_unet", "lora_te", "lora_te1", "lora_te2", "lycoris")

T = TypeVar("T", bound=nnx.Module)

_OURS = {
    # peft's spelling, which ComfyUI reads too; LyCORIS' own, which is written, comes last.
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
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
_SAME = re.compile(r"hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2)")
_THEIRS = {ours: theirs for theirs, ours in _OURS.items() if not theirs.endswith("_norm")}
_NORMS = {"diff": "w_norm", "diff_b": "b_norm"}
# What tells a kind, by one of its factors.
_SIGNS: dict[str, type] = {
    "lora_A": LoRAConfig,
    "hada_w1_a": LoHaConfig,
    "lokr_w1": LoKrConfig,
    "lokr_w1_a": LoKrConfig,
    "a1": GLoRAConfig,
    "ia3_l": IA3Config,
    "diff": FullConfig,
}


def write_lycoris(
    target: str | Path, adapted: nnx.Module, *, prefix: str = "lora_unet", dtype: Any = np.float32
) -> None:
    """Writes the adapters of a network; ValueError naming one that LyCORIS has no file for."""
    write_networks(target, {prefix: adapted}, dtype=dtype)


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
    with replacing(target) as temporary:
        temporary.write_bytes(hub.to_bytes(cast, {"format": "pt", **(metadata or {})}))


def tensors_of(adapted: nnx.Module, names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The tensors of a network's adapters as "<name>.<factor>", `names` by layers' paths.

    ValueError naming an adapter that LyCORIS has no form for.
    """
    found = [
        (p, x) for p, x in inject.layers(adapted).items() if isinstance(x, inject.AdapterLayer)
    ]
    if not found:
        raise ValueError("write_lycoris: the network holds no adapters")
    tensors = {}
    for path, layer in found:
        if type(layer.config) not in set(_SIGNS.values()):
            raise ValueError(f"{path}: a {layer.kind} layer has no form in LyCORIS' files")
        for suffix, value in _tensors(path, layer).items():
            tensors[f"{names[path]}.{suffix}"] = value
    return tensors


def read_lycoris(source: str | Path, model: T, *, prefix: str = "lora_unet") -> T:
    """A copy of the plain network `model` with the adapters of a file around its layers.

    Raises UserError naming the file and a key that fits no layer, a layer whose factors are not one
    kind's, or a shape that does not fit.
    """
    source = Path(source)
    if not source.is_file():
        raise UserError(f"{source}: no such file; expected an adapter of LyCORIS or kohya")
    names = {f"{prefix}_{path.replace('.', '_')}": path for path in layer_paths(model)}
    return fill(load(source)[0], model, names, source)


def layer_paths(model: nnx.Module) -> list[str]:
    """The paths of the layers that hold anything; an empty list of modules does not."""
    return [
        path
        for path, layer in inject.layers(model).items()
        if isinstance(layer, inject.AdapterLayer)
        or any(isinstance(value, nnx.Variable) for value in vars(layer).values())
    ]


def load(source: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A file's tensors and metadata."""
    with opened(source) as file:
        return file.adapter(), file.metadata


def fill(tensors: dict[str, np.ndarray], model: T, modules: Mapping[str, str], source: Any) -> T:
    """A copy of `model` with adapters of these tensors, whose names of layers are `modules`.

    Raises UserError as `read_lycoris`.
    """
    layers = inject.layers(model)
    if len(set(modules.values())) < len(layer_paths(model)):
        raise UserError(f"{source}: two layers of the network have one name in such a file")
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        module = next((key[:at] for at in _dots(key) if key[:at] in modules), None)
        if module is None:
            others = sorted({name[: next(_dots(name))] for name in tensors})[:3]
            raise UserError(
                f"{source}: key {key} names no layer of the network, whose layers are called "
                f"{sorted(modules)[0]}, ...; the file's {others}"
            )
        suffix = key[len(module) + 1 :]
        factor = suffix if suffix in ("alpha", "on_input") else _ours(suffix)
        if factor is None:
            raise UserError(f"{source}: key {key} is of no kind known here")
        found.setdefault(modules[module], {})[factor] = value
    if not found:
        raise UserError(f"{source}: holds no adapters")
    arrays = {}
    for path, own in found.items():
        layer = layers[path]
        size = Place.of(layer, "an adapter", path).size if isinstance(layer, nnx.Conv) else ()
        for factor, value in own.items():
            if factor not in ("alpha", "on_input"):
                arrays[f"{path}.{factor}"] = _from_torch(factor, value, own, size)
    state = inject.AdapterState({name: jnp.asarray(value) for name, value in arrays.items()})
    shapes = {name: value.shape for name, value in arrays.items()}
    configs = list(_configs(found, source))
    # Shapes tell which it was; if none fits, the first says what does not.
    config = next((c for c in configs if _shapes(model, c) == shapes), configs[0])
    adapted = registry.add(model, config, rngs=jax.random.key(0))
    try:
        return inject.load_state(adapted, dataclasses.replace(state, config=config))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


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
        notes.append(f"{lacking} of {len(ranked)} layers have no alpha: read as alpha = rank")
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


def _shapes(model: nnx.Module, config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the factors that a configuration gives."""
    adapted = nnx.eval_shape(lambda: registry.add(model, config, rngs=jax.random.key(0)))
    found = inject.trainable_variables(adapted)
    return {path: tuple(variable.get_value().shape) for path, variable in found.items()}


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
        raise ValueError(f"{path}: its start is kept apart; write `convert.as_lora` of it")
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


def _configs(found: dict[str, dict[str, np.ndarray]], source: Path) -> Iterator[Any]:
    """The configurations that may have made these factors; LoKr's divisor is not in its file."""
    made = {}
    for path, own in found.items():
        signs = {cls for sign, cls in _SIGNS.items() if sign in own}
        if len(signs) != 1:
            raise UserError(f"{source}: {path} has the factors {sorted(own)}, of no one kind")
        made[path] = signs.pop()
    if len(set(made.values())) > 1:
        names = sorted({cls.__name__.removesuffix("Config") for cls in made.values()})
        raise UserError(f"{source}: adapters of several kinds in one file: {', '.join(names)}")
    cls, targets = next(iter(made.values())), tuple(f"^{re.escape(path)}$" for path in sorted(made))
    if cls is IA3Config:
        inputs = [path for path, own in found.items() if float(own.get("on_input", 0))]
        yield IA3Config(targets, tuple(f"^{re.escape(p)}$" for p in inputs), scales_bias=False)
        return
    if cls is FullConfig:
        biases = {"diff_b" in own for own in found.values()}
        yield FullConfig(targets, "all" if biases == {True} else "weight")
        return
    ranks = {path: rank for path, own in found.items() if (rank := _rank(own))}
    common = max(sorted(Counter(ranks.values()).items()), key=lambda i: i[1])[0] if ranks else 1
    alphas = {
        path: float(own["alpha"]) if "alpha" in own else float(ranks.get(path, common))
        for path, own in found.items()
    }
    options: dict[str, Any] = {
        "rank": common,
        "alpha": common,
        "targets": targets,
        "rank_pattern": {f"^{re.escape(p)}": r for p, r in sorted(ranks.items()) if r != common},
        "alpha_pattern": {f"^{re.escape(p)}": a for p, a in sorted(alphas.items()) if a != common},
    }
    scales = [own["magnitude"] for own in found.values() if "magnitude" in own]
    if scales:
        side = "output" if _on_output(scales) else "input"
        options |= {"decompose": side, "detach_norm": False}
    if cls is not GLoRAConfig:
        options["use_tucker"] = any(
            name in own for own in found.values() for name in ("lora_mid", "hada_t1", "lokr_t2")
        )
    if cls is not LoKrConfig:
        yield cls(**options)
        return
    both = any("lokr_w1_a" in own for own in found.values())
    sizes = {
        size
        for own in found.values()
        for name, value in own.items()
        if name.startswith("lokr_w")
        for size in value.shape[:2]
    }
    divisors = (-1, *sorted(sizes - {1}))
    for factor, whole, turned in itertools.product(divisors, (not ranks, False), (False, True)):
        yield LoKrConfig(
            **options, factor=factor, decompose_both=both, full_matrix=whole, unbalanced=turned
        )


def _rank(own: dict[str, np.ndarray]) -> int | None:
    """The rank of a layer's factors; None for a LoKr of whole ones."""
    if "lora_A" in own:
        return own["lora_A"].shape[0]
    for name in ("hada_w1_b", "a2", "lokr_w2_b", "lokr_w1_b"):
        if name in own:
            return own[name].shape[0]
    return None
