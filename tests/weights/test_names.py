"""The rules between NNX paths and Hugging Face keys."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxsynth.models.clip import CLIPConfig, CLIPModel
from jaxsynth.weights.names import canonical, from_hf, hf_name, hf_shape, to_hf

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("encoder", "layers", 0, "fc1", "kernel"), "encoder.layers.0.fc1.weight"),
        (("encoder", "layers", 10, "fc1", "bias"), "encoder.layers.10.fc1.bias"),
        (("norm", "scale"), "norm.weight"),
        (("token_embedding", "embedding"), "token_embedding.weight"),
        (("embeddings", "class_embedding"), "embeddings.class_embedding"),
        (("logit_scale",), "logit_scale"),
        (("attn1", "to_out", 0, "kernel"), "attn1.to_out.0.weight"),
    ],
)
def test_keys(path, key):
    assert hf_name(path) == key


@pytest.mark.parametrize(
    ("leaf", "shape", "expected"),
    [
        ("kernel", (2, 3), (3, 2)),
        ("kernel", (5, 2, 3), (3, 2, 5)),
        ("kernel", (4, 5, 2, 3), (3, 2, 4, 5)),
        ("embedding", (2, 3), (2, 3)),
        ("bias", (2,), (2,)),
        ("logit_scale", (), ()),
    ],
)
def test_layouts_go_there_and_back(leaf, shape, expected):
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    theirs = to_hf(leaf, array)
    assert theirs.shape == hf_shape(leaf, shape) == expected
    assert theirs.flags.c_contiguous and from_hf(leaf, theirs).flags.c_contiguous
    np.testing.assert_array_equal(from_hf(leaf, theirs), array)


def test_a_convolution_kernel_is_height_width_in_out():
    torch = pytest.importorskip("torch")
    weight = torch.nn.Conv2d(2, 3, (4, 5)).weight.detach().numpy()
    ours = from_hf("kernel", weight)
    assert ours.shape == (4, 5, 2, 3)
    assert ours[1, 2, 0, 1] == weight[1, 0, 1, 2]


def test_an_unknown_kernel_shape_is_an_error():
    with pytest.raises(ValueError, match="kernel with 5 axes"):
        hf_shape("kernel", (1, 1, 1, 1, 1))


def test_old_and_flattened_keys():
    vae = {"decoder.mid_block.attentions.0.to_out.0.weight"}
    old = "decoder.mid_block.attentions.0.proj_attn.weight"
    assert canonical(old, vae) in vae
    text = {"text_model.encoder.layers.0.mlp.fc1.bias", "text_model.embeddings.x"}
    assert canonical("encoder.layers.0.mlp.fc1.bias", text) in text
    assert canonical("text_model.embeddings.x", text) == "text_model.embeddings.x"
    assert canonical("text_model.embeddings.position_ids", text) is None
    assert canonical("embeddings.position_ids", text) is None
    assert canonical("something.else", text) == "something.else"
    both = {"text_model.a", "vision_model.a"}
    assert canonical("a", both) == "a", "which tower is meant cannot be told"


def test_every_key_of_a_clip_is_transformers():
    config = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    config = {"text_config": config, "vision_config": config}
    model = nnx.eval_shape(lambda: CLIPModel(CLIPConfig.from_dict(config), rngs=nnx.Rngs(0)))
    ours = {
        hf_name(path): hf_shape(path[-1], leaf.shape)
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    peer = transformers.CLIPModel(transformers.CLIPConfig(**config))
    assert ours == {name: tuple(value.shape) for name, value in peer.named_parameters()}
    assert len(ours) == len(jax.tree.leaves(nnx.state(model)))
