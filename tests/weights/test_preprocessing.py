"""Resizing and cropping against PIL, transformers' image processors and torch."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxsynth.core.errors import UserError
from jaxsynth.ops.resize import crop_start, resize_matrix, torch_cubic_matrix
from jaxsynth.weights import preprocessing
from jaxsynth.weights.preprocessing import IMAGENET, Preprocessing, from_timm, from_transformers

PIL = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
SHARED = {"resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
CASES = {
    "ViTImageProcessorPil": ({"size": {"height": 24, "width": 24}, "resample": 2}, (24, 24, True)),
    "DeiTImageProcessorPil": (
        {
            "size": {"height": 32, "width": 32},
            "crop_size": {"height": 28, "width": 28},
            "do_center_crop": True,
        },
        (28, 32, True),
    ),
    "ConvNextImageProcessorPil": (
        {"size": {"shortest_edge": 28}, "crop_pct": 0.875, "resample": 2},
        (28, 32, False),
    ),
    # From 384 on it does not crop.
    "ConvNextImageProcessorPil 384": (
        {"size": {"shortest_edge": 384}, "crop_pct": 0.875},
        (384, 384, True),
    ),
    "CLIPImageProcessorPil": (
        {
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 28, "width": 28},
            "do_center_crop": True,
        },
        (28, 32, False),
    ),
    "SiglipImageProcessorPil": ({"size": {"height": 24, "width": 24}}, (24, 24, True)),
    "BitImageProcessorPil": (
        {
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 28, "width": 28},
            "do_center_crop": True,
        },
        (28, 32, False),
    ),
}

# After the resize to 32 every rest beside the crop of 28, odd ones at both sides, both ways.
SIZES = [
    (40, 52),
    *((32, 28 + rest) for rest in range(4, 16)),
    (67, 40),
    (64, 85),
    (33, 47),
    (99, 32),
]


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def write(folder, **values):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_processors_file_means_what_transformers_does_with_it(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    values, (image_size, resize, squash) = CASES[name]
    kind = name.split()[0]
    processor = getattr(transformers, kind)(**{**SHARED, **values})
    processor.save_pretrained(tmp_path)
    found = from_transformers(tmp_path / "preprocessor_config.json")
    assert (found.image_size, found.resize, found.squash) == (image_size, resize, squash)
    for height, width in SIZES:
        image = picture(height, width)
        mine = (found.host(image) / 255 - np.array(found.mean)) / np.array(found.std)
        peer = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(
            mine, np.moveaxis(peer, 0, -1), atol=1e-5, err_msg=f"{height}x{width}"
        )


@pytest.mark.parametrize("rounding", ["floor", "round"])
def test_the_device_crops_where_the_host_does(rounding):
    made = Preprocessing(28, 32, False, "bicubic", (0.5,) * 3, (0.5,) * 3, rounding)
    for height, width in [(40, 52), (32, 39), (35, 32)]:
        image = picture(height, width)
        device = np.asarray(made.device(jnp.asarray(image[None], jnp.float32) / 255))[0] * 255
        assert np.abs(device - made.host(image)).max() < 1.2, (height, width)


def test_torchvisions_crop_begins_at_the_even_number():
    """torchvision's CenterCrop: int(round((size - crop) / 2.0))."""
    starts = [crop_start(28 + rest, 28, "round") for rest in range(8)]
    assert starts == [0, 0, 1, 2, 2, 2, 3, 4]
    assert [crop_start(28 + rest, 28, "floor") for rest in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="rounding 'up': expected one of floor, round"):
        crop_start(30, 28, "up")


def test_the_rounding_of_a_crop_is_kept_in_our_files_and_passed_over_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    for made in (IMAGENET, dataclasses.replace(IMAGENET, crop_rounding="floor")):
        path = write(tmp_path, **preprocessing.to_transformers(made))
        assert from_transformers(path) == made
        processor = transformers.BitImageProcessorPil.from_pretrained(tmp_path)
        assert processor.crop_size["height"] == 224
    for kind, reader in (("torchvision", IMAGENET.host), ("transformers", made.host)):
        rest = reader(picture(256, 259))[0, 0]
        column = {"torchvision": 18, "transformers": 17}[kind]
        np.testing.assert_array_equal(rest, picture(256, 259)[16, column])


