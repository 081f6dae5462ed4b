"""The settings of peft's adapters beside LoRA, there and back (peft 0.21).

Each kind has a `Form`: the ends of its keys in a file by our factors, and functions between peft's
settings and our configuration. ValueError names what peft cannot say.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.adalora import AdaLoRAConfig
from jaxsynth.adapters.kinds.glora import GLoRAConfig
from jaxsynth.adapters.kinds.ia3 import IA3Config
from jaxsynth.adapters.kinds.loha import LoHaConfig
from jaxsynth.adapters.kinds.lokr import LoKrConfig
from jaxsynth.adapters.kinds.oft import OFTConfig
from jaxsynth.adapters.kinds.prefix import PrefixConfig
from jaxsynth.adapters.kinds.vera import VeRAConfig
from jaxsynth.core.config import to_dataclass
from jaxsynth.core.errors import UserError, shown

T = TypeVar("T")

# Settings that take some of the targets out again.
_NARROWER = ("exclude_modules", "layers_to_transform", "layers_pattern")
# Targets that name no layer: peft finds them in the network.
_ALL = "all-linear"
# Settings that do not change what an adapter computes once it is trained.
IRRELEVANT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "task_type", "rank_dropout",
    "rank_dropout_scale",
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """How peft keeps a kind: the ends of its keys by our factor, and its settings both ways."""

    config: type
    names: Mapping[str, str]
    read: Callable[["Fields"], Any]
    write: Callable[[Any], dict[str, Any]]


class Fields:
    """A configuration's settings, taken one by one; those left over must not mean anything."""

    def __init__(self, fields: dict[str, Any], source: Any, paths: Collection[str] = ()):
        """`paths` are the layers that the weights have, by peft's names."""
        self._rest, self.source, self._paths = dict(fields), source, sorted(paths)
        # What peft calls our settings.
        ours = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
        self._names = {ours[name]: name for name in fields if name in ours}

    def take(self, name: str, default: Any = None) -> Any:
        """A setting's value, which then counts as understood."""
        return self._rest.pop(name, default)

    def take_number(self, name: str, default: float) -> float:
        """A setting that must be a number; 0 is one, and null stands for the default."""
        found = self.take(name)
        found = default if found is None else found
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise UserError(f"{self.source}: {name} is {shown(found)}, expected a number")
        return found

    def expect(self, name: str, allowed: tuple[Any, ...]) -> Any:
        """A setting that must be one of these, the first where it is missing."""
        found = self.take(name, allowed[0])
        if found not in allowed:
            raise UserError(
                f"{self.source}: {name} is {shown(found)}, expected one of {list(allowed)}"
            )
        return found

    def make(self, config: type[T], **values: Any) -> T:
        """A configuration of these settings; UserError naming one that has another type."""
        own = config.__name__
        try:
            return to_dataclass(config, values, path=own)
        except ValueError as error:
            text = re.sub(rf"^(?:{own}(?:: |\.))+", "", str(error))
            name = re.split(r"\W", text, maxsplit=1)[0]
            told = self._names.get(name, name) + text[len(name) :]
            raise UserError(f"{self.source}: {told}") from None

    def targets(self, name: str = "target_modules") -> tuple[str, ...]:
        found = self.take(name)
        narrower = [self.take(other) for other in _NARROWER]
        if not found or not isinstance(found, (str, list)):
            raise UserError(f"{self.source}: {name} is {shown(found)}, expected names or a pattern")
        unsaid = isinstance(found, str) and found.lower() == _ALL
        if self._paths and (unsaid or any(value not in (None, [], "") for value in narrower)):
            # Which layers these are, the weights tell.
            return tuple(self._paths)
        # A string is a pattern for the whole path, a listed name may be the end of one.
        return (f"^(?:{found})$",) if isinstance(found, str) else tuple(found)

    def finish(self) -> None:
        for name, value in self._rest.items():
            if value and name not in IRRELEVANT:
                raise UserError(
                    f"{self.source}: {name} is {shown(value)}, which is not implemented"
                )


