"""CLIP's towers against transformers, on torch CPU, with weights away from the initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsynth.models.clip import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
)
from jaxsynth.weights.models import describe
from jaxsynth.weights.names import canonical, from_hf, hf_name, hf_shape

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Ratios of the published shapes, widths divided by 16: (layers, heads, width).
B32 = {"num_hidden_layers": 3, "num_attention_heads": 3, "hidden_size": 48, "patch_size": 16}
L14 = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64, "patch_size": 7}
VOCAB = 99
TEXT_SHAPES = {
    "B/32": {"hidden_size": 32, "num_attention_heads": 2, "hidden_act": "quick_gelu"},
    "L/14": {"hidden_size": 48, "num_attention_heads": 3, "hidden_act": "quick_gelu"},
    "SD 2 (H)": {"hidden_size": 64, "num_attention_heads": 4, "hidden_act": "gelu"},
}
# SD 2 ships 23 of H's 24 layers, so that the last state is the one before the last.
LAYERS = {"B/32": 3, "L/14": 3, "SD 2 (H)": 23}


def text_config(shape, **changes):
    config = {"vocab_size": VOCAB, "max_position_embeddings": 14, "intermediate_size": 64}
    return {**config, "num_hidden_layers": LAYERS[shape], **TEXT_SHAPES[shape], **changes}


def vision_config(shape, **changes):
    return {
        "image_size": 32,
        "intermediate_size": 80,
        "hidden_act": "quick_gelu",
        **shape,
        **changes,
    }


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        # Small enough that 23 layers stay in range, large enough that attention is not uniform.
        parameter.data = around + 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def load(model, peer):
    """Copies the peer's weights by our rules of names; every one must be used."""
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    targets = {hf_name(path): path for path in flat}
    source = {canonical(key, targets): value for key, value in peer.state_dict().items()}
    source.pop(None, None)
    assert source.keys() == targets.keys()
    for name, path in targets.items():
        value = source[name].numpy()
        assert value.shape == hf_shape(path[-1], flat[path].shape), name
        flat[path].set_value(jnp.asarray(from_hf(path[-1], value)))
    return model


def error(ours, theirs):
    theirs = theirs.detach().numpy()
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def token_ids(eos, *, seed=0):
    """Sequences of different lengths, padded with their end token like CLIP's."""
    ids = np.random.default_rng(seed).integers(3, VOCAB - 1, (3, 12))
    for row, length in enumerate((12, 7, 2)):
        ids[row, length - 1 :] = eos
    return ids


@pytest.mark.parametrize("shape", TEXT_SHAPES)
@pytest.mark.parametrize("legacy", [True, False])
def test_text_tower_matches_transformers(shape, legacy):
    eos = VOCAB - 1
    config = text_config(shape, eos_token_id=2 if legacy else eos)
    peer = randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))
    model = load(CLIPTextModel(CLIPTextConfig.from_dict(config), rngs=nnx.Rngs(0)), peer)
    ids = token_ids(eos)
    with torch.no_grad():
        theirs = peer(torch.tensor(ids), output_hidden_states=True)
    ours = jax.jit(lambda model, ids: model(ids))(model, jnp.asarray(ids))
    assert error(ours.last_hidden_state, theirs.last_hidden_state) < 1e-4
    assert error(ours.pooled, theirs.pooler_output) < 1e-4
    assert len(ours.hidden_states) == LAYERS[shape] + 1
    for mine, expected in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert error(mine, expected) < 1e-4


def test_end_of_text_in_the_middle_of_the_vocabulary():
    """With new tokens after it the end is not the highest id: only the true eos finds it."""
    ids = token_ids(40)
    ids[:, 0] = VOCAB - 1
    config = text_config("B/32", eos_token_id=40)
    peer = randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))
    model = load(CLIPTextModel(CLIPTextConfig.from_dict(config), rngs=nnx.Rngs(0)), peer)
    ours = model(jnp.asarray(ids))
    assert error(ours.pooled, peer(torch.tensor(ids)).pooler_output) < 1e-4
    first = np.argmax(ids == 40, axis=1)
    np.testing.assert_array_equal(ours.pooled, ours.last_hidden_state[np.arange(3), first])


