"""The recipe of the tiny base runs through, and what it leaves loads here and elsewhere."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from jaxsynth.cli import main as cli
from jaxsynth.weights.hf import load_clip, load_pipeline
from tests.words import last_of_each

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[3] / "configs" / "tiny_base.py"
CLASSES = ("airplane", "cat", "dog", "frog", "horse", "truck")
SMALL = (
    "corpus.digits=6",
    "corpus.shapes=6",
    "vocab_size=560",
    "max_length=12",
    "width=16",
    "vision_layers=1",
    "text_layers=1",
    "vae_channels=8,8",
    "unet_channels=16,16",
    "unet_heads=2",
    *(f"{part}.{field}" for part in ("clip", "vae", "unet") for field in ("steps=2",)),
)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Calls the recipe, in small, on six folders of four photos each."""
    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (root / "photos" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "photos" / name / f"{i}.png")
    workdir = root / "w"

    def call(*more):
        fields = [f"--config.{field}" for field in (*SMALL, *more)]
        photos = f"--config.corpus.photos.path={root / 'photos'}"
        words = ["run", f"--config={CONFIG}:smoke", f"--workdir={workdir}", photos, *fields]
        return cli.main(last_of_each(words))

    call.workdir = workdir
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXSYNTH_CACHE", "off")
        yield call


@pytest.fixture(scope="module")
def tiny(command):
    assert command() == 0
    return command.workdir / "tiny"


def test_the_folder_loads_and_says_how_it_was_made(tiny):
    pipeline, clip = load_pipeline(tiny), load_clip(tiny / "clip")
    assert pipeline.scheduler_config["prediction_type"] == "v_prediction"
    assert pipeline.unet.config.sample_size == 16 and clip.image_size == 32
    card = (tiny / "README.md").read_text()
    assert "airplane, cat, dog" in card and "| unet | 2 | 8 | 0.001 | loss" in card
    with Image.open(tiny / "samples.png") as sheet:
        assert sheet.width > 100


def test_the_text_encoder_is_the_clips(tiny):
    ids = load_clip(tiny / "clip").tokenizer(["a photo of a dog"])
    one = load_pipeline(tiny).text_encoder(ids).last_hidden_state
    other = load_clip(tiny / "clip").model.text_model(ids).last_hidden_state
    np.testing.assert_array_equal(one, other)


def test_diffusers_and_transformers_load_it(tiny):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of a dog", num_inference_steps=2, height=32, width=32).images[0]
    assert image.size == (32, 32)
    peer = transformers.CLIPModel.from_pretrained(tiny / "clip")
    assert peer.config.vision_config.image_size == 32


def test_run_again_it_is_done(command, tiny, capfd):
    assert command() == 0
    assert capfd.readouterr().out.count("unchanged, skipped") == 6
    manifest = json.loads((tiny / "manifest.json").read_text())
    assert manifest["counts"]["megabytes"] < 25


def test_photos_of_another_size_are_refused(command, tiny, capfd, tmp_path):
    code = cli.main(
        [
            "run",
            f"--config={CONFIG}:smoke",
            f"--workdir={tmp_path}",
            f"--config.corpus.photos.path={command.workdir.parent / 'photos'}",
            "--config.corpus.image_size=16",
        ]
    )
    assert code == 1
    assert "images of shape (32, 32, 3), expected (16, 16, 3)" in capfd.readouterr().err