def targets_of(targets: tuple[str, ...]) -> list[str] | str:
    """peft takes a list of names, or one pattern for the whole path."""
    plain = [target for target in targets if re.fullmatch(r"[\w.]+", target)]
    if len(plain) == len(targets):
        return plain
    return pattern_of(targets)


def pattern_of(targets: tuple[str, ...]) -> str:
    """One pattern for the whole paths that these targets match."""
    return "|".join(
        rf"(?:.*\.)?{re.escape(target)}" if re.fullmatch(r"[\w.]+", target) else f"(?:{target})"
        for target in targets
    )


def number(value: float) -> int | float:
    """Whole numbers as integers, as peft writes them."""
    return int(value) if float(value).is_integer() else float(value)


def ranked(fields: Fields, alpha: str = "alpha") -> dict[str, Any]:
    """The settings that all kinds of a rank share."""
    rank = fields.take("r", 8)
    return {
        "rank": rank,
        "alpha": fields.take_number(alpha, 8),
        "targets": fields.targets(),
        "rank_pattern": fields.take("rank_pattern") or {},
        "alpha_pattern": fields.take("alpha_pattern") or {},
    }


def patterns(config: Any) -> dict[str, Any]:
    """Ranks and alphas by pattern, as peft has them."""
    return {
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {name: number(value) for name, value in config.alphas()[1].items()},
    }


def alpha_of(config: Any) -> int | float:
    """The alpha of most layers, as peft has it."""
    return number(config.alphas()[0])


def _read_loha(fields: Fields) -> LoHaConfig:
    fields.take("init_weights")
    return fields.make(
        LoHaConfig,
        **ranked(fields),
        module_dropout=fields.take("module_dropout", 0.0),
        use_tucker=fields.take("use_effective_conv2d", False),
        init="peft",
    )


def _write_loha(config: LoHaConfig) -> dict[str, Any]:
    return {
        "r": config.rank,
        "alpha": alpha_of(config),
        **patterns(config),
        "module_dropout": config.module_dropout,
        "use_effective_conv2d": config.use_tucker,
        "init_weights": True,
    }


def _read_lokr(fields: Fields) -> LoKrConfig:
    return fields.make(
        LoKrConfig,
        **ranked(fields),
        module_dropout=fields.take("module_dropout", 0.0),
        use_tucker=fields.take("use_effective_conv2d", False),
        factor=fields.take("decompose_factor", -1),
        decompose_both=fields.take("decompose_both", False),
        init="lycoris" if fields.take("init_weights") == "lycoris" else "peft",
        full_alpha=True,
        ordered=False,
    )


def _write_lokr(config: LoKrConfig) -> dict[str, Any]:
    return _write_loha(config) | {
        "decompose_factor": config.factor,
        "decompose_both": config.decompose_both,
        "init_weights": "lycoris" if config.init == "lycoris" else True,
    }


def _read_adalora(fields: Fields) -> AdaLoRAConfig:
    rank = fields.take("init_r", 12)
    for name in ("r", "orth_reg_weight", "total_step", "init_lora_weights", "rank_pattern"):
        fields.take(name)
    return fields.make(
        AdaLoRAConfig,
        rank=rank,
        alpha=fields.take_number("lora_alpha", 8),
        targets=fields.targets(),
        dropout=fields.take("lora_dropout", 0.0),
        target_rank=fields.take("target_r", 8),
        warmup=fields.take("tinit", 0),
        final=fields.take("tfinal", 0),
        interval=fields.take("deltaT", 1),
        beta1=fields.take("beta1", 0.85),
        beta2=fields.take("beta2", 0.85),
    )


