"""Kinds against LyCORIS: outputs and gradients (its own merges are wrong where alpha != rank)."""

import pytest
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

from jaxsynth.adapters.loha import LoHaConfig, add_loha
from jaxsynth.adapters.lokr import LoKrConfig, add_lokr, factorization
from jaxsynth.adapters.lora import LoRAConfig, add_lora
from tests.adapters import oracles
from tests.adapters.oracles import TARGETS

OURS = {"rank": 3, "alpha": 7, "targets": TARGETS}
DORA = {"decompose": "output", "detach_norm": False}
KRON = {"rank": 1, "alpha": 3, "targets": TARGETS, "factor": 2}
CASES = {
    "locon": (add_lora, LoRAConfig(**OURS, use_tucker=True), LoConModule, {"use_tucker": True}),
    "dora": (add_lora, LoRAConfig(**OURS, **DORA), LoConModule, {"weight_decompose": True}),
    "dora-input": (
        add_lora,
        LoRAConfig(**OURS, **DORA | {"decompose": "input"}),
        LoConModule,
        {"weight_decompose": True, "wd_on_out": False},
    ),
    "rslora": (add_lora, LoRAConfig(**OURS, use_rslora=True), LoConModule, {"rs_lora": True}),
    "loha-tucker": (
        add_loha,
        LoHaConfig(**OURS, use_tucker=True),
        LohaModule,
        {"use_tucker": True},
    ),
    "doha-input": (
        add_loha,
        LoHaConfig(**OURS, **DORA | {"decompose": "input"}),
        LohaModule,
        {"weight_decompose": True, "wd_on_out": False},
    ),
    "lokr-full": (
        add_lokr,
        LoKrConfig(**KRON, full_matrix=True, unbalanced=True),
        LokrModule,
        {"factor": 2, "full_matrix": True, "unbalanced_factorization": True},
    ),
    "dokr-tucker": (
        add_lokr,
        LoKrConfig(**KRON, **DORA, use_tucker=True),
        LokrModule,
        {"factor": 2, "use_tucker": True, "weight_decompose": True},
    ),
}
NAMES = {
    "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight",
    "lora_mid": "lora_mid.weight",
    "magnitude": "dora_scale",
}


def wrapped(plain, make, options, rank, alpha):
    """LyCORIS' module of each target, in place of its forward."""
    modules = {}
    for name in TARGETS:
        layer = plain.get_submodule(name)
        modules[name] = make(name, layer, lora_dim=rank, alpha=alpha, **options)
        modules[name].apply_to()
    return modules


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_equal_lycoris(name):
    add, config, make, options = CASES[name]
    model, plain = oracles.adapted(add, config)
    modules = wrapped(plain, make, options, config.rank, config.alpha)

    def parameter(layer, factor):
        return dict(modules[layer].named_parameters())[NAMES.get(factor, factor)]

    oracles.check(model, plain, parameter)


def test_factorization():
    from lycoris.functional.general import factorization as of_lycoris
    from peft.tuners.lokr.layer import factorization as of_peft

    for size in (1, 2, 3, 12, 36, 127, 128, 250, 360, 1024, 1280):
        for factor in (-1, 1, 2, 4, 5, 8, 12, 16, 40, 2000):
            assert factorization(size, factor) == of_lycoris(size, factor), (size, factor)
            found = factorization(size, factor, ordered=False)
            assert found == of_peft(size, factor), (size, factor)
