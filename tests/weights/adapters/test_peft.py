"""peft folders of every kind: peft loads ours, we load peft's, and what is refused."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.kinds.lora import LoRAConfig
from jaxsynth.adapters.registry import attach
from jaxsynth.core.errors import UserError
from jaxsynth.weights.adapters import peft as folders
from tests.adapters.nets import scrambled
from tests.adapters.oracles import TARGETS, Pair, TorchPair, images
from tests.models.torch_parity import copy_weights, nchw, randomise, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    # Of its own files of pruned AdaLoRA too, and when it saves a rank of 0.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
]
RANKED = {"rank": 3, "alpha": 7, "targets": TARGETS}
LINEAR = {"targets": ("linear",)}
KRON = RANKED | {"rank": 1, "factor": 2}
CASES = {
    "lora": RANKED | {"rank_pattern": {"conv": 2}},
    "loha": RANKED | {"rank_pattern": {"conv": 2}, "alpha_pattern": {"linear": 5}},
    "loha-tucker": RANKED | {"use_tucker": True},
    "lokr": KRON,
    "lokr-tucker": KRON | {"factor": -1, "decompose_both": True, "use_tucker": True},
    "lokr-full": KRON | {"full_matrix": True},
    "lokr-peft": KRON | {"rank": 8, "full_alpha": True, "init": "peft"},
    "adalora": RANKED | {"target_rank": 2},
    "adalora-pruned": RANKED | {"target_rank": 2},
    "ia3": {"targets": TARGETS, "feedforward": ("conv",)},
    "ia3-pattern": {"targets": (r"con.|linear",), "feedforward": ("linear",)},
    "oft": LINEAR | {"block_size": 4},
    "oft-neumann": LINEAR | {"block_size": 4, "cayley": "neumann"},
    "oft-boft": LINEAR | {"block_size": 4, "rescale": True},
    "glora": LINEAR | {"rank": 3, "form": "hadamard"},
    "vera": LINEAR | {"rank": 3, "alpha": 6, "seed": 4},
}


@pytest.fixture(scope="module")
def torch_weights():
    return randomise(TorchPair()).state_dict()


def torch_net(torch_weights):
    plain = TorchPair()
    plain.load_state_dict(torch_weights)
    return plain.eval()


@pytest.fixture(scope="module")
def net(torch_weights):
    model = Pair(rngs=nnx.Rngs(0))
    copy_weights(torch_net(torch_weights), model)
    return model


def adapted(net, name):
    config = registry.make_config(name.partition("-")[0], **CASES[name])
    model = registry.add(net, config, rngs=jax.random.key(0))
    state = inject.extract(model)
    moved = scrambled(state, 1).arrays
    arrays = {key: value + moved[key] for key, value in state.arrays.items()}
    if name == "adalora-pruned":
        arrays["conv.lora_E"] = jnp.array([0.0, 2.0, 0.0])
        arrays["linear.lora_E"] = jnp.zeros(3)
    return inject.load_state(model, inject.AdapterState(arrays, state.config))


def outputs(wrapped):
    with torch.no_grad():
        return wrapped(nchw(images())).numpy()


def shapes(folder):
    return {key: value.shape for key, value in load_file(folder / folders.PEFT_WEIGHTS).items()}


@pytest.mark.parametrize("name", CASES)
def test_both_ways(net, torch_weights, tmp_path, name):
    model = adapted(net, name)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    folders.write_peft(ours, inject.extract(model), model=net)
    plain = torch_net(torch_weights)
    before = outputs(plain)
    # A key that peft leaves out would be a warning, and warnings are errors.
    wrapped = peft.PeftModel.from_pretrained(plain, ours).eval()
    expected = outputs(wrapped)
    wrapped.save_pretrained(theirs)
    assert shapes(theirs) == shapes(ours)

    state = folders.read_peft(theirs, net)
    again = attach(net, state)
    found, back = jax.jit(lambda models: [model(images()) for model in models])([model, again])
    assert relative_error(found, before) > 0.05
    assert relative_error(found, expected) < 1e-5
    assert relative_error(back, expected) < 1e-5
    if name != "ia3-pattern":
        assert set(state.config.targets) == set(CASES[name]["targets"])


def test_ranks_that_are_gone_are_not_in_the_file(net, tmp_path):
    model = adapted(net, "adalora-pruned")
    folders.write_peft(tmp_path, inject.extract(model))
    found = shapes(tmp_path)
    assert found["base_model.model.conv.lora_A"] == (1, 16)
    assert found["base_model.model.linear.lora_B"] == (8, 0)
    state = folders.read_peft(tmp_path, net)
    e = state.arrays["conv.lora_E"]
    np.testing.assert_array_equal(e, [0, 2, 0])
    np.testing.assert_array_equal(
        state.arrays["conv.lora_A"][..., 1], model.conv.lora_A[...][..., 1]
    )
    assert not np.any(state.arrays["linear.lora_B"])


def test_peft_prunes_and_we_read_it(net, torch_weights, tmp_path):
    config = peft.AdaLoraConfig(
        init_r=3, target_r=1, lora_alpha=7, total_step=2, target_modules=list(TARGETS)
    )
    wrapped = peft.get_peft_model(torch_net(torch_weights), config)
    generator = torch.Generator().manual_seed(0)
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            value.data = torch.randn(value.shape, generator=generator)
            value.grad = torch.randn(value.shape, generator=generator)
    wrapped.base_model.update_and_allocate(1)
    wrapped.base_model.update_and_allocate(2)
    wrapped.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / folders.PEFT_CONFIG).read_text())
    assert sum(map(sum, fields["rank_pattern"].values())) == 2
    state = folders.read_peft(tmp_path, net)
    found = attach(net, state)(images())
    assert relative_error(found, outputs(wrapped.eval())) < 1e-5


def test_another_projection_is_read_as_the_lora_that_it_is(net, torch_weights, tmp_path):
    config = peft.VeraConfig(r=3, target_modules=["linear"])
    wrapped = peft.get_peft_model(torch_net(torch_weights), config)
    torch.nn.init.normal_(wrapped.base_model.model.linear.vera_lambda_b["default"])
    wrapped.save_pretrained(tmp_path)
    state = folders.read_peft(tmp_path, net)
    assert type(state.config) is LoRAConfig and state.config.rank == 3
    found = attach(net, state)(images())
    assert relative_error(found, outputs(wrapped.eval())) < 1e-5
    with pytest.raises(UserError, match="give the network"):
        folders.read_peft(tmp_path)


@pytest.mark.parametrize(("setting", "targets"), [("all", ("linear",)), ("lora_only", TARGETS)])
def test_biases_beside_lora(net, torch_weights, tmp_path, setting, targets):
    config = LoRAConfig(rank=3, alpha=7, targets=targets)
    model = inject.mark_trainable(registry.add(net, config, rngs=nnx.Rngs(0)), [".*bias"])
    model = inject.load_state(model, scrambled(inject.extract(model), 3))
    state = inject.extract(model)
    assert {"conv.bias", "linear.bias"} < set(state.arrays)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    folders.write_peft(ours, state)
    wrapped = peft.PeftModel.from_pretrained(torch_net(torch_weights), ours).eval()
    assert wrapped.peft_config["default"].bias == setting
    expected = outputs(wrapped)
    wrapped.save_pretrained(theirs)
    assert shapes(theirs) == shapes(ours)
    found = folders.read_peft(theirs)
    assert found.arrays.keys() == state.arrays.keys()
    assert relative_error(attach(net, found)(images()), expected) < 1e-5
    assert relative_error(model(images()), expected) < 1e-5


def test_a_table_of_embeddings_and_other_convolutions(tmp_path):
    class Torch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(7, 4)
            self.conv = torch.nn.Conv1d(4, 6, 3)

        def forward(self, ids):
            return self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)

    class Ours(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(7, 4, rngs=rngs)
            self.conv = nnx.Conv(4, 6, (3,), padding="VALID", rngs=rngs)

        def __call__(self, ids):
            return self.conv(self.table(ids))

    plain, model = randomise(Torch()), Ours(nnx.Rngs(0))
    copy_weights(plain, model)
    config = LoRAConfig(rank=2, alpha=5, targets=("table", "conv"))
    model = registry.add(model, config, rngs=nnx.Rngs(0))
    model = inject.load_state(model, scrambled(inject.extract(model), 0))
    folders.write_peft(tmp_path / "ours", inject.extract(model))
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    ids = np.array([[1, 2, 3, 6, 0]])
    with torch.no_grad():
        expected = wrapped(torch.tensor(ids)).numpy()
    np.testing.assert_allclose(model(ids), expected, atol=1e-5 * np.abs(expected).max())
    wrapped.save_pretrained(tmp_path / "theirs")
    assert shapes(tmp_path / "theirs") == shapes(tmp_path / "ours")
    found = folders.read_peft(tmp_path / "theirs").arrays
    jax.tree.map(np.testing.assert_array_equal, found, inject.extract(model).arrays)


class Words(nnx.Module):
    """What prompts and prefixes of a small GPT-2 stand before."""

    def __init__(self, rngs):
        self.wte = nnx.Embed(9, 8, rngs=rngs)
        self.h = nnx.List(
            [
                nnx.Dict(k_proj=nnx.Linear(8, 8, rngs=rngs), v_proj=nnx.Linear(8, 8, rngs=rngs))
                for _ in range(11)
            ]
        )


@pytest.mark.parametrize("targets", [("wte",), ("k_proj", "v_proj")])
def test_prompts_and_prefixes(tmp_path, targets):
    net = Words(nnx.Rngs(0))
    config = registry.make_config("prefix", targets=targets, tokens=3)
    model = registry.add(net, config, rngs=nnx.Rngs(1))
    state = inject.extract(model)
    folders.write_peft(tmp_path / "ours", state)
    settings = transformers.GPT2Config(
        vocab_size=9, n_embd=8, n_layer=11, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gpt = transformers.GPT2LMHeadModel(settings)
        wrapped = peft.PeftModel.from_pretrained(gpt, tmp_path / "ours")
        prompt = wrapped.get_prompt(1)
        wrapped.save_pretrained(tmp_path / "theirs")
    if targets == ("wte",):
        np.testing.assert_array_equal(prompt[0].detach(), state.arrays["wte.prefix"])
    else:
        for i, layer in enumerate(prompt.layers):
            for name, found in (("k_proj", layer.keys), ("v_proj", layer.values)):
                rows = found[0].detach().transpose(0, 1).reshape(3, 8)
                np.testing.assert_array_equal(rows, state.arrays[f"h.{i}.{name}.prefix"])
    assert shapes(tmp_path / "theirs") == shapes(tmp_path / "ours")
    found = folders.read_peft(tmp_path / "theirs", net, targets=targets)
    jax.tree.map(np.testing.assert_array_equal, found.arrays, state.arrays)
    with pytest.raises(UserError, match=r"target_modules is \[\]|match in the given network"):
        folders.read_peft(tmp_path / "ours")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("loha", {"peft_type": "LOKR", "decompose_factor": 2}, "none of a LOKR adapter, whose"),
        ("loha", {"peft_type": "XLORA"}, "peft_type is XLORA, expected LORA, LOHA"),
        ("lora", {"peft_type": "LOHA", "alpha": 3}, "key conv.lora_A.weight is none of a LOHA"),
        ("loha", {"peft_type": "LORA"}, "is of a LoHa adapter"),
        ("loha", {"r": 4}, r"linear.hada_w1_b has shape \(3, 12\), expected rank 4"),
        ("loha", {"target_modules": ["conv"]}, "linear is not among the targets"),
        ("loha", {"target_modules": ["conv" * 99]}, r"the targets \['(conv){20}'\.\.\.\]$"),
        ("lora", {"target_modules": "([a"}, r"adapter_config\.json: pattern '.*, letter"),
        ("lora", {"r": 0}, r"adapter_config\.json: r is 0, expected at least 1"),
        ("lora", {"r": "2"}, r"adapter_config\.json: r='2' \(str\): expected an integer"),
        ("lora", {"rank_pattern": [1]}, r"rank_pattern=\[1\] \(list\): expected names with a va"),
        ("lora", {"megatron_config": {"a": 1}}, "megatron_config is a value of type dict, which"),
        ("oft", {"block_share": True}, "block_share is True, which is not implemented"),
        ("glora", {"config_C": "none"}, "config_C is 'none', expected one of"),
        ("adalora-pruned", {"init_r": 4}, "linear has ranks|conv has ranks"),
        ("oft-boft", {"boft_n_butterfly_factor": 2}, "boft_n_butterfly_factor is 2"),
    ],
)
def test_what_does_not_fit_is_named(net, tmp_path, name, change, message):
    folders.write_peft(tmp_path, inject.extract(adapted(net, name)), model=net)
    path = tmp_path / folders.PEFT_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        folders.read_peft(tmp_path, net)


def test_missing_factors_are_named(net, tmp_path):
    folders.write_peft(tmp_path, inject.extract(adapted(net, "lokr")), model=net)
    path = tmp_path / folders.PEFT_WEIGHTS
    tensors = load_file(path)
    del tensors["base_model.model.linear.lokr_w2_a"]
    save_file(tensors, path)
    with pytest.raises(UserError, match="linear has no lokr_w2_a, only"):
        folders.read_peft(tmp_path, net)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("doha", RANKED, "neither a rank-stabilised scale nor DoRA"),
        ("loha", RANKED | {"use_rslora": True}, "neither a rank-stabilised scale"),
        ("lokr", KRON | {"unbalanced": True}, "which peft's decompose_factor 2 splits into"),
        ("glora", RANKED, "peft's GLoRA has the hadamard form"),
        ("ia3", {"targets": TARGETS, "scales_bias": False}, "scales biases too"),
        ("oft", LINEAR | {"block_size": 4, "side": "output"}, "peft's OFT rotates inputs"),
        ("oft", {"targets": ("conv",), "block_size": 4}, "rotates its taps too"),
        ("boft", LINEAR | {"block_size": 2}, "butterfly 2"),
        ("full", {"targets": TARGETS}, "peft has no Full, only LORA, LOHA"),
        ("locon", RANKED, "a LoRA file holds lora_A and lora_B, not lora_mid"),
        ("vera", RANKED, "peft's VeRA adapts linear layers, found Conv"),
    ],
)
def test_what_peft_has_no_form_for_is_refused(net, tmp_path, kind, options, message):
    model = registry.add(net, registry.make_config(kind, **options), rngs=nnx.Rngs(0))
    target = tmp_path / "x"
    with pytest.raises(ValueError, match=message):
        folders.write_peft(target, inject.extract(model), model=net)
    assert not target.exists()