def _write_adalora(config: AdaLoRAConfig) -> dict[str, Any]:
    if config.rank_pattern or config.alpha_pattern:  # alpha None then follows the one rank
        raise ValueError("peft's AdaLoRA has one rank and one alpha for all layers")
    return {
        "init_r": config.rank,
        "target_r": config.target_rank,
        "lora_alpha": alpha_of(config),
        "lora_dropout": config.dropout,
        "tinit": config.warmup,
        "tfinal": config.final,
        "deltaT": config.interval,
        "beta1": config.beta1,
        "beta2": config.beta2,
        # peft wants more steps than warm-up and end; training is over.
        "total_step": config.warmup + config.final + 1,
        "init_lora_weights": True,
    }


def _read_ia3(fields: Fields) -> IA3Config:
    fields.take("init_ia3_weights")
    inner = fields.take("feedforward_modules") or ()
    inner = (f"^(?:{inner})$",) if isinstance(inner, str) else inner
    return fields.make(IA3Config, targets=fields.targets(), feedforward=inner)


def _write_ia3(config: IA3Config) -> dict[str, Any]:
    if not config.scales_bias:
        raise ValueError("peft's (IA)^3 scales biases too (scales_bias)")
    fields = {"feedforward_modules": list(config.feedforward), "init_ia3_weights": True}
    # peft wants names of feed-forward layers to be among the targets', and compares no patterns.
    if not set(config.feedforward) <= set(config.targets) or isinstance(
        targets_of(config.targets), str
    ):
        fields["target_modules"] = pattern_of(config.targets)
        fields["feedforward_modules"] = pattern_of(config.feedforward)
    return fields


def _read_oft(fields: Fields) -> OFTConfig:
    for name in ("eps", "init_weights"):
        fields.take(name)
    if not (size := fields.take("oft_block_size", 32)):
        raise UserError(f"{fields.source}: oft_block_size is {size}, expected it, not r, to be set")
    fields.take("r")
    neumann = fields.take("use_cayley_neumann", True)
    terms = fields.take("num_cayley_neumann_terms", 5)
    if neumann and terms != 5:
        raise UserError(f"{fields.source}: num_cayley_neumann_terms is {terms}, expected 5")
    return fields.make(
        OFTConfig,
        block_size=size,
        targets=fields.targets(),
        cayley="neumann" if neumann else "exact",
    )


def _write_oft(config: OFTConfig) -> dict[str, Any]:
    if config.side != "input" or config.butterfly or config.constraint:
        raise ValueError(
            "peft's OFT rotates inputs, in one stage and without LyCORIS' constraint: this one has "
            f"side {config.side!r}, butterfly {config.butterfly}, constraint {config.constraint}"
        )
    if config.rescale:
        if config.cayley != "exact":
            raise ValueError("peft's BOFT, which rescales outputs, has the exact transform only")
        return {
            "boft_block_size": config.block_size,
            "boft_block_num": 0,
            "boft_n_butterfly_factor": 1,
            "boft_dropout": 0.0,
            "init_weights": True,
        }
    return {
        "r": 0,
        "oft_block_size": config.block_size,
        "use_cayley_neumann": config.cayley == "neumann",
        "num_cayley_neumann_terms": 5,
        "init_weights": True,
    }


def _read_boft(fields: Fields) -> OFTConfig:
    for name in ("init_weights", "boft_dropout", "boft_block_num"):
        fields.take(name)
    fields.expect("boft_n_butterfly_factor", (1,))
    return fields.make(
        OFTConfig,
        block_size=fields.take("boft_block_size", 4),
        targets=fields.targets(),
        rescale=True,
    )


def _read_glora(fields: Fields) -> GLoRAConfig:
    fields.take("init_weights")
    for name, allowed in (("config_A_B", "lora"), ("config_C", "lora"), ("config_D_E", "constant")):
        fields.expect(name, (allowed,))
    return fields.make(
        GLoRAConfig, rank=fields.take("r", 4), targets=fields.targets(), form="hadamard"
    )


def _write_glora(config: GLoRAConfig) -> dict[str, Any]:
    if config.form != "hadamard" or config.rank_pattern:
        raise ValueError("peft's GLoRA has the hadamard form and one rank for all layers")
    return {"r": config.rank, "config_A_B": "lora", "config_C": "lora", "config_D_E": "constant",
            "init_weights": True}  # fmt: skip


