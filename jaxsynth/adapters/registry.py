"""All kinds of adapters by name: what `--config.adapter=` takes, and what a state's file may hold.

BitFit, norm tuning and training in place are no kinds of layer but `inject.mark_trainable`;
DiffFit's scales are an Affiner of rank 0 (`affiner`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from flax import nnx
from jaxtyping import Array, Key

from jaxsynth.adapters import inject
from jaxsynth.adapters.kinds.adalora import AdaLoRAConfig, adalora
from jaxsynth.adapters.kinds.affiner import AffinerConfig, affiner
from jaxsynth.adapters.kinds.delta_lora import DeltaLoRAConfig, delta_lora
from jaxsynth.adapters.kinds.full import FullConfig, full
from jaxsynth.adapters.kinds.glora import GLoRAConfig, glora
from jaxsynth.adapters.kinds.hypernetwork import HypernetworkConfig, hypernetwork
from jaxsynth.adapters.kinds.ia3 import IA3Config, ia3
from jaxsynth.adapters.kinds.loha import LoHaConfig, loha
from jaxsynth.adapters.kinds.lokr import LoKrConfig, lokr
from jaxsynth.adapters.kinds.lora import LoRAConfig, lora
from jaxsynth.adapters.kinds.oft import OFTConfig, oft
from jaxsynth.adapters.kinds.prefix import PrefixConfig, prefix
from jaxsynth.adapters.kinds.vera import VeRAConfig, vera
from jaxsynth.core.errors import UserError

# What makes the layers of each configuration.
MAKERS: dict[type, Callable[[Any], inject.Maker]] = {
    LoRAConfig: lora,
    LoHaConfig: loha,
    LoKrConfig: lokr,
    VeRAConfig: vera,
    AdaLoRAConfig: adalora,
    DeltaLoRAConfig: delta_lora,
    GLoRAConfig: glora,
    OFTConfig: oft,
    IA3Config: ia3,
    FullConfig: full,
    AffinerConfig: affiner,
    PrefixConfig: prefix,
    HypernetworkConfig: hypernetwork,
}


@dataclass(frozen=True)
class Kind:
    """A configuration and the fields that its name stands for.

    `has_places`: it is for certain layers, which its own targets name.
    """

    config: type[Any]
    options: dict[str, Any]
    has_places: bool = False

    @property
    def fields(self) -> set[str]:
        """The names of its settings."""
        return {field.name for field in fields(self.config)}


KINDS = {
    "lora": Kind(LoRAConfig, {}),
    "dora": Kind(LoRAConfig, {"decompose": "output"}),
    "pissa": Kind(LoRAConfig, {"init": "pissa"}),
    "olora": Kind(LoRAConfig, {"init": "olora"}),
    "rslora": Kind(LoRAConfig, {"use_rslora": True}),
    "locon": Kind(LoRAConfig, {"use_tucker": True}),
    "loha": Kind(LoHaConfig, {}),
    "doha": Kind(LoHaConfig, {"decompose": "output"}),
    "lokr": Kind(LoKrConfig, {}),
    "dokr": Kind(LoKrConfig, {"decompose": "output"}),
    "vera": Kind(VeRAConfig, {}),
    "adalora": Kind(AdaLoRAConfig, {}),
    "delta_lora": Kind(DeltaLoRAConfig, {}),
    "glora": Kind(GLoRAConfig, {}),
    "oft": Kind(OFTConfig, {}),
    "boft": Kind(OFTConfig, {"butterfly": 2}),
    "ia3": Kind(IA3Config, {}, has_places=True),
    "full": Kind(FullConfig, {}),
    "affiner": Kind(AffinerConfig, {}),
    "prefix": Kind(PrefixConfig, {}, has_places=True),
    "hypernetwork": Kind(HypernetworkConfig, {}, has_places=True),
}


def kind_of(name: str) -> Kind:
    """The kind of this name; ValueError where there is none."""
    if name not in KINDS:
        raise ValueError(f"adapter {name!r}: expected one of {', '.join(KINDS)}")
    return KINDS[name]


def make_config(name: str, **settings: Any) -> Any:
    """The configuration of the kind `name` with these settings.

    ValueError for a name that is no kind, or settings that the kind does not have.
    """
    kind = kind_of(name)
    if unknown := settings.keys() - kind.fields:
        raise ValueError(
            f"adapter {name}: no setting {sorted(unknown)}, expected some of {sorted(kind.fields)}"
        )
    return kind.config(**kind.options | settings)


@dataclass(frozen=True)
class AdapterChoice:
    """A kind by name with settings of its own: what a run's `--config.adapter=` is read into.

        --config.adapter=lokr --config.adapter.rank=4

    What it leaves open is for the method to say (`config`).
    """

    kind: str = "lora"
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        make_config(self.kind, **self.settings)

    @classmethod
    def schema(cls, kind: str) -> type:
        """The dataclass whose fields the settings of a kind are."""
        return kind_of(kind).config

    def config(
        self,
        *,
        targets: tuple[str, ...],
        given: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        scale: float = 1.0,
    ) -> Any:
        """The configuration: the choice's settings, those of the method, and its `targets`.

        `given` are settings that the method's user made elsewhere, None where they were left open;
        a kind without them refuses them. `defaults` are the method's, for kinds that have them.
        An alpha that nobody gives is `scale` times the rank of each layer. Kinds with places of
        their own leave `targets` out.

        Raises ValueError naming a given setting that the kind does not have, or that is given in
        both places.
        """
        kind = kind_of(self.kind)
        given = {name: value for name, value in (given or {}).items() if value is not None}
        for name, value in given.items():
            if name not in kind.fields:
                raise ValueError(
                    f"{name} is {value}, and adapters of kind {self.kind} have no {name}; they "
                    f"have {', '.join(sorted(kind.fields))}"
                )
            if name in self.settings:
                raise ValueError(
                    f"{name} is given twice, {value} and {self.settings[name]} (adapter.{name}); "
                    "give one of them"
                )
        known = {name: value for name, value in (defaults or {}).items() if name in kind.fields}
        if not kind.has_places:
            known["targets"] = targets
        config = make_config(self.kind, **known | given | self.settings)
        if scale == 1 or getattr(config, "alpha", scale) is not None:
            return config
        ranks = {pattern: scale * rank for pattern, rank in config.rank_pattern.items()}
        alphas = {**config.alpha_pattern, **ranks, **config.alpha_pattern}
        return replace(config, alpha=scale * config.rank, alpha_pattern=alphas)


def maker(config: Any) -> inject.Maker:
    """Makes the layers of any configuration; TypeError if it is none of an adapter."""
    if isinstance(config, inject.MixedConfig):
        makers = {id(part): maker(part) for part in config.parts}
        return lambda path, layer, key: makers[id(config.at(path))](path, layer, key)
    if type(config) not in MAKERS:
        raise TypeError(f"cannot make adapters of a {type(config).__name__}")
    return MAKERS[type(config)](config)


def add(model: inject.T, config: Any, *, rngs: nnx.Rngs | Key[Array, ""]) -> inject.T:
    """A copy of `model` with adapters of any kind on `config.targets`; see `inject.inject`."""
    return inject.inject(model, maker(config), targets=config.targets, rngs=rngs)


def attach(model: inject.T, state: inject.AdapterState) -> inject.T:
    """A copy of `model` with the adapter of `state` wrapped around its targets and filled in.

    Parameters of the network's own that the state holds (biases, whole layers) are `Trainable` in
    it. Raises UserError where the targets and the state's keys, or any two shapes, do not agree.
    """
    try:
        adapted = model
        if state.config is not None:
            # The initial values are all replaced: any key will do.
            adapted = add(model, state.config, rngs=nnx.Rngs(0))
        known = inject.trainable_variables(adapted).keys()
        own = (state.arrays.keys() & inject.parameters(adapted)) - known
        if own:
            patterns = [f"^{re.escape(name)}$" for name in sorted(own)]
            adapted = inject.mark_trainable(adapted, patterns)
        return inject.load_state(adapted, state)
    except (TypeError, ValueError) as error:
        raise UserError(f"the adapter does not fit this network: {error}") from error
