"""Folders in Hugging Face's format: what the peers write loads here, and the other way round."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxsynth.core.errors import UserError
from jaxsynth.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.models.diffusion.vae import AutoencoderKL, AutoencoderKLConfig
from jaxsynth.weights import hub
from jaxsynth.weights.hf import (
    Clip,
    StableDiffusion,
    load_clip,
    load_pipeline,
    read_json,
    save_clip,
    save_pipeline,
)
from jaxsynth.weights.layout import to_file
from jaxsynth.weights.models import describe, load_model, save_model
from jaxsynth.weights.names import hf_name
from jaxsynth.weights.tokenizer import train_tokenizer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

VOCAB, LENGTH, WIDTH = 540, 12, 16
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "bos_token_id": VOCAB - 2,
    "eos_token_id": VOCAB - 1,
    "projection_dim": 10,
}
VISION = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
UNET = {
    "sample_size": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
}
VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 8,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
PROMPTS = ["a photo of a cat", "zebra, 12!", ""]


def randomise(model):
    """Weights away from the initialisation, so that no bias is zero and no norm is one."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = around + 0.2 * noise
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a photo of a cat", "a photo of a dog"] * 3, VOCAB, LENGTH, folder)
    return folder


@pytest.fixture(scope="module")
def peer(tokenizer_folder):
    """A pipeline as diffusers builds it."""
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT))
    return diffusers.StableDiffusionPipeline(
        vae=randomise(diffusers.AutoencoderKL(**VAE)),
        text_encoder=randomise(text),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer_folder),
        unet=randomise(diffusers.UNet2DConditionModel(**UNET)),
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def pipeline_folder(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    peer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_peer():
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=10)
    return randomise(transformers.CLIPModel(config))


@pytest.fixture(scope="module")
def clip_folder(clip_peer, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    clip_peer.save_pretrained(folder)
    transformers.CLIPTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@jax.jit
def text_states(model, ids):
    return model(ids).last_hidden_state


@jax.jit
def denoise(model, latents, t, states):
    return jnp.moveaxis(model(latents, t, states), -1, 1)


@jax.jit
def encode(model, images):
    return jnp.moveaxis(model.encode(images).mode(), -1, 1)


@jax.jit
def decode(model, latents):
    return jnp.moveaxis(model.decode(latents), -1, 1)


@jax.jit
def features(model, ids, pixels):
    both = model.encode_text(ids), model.encode_image(pixels)
    return [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in both]


def error(ours, theirs):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def nchw(array):
    return torch.tensor(np.moveaxis(np.asarray(array), -1, 1))


def assert_same_networks(ours, theirs):
    """A StableDiffusion and a diffusers pipeline compute the same."""
    rng = np.random.default_rng(0)
    ids = ours.tokenizer(PROMPTS)
    their_ids = theirs.tokenizer(
        PROMPTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    np.testing.assert_array_equal(ids, their_ids.numpy())
    with torch.no_grad():
        states = theirs.text_encoder(their_ids).last_hidden_state
        assert error(text_states(ours.text_encoder, ids), states) < 1e-4
        latents = rng.normal(size=(3, 4, 4, 4)).astype(np.float32)
        t = np.array([1, 500, 999])
        noise = theirs.unet(nchw(latents), torch.tensor(t), states).sample
        assert error(denoise(ours.unet, latents, t, states.numpy()), noise) < 1e-4
        images = rng.uniform(-1, 1, size=(2, 8, 8, 3)).astype(np.float32)
        posterior = theirs.vae.encode(nchw(images)).latent_dist.mode()
        assert error(encode(ours.vae, images), posterior) < 1e-4
        decoded = theirs.vae.decode(nchw(latents)).sample
        assert error(decode(ours.vae, latents), decoded) < 1e-4


def test_pipeline_of_diffusers_loads_and_computes_the_same(peer, pipeline_folder):
    ours = load_pipeline(pipeline_folder)
    assert_same_networks(ours, peer)
    assert ours.folder == pipeline_folder
    assert ours.scheduler_config["beta_schedule"] == "scaled_linear"
    assert ours.vae.config.scaling_factor == peer.vae.config.scaling_factor


def test_pipeline_of_ours_loads_in_diffusers(pipeline_folder, tmp_path):
    ours = load_pipeline(pipeline_folder)
    save_pipeline(ours, tmp_path / "out")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "out", safety_checker=None
    )
    assert type(theirs.scheduler) is diffusers.DDIMScheduler
    assert_same_networks(ours, theirs)
    again = load_pipeline(tmp_path / "out")
    assert_same_networks(again, theirs)
    theirs.set_progress_bar_config(disable=True)
    image = theirs("a cat", num_inference_steps=2, output_type="np", height=8, width=8).images
    assert image.shape == (1, 8, 8, 3) and np.isfinite(image).all()


@pytest.mark.heavy
def test_pipeline_from_scratch_loads_in_diffusers(tokenizer_folder, tmp_path):
    """Nothing in a folder may depend on a config that came from the peers."""
    rngs = nnx.Rngs(0)
    config = {key: value for key, value in TEXT.items() if key != "bos_token_id"}
    tokenizer = train_tokenizer(["a cat"], VOCAB, LENGTH, tmp_path / "tokenizer")
    ours = StableDiffusion(
        UNet2DCondition(UNet2DConditionConfig.from_dict(UNET), rngs=rngs),
        AutoencoderKL(AutoencoderKLConfig.from_dict(VAE), rngs=rngs),
        CLIPTextModel(CLIPTextConfig.from_dict(config), rngs=rngs),
        tokenizer,
        {"_class_name": "DDIMScheduler", **SCHEDULER},
    )
    save_pipeline(ours, tmp_path / "out")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path / "out", safety_checker=None
    )
    assert theirs.text_encoder.config.bos_token_id == tokenizer.bos_token_id
    assert_same_networks(ours, theirs)