def _read_vera(fields: Fields) -> VeRAConfig:
    fields.take("init_weights")
    fields.expect("save_projection", (True,))
    return fields.make(
        VeRAConfig,
        rank=fields.take("r", 256),
        targets=fields.targets(),
        dropout=fields.take("vera_dropout", 0.0),
        d_initial=fields.take("d_initial", 0.1),
        seed=fields.take("projection_prng_key", 0),
    )


def _write_vera(config: VeRAConfig) -> dict[str, Any]:
    if config.rank_pattern:
        raise ValueError("peft's VeRA has one rank for all layers")
    return {"r": config.rank, "vera_dropout": config.dropout, "d_initial": config.d_initial,
            "projection_prng_key": config.seed, "save_projection": True,
            "init_weights": True}  # fmt: skip


def _read_prompt(fields: Fields) -> PrefixConfig:
    for name in (
        "num_layers", "token_dim", "num_attention_heads", "num_transformer_submodules",
        "prompt_tuning_init", "encoder_hidden_size", "prefix_projection", "init_weights",
        "tokenizer_kwargs",
    ):  # fmt: skip
        fields.take(name)
    return fields.make(
        PrefixConfig, targets=fields.targets(), tokens=fields.take("num_virtual_tokens")
    )


def _write_prompt(config: PrefixConfig) -> dict[str, Any]:
    return {"num_virtual_tokens": config.tokens, "num_transformer_submodules": 1}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_HADA = _same(*(f"hada_{n}" for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")))
_KRON = _same(*(f"lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")))
_GLORA = {
    **{f"{n}_down": f"glora_{n}.Xu" for n in "ABC"},
    **{f"{n}_up": f"glora_{n}.Xd" for n in "ABC"},
    **{n: f"glora_{n}.X" for n in "DE"},
}
FORMS: dict[str, Form] = {
    "LOHA": Form(LoHaConfig, _HADA, _read_loha, _write_loha),
    "LOKR": Form(LoKrConfig, _KRON, _read_lokr, _write_lokr),
    "ADALORA": Form(
        AdaLoRAConfig, _same("lora_A", "lora_B", "lora_E"), _read_adalora, _write_adalora
    ),
    "IA3": Form(IA3Config, _same("ia3_l"), _read_ia3, _write_ia3),
    "OFT": Form(OFTConfig, {"oft_R": "oft_R.weight"}, _read_oft, _write_oft),
    "BOFT": Form(OFTConfig, {"oft_R": "boft_R", "rescale": "boft_s"}, _read_boft, _write_oft),
    "GLORA": Form(GLoRAConfig, _GLORA, _read_glora, _write_glora),
    "VERA": Form(VeRAConfig, _same("vera_lambda_b", "vera_lambda_d"), _read_vera, _write_vera),
    "PROMPT_TUNING": Form(PrefixConfig, {}, _read_prompt, _write_prompt),
    "PREFIX_TUNING": Form(PrefixConfig, {}, _read_prompt, _write_prompt),
}


# Kinds beside which peft trains biases, and what it calls those of adapted layers alone.
BIASES = {
    "LORA": "lora_only",
    "ADALORA": "lora_only",
    "OFT": "oft_only",
    "BOFT": "boft_only",
    "GLORA": "glora_only",
    "VERA": "vera_only",
}


def kind_of(state: inject.AdapterState, source: str = "adapter state") -> str:
    """peft's name of a state's kind; ValueError where it has none."""
    config = state.config
    if type(config) is OFTConfig and config.rescale:
        return "BOFT"
    if type(config) is PrefixConfig:
        return "PROMPT_TUNING" if len(state.arrays) == 1 else "PREFIX_TUNING"
    for kind, form in FORMS.items():
        if form.config is type(config):
            return kind
    raise ValueError(
        f"{source}: peft has no {type(config).__name__.removesuffix('Config')}, only LORA, "
        f"{', '.join(FORMS)}"
    )
