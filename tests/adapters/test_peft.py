"""Kinds against peft: outputs, gradients and merged weights, with alpha != rank."""

import jax.numpy as jnp
import peft
import pytest

from jaxsynth.adapters.inject import Constant
from jaxsynth.adapters.kinds.adalora import AdaLoRAConfig
from jaxsynth.adapters.kinds.glora import GLoRAConfig
from jaxsynth.adapters.kinds.ia3 import IA3Config
from jaxsynth.adapters.kinds.loha import LoHaConfig
from jaxsynth.adapters.kinds.lokr import LoKrConfig
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.adapters.kinds.oft import OFTConfig
from jaxsynth.adapters.kinds.vera import VeRAConfig
from tests.adapters import oracles
from tests.adapters.oracles import TARGETS

LORA = {"r": 3, "lora_alpha": 7, "target_modules": list(TARGETS)}
HADA = {"r": 3, "alpha": 7, "target_modules": list(TARGETS)}
KRON = {"r": 1, "alpha": 3, "target_modules": list(TARGETS), "decompose_factor": 2}
OURS = {"rank": 3, "alpha": 7, "targets": TARGETS}
OUR_KRON = {"rank": 1, "alpha": 3, "targets": TARGETS, "factor": 2}

CASES = {
    "dora": (
        LoRAConfig(**OURS, decompose="output"),
        peft.LoraModel,
        peft.LoraConfig(**LORA, use_dora=True),
    ),
    "pissa": (
        LoRAConfig(**OURS | {"targets": ("linear",)}, init="pissa"),
        peft.LoraModel,
        peft.LoraConfig(**LORA | {"target_modules": ["linear"]}, init_lora_weights="pissa"),
    ),
    "olora": (
        LoRAConfig(**OURS | {"targets": ("linear",)}, init="olora"),
        peft.LoraModel,
        peft.LoraConfig(**LORA | {"target_modules": ["linear"]}, init_lora_weights="olora"),
    ),
    "loha": (LoHaConfig(**OURS), peft.LoHaModel, peft.LoHaConfig(**HADA)),
    "loha-tucker": (
        LoHaConfig(**OURS, use_tucker=True),
        peft.LoHaModel,
        peft.LoHaConfig(**HADA, use_effective_conv2d=True),
    ),
    "lokr": (LoKrConfig(**OUR_KRON), peft.LoKrModel, peft.LoKrConfig(**KRON)),
    "lokr-both-tucker": (
        LoKrConfig(**OUR_KRON | {"factor": -1}, decompose_both=True, use_tucker=True),
        peft.LoKrModel,
        peft.LoKrConfig(
            **KRON | {"decompose_factor": -1}, decompose_both=True, use_effective_conv2d=True
        ),
    ),
    "lokr-full": (
        LoKrConfig(**OUR_KRON | {"rank": 8}, full_alpha=True),
        peft.LoKrModel,
        peft.LoKrConfig(**KRON | {"r": 8}),
    ),
    "adalora": (
        AdaLoRAConfig(**OURS, target_rank=2),
        peft.AdaLoraModel,
        peft.AdaLoraConfig(
            init_r=3, target_r=2, lora_alpha=7, total_step=10, target_modules=list(TARGETS)
        ),
    ),
    "ia3": (
        IA3Config(TARGETS, feedforward=("conv",)),
        peft.IA3Model,
        peft.IA3Config(target_modules=list(TARGETS), feedforward_modules=["conv"]),
    ),
    "oft": (
        OFTConfig(4, ("linear",)),
        peft.OFTModel,
        peft.OFTConfig(oft_block_size=4, target_modules=["linear"], use_cayley_neumann=False),
    ),
    "oft-neumann": (
        OFTConfig(4, ("linear",), cayley="neumann"),
        peft.OFTModel,
        peft.OFTConfig(oft_block_size=4, target_modules=["linear"]),
    ),
    "boft": (
        OFTConfig(4, ("linear",), rescale=True),
        peft.BOFTModel,
        peft.BOFTConfig(boft_block_size=4, target_modules=["linear"]),
    ),
    "glora": (
        GLoRAConfig(rank=3, targets=("linear",), form="hadamard"),
        peft.GloraModel,
        peft.GloraConfig(r=3, target_modules=["linear"]),
    ),
    "vera": (
        VeRAConfig(rank=3, targets=("linear",)),
        peft.VeraModel,
        peft.VeraConfig(r=3, target_modules=["linear"]),
    ),
}
# What peft calls our factors, where it is not the same.
NAMES = {
    "magnitude": "lora_magnitude_vector",
    "A_down": "glora_A.default.Xu",
    "A_up": "glora_A.default.Xd",
    "B_down": "glora_B.default.Xu",
    "B_up": "glora_B.default.Xd",
    "C_down": "glora_C.default.Xu",
    "C_up": "glora_C.default.Xd",
    "D": "glora_D.default.X",
    "E": "glora_E.default.X",
}
# peft's exact Cayley transform turns the other way, and BOFT's Q is half the difference there.
SCALES = {"oft": {"oft_R": -1.0}, "boft": {"oft_R": -2.0}}

# peft 0.21 takes the other product's factors in the gradient of these (HadaWeightCP.backward);
# LyCORIS has them right.
WRONG = ("conv.hada_w1_a", "conv.hada_w2_a")


@pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension")
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1")
@pytest.mark.parametrize("name", CASES)
def test_forward_gradients_and_merged_weights_equal_peft(name):
    config, wrapper, peft_config = CASES[name]
    model, plain = oracles.adapted(config)
    wrapped = wrapper(plain, peft_config, "default")

    if name == "vera":
        model.linear.vera_A = Constant(jnp.asarray(wrapped.vera_A["default"][:, :12].T.numpy()))
        model.linear.vera_B = Constant(jnp.asarray(wrapped.vera_B["default"][:8].T.numpy()))

    def parameter(layer, factor):
        module = wrapped.model.get_submodule(layer)
        if name == "boft":
            factor = {"oft_R": "boft_R", "rescale": "boft_s"}[factor]
        factor = NAMES.get(factor, factor)
        if "." in factor:
            return module.get_parameter(factor)
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
    scales = SCALES.get(name)
    oracles.check(model, wrapped.model, parameter, merged, wrong=wrong, scales=scales)