def test_clip_of_transformers_loads_and_computes_the_same(clip_peer, clip_folder):
    ours = load_clip(clip_folder)
    assert_same_clip(ours, clip_peer)
    assert ours.image_size == 16
    assert ours.mean[0] == pytest.approx(0.48145466)


def assert_same_clip(ours, theirs):
    ids = ours.tokenizer(PROMPTS)
    pixels = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor(ids, dtype=torch.long), pixel_values=nchw(pixels))
    text, image = features(ours.model, ids, pixels)
    assert error(text, out.text_embeds) < 1e-4
    assert error(image, out.image_embeds) < 1e-4
    assert float(ours.model.logit_scale[...]) == pytest.approx(theirs.logit_scale.item())


def test_clip_of_ours_loads_in_transformers(clip_folder, tmp_path):
    ours = load_clip(clip_folder)
    save_clip(ours, tmp_path)
    theirs = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    assert_same_clip(ours, theirs)
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path)
    assert processor.image_processor.crop_size["height"] == 16
    out = processor.tokenizer(
        PROMPTS, padding="max_length", truncation=True, return_tensors="np"
    ).input_ids
    np.testing.assert_array_equal(ours.tokenizer(PROMPTS), out)
    assert load_clip(tmp_path).digest


def test_flattened_and_prefixed_text_keys_load(pipeline_folder, tmp_path):
    source = pipeline_folder / "text_encoder"
    tensors = load_file(source / "model.safetensors")
    flat = {key.removeprefix("text_model."): value for key, value in tensors.items()}
    full = {f"text_model.{key}": value for key, value in flat.items()}
    full["text_model.embeddings.position_ids"] = np.arange(LENGTH)[None]
    models = []
    for name, content in (("flat", flat), ("full", full)):
        shutil.copytree(source, tmp_path / name)
        save_file(content, tmp_path / name / "model.safetensors")
        models.append(load_model(CLIPTextModel, CLIPTextConfig, tmp_path / name))
    ids = jnp.arange(LENGTH)[None]
    np.testing.assert_array_equal(*(model(ids).last_hidden_state for model in models))
    save_model(models[0], None, tmp_path / "out")
    assert all(
        key.startswith("text_model.") for key in load_file(tmp_path / "out/model.safetensors")
    )


def test_old_attention_names_of_the_vae_load(pipeline_folder, tmp_path):
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    folder = tmp_path / "vae"
    shutil.copytree(pipeline_folder / "vae", folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    renamed = {}
    for key, value in tensors.items():
        for current, old in new.items():
            key = key.replace(f".attentions.0.{current}.", f".attentions.0.{old}.")
        renamed[key] = value
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path)
    images = jnp.ones((1, 8, 8, 3))
    old, current = (
        load_model(AutoencoderKL, AutoencoderKLConfig, where).encode(images).mean
        for where in (folder, pipeline_folder / "vae")
    )
    np.testing.assert_array_equal(old, current)


