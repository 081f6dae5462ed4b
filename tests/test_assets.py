"""The shipped base: small, whole, readable by the peers, and it draws what it is asked for."""

import numpy as np
import pytest

from jaxsynth.data.procedural.shapes import DIGITS
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.generation.generate import GenerateConfig, Generator
from jaxsynth.tasks.clip_predictions import predict, scores
from jaxsynth.weights.hf import load_clip, load_pipeline
from jaxsynth.weights.hub import resolve


def test_the_base_takes_at_most_25_megabytes():
    files = [path for path in resolve("tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md", ".png"}


def test_diffusers_and_transformers_load_it():
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    folder = resolve("tiny")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert pipeline.unet.config.block_out_channels == [64, 128]
    model = transformers.CLIPModel.from_pretrained(folder / "clip")
    ours = load_clip("tiny/clip").model.vision_model.embeddings.patch_embedding.kernel[...]
    theirs = model.vision_model.embeddings.patch_embedding.weight.detach().float().numpy()
    np.testing.assert_array_equal(np.asarray(ours), theirs.transpose(2, 3, 1, 0))


@pytest.mark.heavy
def test_it_draws_digits_that_its_own_clip_can_read():
    prompts = [f"a photo of the digit {name}" for name in DIGITS]
    config = GenerateConfig(num_inference_steps=15, batch_size=40, guidance_scale=3.0)
    labels = np.tile(np.arange(10), 4)
    draw = Generator(load_pipeline("tiny"), prompts, config, seed=0)
    images = draw(labels, np.repeat(np.arange(4), 10))
    drawn = ArraySource(images, labels.astype(np.int32), tuple(map(str, range(40))))
    clip = load_clip("tiny/clip")
    found = scores(predict(clip, clip.model, prompts, drawn), labels, DIGITS)
    # Chance is 0.1.
    assert found["top1"] > 0.5