def test_padded_text_matches_transformers():
    config = text_config("L/14", eos_token_id=VOCAB - 1)
    peer = randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))
    model = load(CLIPTextModel(CLIPTextConfig.from_dict(config), rngs=nnx.Rngs(0)), peer)
    ids = token_ids(VOCAB - 1)
    mask = (np.arange(12)[None] < np.array([12, 7, 2])[:, None]).astype(np.int32)
    theirs = peer(torch.tensor(ids), attention_mask=torch.tensor(mask))
    ours = model(jnp.asarray(ids), jnp.asarray(mask))
    assert error(ours.last_hidden_state, theirs.last_hidden_state) < 1e-4
    assert error(ours.pooled, theirs.pooler_output) < 1e-4
    # What is padded does not reach what is not.
    other = np.where(mask, ids, 5)
    np.testing.assert_allclose(
        model(jnp.asarray(other), jnp.asarray(mask)).last_hidden_state * mask[..., None],
        ours.last_hidden_state * mask[..., None],
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("shape", [B32, L14], ids=["B/32", "L/14"])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_vision_tower_matches_transformers(shape, act):
    # 32 is no multiple of 7: the last rows and columns belong to no patch.
    config = vision_config(shape, hidden_act=act)
    peer = randomise(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config)))
    model = load(CLIPVisionModel(CLIPVisionConfig.from_dict(config), rngs=nnx.Rngs(0)), peer)
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = peer(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    ours = jax.jit(lambda model, x: model(x))(model, jnp.asarray(pixels))
    assert error(ours.last_hidden_state, theirs.last_hidden_state) < 1e-4
    assert error(ours.pooled, theirs.pooler_output) < 1e-4
    assert len(ours.hidden_states) == shape["num_hidden_layers"] + 1
    assert error(ours.hidden_states[0], theirs.hidden_states[0]) < 1e-4


@pytest.mark.parametrize("shape", ["B/32", "L/14"])
def test_whole_clip_matches_transformers(shape):
    config = {
        "text_config": text_config(shape, eos_token_id=VOCAB - 1),
        "vision_config": vision_config(B32 if shape == "B/32" else L14),
        "projection_dim": 24,
    }
    peer = randomise(transformers.CLIPModel(transformers.CLIPConfig(**config)))
    model = load(CLIPModel(CLIPConfig.from_dict(config), rngs=nnx.Rngs(0)), peer)
    ids = token_ids(VOCAB - 1)
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    images = torch.tensor(pixels.transpose(0, 3, 1, 2))
    with torch.no_grad():
        theirs = peer(input_ids=torch.tensor(ids), pixel_values=images)
    text = jax.jit(CLIPModel.encode_text)(model, jnp.asarray(ids))
    image = jax.jit(CLIPModel.encode_image)(model, jnp.asarray(pixels))
    assert text.shape == (3, 24) and image.shape == (2, 24)
    text, image = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (text, image))
    assert error(text, theirs.text_embeds) < 1e-4
    assert error(image, theirs.image_embeds) < 1e-4
    logits = jnp.exp(model.logit_scale[...]) * image @ text.T
    assert error(logits, theirs.logits_per_image) < 1e-4


@pytest.mark.parametrize("eos", [2, VOCAB - 1])
def test_the_text_tower_with_its_projection_matches_transformers(eos):
    """SDXL's second text encoder: projected pooled text, and states before the last layer."""
    config = text_config("B/32", eos_token_id=eos, projection_dim=24, hidden_act="gelu")
    kind = transformers.CLIPTextModelWithProjection
    peer = randomise(kind(transformers.CLIPTextConfig(**config)))
    ours = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config), rngs=nnx.Rngs(0))
    model = load(ours, peer)
    ids = token_ids(VOCAB - 1)
    with torch.no_grad():
        theirs = peer(torch.tensor(ids), output_hidden_states=True)
    found = jax.jit(lambda model, ids: model(ids))(model, jnp.asarray(ids))
    assert found.text_embeds.shape == (3, 24)
    assert error(found.text_embeds, theirs.text_embeds) < 1e-4
    assert error(found.last_hidden_state, theirs.last_hidden_state) < 1e-4
    assert error(found.hidden_states[-2], theirs.hidden_states[-2]) < 1e-4


def test_image_features_match_the_tower_with_projection():
    """Projected features are not normalised: the same as CLIPVisionModelWithProjection's."""
    config = vision_config(B32, projection_dim=24)
    kind = transformers.CLIPVisionModelWithProjection
    peer = randomise(kind(transformers.CLIPVisionConfig(**config)))
    whole = {"vision_config": config, "text_config": text_config("B/32"), "projection_dim": 24}
    model = CLIPModel(CLIPConfig.from_dict(whole), rngs=nnx.Rngs(0))
    flat = {hf_name(p): (p, v) for p, v in nnx.to_flat_state(nnx.state(model))}
    for key, value in peer.state_dict().items():
        name = canonical(key, flat)
        if name is not None:
            path, variable = flat[name]
            variable.set_value(jnp.asarray(from_hf(path[-1], value.numpy())))
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    theirs = peer(torch.tensor(pixels.transpose(0, 3, 1, 2))).image_embeds
    assert error(model.encode_image(jnp.asarray(pixels)), theirs) < 1e-4