def test_shards_and_half_precision_files_load(peer, pipeline_folder, tmp_path):
    reference = load_model(UNet2DCondition, UNet2DConditionConfig, pipeline_folder / "unet")
    peer.unet.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(hub.weight_files(tmp_path / "sharded")) > 2
    sharded = load_model(UNet2DCondition, UNet2DConditionConfig, tmp_path / "sharded")
    peer.unet.save_pretrained(tmp_path / "fp16", variant="fp16")
    fp16 = load_model(UNet2DCondition, UNet2DConditionConfig, tmp_path / "fp16")
    peer.unet.save_pretrained(tmp_path / "fp16_sharded", variant="fp16", max_shard_size="20KB")
    fp16_sharded = load_model(UNet2DCondition, UNet2DConditionConfig, tmp_path / "fp16_sharded")
    for model in (sharded, fp16, fp16_sharded):
        for (path, a), (_, b) in zip(
            nnx.to_flat_state(nnx.state(model)),
            nnx.to_flat_state(nnx.state(reference)),
            strict=True,
        ):
            np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


def text_dtype(clip):
    ids = jnp.asarray(clip.tokenizer(PROMPTS))
    return jax.eval_shape(CLIPModel.encode_text, clip.model, ids).dtype


def test_bfloat16_storage_and_computation(clip_folder, tmp_path):
    ours = load_clip(clip_folder, jnp.bfloat16, compute_dtype=jnp.float32)
    assert ours.model.text_projection.kernel.dtype == jnp.bfloat16
    assert text_dtype(ours) == jnp.float32
    save_clip(ours, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written["text_projection.weight"].dtype == ml_dtypes.bfloat16
    assert written["logit_scale"].dtype == np.float32
    half = load_clip(tmp_path, jnp.bfloat16)
    assert text_dtype(half) == jnp.bfloat16
    save_clip(half, tmp_path / "wide", jnp.float32)
    assert load_file(tmp_path / "wide/model.safetensors")["logit_scale"].dtype == np.float32


def test_scalars_and_norms_stay_float32(clip_folder, pipeline_folder, tmp_path):
    """bfloat16 would make 98.9 of CLIP's 100, and round every norm's factor."""
    parts = [load_clip(clip_folder, jnp.bfloat16).model]
    pipeline = load_pipeline(pipeline_folder, jnp.bfloat16)
    parts += [pipeline.unet, pipeline.vae, pipeline.text_encoder]
    full = load_pipeline(pipeline_folder)
    for model, wide in zip(parts, [load_clip(clip_folder).model, full.unet, full.vae,
                                   full.text_encoder], strict=True):  # fmt: skip
        state, exact = (dict(nnx.to_flat_state(nnx.state(m))) for m in (model, wide))
        norms = [path for path in state if "norm" in str(path[-2:]) or not state[path].shape]
        assert norms and len(norms) < len(state)
        for path, variable in state.items():
            expected = jnp.float32 if path in norms else jnp.bfloat16
            assert variable.dtype == expected, path
            if path in norms:
                np.testing.assert_array_equal(variable[...], exact[path][...])
        written = to_file(wide, jnp.float16)
        assert {x.dtype.name for x in written.values()} == {"float16", "float32"}
        assert {key for key, x in written.items() if x.dtype == np.float32} == {
            hf_name(path) for path in norms
        }


def broken_text(clip_folder, tmp_path, change):
    """A CLIP folder whose tensors `change` has edited."""
    folder = tmp_path / "broken"
    shutil.copytree(clip_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


KEY = "text_model.encoder.layers.1.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(extra=np.zeros(2, np.float32)), "unknown key 'extra'"),
        (lambda t: t.pop(KEY), f"key '{KEY}' missing"),
        (
            lambda t: t.update({KEY: np.zeros((24, 17), np.float32)}),
            rf"{KEY}: shape \(24, 17\), expected \(24, 16\)",
        ),
        (
            lambda t: t.update({KEY: np.zeros((24, 16), np.int8)}),
            f"{KEY}: int8, expected floats",
        ),
        (lambda t: (t.pop(KEY), t.pop("logit_scale")), "'logit_scale' missing and 1 more"),
    ],
)
def test_wrong_tensors_are_named(clip_folder, tmp_path, change, message):
    folder = broken_text(clip_folder, tmp_path, change)
    with pytest.raises(UserError, match=rf"broken/model\.safetensors: .*{message}"):
        load_clip(folder)


