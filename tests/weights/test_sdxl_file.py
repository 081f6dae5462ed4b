"""SDXL in one file, read and written beside diffusers' own conversion."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxsynth.cli.convert import convert
from jaxsynth.core.errors import UserError
from jaxsynth.diffusion.samplers import make_sampler
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.models.diffusion.vae import AutoencoderKL
from jaxsynth.weights import published
from jaxsynth.weights.adapters.io import Networks
from jaxsynth.weights.hf import (
    EDITING,
    INPAINTING,
    KINDS,
    PIPELINES,
    describe_pipeline,
    kind_of,
    load_pipeline,
    pipeline_configs,
    save_pipeline,
)
from jaxsynth.weights.layout import keys_of, to_file
from jaxsynth.weights.models import describe
from jaxsynth.weights.names import hf_shape
from jaxsynth.weights.original_names import open_clip_name
from jaxsynth.weights.single_file.checkpoint import find_checkpoint, names_of
from jaxsynth.weights.single_file.families import XL
from jaxsynth.weights.single_file.shapes import inferred
from jaxsynth.weights.tokenizer import train_tokenizer
from tests.methods.small_base import XL_UNET, random_network

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

VOCAB, LENGTH = 540, 12
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
G = "conditioner.embedders.1.model."


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = around + 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def text_config(**own):
    return transformers.CLIPTextConfig(
        vocab_size=VOCAB, intermediate_size=48, max_position_embeddings=LENGTH,
        bos_token_id=VOCAB - 2, eos_token_id=VOCAB - 1, **own,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small SDXL, as diffusers saves it; what shapes do not tell is as in the published one."""
    words = tmp_path_factory.mktemp("words")
    train_tokenizer(["a photo of a cat", "a photo of a dog"] * 3, VOCAB, LENGTH, words)
    first, second = (transformers.CLIPTokenizer.from_pretrained(words) for _ in range(2))
    second.pad_token = "!"
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, cross_attention_dim=64 + 128, transformer_layers_per_block=(1, 2),
        attention_head_dim=(1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.13025,
    )  # fmt: skip
    one = text_config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1)
    other = text_config(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, hidden_act="gelu",
        projection_dim=20,
    )  # fmt: skip
    peer = diffusers.StableDiffusionXLPipeline(
        vae=randomise(vae, 1),
        text_encoder=randomise(transformers.CLIPTextModel(one), 2),
        text_encoder_2=randomise(transformers.CLIPTextModelWithProjection(other), 3),
        tokenizer=first,
        tokenizer_2=second,
        unet=randomise(unet, 4),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    )  # fmt: skip
    made = tmp_path_factory.mktemp("folder") / "sdxl"
    peer.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def ours(folder):
    return load_pipeline(folder)


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    """The same in one file, without what only this package wrote; one tokenizer lies beside it."""
    made = tmp_path_factory.mktemp("file") / "model.safetensors"
    convert(folder, made, "comfyui")
    save_file(load_file(made), made)
    shutil.copytree(folder / "tokenizer", made.parent / "tokenizer")
    return made


def weights(pipeline):
    return {
        f"{part}.{key}": value
        for part in PARTS
        for key, value in to_file(getattr(pipeline, part)).items()
    }


def expect_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in found.items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)


def test_diffusers_reads_what_is_written(folder, ours, file):
    theirs = diffusers.StableDiffusionXLPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, add_watermarker=False
    )
    found = {}
    for part in PARTS:
        for key, value in getattr(theirs, part).state_dict().items():
            flat = part == "text_encoder" and not key.startswith("text_model.")
            if not key.endswith("position_ids"):
                found[f"{part}.{'text_model.' * flat}{key}"] = value.numpy()
    expect_equal(found, weights(ours))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_file_is_the_same_pipeline_as_its_folder(folder, ours, file, tmp_path, suffix):
    path = file
    if suffix == ".ckpt":
        tensors = {key: torch.from_numpy(value) for key, value in load_file(file).items()}
        # As other programs leave them in.
        tensors["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = (
            torch.arange(LENGTH)[None]
        )
        tensors[f"{G}text_projection.weight"] = tensors.pop(f"{G}text_projection").T.contiguous()
        tensors["denoiser.sigmas"] = torch.ones(3)
        tensors["conditioner.embedders.0.logit_scale"] = torch.ones(())
        path = tmp_path / "model.ckpt"
        torch.save({"state_dict": tensors, "global_step": 7}, path)
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(folder / name, tmp_path / name)
    read = load_pipeline(path)
    expect_equal(weights(read), weights(ours))
    for part in PARTS:
        free = {"sample_size": 0, "projection_dim": 0} if part != "text_encoder_2" else {}
        fields = [
            dataclasses.asdict(getattr(pipeline, part).config) | free for pipeline in (read, ours)
        ]
        assert fields[0] == fields[1], part
    assert read.image_size == 2 * 512
    texts = ["a photo of a cat", "zebra, 12!", ""]
    np.testing.assert_array_equal(read.tokenizer(texts), ours.tokenizer(texts))
    assert read.zeroes_empty and ours.zeroes_empty
    for name in ("_class_name", "beta_schedule", "beta_end", "timestep_spacing", "steps_offset"):
        assert read.scheduler_config[name] == ours.scheduler_config[name]
    assert read.scheduler_config["prediction_type"] == "epsilon"
    shapes = describe_pipeline(path)
    assert jax.tree.map(np.shape, jax.tree.leaves(shapes.networks)) == jax.tree.map(
        np.shape, jax.tree.leaves(read.networks)
    )
    assert read.digest and read.digest != ours.digest
    networks = Networks.of(str(path)).need("a test")
    assert list(networks) == ["unet", "text_encoder", "text_encoder_2"]


