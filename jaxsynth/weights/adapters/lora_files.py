"""LoRA and DoRA in the layout of peft and diffusers: their keys, factors and settings, both ways.

Names and semantics are those that peft 0.21 and diffusers 0.42 write and read; the tests load every
file in both directions. Reading is strict, because a key that peers skip silently is an adapter
that does not act.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxsynth.adapters.inject import AdapterState, configs_of, matches
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.core.errors import UserError, shown
from jaxsynth.weights.adapters import factors, peft_settings
from jaxsynth.weights.adapters.layer_names import TEXT_MODEL

FACTORS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_B.bias": "bias",
    ".lora.down.weight": "lora_A",
    ".lora.up.weight": "lora_B",
    ".lora_linear_layer.down.weight": "lora_A",
    ".lora_linear_layer.up.weight": "lora_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_embedding_A": "lora_embedding_A",
    ".lora_embedding_B": "lora_embedding_B",
}
# diffusers before 0.20: the attention processors held the adapters.
_LEGACY = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")
# The name of an adapter in a model's state dict, which peft leaves out of its files.
_NAMED = re.compile(
    r"\.(lora_[AB]|lora_magnitude_vector|lora_embedding_[AB])\.(?!weight$|bias$)[^.]+"
    r"(?=\.weight$|\.bias$|$)"
)
_WRAPPED = re.compile(r"^((?:unet|transformer|text_encoder(?:_2)?)\.)?base_model\.model\.")
_OTHER_KINDS = {
    "LyCORIS DoRA": r"\.dora_scale$",
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "IA3": r"\.ia3_",
    "AdaLoRA": r"\.lora_E$",
    "OFT": r"\.(oft_R|oft_blocks|boft_R|boft_s)",
    "LoCon (Tucker)": r"\.lora_mid\.",
    "kohya-format": r"\.(lora_down|lora_up)\.weight$",
}
# Initialisations that leave the base weights as they are; others (pissa, olora, ...) change them.
_INITS = {True: "kaiming", False: "kaiming", "gaussian": "gaussian", "orthogonal": "kaiming"}


def canonical(key: str) -> str:
    """A key without what tools wrap around it: an adapter's name, a PeftModel, old processors."""
    key = _NAMED.sub(r".\1", _WRAPPED.sub(lambda found: found[1] or "", key))
    old = _LEGACY.search(key)
    if old is None:
        return key
    layer = "to_out.0" if old[1] == "to_out" else old[1]
    return f"{key[: old.start()]}.{layer}.lora.{old[2]}.weight"


def with_text_model(path: str) -> str:
    """A path in a text encoder as here; transformers >= 5.6 leaves out "text_model."."""
    return path if path.startswith((TEXT_MODEL, "text_projection")) else f"{TEXT_MODEL}{path}"


def renamed(config: Any, paths: Mapping[str, str]) -> Any:
    """A configuration for layers of other names, old to new, that means the same for each.

    Patterns that still do so are kept; else layers are named one by one.
    """
    places = [name for name in ("targets", "feedforward", "bias") if _is_places(config, name)]
    changed: dict[str, Any] = {}
    for name in places:
        patterns = getattr(config, name)
        taken = [new for old, new in paths.items() if any(matches(t, old) for t in patterns)]
        if [new for new in paths.values() if any(matches(t, new) for t in patterns)] != taken:
            changed[name] = tuple(f"^{re.escape(path)}$" for path in sorted(taken))
    for name, at in (("rank_pattern", "rank_at"), ("alpha_pattern", "alpha_at")):
        read: Callable[[str], Any] | None = getattr(config, at, None)
        if read is None or all(read(old) == read(new) for old, new in paths.items()):
            continue
        default = read("")
        values = {f"^{re.escape(new)}": read(old) for old, new in sorted(paths.items())}
        changed[name] = {pattern: x for pattern, x in values.items() if x != default}
    return dataclasses.replace(config, **changed)


def for_both_names(config: Any, paths: Collection[str]) -> Any:
    """A text encoder's configuration with patterns for layers with and without "text_model."."""
    if not paths or not all(path.startswith(TEXT_MODEL) for path in paths):
        return config

    def pattern(text: str) -> str:
        if re.fullmatch(r"[\w.]+", text):
            return text.removeprefix(TEXT_MODEL)
        if "(?:text_model" in text:
            return text
        return re.sub(r"text_model(\\?\.)", r"(?:text_model\1)?", text)

    changed: dict[str, Any] = {
        name: tuple(map(pattern, getattr(config, name)))
        for name in ("targets", "feedforward", "bias")
        if _is_places(config, name)
    }
    for name in ("rank_pattern", "alpha_pattern"):
        if hasattr(config, name):
            changed[name] = {pattern(key): value for key, value in getattr(config, name).items()}
    return dataclasses.replace(config, **changed)


