"""A1111's hypernetwork files: what torch and a restricted unpickler make of ours, and back."""

import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxsynth.adapters import inject, registry
from jaxsynth.adapters.kinds.hypernetwork import HypernetworkConfig
from jaxsynth.core.errors import UserError
from jaxsynth.weights.adapters.a1111 import read_hypernetwork, write_hypernetwork
from jaxsynth.weights.torch_files.reader import read_nested
from jaxsynth.weights.torch_files.writer import write_pickled
from tests.adapters.nets import scrambled


class Attentions(nnx.Module):
    """Keys and values of two widths, one of them twice."""

    def __init__(self, rngs):
        self.blocks = nnx.List(
            [nnx.Dict(to_k=nnx.Linear(n, 5, rngs=rngs), to_v=nnx.Linear(n, 5, rngs=rngs))
             for n in (4, 6, 6)]
        )  # fmt: skip


def filled(net, config):
    """Networks with random weights, equal in all copies."""
    model = registry.add(net, config, rngs=jax.random.key(0))
    state = scrambled(inject.extract(model), 1)
    arrays = {k: state.arrays[k.replace("blocks.2", "blocks.1")] for k in state.arrays}
    return inject.load_state(model, inject.AdapterState(arrays, state.config))


def torch_network(state, content):
    """The network as the web UI builds it."""
    structure, act = content["layer_structure"], content["activation_func"]
    activations = {"relu": torch.nn.ReLU, "swish": torch.nn.Hardswish, "tanh": torch.nn.Tanh}
    width = state["linear.0.weight"].shape[1]
    layers = []
    for i in range(len(structure) - 1):
        sizes = [int(width * structure[k]) for k in (i, i + 1)]
        layers.append(torch.nn.Linear(*sizes))
        last = i >= len(structure) - 2 and not content["activate_output"]
        if act != "linear" and not last:
            layers.append(activations[act]())
        if content["is_layer_norm"]:
            layers.append(torch.nn.LayerNorm(sizes[1]))
    made = torch.nn.Module()
    made.linear = torch.nn.Sequential(*layers)
    made.load_state_dict(state)
    return made.linear


CASES = {
    "linear": {},
    "relu": {"structure": (1, 2, 1.5, 1), "activation": "relu", "layer_norm": True},
    "tanh": {"activation": "tanh", "activate_output": True},
}


@pytest.mark.parametrize("name", CASES)
def test_torch_computes_the_same_and_it_comes_back(tmp_path, name):
    net = Attentions(nnx.Rngs(0))
    model = filled(net, HypernetworkConfig(**CASES[name]))
    path = tmp_path / "net.pt"
    write_hypernetwork(path, model)
    content = torch.load(path, weights_only=True)
    assert {key for key in content if type(key) is int} == {4, 6}
    for place, width in ((0, 4), (2, 6)):
        x = np.random.default_rng(0).standard_normal((3, width), np.float32)
        for i, last in enumerate(("to_k", "to_v")):
            with torch.no_grad():
                change = torch_network(content[width][i], content)(torch.tensor(x)).numpy()
            layer = model.blocks[place][last]
            np.testing.assert_allclose(layer.network(jnp.asarray(x)), change, atol=2e-5)
    # What torch writes of it, and a file of one width.
    torch.save(content, tmp_path / "again.pt")
    back = read_hypernetwork(tmp_path / "again.pt", net)
    found, expected = inject.extract(back), inject.extract(model)
    assert found.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, found.arrays, expected.arrays)
    del content[4]
    torch.save(content, tmp_path / "one.pt")
    part = inject.extract(read_hypernetwork(tmp_path / "one.pt", net)).arrays
    assert part.keys() == {key for key in expected.arrays if not key.startswith("blocks.0")}


def test_what_cannot_be_is_named(tmp_path):
    net = Attentions(nnx.Rngs(0))
    path = tmp_path / "net.pt"
    config = HypernetworkConfig()
    model = registry.add(net, config, rngs=jax.random.key(0))
    model = inject.load_state(model, scrambled(inject.extract(model), 1))
    with pytest.raises(ValueError, match=r"blocks.2.to_k: differs from blocks.1.to_k"):
        write_hypernetwork(path, model)
    lora = registry.add(net, registry.make_config("lora", targets=("to_k",)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="holds hypernetworks, found LoRA"):
        write_hypernetwork(path, lora)
    with pytest.raises(ValueError, match=r"networks before \['to_k'\]"):
        one = HypernetworkConfig(targets=("to_k",))
        write_hypernetwork(path, filled(net, one))
    assert not path.exists()
    write_hypernetwork(path, filled(net, config))
    content = torch.load(path, weights_only=True)
    for change, message in (
        ({"activation_func": "gelu"}, "activation='gelu'"),
        ({"layer_structure": [1, 2, 2, 1]}, "a network of 2 layers and 0 norms, expected 3"),
        ({4: None, 6: None}, "a network is a NoneType|not subscriptable"),
    ):
        changed = content | change
        if 4 in change:
            changed = content | {4: (None, None)}
        torch.save(changed, path)
        with pytest.raises(UserError, match=message):
            read_hypernetwork(path, net)
    torch.save({9: content[4]}, path)
    with pytest.raises(UserError, match=r"networks of widths \[9\], .* have \[4, 6\]"):
        read_hypernetwork(path, net)
    torch.save({"step": 1}, path)
    with pytest.raises(UserError, match=r"no networks by width among \['step'\]"):
        read_hypernetwork(path, net)


def test_plain_data_there_and_back(tmp_path):
    content = {
        320: ({"a.b": np.arange(6, dtype=np.float32).reshape(2, 3)}, {}),
        "x": [1, -5, 2.5, True, None, "naïve"],
        "half": np.ones((2, 1), np.float16),
    }
    path = tmp_path / "x.pt"
    write_pickled(path, content)
    first = path.read_bytes()
    write_pickled(path, content)
    assert path.read_bytes() == first
    found = torch.load(path, weights_only=True)
    assert found["x"] == content["x"] and found[320][1] == {}
    np.testing.assert_array_equal(found[320][0]["a.b"], content[320][0]["a.b"])
    again = read_nested(path)
    assert again["x"] == content["x"] and again["half"].dtype == np.float16
    np.testing.assert_array_equal(again[320][0]["a.b"], content[320][0]["a.b"])
    with pytest.raises(TypeError, match="a set is no plain data"):
        write_pickled(path, {"x": {1}})
    assert path.read_bytes() == first


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({320: Evil()}, 2))
    with pytest.raises(UserError, match=r"asks for (__builtin__|builtins)\.print"):
        read_nested(path)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match="no PyTorch file"):
        read_nested(path)