@pytest.mark.heavy
@pytest.mark.parametrize("which", ["published", "other"])
def test_a_folder_comes_back_from_its_file(folder, ours, sdxl_folder, tmp_path, which):
    """Also one whose heads, groups and latents' scale no other program would guess."""
    base = ours if which == "published" else load_pipeline(sdxl_folder)
    if which == "other":
        base = dataclasses.replace(base, zeroes_empty=False)
        save_pipeline(base, tmp_path / "base")
    source = folder if which == "published" else tmp_path / "base"
    said = convert(source, tmp_path / "one.safetensors", "a1111")
    assert ("make other pictures" in said) == ("vae scaling_factor" in said) == (which == "other")
    words = tmp_path / "words"
    shutil.copytree(source / "tokenizer", words)
    convert(tmp_path / "one.safetensors", tmp_path / "back", "diffusers", str(words))
    back = load_pipeline(tmp_path / "back")
    expect_equal(weights(back), weights(base))
    for part in PARTS:
        found, expected = getattr(back, part).config, getattr(base, part).config
        free = {"projection_dim": 0} if part == "text_encoder" else {}
        assert dataclasses.asdict(found) | free == dataclasses.asdict(expected) | free
    assert base.scheduler_config.items() <= back.scheduler_config.items()
    texts = ["a photo", ""]
    np.testing.assert_array_equal(back.tokenizer(texts), base.tokenizer(texts))
    assert back.zeroes_empty == base.zeroes_empty == (which == "published")