@pytest.mark.parametrize("method", PIL)
@pytest.mark.parametrize(("height", "width"), [(61, 50), (20, 33)])
def test_the_device_resizes_as_pil_does(method, height, width):
    """Down and up, on noise. PIL rounds to 8 bits after each axis: half a step of 255 each time."""
    made = Preprocessing(28, 32, False, method, (0.5,) * 3, (0.5,) * 3, "round")
    image = picture(height, width)
    host = made.host(image).astype(np.float32)
    device = np.asarray(made.device(jnp.asarray(image[None], jnp.float32) / 255))[0] * 255
    assert device.shape == host.shape == (28, 28, 3)
    assert np.abs(device - host).max() < 1.2
    assert np.abs(device - host).mean() < 0.35
    # PIL does not round floating point channels.
    channel = Image.fromarray(image[..., 0].astype(np.float32))
    tall = np.asarray(channel.resize((width, 47), PIL[method]))
    assert np.abs(resize_matrix(height, 47, method) @ image[..., 0] - tall).max() < 1e-3


def test_torchs_cubic_is_reproduced():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((1, 1, 7, 1)).astype(np.float32)
    for size in (5, 7, 13):
        resized = torch.nn.functional.interpolate(
            torch.from_numpy(x), size=(size, 1), mode="bicubic", align_corners=False
        )
        mine = torch_cubic_matrix(7, size) @ x[0, 0]
        np.testing.assert_allclose(mine, resized[0, 0].numpy(), atol=1e-6)


def test_a_file_says_all_or_is_refused(tmp_path):
    whole = {
        **SHARED,
        **CASES["BitImageProcessorPil"][0],
        "image_processor_type": "BitImageProcessor",
    }
    for change, message in (
        ({"image_mean": None, "resample": None}, "no resample, image_mean: the file must say it"),
        ({"do_normalize": False}, "do_normalize: expected true, found False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor: expected 1/255, found 0.0078"),
        ({"resample": 0}, r"resample: 0, expected one of \[1, 2, 3\]"),
        ({"do_center_crop": False}, "images would have different shapes"),
        ({"crop_size": {"height": 28, "width": 20}}, "size .* of"),
        ({"crop_size": {"height": 40, "width": 40}}, "image_size 40 of resize 32"),
        ({"image_std": [1, 1]}, r"image_std=.1, 1. .*expected 3 values"),
        ({"image_std": [1, 1, 0]}, r"std: \(1, 1, 0\), expected more than 0"),
        ({"size": {"shortest_edge": 32, "longest_edge": 40}}, "size .*: expected"),
        ({"crop_rounding": "up"}, "crop_rounding: 'up', expected one of floor, round"),
        ({"size": 32, "image_processor_type": "Other"}, "size 32 of Other: expected"),
    ):
        path = write(tmp_path, **{**whole, **change})
        with pytest.raises(UserError, match=message):
            from_transformers(path)
    # A plain number is both sides to some classes, and the short one to others.
    for kind, squash in (("ViTFeatureExtractor", True), ("CLIPFeatureExtractor", False)):
        path = write(tmp_path, **{**whole, "size": 32, "feature_extractor_type": kind,
                                  "image_processor_type": None})  # fmt: skip
        assert from_transformers(path).squash is squash


def test_timms_fields_are_read_as_timm_does(tmp_path):
    config = {
        "input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bicubic",
        "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip
    found = from_timm(tmp_path, config)
    assert (found.image_size, found.resize, found.squash) == (224, 256, False)
    assert from_timm(tmp_path, {**config, "crop_pct": 0.9}).resize == 248
    assert from_timm(tmp_path, {**config, "crop_mode": "squash"}).squash
    for change, message in (
        ({"crop_mode": "border"}, "crop_mode: 'border', expected"),
        ({"input_size": [3, 224, 256]}, "input_size: .3, 224, 256., expected"),
        ({"std": None}, "pretrained_cfg has no std"),
        ({"interpolation": "random"}, "interpolation: 'random', expected one of bilinear"),
    ):
        with pytest.raises(UserError, match=message):
            from_timm(tmp_path, {**config, **change})


def test_a_name_or_a_file_gives_preprocessing(tmp_path):
    assert preprocessing.named_preprocessing("imagenet") is IMAGENET
    path = write(tmp_path, **preprocessing.to_transformers(IMAGENET))
    for place in (path, tmp_path):
        assert preprocessing.named_preprocessing(str(place)) == IMAGENET
    with pytest.raises(UserError, match="missing"):
        preprocessing.named_preprocessing(str(tmp_path / "other.json"))
