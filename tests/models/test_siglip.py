"""SigLIP's towers against transformers, on torch CPU, with weights away from the initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from jax.sharding import PartitionSpec

from jaxsynth.models.siglip import (
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from jaxsynth.training import sharding
from jaxsynth.weights.models import describe
from tests.models.torch_parity import copy_weights, nchw, randomise, relative_error

TEXT = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 6,
    "projection_size": 16,
}
# 18 is no multiple of 4: the last rows and columns belong to no patch.
VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 18,
    "patch_size": 4,
}
WHOLE = {"text_config": TEXT, "vision_config": VISION}


def peer_of(kind, config, values):
    return randomise(getattr(transformers, kind)(getattr(transformers, config)(**values)))


def loaded(model_cls, config, peer):
    model = model_cls(config, rngs=nnx.Rngs(0))
    copy_weights(peer, model)
    return model


def test_both_towers_are_those_of_transformers():
    """A longer text and images; the towers' widths differ before their heads."""
    peer = peer_of("SiglipModel", "SiglipConfig", WHOLE)
    model = loaded(SiglipModel, SiglipConfig.from_dict(WHOLE), peer)
    rng = np.random.default_rng(0)
    ids, pixels = rng.integers(0, 40, (3, 6)), rng.uniform(-1, 1, (2, 18, 18, 3))
    pixels = pixels.astype(np.float32)

    @jax.jit
    def run(model, ids, pixels):
        features = model.encode_text(ids), model.encode_image(pixels)
        return model.text_model(ids), model.vision_model(pixels), features

    text, image, features = run(model, ids, pixels)
    with torch.no_grad():
        theirs = peer(input_ids=torch.tensor(ids), pixel_values=nchw(pixels))
    for ours, expected in ((text, theirs.text_model_output), (image, theirs.vision_model_output)):
        last = expected.last_hidden_state
        assert relative_error(ours.last_hidden_state, last.numpy()) < 1e-5
        assert relative_error(ours.pooled, expected.pooler_output.numpy()) < 1e-5
    assert len(text.hidden_states) == 3 and text.pooled.shape == (3, 16)
    for mine, whole in zip(features, (text, image), strict=True):
        np.testing.assert_array_equal(mine, whole.pooled)
    unit = [x.pooled / jnp.linalg.norm(x.pooled, axis=-1, keepdims=True) for x in (image, text)]
    logits = jnp.exp(model.logit_scale[...]) * unit[0] @ unit[1].T + model.logit_bias[...]
    assert relative_error(logits, theirs.logits_per_image.numpy()) < 1e-5


def test_a_new_network_begins_as_the_papers():
    model = SiglipModel(SiglipConfig.from_dict(WHOLE), rngs=nnx.Rngs(0))
    assert float(model.logit_bias[0]) == -10 and np.exp(model.logit_scale[0]) == pytest.approx(10)


def test_published_shapes_build_abstractly():
    """B/16's two vocabularies and giant-opt's towers of two widths, without allocating."""

    def count(config):
        shapes = nnx.state(describe(SiglipModel, config))
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    # What transformers counts of its own networks.
    with torch.device("meta"):
        for changes in ({}, {"vocab_size": 256_000}):
            peer = transformers.SiglipModel(transformers.SiglipConfig(text_config=changes))
            expected = sum(value.numel() for value in peer.parameters())
            assert count(SiglipConfig.from_dict({"text_config": changes})) == expected
    giant = {
        "text_config": {"hidden_size": 1152, "num_attention_heads": 16, "projection_size": 1536},
        "vision_config": {"hidden_size": 1536, "num_attention_heads": 16},
    }
    assert SiglipConfig.from_dict(giant).projection_dim == 1536


def test_every_array_has_a_place_on_a_mesh():
    shapes = nnx.state(describe(SiglipModel, SiglipConfig()))
    places = sharding.shardings_for(shapes, sharding.make_mesh(4, 1, 2), sharding.CLIP)
    found = {sharding.dotted(path): leaf.spec for path, leaf in jax.tree.leaves_with_path(places)}
    layer = "vision_model.encoder.layers.0."
    assert found[f"{layer}self_attn.q_proj.kernel"] == PartitionSpec(None, "tensor")
    assert "tensor" not in found["vision_model.head.attention.in_proj_weight"]


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (SiglipTextConfig, {"rope_theta": 1}, "SiglipTextConfig: unknown field 'rope_theta'"),
        (SiglipTextConfig, {"hidden_act": "swiglu"}, "SiglipTextConfig.hidden_act: 'swiglu'"),
        (SiglipTextConfig, {"attention_dropout": 0.1}, "attention_dropout: 0.1, only 0"),
        (SiglipVisionConfig, {"patch_size": 300}, "patch_size 300 is larger than image_size 224"),
        (SiglipVisionConfig, {"image_size": [224, 112]}, "image_size: .*expected a square"),
        (SiglipVisionConfig, {"hidden_size": 10}, "hidden_size 10 is not a multiple of .* 12"),
        (SiglipConfig, {"text_config": {"depth": 3}}, "SiglipTextConfig: unknown field 'depth'"),
        (
            SiglipConfig,
            {"text_config": {"projection_size": 5}},
            "projection_size is 5, but vision_config.hidden_size 768",
        ),
        (
            SiglipConfig,
            {"vision_config": {"vision_use_head": False}},
            "vision_use_head is false, expected true",
        ),
    ],
)
def test_wrong_configs_are_named(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls.from_dict(fields)


def test_wrong_inputs_are_named():
    text = describe(SiglipTextModel, SiglipTextConfig.from_dict(TEXT))
    with pytest.raises(ValueError, match="7 tokens, but max_position_embeddings is 6"):
        jax.eval_shape(lambda model, ids: model(ids), text, jnp.zeros((1, 7), jnp.int32))
    vision = describe(SiglipVisionModel, SiglipVisionConfig.from_dict(VISION))
    with pytest.raises(ValueError, match=r"images are \(1, 16, 16, 3\), expected \(batch, \*\(18"):
        jax.eval_shape(lambda model, x: model(x), vision, jnp.zeros((1, 16, 16, 3)))