def test_gradients_match_torch():
    config = text_config("B/32", eos_token_id=VOCAB - 1)
    peer = randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))
    model = load(CLIPTextModel(CLIPTextConfig.from_dict(config), rngs=nnx.Rngs(0)), peer)
    ids = token_ids(VOCAB - 1)
    (peer(torch.tensor(ids)).pooler_output ** 2).mean().backward()
    graphdef, state = nnx.split(model)
    loss = lambda state: (nnx.merge(graphdef, state)(jnp.asarray(ids)).pooled ** 2).mean()  # noqa: E731
    gradients = dict(nnx.to_flat_state(jax.jit(jax.grad(loss))(state)))
    expected = {name: parameter.grad for name, parameter in peer.named_parameters()}
    targets = {hf_name(path): path for path in gradients}
    for key, gradient in expected.items():
        path = targets[canonical(key, targets)]
        theirs = from_hf(path[-1], gradient.numpy())
        scale = np.abs(theirs).max()
        if "k_proj.bias" not in key:  # zero up to rounding: softmax ignores a constant
            np.testing.assert_allclose(
                gradients[path][...], theirs, atol=1e-4 * scale, rtol=1e-4, err_msg=key
            )


def test_bfloat16_computation_keeps_float32_weights():
    config = CLIPTextConfig.from_dict(text_config("B/32", eos_token_id=VOCAB - 1))
    full = CLIPTextModel(config, rngs=nnx.Rngs(0))
    half = CLIPTextModel(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    ids = jnp.asarray(token_ids(VOCAB - 1))
    out = half(ids)
    assert out.last_hidden_state.dtype == jnp.bfloat16
    assert half.text_model.final_layer_norm.scale.dtype == jnp.float32
    reference = full(ids).last_hidden_state
    spread = jnp.abs(out.last_hidden_state.astype(jnp.float32) - reference).max()
    assert spread < 0.05 * jnp.abs(reference).max()


def test_published_shapes_build_abstractly():
    """OpenAI's B/32 and the text encoders of Stable Diffusion, counted without allocating."""

    def count(cls, config):
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(describe(cls, config))))

    assert count(CLIPModel, CLIPConfig()) == 151_277_313
    sd1 = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    assert count(CLIPTextModel, sd1) == 123_060_480
    sd2 = CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=23,
        hidden_act="gelu",
    )
    assert count(CLIPTextModel, sd2) == 340_387_840


def test_old_config_files_are_read():
    """A text_config_dict wins over text_config, as in transformers, with its own defaults."""
    full = {"hidden_size": 96, "num_attention_heads": 6, "eos_token_id": 2, "top_k": 50}
    old = {
        "_commit_hash": None,
        "model_type": "clip",
        "torch_dtype": "float32",
        "text_config": full,
        "text_config_dict": {"hidden_size": 64, "num_attention_heads": 4},
        "vision_config": {"patch_size": 16, "dropout": 0.0},
        "vision_config_dict": None,
    }
    config = CLIPConfig.from_dict(old)
    theirs = transformers.CLIPConfig(**old)
    for name in ("hidden_size", "num_attention_heads", "eos_token_id"):
        assert getattr(config.text_config, name) == getattr(theirs.text_config, name)
    assert config.vision_config.patch_size == 16


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (CLIPTextConfig, {"rope_theta": 1}, "CLIPTextConfig: unknown field 'rope_theta'"),
        (CLIPTextConfig, {"hidden_act": "swiglu"}, "CLIPTextConfig.hidden_act: 'swiglu'"),
        (CLIPTextConfig, {"hidden_size": 10}, "hidden_size 10 is not a multiple of .* 8"),
        (CLIPTextConfig, {"attention_dropout": 0.1}, "attention_dropout: 0.1, only 0"),
        (CLIPTextConfig, {"eos_token_id": [1, 2]}, "eos_token_id.*: expected an int"),
        (CLIPVisionConfig, {"patch_size": 300}, "patch_size 300 is larger than image_size 224"),
        (CLIPVisionConfig, {"image_size": [224, 112]}, "image_size.*: expected an int"),
        (CLIPConfig, {"text_config": {"depth": 3}}, "CLIPTextConfig: unknown field 'depth'"),
        (CLIPConfig, {"temperature_init": 3}, "CLIPConfig: unknown field 'temperature_init'"),
    ],
)
def test_wrong_configs_are_named(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls.from_dict(fields)


def test_wrong_inputs_are_named():
    text = CLIPTextModel(CLIPTextConfig.from_dict(text_config("B/32")), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="15 tokens, but max_position_embeddings is 14"):
        text(jnp.zeros((1, 15), jnp.int32))
    vision = CLIPVisionModel(CLIPVisionConfig.from_dict(vision_config(B32)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"images are \(1, 16, 16, 3\)"):
        vision(jnp.zeros((1, 16, 16, 3)))