def _is_places(config: Any, name: str) -> bool:
    return isinstance(getattr(config, name, None), tuple)


def peft_name(factor: str) -> str:
    """The end of a factor's key in peft's files."""
    if factor == "magnitude":
        return ".lora_magnitude_vector"
    if factor == "bias":
        return ".lora_B.bias"
    return f".{factor}" if factor.startswith("lora_embedding_") else f".{factor}.weight"


def parse(key: str, name: str, source: Any) -> tuple[str, str]:
    """(module path, factor) of a canonical key without its prefix."""
    for suffix, factor in FACTORS.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), factor
    raise UserError(f"{source}: unknown key {key}")


def refuse_other_kinds(tensors: Mapping[str, Any], source: Any) -> None:
    """UserError naming the first key that is of another kind than LoRA."""
    for kind, pattern in _OTHER_KINDS.items():
        for key in tensors:
            if re.search(pattern, key):
                raise UserError(
                    f"{source}: key {key} is of a {kind} adapter; expected a LoRA of peft or "
                    "diffusers"
                )


def arrays_of(found: dict[tuple[str, str], np.ndarray], config: LoRAConfig, source: Any) -> dict:
    """The factors in NNX's layout and float32, checked against each other and the configuration."""
    if not found:
        raise UserError(f"{source}: holds no LoRA factors")
    arrays: dict[str, jnp.ndarray] = {}
    for path in sorted({path for path, _ in found}):
        pair = [f"{'lora_embedding_' if _is_table(path, found) else 'lora_'}{end}" for end in "AB"]
        for factor in pair:
            if (path, factor) not in found:
                raise UserError(f"{source}: {path} has no {factor}")
        down, up = (found[path, factor] for factor in pair)
        rank = config.rank_at(path)
        if (
            down.ndim not in (2, 3, 4, 5)
            or up.ndim != down.ndim
            or (down.shape[0], up.shape[1]) != (rank, rank)
            or math.prod(up.shape[2:]) != 1
        ):
            raise UserError(
                f"{source}: {path} has factors of shapes {down.shape} and {up.shape}, expected "
                f"({rank}, in) and (out, {rank}), or the convolutions ({rank}, in, kh, kw) and "
                f"(out, {rank}, 1, 1)"
            )
        if not any(matches(target, path) for target in config.targets):
            raise UserError(f"{source}: {path} is not among the targets {shown(config.targets)}")
        for factor, value in zip(pair, (down, up), strict=True):
            arrays[f"{path}.{factor}"] = jnp.asarray(factors.from_torch(factor, value), jnp.float32)
        if (path, "bias") in found:
            # peft's B has a bias of its own, which is scaled as its kernel is.
            bias = config.scaling_at(path) * np.asarray(found[path, "bias"], np.float32)
            arrays[f"{path}.diff_b"] = jnp.asarray(bias.ravel())
        magnitude = found.get((path, "magnitude"))
        if (magnitude is None) == (config.decompose == "output"):
            expected = "one" if magnitude is None else "none"
            raise UserError(
                f"{source}: {path} has {'no' if magnitude is None else 'a'} magnitude vector, "
                f"expected {expected}: use_dora is {magnitude is None}"
            )
        if magnitude is not None:
            if magnitude.size != up.shape[0]:
                raise UserError(
                    f"{source}: {path} has a magnitude vector of shape {magnitude.shape}, expected "
                    f"{up.shape[0]} values"
                )
            arrays[f"{path}.magnitude"] = jnp.asarray(magnitude.ravel(), jnp.float32)
    return arrays


def _is_table(path: str, found: dict[tuple[str, str], np.ndarray]) -> bool:
    return (path, "lora_embedding_A") in found or (path, "lora_embedding_B") in found


