"""Checkpoints in one file, read and written beside diffusers' own conversion."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxsynth.cli.convert import convert
from jaxsynth.core.errors import UserError
from jaxsynth.diffusion.samplers import make_sampler
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.weights.adapters.io import Networks
from jaxsynth.weights.hf import describe_pipeline, load_pipeline
from jaxsynth.weights.layout import to_file
from jaxsynth.weights.single_file.checkpoint import SETTINGS, find_checkpoint
from jaxsynth.weights.tokenizer import train_tokenizer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

VOCAB, LENGTH, WIDTH = 540, 12, 128
PARTS = ("unet", "vae", "text_encoder")
FAMILIES = {
    "1.x": {"unet": {"attention_head_dim": 8}, "text": {"hidden_act": "quick_gelu"}, "v": False},
    "2.x": {
        "unet": {"attention_head_dim": (1, 2), "use_linear_projection": True},
        "text": {"hidden_act": "gelu"},
        "v": True,
    },
}


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = around + 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline of each family, as diffusers saves it."""
    words = tmp_path_factory.mktemp("words")
    train_tokenizer(["a photo of a cat", "a photo of a dog"] * 3, VOCAB, LENGTH, words)
    made = {}
    for name, family in FAMILIES.items():
        unet = {
            "block_out_channels": (64, 128),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": WIDTH,
        }
        text = transformers.CLIPTextConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=LENGTH, bos_token_id=VOCAB - 2,
            eos_token_id=VOCAB - 1, **family["text"],
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        tokenizer = transformers.CLIPTokenizer.from_pretrained(words)
        if name == "2.x":
            tokenizer.pad_token = "!"
        peer = diffusers.StableDiffusionPipeline(
            vae=randomise(vae, 1),
            text_encoder=randomise(transformers.CLIPTextModel(text), 2),
            tokenizer=tokenizer,
            unet=randomise(diffusers.UNet2DConditionModel(**unet, **family["unet"]), 3),
            scheduler=diffusers.DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                prediction_type="v_prediction" if family["v"] else "epsilon",
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        made[name] = tmp_path_factory.mktemp("folder") / name
        peer.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory):
    """The same in one file each, without what only this package wrote into the metadata."""
    made = {}
    for name, folder in folders.items():
        made[name] = tmp_path_factory.mktemp("file") / "model.safetensors"
        convert(folder, made[name], "comfyui")
        save_file(load_file(made[name]), made[name])
        shutil.copytree(folder / "tokenizer", made[name].parent / "tokenizer")
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


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_reads_what_is_written(folders, files, name):
    theirs = diffusers.StableDiffusionPipeline.from_single_file(
        str(files[name]), config=str(folders[name]), local_files_only=True
    )
    ours = load_pipeline(folders[name])
    found = {
        f"{part}.{key}".replace("text_encoder.encoder", "text_encoder.text_model.encoder")
        .replace("text_encoder.embeddings", "text_encoder.text_model.embeddings")
        .replace("text_encoder.final", "text_encoder.text_model.final"): value.numpy()
        for part in PARTS
        for key, value in getattr(theirs, part).state_dict().items()
        if not key.endswith("position_ids")
    }
    expect_equal(found, weights(ours))


@pytest.mark.parametrize(("name", "suffix"), [("1.x", ".ckpt"), ("2.x", ".safetensors")])
def test_a_file_is_the_same_pipeline_as_its_folder(folders, files, tmp_path, name, suffix):
    path = files[name]
    if suffix == ".ckpt":
        tensors = {key: torch.from_numpy(value) for key, value in load_file(path).items()}
        path = tmp_path / "model.ckpt"
        torch.save({"state_dict": tensors, "global_step": 7}, path)
        shutil.copytree(files[name].parent / "tokenizer", tmp_path / "tokenizer")
    ours, file = load_pipeline(folders[name]), load_pipeline(path)
    expect_equal(weights(file), weights(ours))
    for part in PARTS:
        free = {"sample_size": 0, "attention_head_dim": 0}
        fields = [
            dataclasses.asdict(getattr(pipeline, part).config) | free for pipeline in (file, ours)
        ]
        assert fields[0] == fields[1], part
    heads = [p.unet.config.per_level("attention_head_dim") for p in (file, ours)]
    assert heads[0] == heads[1]
    texts = ["a photo of a cat", "zebra, 12!", ""]
    np.testing.assert_array_equal(file.tokenizer(texts), ours.tokenizer(texts))
    kind = file.scheduler_config["prediction_type"]
    assert kind == ours.scheduler_config["prediction_type"]
    shapes = describe_pipeline(path)
    assert jax.tree.map(np.shape, jax.tree.leaves(shapes.unet)) == jax.tree.map(
        np.shape, jax.tree.leaves(file.unet)
    )
    assert file.digest and file.digest != ours.digest


