"""Kinds against peft: outputs, gradients and merged weights, with alpha != rank."""

import peft
import pytest

from jaxsynth.adapters.loha import LoHaConfig, add_loha
from jaxsynth.adapters.lokr import LoKrConfig, add_lokr
from jaxsynth.adapters.lora import LoRAConfig, add_lora
from tests.adapters import oracles
from tests.adapters.oracles import TARGETS

LORA = {"r": 3, "lora_alpha": 7, "target_modules": list(TARGETS)}
HADA = {"r": 3, "alpha": 7, "target_modules": list(TARGETS)}
KRON = {"r": 1, "alpha": 3, "target_modules": list(TARGETS), "decompose_factor": 2}
OURS = {"rank": 3, "alpha": 7, "targets": TARGETS}
OUR_KRON = {"rank": 1, "alpha": 3, "targets": TARGETS, "factor": 2}

CASES = {
    "dora": (
        add_lora,
        LoRAConfig(**OURS, decompose="output"),
        peft.LoraModel,
        peft.LoraConfig(**LORA, use_dora=True),
    ),
    "pissa": (
        add_lora,
        LoRAConfig(**OURS | {"targets": ("linear",)}, init="pissa"),
        peft.LoraModel,
        peft.LoraConfig(**LORA | {"target_modules": ["linear"]}, init_lora_weights="pissa"),
    ),
    "olora": (
        add_lora,
        LoRAConfig(**OURS | {"targets": ("linear",)}, init="olora"),
        peft.LoraModel,
        peft.LoraConfig(**LORA | {"target_modules": ["linear"]}, init_lora_weights="olora"),
    ),
    "loha": (add_loha, LoHaConfig(**OURS), peft.LoHaModel, peft.LoHaConfig(**HADA)),
    "loha-tucker": (
        add_loha,
        LoHaConfig(**OURS, use_tucker=True),
        peft.LoHaModel,
        peft.LoHaConfig(**HADA, use_effective_conv2d=True),
    ),
    "lokr": (add_lokr, LoKrConfig(**OUR_KRON), peft.LoKrModel, peft.LoKrConfig(**KRON)),
    "lokr-both-tucker": (
        add_lokr,
        LoKrConfig(**OUR_KRON | {"factor": -1}, decompose_both=True, use_tucker=True),
        peft.LoKrModel,
        peft.LoKrConfig(
            **KRON | {"decompose_factor": -1}, decompose_both=True, use_effective_conv2d=True
        ),
    ),
    "lokr-full": (
        add_lokr,
        LoKrConfig(**OUR_KRON | {"rank": 8}, full_alpha=True),
        peft.LoKrModel,
        peft.LoKrConfig(**KRON | {"r": 8}),
    ),
}

# peft 0.21 takes the other product's factors in the gradient of these (HadaWeightCP.backward);
# LyCORIS has them right.
WRONG = ("conv.hada_w1_a", "conv.hada_w2_a")


@pytest.mark.parametrize("name", CASES)
def test_forward_gradients_and_merged_weights_equal_peft(name):
    add, config, wrapper, peft_config = CASES[name]
    model, plain = oracles.adapted(add, config)
    wrapped = wrapper(plain, peft_config, "default")

    def parameter(layer, factor):
        module = wrapped.model.get_submodule(layer)
        if factor == "magnitude":
            factor = "lora_magnitude_vector"
        found = getattr(module, factor)["default"]
        return getattr(found, "weight", found)

    def merged(layer):
        if layer not in config.targets:
            return plain.get_submodule(layer).weight
        module = wrapped.model.get_submodule(layer)
        if not module.merged:
            module.merge()
        return module.get_base_layer().weight

    wrong = WRONG if name == "loha-tucker" else ()
    oracles.check(model, wrapped.model, parameter, merged, wrong=wrong)
