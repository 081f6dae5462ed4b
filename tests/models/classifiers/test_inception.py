"""The FID's InceptionV3 against torch with random weights, and the loading of its files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxsynth.core.errors import UserError
from jaxsynth.models.classifiers.inception import FEATURES, InceptionV3
from jaxsynth.weights.networks.inception import load_inception
from tests.models.torch_parity import nchw, relative_error

torch = pytest.importorskip("torch")
from tests.models.classifiers.torch_inception import random_inception  # noqa: E402


@pytest.fixture(scope="module")
def peer():
    return random_inception()


@pytest.fixture(scope="module")
def tensors(peer):
    return {name: value.numpy().copy() for name, value in peer.state_dict().items()}


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    """A folder as a user has it: one file, the classifier and the counters among its keys."""
    folder = tmp_path_factory.mktemp("inception")
    save_file(tensors, folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_inception(folder)[0]


@pytest.mark.heavy
def test_features_match_torch(peer, model):
    # Small, but the last blocks still see 2 x 3 pixels: at one pixel their pools are all alike.
    images = np.random.default_rng(0).uniform(-1, 1, (2, 107, 139, 3)).astype(np.float32)
    with torch.no_grad():
        expected = peer(nchw(images))
    found = jax.jit(lambda model, x: model(x))(model, jnp.asarray(images))
    assert found.shape == (2, FEATURES)
    assert relative_error(found, expected) < 1e-4
    # The comparison means something: features differ between images and between channels.
    assert relative_error(found[:1], expected[1:]) > 0.01
    assert np.std(found, axis=1).min() > 0.1 * np.abs(found).mean()


def test_too_small_images(model):
    with pytest.raises(ValueError, match=r"\(1, 74, 99, 3\), expected .* 75 or more"):
        model(jnp.zeros((1, 74, 99, 3)))


def test_parameters_are_the_checkpoints(tensors):
    """21.8 M parameters and statistics in 94 convolutions; only the classifier is left out."""
    state = nnx.state(nnx.eval_shape(lambda: InceptionV3(rngs=nnx.Rngs(0))))
    ours = sum(x.size for x in jax.tree.leaves(state))
    skipped = ("fc.", "num_batches")
    assert ours == sum(v.size for k, v in tensors.items() if not any(s in k for s in skipped))
    assert sum(key.endswith("conv.weight") for key in tensors) == 94


def test_digest_is_of_the_tensors(folder, tensors, tmp_path):
    _, digest = load_inception(folder)
    kept = {k: v for k, v in tensors.items() if not k.startswith("fc") and "num_b" not in k}
    save_file(kept, tmp_path / "a.safetensors")
    assert load_inception(tmp_path / "a.safetensors")[1] == digest
    kept["Mixed_5b.branch1x1.bn.bias"] = kept["Mixed_5b.branch1x1.bn.bias"] + 1e-3
    save_file(kept, tmp_path / "b.safetensors")
    assert load_inception(tmp_path / "b.safetensors")[1] != digest


@pytest.mark.parametrize("new", [False, True])
def test_pth_files(peer, model, folder, tmp_path, new):
    """The published file is of 2019, and in the format that PyTorch had then."""
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(peer.state_dict(), path, _use_new_zipfile_serialization=new)
    loaded, digest = load_inception(path)
    assert digest == load_inception(folder)[1]
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, loaded)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Mixed_5b.branch9x9.conv.weight": np.zeros(1, np.float32)}, "unknown key 'Mixed_5b.br"),
        ({"Mixed_7c.branch_pool.bn.running_var": None}, "key 'Mixed_7c.*running_var' missing$"),
        (
            {"Conv2d_1a_3x3.conv.weight": np.zeros((32, 3, 3, 5), np.float32)},
            r"Conv2d_1a_3x3.conv.weight: shape \(32, 3, 3, 5\), expected \(32, 3, 3, 3\)",
        ),
        ({"Conv2d_1a_3x3.bn.bias": np.zeros(32, np.int32)}, "bn.bias: int32"),
    ],
)
def test_keys_are_strict(tensors, tmp_path, change, message):
    changed = {k: v for k, v in (tensors | change).items() if v is not None}
    save_file(changed, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=message):
        load_inception(tmp_path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such file .*6726825d\.pth"):
        load_inception(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"expected one file of .* found none"):
        load_inception(tmp_path)
    for name in ("a.pth", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"found a\.pth, b\.safetensors"):
        load_inception(tmp_path)
    (tmp_path / "weights.h5").touch()
    with pytest.raises(UserError, match=r"weights\.h5: expected a file ending in \.safetensors"):
        load_inception(tmp_path / "weights.h5")
    (tmp_path / "b.safetensors").write_bytes(b"12345678")
    with pytest.raises(UserError, match=r"b\.safetensors: is a text, not a safetensors file"):
        load_inception(tmp_path / "b.safetensors")