@pytest.mark.heavy
@pytest.mark.parametrize("name", [*FAMILIES, "tiny"])
def test_a_folder_comes_back_from_its_file(folders, tmp_path, name):
    """Also one whose heads, groups and schedule no other program would guess."""
    base = load_pipeline(folders.get(name, "tiny"))
    said = convert(base.folder, tmp_path / "one.safetensors", "a1111")
    assert ("unet attention_head_dim 4 (they: (1, 2))" in said) == (name == "tiny")
    assert ("vae scaling_factor" in said) == ("make other pictures" in said) == (name == "tiny")
    words = tmp_path / "words"
    shutil.copytree(base.folder / "tokenizer", words)
    convert(tmp_path / "one.safetensors", tmp_path / "back", "diffusers", str(words))
    back = load_pipeline(tmp_path / "back")
    expect_equal(weights(back), weights(base))
    for part in PARTS:
        found, expected = getattr(back, part).config, getattr(base, part).config
        heads = {}
        if part == "unet":
            assert found.per_level("attention_head_dim") == expected.per_level("attention_head_dim")
            heads = {"attention_head_dim": 0, "sample_size": 0}
        if part == "vae":
            heads = {"sample_size": 0}
        assert dataclasses.asdict(found) | heads == dataclasses.asdict(expected) | heads
    stated = base.scheduler_config.items()
    assert stated <= back.scheduler_config.items()


