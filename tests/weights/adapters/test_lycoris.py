"""LyCORIS files, both ways: what LyCORIS makes of ours, and what comes back."""

import re

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from lycoris.wrapper import create_lycoris_from_weights
from safetensors.numpy import load_file, save_file

from jaxsynth.adapters import inject, registry
from jaxsynth.core.errors import UserError
from jaxsynth.weights.adapters.layered import read_layers
from jaxsynth.weights.adapters.lycoris import write_networks
from tests.adapters.nets import scrambled
from tests.adapters.oracles import TARGETS, Pair, TorchPair, images
from tests.models.torch_parity import copy_weights, nchw, randomise

RANKED = {"rank": 2, "alpha": 5, "targets": TARGETS}
DORA = {"decompose": "output", "detach_norm": False}
CASES = {
    "lora": RANKED | {"rank_pattern": {"conv": 3}, "use_rslora": True},
    "locon": RANKED | DORA,
    "loha": RANKED | {"use_tucker": True},
    "loha-dora": RANKED | DORA,
    "lokr": RANKED | {"rank": 1, "factor": 2},
    "lokr-tucker": RANKED | {"rank": 1, "factor": 2, "use_tucker": True},
    "lokr-both": RANKED | {"rank": 1, "decompose_both": True},
    "lokr-full": RANKED | {"full_matrix": True, "factor": 4},
    "glora": RANKED,
    "ia3": {"targets": TARGETS, "feedforward": ("conv",), "scales_bias": False},
    "full": {"targets": TARGETS},
}

# LyCORIS 4.1.3 writes these and cannot read them (it gives (IA)^3 an argument too many, and takes
# the transposed Tucker factors for plain ones): the names and shapes of its own modules.
NAMES = {
    "ia3": {
        "lycoris_conv.weight": (1, 4, 1, 1),
        "lycoris_conv.on_input": (),
        "lycoris_linear.weight": (8,),
        "lycoris_linear.on_input": (),
    },
    "lokr-tucker": {
        "lycoris_conv.alpha": (),
        "lycoris_conv.lokr_t2": (1, 1, 2, 2),
        "lycoris_conv.lokr_w1": (2, 2),
        "lycoris_conv.lokr_w2_a": (1, 6),
        "lycoris_conv.lokr_w2_b": (1, 2),
        "lycoris_linear.alpha": (),
        "lycoris_linear.lokr_w1": (2, 2),
        "lycoris_linear.lokr_w2_a": (4, 1),
        "lycoris_linear.lokr_w2_b": (1, 6),
    },
}


@pytest.fixture(scope="module")
def torch_weights():
    return randomise(TorchPair()).state_dict()


@pytest.fixture(scope="module")
def net(torch_weights):
    plain = TorchPair()
    plain.load_state_dict(torch_weights)
    model = Pair(rngs=nnx.Rngs(0))
    copy_weights(plain, model)
    return model


def adapted(net, name):
    config = registry.make_config(name.partition("-")[0], **CASES[name])
    model = registry.add(net, config, rngs=jax.random.key(0))
    state = inject.extract(model)
    moved = scrambled(state, 1).arrays
    arrays = {key: value + moved[key] for key, value in state.arrays.items()}
    return inject.load_state(model, inject.AdapterState(arrays, state.config))


@pytest.mark.parametrize("name", CASES)
def test_lycoris_computes_what_we_do_and_it_comes_back(net, torch_weights, tmp_path, name):
    model = adapted(net, name)
    path = tmp_path / "adapter.safetensors"
    write_networks(path, {"lycoris": model})
    plain = TorchPair()
    plain.load_state_dict(torch_weights)
    forward = jax.jit(lambda models: [model(images()) for model in models])
    again = read_layers(path, {"unet": net})["unet"]
    found, back = forward([model, again])
    bound = 1e-5 * np.abs(found).max()
    np.testing.assert_allclose(back, found, atol=bound)
    first, second = inject.extract(model).arrays, inject.extract(again).arrays
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_allclose(second[key], value, atol=1e-6, err_msg=key)
    if name in NAMES:
        assert {key: value.shape for key, value in load_file(path).items()} == NAMES[name]
        return
    with torch.no_grad():
        network, _ = create_lycoris_from_weights(1.0, str(path), plain.eval())
        network.apply_to()
        assert len(network.loras) == 2
        expected = plain(nchw(images())).numpy()
    np.testing.assert_allclose(found, expected, atol=bound)


def test_norms_have_names_of_their_own(tmp_path):
    net = nnx.Sequential(nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    model = registry.add(net, registry.make_config("full", targets=("layers.0",)), rngs=nnx.Rngs(0))
    model = inject.load_state(model, scrambled(inject.extract(model), 0))
    path = tmp_path / "norm.safetensors"
    write_networks(path, {"lora_unet": model})
    assert set(load_file(path)) == {f"lora_unet_layers_0.{n}" for n in ("w_norm", "b_norm")}
    back = inject.extract(read_layers(path, {"unet": net})["unet"]).arrays
    jax.tree.map(np.testing.assert_array_equal, back, inject.extract(model).arrays)


def changed(path, tmp_path, **tensors):
    """The file with other tensors; None leaves one out."""
    found = load_file(path) | {key.replace("__", "."): value for key, value in tensors.items()}
    other = tmp_path / "other.safetensors"
    save_file({key: value for key, value in found.items() if value is not None}, other)
    return other


def test_what_does_not_fit_is_named(net, tmp_path):
    path = tmp_path / "adapter.safetensors"
    model = adapted(net, "loha")
    write_networks(path, {"lora_unet": model})
    one = np.ones((2, 2), np.float32)
    for tensors, message in (
        ({"lora_unet_to_q__hada_w1_a": one}, "to_q.hada_w1_a names no layer of the network"),
        ({"lora_unet_conv__oft_blocks": one}, "conv.oft_blocks is of no kind known here"),
        ({"lora_unet_conv__lora_down__weight": one}, "conv has the factors .* of no one kind"),
        ({"lora_unet_linear__hada_w1_a": None}, "linear has the factors .* of no one kind"),
        ({"lora_unet_linear__hada_w2_a": one}, r"linear.hada_w2_a has shape \(2, 2\), expected"),
    ):
        with pytest.raises(UserError, match=message):
            read_layers(changed(path, tmp_path, **tensors), {"unet": net})
    with pytest.raises(UserError, match="no such file"):
        read_layers(tmp_path / "none.safetensors", {"unet": net})
    for kind, options, message in (
        ("pissa", RANKED, "write `to_lora.as_lora` of it"),
        ("vera", RANKED, "a VeRA layer has no form"),
    ):
        other = registry.add(net, registry.make_config(kind, **options), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=re.escape(message)):
            write_networks(path, {"lora_unet": other})
    with pytest.raises(ValueError, match="holds no adapters"):
        write_networks(path, {"lora_unet": net})