def test_a_key_given_twice_is_named(pipeline_folder, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(pipeline_folder / "vae", folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["encoder.mid_block.attentions.0.query.bias"] = np.zeros(8, np.float32)
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"gives 'encoder.*to_q.bias' a second time"):
        load_model(AutoencoderKL, AutoencoderKLConfig, folder)


def test_a_truncated_file_is_named(clip_folder, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(clip_folder, folder)
    path = folder / "model.safetensors"
    for size in (path.stat().st_size // 2, 4, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UserError, match=r"cut/model\.safetensors: not a complete safetensors"):
            load_clip(folder)


def test_missing_shard_and_wrong_index_are_named(peer, tmp_path):
    peer.unet.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    original = json.loads(index.read_text())
    shard = sorted(set(original["weight_map"].values()))[1]
    (tmp_path / shard).rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"{shard}: missing, though .*index.json lists it"):
        load_model(UNet2DCondition, UNet2DConditionConfig, tmp_path)
    (tmp_path / "moved").rename(tmp_path / shard)
    original["weight_map"]["ghost"] = shard
    index.write_text(json.dumps(original))
    with pytest.raises(UserError, match=f"{shard}: key 'ghost' missing"):
        load_model(UNet2DCondition, UNet2DConditionConfig, tmp_path)
    index.write_text("{}")
    with pytest.raises(UserError, match="weight_map is missing"):
        load_model(UNet2DCondition, UNet2DConditionConfig, tmp_path)


def test_folders_without_weights_say_what_is_there(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "old")
    (tmp_path / "old/model.safetensors").rename(tmp_path / "old/flax_model.msgpack")
    with pytest.raises(UserError, match=r"only flax_model\.msgpack here; expected diffusion_"):
        load_clip(tmp_path / "old")
    (tmp_path / "old/flax_model.msgpack").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_clip(tmp_path / "old")


def same_unet(folder, peer):
    model = load_model(UNet2DCondition, UNet2DConditionConfig, folder)
    theirs = peer.unet.state_dict()
    for key, value in to_file(model).items():
        np.testing.assert_array_equal(value, theirs[key].numpy(), err_msg=key)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("variant", [None, "fp16", "bf16", "non_ema"])
@pytest.mark.parametrize("safe", [False, True])
def test_every_variant_that_diffusers_writes_is_read(peer, tmp_path, variant, safe, shards):
    """Of shards too. The values are those of the full precision here, whatever the name says."""
    limits = {"max_shard_size": "20KB"} if shards else {}
    peer.unet.save_pretrained(tmp_path, variant=variant, safe_serialization=safe, **limits)
    files = [path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".bin")]
    assert (len(files) > 1) == shards
    same_unet(tmp_path, peer)


def test_the_average_of_a_training_is_read(peer, tmp_path):
    """diffusers' EMAModel adds its settings to config.json."""
    from diffusers.training_utils import EMAModel

    unet = peer.unet
    cls = diffusers.UNet2DConditionModel
    average = EMAModel(unet.parameters(), model_cls=cls, model_config=unet.config)
    average.save_pretrained(tmp_path)
    assert "decay" in json.loads((tmp_path / "config.json").read_text())
    same_unet(tmp_path, peer)


@pytest.mark.parametrize("prefixed", [False, True])
def test_a_text_encoder_is_read_with_and_without_its_prefix(pipeline_folder, tmp_path, prefixed):
    """transformers from 5.6 on writes no "text_model.", which older versions need."""
    folder = tmp_path / "text"
    shutil.copytree(pipeline_folder / "text_encoder", folder)
    tensors = load_file(folder / "model.safetensors")
    prefix = "text_model." if prefixed else ""
    renamed = {prefix + key.removeprefix("text_model."): value for key, value in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    model = load_model(CLIPTextModel, CLIPTextConfig, folder)
    for key, value in to_file(model).items():
        assert key.startswith("text_model."), "what all versions of transformers read"
        np.testing.assert_array_equal(value, renamed[prefix + key.removeprefix("text_model.")])


def edited(folder, name, **changes):
    """Sets fields of a JSON file; None removes one."""
    content = json.loads((folder / name).read_text())
    content.update(changes)
    (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_configs_are_read_strictly(pipeline_folder, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipeline_folder, folder)
    edited(folder, "text_encoder/config.json", rope_theta=1e4)
    with pytest.raises(UserError, match=r"text_encoder/config\.json: .*rope_theta"):
        load_pipeline(folder)
    edited(folder, "text_encoder/config.json", rope_theta=None, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"text_model\.encoder\.layers\.2\..* missing and 15 more"):
        load_pipeline(folder)
    edited(folder, "text_encoder/config.json", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"unknown key .*layers\.1\."):
        load_pipeline(folder)
    edited(folder, "model_index.json", _class_name="StableDiffusion3Pipeline")
    with pytest.raises(UserError, match="StableDiffusion3Pipeline"):
        load_pipeline(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index\.json: not valid JSON"):
        load_pipeline(folder)
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match=r"expected a JSON object, got list"):
        load_pipeline(folder)
    (folder / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"model_index\.json: missing"):
        load_pipeline(folder)


def test_parts_that_do_not_fit_are_refused(
    clip_folder, tokenizer_folder, pipeline_folder, tmp_path
):
    clip = load_clip(clip_folder)
    larger = train_tokenizer(["a cat"], VOCAB + 1, LENGTH, tmp_path / "larger")
    with pytest.raises(UserError, match=f"gives {VOCAB + 1} ids.*vocab_size is {VOCAB}"):
        save_clip(Clip(clip.model, larger, 16), tmp_path / "out")
    smaller = train_tokenizer(["a cat"], VOCAB - 1, LENGTH, tmp_path / "smaller")
    with pytest.raises(UserError, match=f"end of text is {VOCAB - 2}.*looks for {VOCAB - 1}"):
        save_clip(Clip(clip.model, smaller, 16), tmp_path / "out")
    longer = train_tokenizer(["a cat"], VOCAB, LENGTH + 1, tmp_path / "longer")
    with pytest.raises(UserError, match=f"{LENGTH + 1} tokens a text"):
        save_clip(Clip(clip.model, longer, 16), tmp_path / "out")
    pipeline = load_pipeline(pipeline_folder)
    narrow = CLIPTextConfig.from_dict({**TEXT, "hidden_size": 8})
    changed = StableDiffusion(
        pipeline.unet,
        pipeline.vae,
        CLIPTextModel(narrow, rngs=nnx.Rngs(0)),
        pipeline.tokenizer,
        pipeline.scheduler_config,
    )
    with pytest.raises(UserError, match=r"cross_attention_dim is 16, .* hidden_size is 8"):
        save_pipeline(changed, tmp_path / "out")
    save_clip(clip, tmp_path / "sized")
    edited(tmp_path / "sized", "preprocessor_config.json", crop_size={"height": 8, "width": 8})
    with pytest.raises(UserError, match=r"crop_size .*8.* image_size is 16"):
        load_clip(tmp_path / "sized")


def test_digest_follows_the_files_content(clip_folder, tmp_path):
    """Not their place; a tokenizer or a schedule is part of a model as its weights are."""
    first = load_clip(clip_folder)
    copy = tmp_path / "copy"
    shutil.copytree(clip_folder, copy)
    assert load_clip(copy).digest == first.digest
    changed = broken_text(clip_folder, tmp_path, lambda t: t[KEY].__setitem__((0, 0), 9.0))
    assert load_clip(changed).digest != first.digest
    settings = {"image_mean": [0.1, 0.2, 0.3]}
    (copy / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load_clip(copy).digest != first.digest


def test_save_refuses_adapter_layers(tmp_path):
    class Wrapper(nnx.Module):
        def __init__(self):
            self.base = nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match=r"base\.\w+ belongs to an adapter layer"):
        save_model(Wrapper(), {}, tmp_path)


def test_models_build_abstractly_and_save(tmp_path):
    config = CLIPConfig.from_dict({"text_config": TEXT, "vision_config": VISION})
    model = CLIPModel(config, rngs=nnx.Rngs(0))
    abstract = describe(CLIPModel, config)
    # Asked for again it is another network, which is changed alone.
    other = describe(CLIPModel, config)
    other.logit_scale.set_value(jax.ShapeDtypeStruct((3,), jnp.float32))
    assert abstract.logit_scale.shape == ()
    assert nnx.split(abstract)[0] == nnx.split(model)[0]
    assert isinstance(abstract.logit_scale.get_value(), jax.ShapeDtypeStruct)
    save_model(model, {"text_config": TEXT, "vision_config": VISION}, tmp_path, jnp.float32)
    assert read_json(tmp_path / "config.json")["model_type"] == "clip"
    loaded = load_model(CLIPModel, CLIPConfig, tmp_path)
    np.testing.assert_array_equal(
        loaded.vision_model.embeddings.patch_embedding.kernel[...],
        model.vision_model.embeddings.patch_embedding.kernel[...],
    )
    assert not list(tmp_path.glob("*.tmp"))