def test_half_precision_stays(folders, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(folders["1.x"], half)
    for part in PARTS:
        for file in (half / part).glob("*.safetensors"):
            save_file({key: x.astype("f2") for key, x in load_file(file).items()}, file)
    convert(half, tmp_path / "half.safetensors", "comfyui")
    kinds = {x.dtype.name for x in load_file(tmp_path / "half.safetensors").values() if x.ndim > 1}
    assert kinds == {"float16"}


def test_what_the_file_says_of_its_schedule(files, tmp_path):
    tensors = load_file(files["2.x"])
    shutil.copytree(files["2.x"].parent / "tokenizer", tmp_path / "tokenizer")
    path, betas = tmp_path / "model.safetensors", np.linspace(1e-4, 0.02, 1000, dtype="f4")
    usual = (np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).astype("f4")
    for more, metadata, kind, own in (
        ({}, {}, "v_prediction", False),
        ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
        ({"global_step": np.asarray(875000)}, {}, "epsilon", False),
        ({"global_step": np.asarray(140000), "betas": usual}, {}, "v_prediction", False),
        ({"betas": betas, "model_ema.decay": betas[:1]}, {}, "v_prediction", True),
    ):
        save_file(tensors | more, path, metadata=metadata)
        found = find_checkpoint(path).scheduler
        assert found["prediction_type"] == kind
        assert ("trained_betas" in found) == own
        if own:
            np.testing.assert_array_equal(np.float32(found["trained_betas"]), betas)


def test_velocities_of_the_first_family(files, tmp_path):
    shutil.copytree(files["1.x"].parent / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "model.safetensors"
    save_file(load_file(files["1.x"]) | {"v_pred": np.zeros(0, "f4")}, path)
    assert find_checkpoint(path).scheduler["prediction_type"] == "v_prediction"
    save_file(load_file(path) | {"ztsnr": np.zeros(0, "f4")}, path)
    found = find_checkpoint(path).scheduler
    assert found["rescale_betas_zero_snr"] and found["timestep_spacing"] == "trailing"
    schedule = NoiseSchedule.from_config(found)
    assert make_sampler(found, schedule, 4).timesteps[0] == 999


def test_the_folder_behind_an_at_gives_settings(folders, files, tmp_path):
    """A pipeline's folder gives its configs and schedule, one with a tokenizer that alone."""
    path = tmp_path / "model.safetensors"
    shutil.copy(files["1.x"], path)
    other = tmp_path / "other"
    shutil.copytree(folders["1.x"], other)
    for part in PARTS:
        for file in (other / part).glob("*.safetensors"):
            file.unlink()
    config = json.loads((other / "unet" / "config.json").read_text())
    config["attention_head_dim"] = 4
    (other / "unet" / "config.json").write_text(json.dumps(config))
    found = load_pipeline(f"{path}@{other}")
    assert found.unet.config.attention_head_dim == 4
    assert find_checkpoint(f"{path}@{other / 'tokenizer'}").configs["unet"].attention_head_dim == 8
    assert found.digest != load_pipeline(f"{path}@{folders['1.x']}").digest


UNET = "model.diffusion_model."


def strangers(tensors):
    one = np.ones((2, 2), "f4")
    q = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    lora = {f"lora_unet_a_{i}.lora_{end}.weight": one for i in (1, 2) for end in ("up", "down")}
    clip = "cond_stage_model.transformer.text_model."
    return {
        "lora": (lora, "is an adapter .*adapters are for --adapter="),
        "flux-lora": (
            {f"lora_unet_double_blocks_{i}_img.lora_up.weight": one for i in (1, 2)},
            "is an adapter of FLUX",
        ),
        "embedding": ({"emb_params": one}, "is an embedding"),
        "sdxl": (
            tensors | {"conditioner.embedders.0.x.weight": one},
            "unknown key 'cond_stage_model.*, of none of its networks",
        ),
        "flux": ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": one}, "of FLUX"),
        "controlnet": ({"control_model.input_hint_block.0.weight": one}, "is a ControlNet"),
        "network": ({"down_blocks.0.resnets.0.conv1.weight": one}, "the weights of a network"),
        "no-vae": (
            {k: v for k, v in tensors.items() if not k.startswith("first_stage")},
            "key 'first_stage_model.* is missing; where diffusers reads the file",
        ),
        "half-a-unet": (
            {k: v for k, v in tensors.items() if k != q}, "to_q.weight' is missing"
        ),
        "half-a-text-encoder": (
            {k: v for k, v in tensors.items() if k != clip + "final_layer_norm.bias"},
            "final_layer_norm.bias' missing",
        ),
        "more": (tensors | {"model.diffusion_model.tail.weight": one}, "unknown key .*tail"),
        "odd-one": (tensors | {"tail.weight": one}, "unknown key 'tail.weight'"),
        "of-classes": (
            tensors | {"model.diffusion_model.label_emb.0.0.weight": one}, "has label_emb"
        ),
        "inpainting": (
            tensors
            | {"model.diffusion_model.input_blocks.0.0.weight": np.ones((64, 9, 3, 3), "f4")},
            "in_channels is 9",
        ),
        "a-number": (
            tensors | {f"{UNET}out.2.weight": np.asarray(3, "f4")}, r"out.2.weight' has shape \(\)"
        ),
        "a-row": (
            tensors | {f"{UNET}input_blocks.0.0.weight": one[0]}, r"0.0.weight' has shape \(2,\)"
        ),
        "a-row-of-words": (
            tensors | {f"{clip}embeddings.token_embedding.weight": one[0]},
            r"token_embedding.weight' has shape \(2,\), expected other axes",
        ),
        "another-shape": (tensors | {q: one}, r"shape \(2, 2\), expected \(64, 64\)"),
    }  # fmt: skip


@pytest.mark.parametrize("name", strangers({}))
def test_what_is_no_base_is_named(files, tmp_path, name):
    tensors, words = strangers(load_file(files["1.x"]))[name]
    shutil.copytree(files["1.x"].parent / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError, match=words) as error:
        load_pipeline(path)
    assert str(error.value).startswith(str(path))


def test_other_files_and_places(folders, files, tmp_path):
    shutil.copy(files["1.x"], tmp_path / "alone.safetensors")
    torch.save({320: ({}, {}), "layer_structure": [1, 2, 1]}, tmp_path / "net.pt")
    tiny = tmp_path / "tiny.safetensors"
    for source, words in (
        (tmp_path / "alone.safetensors", "has no tokenizer; lay CLIP's"),
        (f"{tmp_path / 'alone.safetensors'}@tiny", r"shape \(|missing|unknown"),
        (f"{tmp_path / 'alone.safetensors'}@tiny/tokenizer", "1024 ids, but the text encoder"),
        (tmp_path / "net.pt", "is a hypernetwork"),
        (tmp_path / "absent.safetensors", "no such file"),
        ("absent.ckpt@tiny", "absent.ckpt: no such file"),
    ):
        with pytest.raises(UserError, match=words):
            load_pipeline(source)
    with pytest.raises(UserError, match="--to=kohya does not apply, only diffusers, comfyui"):
        convert(files["1.x"], tiny, "kohya")
    with pytest.raises(UserError, match=r"ending in \.safetensors"):
        convert(folders["1.x"], tmp_path / "tiny.ckpt", "comfyui")


def test_adapters_need_no_tokenizer(files, tmp_path):
    """The networks of a file that lies alone, as a base of adapters' layers."""
    shutil.copy(files["2.x"], tmp_path / "alone.safetensors")
    networks = Networks.of(str(tmp_path / "alone.safetensors")).need("a test")
    ours = load_pipeline(files["2.x"])
    assert list(networks) == ["unet", "text_encoder"]
    for name, network in networks.items():
        expect_equal(to_file(network), to_file(getattr(ours, name)))


def test_settings_in_the_metadata_are_checked(files, tmp_path):
    shutil.copytree(files["1.x"].parent / "tokenizer", tmp_path / "tokenizer")
    path, tensors = tmp_path / "model.safetensors", load_file(files["1.x"])
    for text, words in (
        ("[", "metadata: jaxsynth.settings"),
        ('{"unet": {"heads": 3}}', "heads"),
        ('{"unet": 3}', "jaxsynth.settings"),
    ):
        save_file(tensors, path, metadata={SETTINGS: text})
        with pytest.raises(UserError, match=words):
            load_pipeline(path)
