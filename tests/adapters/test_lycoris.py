"""Kinds against LyCORIS: outputs and gradients (its own merges are wrong where alpha != rank)."""

import pytest
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

from jaxsynth.adapters.kinds.glora import GLoRAConfig
from jaxsynth.adapters.kinds.ia3 import IA3Config
from jaxsynth.adapters.kinds.loha import LoHaConfig
from jaxsynth.adapters.kinds.lokr import LoKrConfig, factorization
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.adapters.kinds.oft import OFTConfig
from tests.adapters import oracles
from tests.adapters.oracles import TARGETS

OURS = {"rank": 3, "alpha": 7, "targets": TARGETS}
DORA = {"decompose": "output", "detach_norm": False}
KRON = {"rank": 1, "alpha": 3, "targets": TARGETS, "factor": 2}
CASES = {
    "locon": (LoRAConfig(**OURS, use_tucker=True), LoConModule, {"use_tucker": True}),
    "dora": (LoRAConfig(**OURS, **DORA), LoConModule, {"weight_decompose": True}),
    "dora-input": (
        LoRAConfig(**OURS, **DORA | {"decompose": "input"}),
        LoConModule,
        {"weight_decompose": True, "wd_on_out": False},
    ),
    "rslora": (LoRAConfig(**OURS, use_rslora=True), LoConModule, {"rs_lora": True}),
    "loha": (LoHaConfig(**OURS), LohaModule, {}),
    "lokr-both": (
        LoKrConfig(**KRON, decompose_both=True),
        LokrModule,
        {"factor": 2, "decompose_both": True},
    ),
    "loha-tucker": (
        LoHaConfig(**OURS, use_tucker=True),
        LohaModule,
        {"use_tucker": True},
    ),
    "doha-input": (
        LoHaConfig(**OURS, **DORA | {"decompose": "input"}),
        LohaModule,
        {"weight_decompose": True, "wd_on_out": False},
    ),
    "lokr-full": (
        LoKrConfig(**KRON, full_matrix=True, unbalanced=True),
        LokrModule,
        {"factor": 2, "full_matrix": True, "unbalanced_factorization": True},
    ),
    "dokr-tucker": (
        LoKrConfig(**KRON, **DORA, use_tucker=True),
        LokrModule,
        {"factor": 2, "use_tucker": True, "weight_decompose": True},
    ),
    "glora": (GLoRAConfig(**OURS), GLoRAModule, {}),
    "ia3": (IA3Config(TARGETS, feedforward=(), scales_bias=False), IA3Module, {}),
    "oft": (
        OFTConfig(2, TARGETS, side="output", constraint=0.05, rescale=True),
        DiagOFTModule,
        {"lora_dim": 2, "constraint": 0.05, "rescaled": True},
    ),
    "boft": (
        OFTConfig(6, ("conv",), side="output", butterfly=2),
        ButterflyOFTModule,
        {"lora_dim": 6},
    ),
}
NAMES = {
    "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight",
    "lora_mid": "lora_mid.weight",
    "magnitude": "dora_scale",
    "ia3_l": "weight",
    "oft_R": "oft_blocks",
    "boft_R": "oft_blocks",
    **{name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2")},
}


# BOFT's blocks turn the other way there; (IA)^3 is stored less 1.
SCALES = {"boft_R": -1.0}
OFFSETS = {"ia3_l": -1.0}


def wrapped(plain, make, options, config):
    """LyCORIS' module of each target, in place of its forward."""
    modules = {}
    ranked = {"lora_dim": config.rank, "alpha": config.alpha} if hasattr(config, "alpha") else {}
    for name in config.targets:
        modules[name] = make(name, plain.get_submodule(name), **ranked | options)
        modules[name].apply_to()
    return modules


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_lycoris(name):
    config, make, options = CASES[name]
    model, plain = oracles.adapted(config)
    modules = wrapped(plain, make, options, config)

    def parameter(layer, factor):
        return dict(modules[layer].named_parameters())[NAMES.get(factor, factor)]

    oracles.check(model, plain, parameter, scales=SCALES, offsets=OFFSETS)


def test_factorization():
    from lycoris.functional.general import factorization as of_lycoris
    from peft.tuners.lokr.layer import factorization as of_peft

    for size in (1, 2, 3, 12, 36, 127, 128, 250, 360, 1024, 1280):
        for factor in (-1, 1, 2, 4, 5, 8, 12, 16, 40, 2000):
            assert factorization(size, factor) == of_lycoris(size, factor), (size, factor)
            found = factorization(size, factor, ordered=False)
            assert found == of_peft(size, factor), (size, factor)