def torch_tensors(state: AdapterState) -> dict[tuple[str, str], np.ndarray]:
    """The factors in torch's layout, float32, by (path, factor)."""
    config = state.config
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"expected the state of a LoRA, found {_kinds(config)}")
    if config.init in ("pissa", "olora"):
        raise ValueError("a LoRA that started from W has factors beside it: write `as_lora` of it")
    if config.decompose == "input":
        raise ValueError("peft and diffusers have DoRA's magnitudes for outputs, not for inputs")
    tensors = {}
    for key, value in sorted(state.arrays.items()):
        path, _, factor = key.rpartition(".")
        value = np.asarray(value, np.float32)
        if factor == "magnitude":
            axes = (
                state.arrays[f"{path}.lora_A"].ndim - 2 if f"{path}.lora_A" in state.arrays else 0
            )
            tensors[path, factor] = value.reshape(1, -1, *(1,) * axes) if axes else value
            continue
        if factor == "diff_b":
            tensors[path, "bias"] = value / _scale_of_bias(config, path)
            continue
        if factor not in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            raise ValueError(f"{key}: a LoRA file holds lora_A and lora_B, not {factor}")
        if value.ndim < 2 or (factor.endswith("_B") and math.prod(value.shape[:-2]) != 1):
            raise ValueError(
                f"{key} has shape {value.shape}: expected a matrix, or one pointwise convolution "
                "(unstack a stacked state)"
            )
        tensors[path, factor] = factors.to_torch(factor, value)
    if config.bias:
        # peft's lora_bias is for all layers or none.
        for path, factor in list(tensors):
            if factor.endswith("_B"):
                tensors.setdefault((path, "bias"), np.zeros(tensors[path, factor].shape[0], "f4"))
    # What the reader would refuse must not be written.
    arrays_of(tensors, config, "adapter state")
    return tensors


def config_from_peft(
    fields: dict[str, Any], source: Any, paths: Collection[str] = ()
) -> LoRAConfig:
    """A LoRAConfig from peft's fields, for layers of these paths.

    UserError for a setting that is not implemented.
    """
    taken = peft_settings.Fields(fields, source, paths)
    taken.take("bias")
    init = taken.expect("init_lora_weights", tuple(_INITS))
    config = taken.make(
        LoRAConfig,
        **peft_settings.ranked(taken, "lora_alpha"),
        dropout=taken.take("lora_dropout", 0.0),
        bias=bool(taken.take("lora_bias", False)),
        use_rslora=taken.take("use_rslora", False),
        decompose="output" if taken.take("use_dora", False) else "none",
        init=_INITS[init],
    )
    taken.finish()
    return config


def config_to_peft(config: LoRAConfig) -> dict[str, Any]:
    """The fields of peft's LoraConfig that its readers need."""
    return {
        **peft_settings.patterns(config),
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True if config.init == "kaiming" else config.init,
        "lora_alpha": peft_settings.alpha_of(config),
        "lora_dropout": config.dropout,
        "lora_bias": bool(config.bias),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": peft_settings.targets_of(config.targets),
        "task_type": None,
        "use_dora": config.decompose == "output",
        "use_rslora": config.use_rslora,
    }


def inferred_config(factors: dict[tuple[str, str], np.ndarray], source: str) -> LoRAConfig:
    """The configuration of a file without one: the ranks of its factors, and alpha = rank."""
    ranks = {
        path: value.shape[0] for (path, factor), value in factors.items() if factor == "lora_A"
    }
    if not ranks:
        raise UserError(f"{source}: {next(iter(factors))[0]} has no lora_A")
    # Of equally common ranks the smaller, so that the result does not depend on the file's order.
    rank = max(sorted(Counter(ranks.values()).items()), key=lambda item: item[1])[0]
    others = {f"^{re.escape(path)}": own for path, own in sorted(ranks.items()) if own != rank}
    return LoRAConfig(
        rank=rank,
        alpha=rank,
        targets=tuple(sorted({path for path, _ in factors})),
        rank_pattern=others,
        alpha_pattern=dict(others),
        decompose="output" if any(f == "magnitude" for _, f in factors) else "none",
        bias=any(f == "bias" for _, f in factors),
    )


def _scale_of_bias(config: LoRAConfig, path: str) -> float:
    scale = config.scaling_at(path)
    if not scale:
        raise ValueError(f"{path}: peft scales a bias by alpha, which is 0 here")
    return scale


def _kinds(config: Any) -> str:
    parts = configs_of(config)
    return " and ".join(type(part).__name__.removesuffix("Config") for part in parts) or "NoneType"