@pytest.mark.heavy
def test_shapes_tell_the_published_one():
    """Of its whole size, of which no value is needed."""
    known = published.PIPELINES["stabilityai/stable-diffusion-xl-base-1.0"]
    shapes = {}
    for part, kind in (("unet", UNet2DCondition), ("vae", AutoencoderKL)):
        keys = keys_of(network := describe(kind, known.networks[part]))
        of_file = {
            name: hf_shape(path[-1], variable.shape)
            for path, variable in nnx.to_flat_state(nnx.state(network))
            for name in keys[path].names
        }
        names = names_of(part, known.networks[part], of_file)
        shapes |= {XL.prefixes[part] + name: of_file[key] for name, key in names.items()}
    for part, layers, width in (("text_encoder", 12, 768), ("text_encoder_2", 32, 1280)):
        hf = part == "text_encoder"
        own = {
            "text_model.embeddings.token_embedding.weight": (49408, width),
            "text_model.embeddings.position_embedding.weight": (77, width),
        }
        inner = {f"text_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(layers)}
        own |= dict.fromkeys(inner, (4 * width, width)) | {"text_projection.weight": (width, width)}
        named = {key if hf else open_clip_name(key): shape for key, shape in own.items()}
        shapes |= {XL.prefixes[part] + key: shape for key, shape in named.items()}
    for part, found in inferred(XL, shapes, v_prediction=False).items():
        free = {"projection_dim": 0} if part == "text_encoder" else {}
        config = dataclasses.asdict(XL.parts[part][1].from_dict(found))
        assert config | free == dataclasses.asdict(known.networks[part]) | free


def test_what_a_file_says_of_its_schedule(folder, file, tmp_path):
    """Keys without values, as ComfyUI and A1111 know them, or the metadata of trainers."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    tensors, path = load_file(file), tmp_path / "model.safetensors"
    empty = np.zeros(0, "f4")
    v, zero = {"v_pred": empty}, {"ztsnr": empty}
    for more, metadata, kind, ends_in_noise in (
        ({}, {}, "epsilon", False),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction", False),
        (v, {}, "v_prediction", False),
        (v, {"modelspec.prediction_type": "epsilon"}, "v_prediction", False),
        (zero, {}, "epsilon", False),
        (v | zero, {}, "v_prediction", True),
    ):
        save_file(tensors | more, path, metadata=metadata)
        found = find_checkpoint(path).scheduler
        assert found["prediction_type"] == kind
        assert found.get("rescale_betas_zero_snr", False) == ends_in_noise
        assert (found["timestep_spacing"] == "trailing") == ends_in_noise
    # The folder that is given has another schedule, and the file knows better.
    checkpoint = find_checkpoint(f"{path}@{folder}")
    found = checkpoint.scheduler
    assert found["prediction_type"] == "v_prediction" and found["rescale_betas_zero_snr"]
    assert "so says the file by its v_pred and ztsnr, other than" in checkpoint.notes[0]
    schedule = NoiseSchedule.from_config(found)
    assert schedule.alphas_cumprod[-1] < 1e-4
    assert make_sampler(found, schedule, 4).timesteps[0] == 999
    assert not find_checkpoint(f"{file}@{folder}").notes


def test_what_a_folder_says_of_its_schedule_is_in_its_file(folder, ours, tmp_path):
    """Where other programs look for it."""
    changed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = ours.scheduler_config | changed
    save_pipeline(dataclasses.replace(ours, scheduler_config=scheduler), tmp_path / "v")
    said = convert(tmp_path / "v", tmp_path / "v.safetensors", "comfyui")
    assert "make other pictures" not in said
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "v.safetensors").keys()
    found = find_checkpoint(f"{tmp_path / 'v.safetensors'}@{folder / 'tokenizer'}").scheduler
    assert changed.items() <= found.items()


def test_the_folder_behind_an_at_gives_settings(folder, file, tmp_path, base_folder):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for path in (other / "unet").glob("*.safetensors"):
        path.unlink()
    for part, changes in (
        ("unet/config.json", {"attention_head_dim": [1, 4]}),
        ("model_index.json", {"force_zeros_for_empty_prompt": False}),
    ):
        path = other / part
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    found = load_pipeline(f"{file}@{other}")
    assert found.unet.config.attention_head_dim == (1, 4) and not found.zeroes_empty
    with pytest.raises(UserError, match=r"has 1 text encoder, but .* is SDXL; expected"):
        load_pipeline(f"{file}@{base_folder}")


def strangers(tensors):
    one, empty = np.ones((2, 2), "f4"), np.zeros(0, "f4")
    refiner = {key.replace(G, "conditioner.embedders.0.model."): x for key, x in tensors.items()
               if not key.startswith("conditioner.embedders.0")}  # fmt: skip
    unet = "model.diffusion_model."
    return {
        "refiner": (
            refiner | {"conditioner.embedders.0.model.ln_final.bias": one[0]},
            "is SDXL's refiner, .* expected a base, such as",
        ),
        "cosxl": (tensors | {"edm_vpred.sigma_max": empty}, "key 'edm_vpred.sigma_max' marks"),
        "no-projection": (
            {key: x for key, x in tensors.items() if key != f"{G}text_projection"},
            r"text_projection' is missing; .*StableDiffusionXLPipeline.from_single_file",
        ),
        "unet-alone": (
            {key: x for key, x in tensors.items() if key.startswith(unet)}
            | {f"{unet}input_blocks.3.1.transformer_blocks.1.norm1.weight": one[0]},
            "key 'first_stage_model.* is missing",
        ),
        "no-sizes": (
            {key: x for key, x in tensors.items() if ".label_emb." not in key},
            r"label_emb\.0\.0\.weight' is missing",
        ),
        "other-sizes": (
            tensors | {f"{unet}label_emb.0.0.weight": one}, "reads 2 features, expected 20 of the"
        ),
        "half-a-text-encoder": (
            {key: x for key, x in tensors.items() if key != f"{G}ln_final.bias"},
            "final_layer_norm.bias' missing",
        ),
        "more": (tensors | {f"{G}tail.weight": one}, "unknown key 'tail.weight'"),
        "odd-one": (tensors | {"tail.weight": one}, "unknown key 'tail.weight', of none"),
    }  # fmt: skip


@pytest.mark.parametrize("name", strangers({}))
def test_what_is_no_base_is_named(folder, file, tmp_path, name):
    tensors, words = strangers(load_file(file))[name]
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError, match=words) as error:
        load_pipeline(path)
    assert str(error.value).startswith(str(path))


def test_what_has_no_use_for_two_text_encoders_refuses_them(file):
    for load in (load_pipeline, describe_pipeline, pipeline_configs):
        with pytest.raises(UserError, match="is SDXL, with two text encoders; expected a base"):
            load(file, kinds=PIPELINES)


@pytest.mark.heavy
@pytest.mark.parametrize("kinds", [INPAINTING, EDITING])
def test_bases_that_read_an_image_come_in_one_file(sdxl_folder, tmp_path, kinds):
    base, channels = load_pipeline(sdxl_folder), 9 if kinds is INPAINTING else 8
    config = UNet2DConditionConfig.from_dict(XL_UNET | {"in_channels": channels})
    unet = random_network(UNet2DCondition, config, 5)
    base = dataclasses.replace(base, unet=unet)
    save_pipeline(base, tmp_path / "base")
    path = tmp_path / "model.safetensors"
    convert(tmp_path / "base", path, "comfyui")
    found = load_pipeline(f"{path}@{sdxl_folder / 'tokenizer'}", kinds=KINDS)
    assert kind_of(found.unet, found.vae) == kinds[1]
    expect_equal(weights(found), weights(base))
    with pytest.raises(UserError, match=f"unet in_channels is {channels}, but vae latent_channels"):
        load_pipeline(f"{path}@{sdxl_folder / 'tokenizer'}")
