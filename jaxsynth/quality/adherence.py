"""How closely images follow the condition images that they were drawn for.

The condition is found again in the image and compared with the one that was given:

- `edges`: F1 of edge pixels, those within a pixel of each other counting as one;
- `low_resolution`: peak signal-to-noise ratio of the two small images, in dB;
- `segmentation`, `depth`, `mask`: mean intersection over union of regions, for pictures whose
  regions have one colour each (`data.scenes`): nothing here estimates depth or labels of a photo.
"""

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from scipy import ndimage

from jaxsynth.data.conditions import CHANNELS, WITH_PARTNER, as_bytes, make_condition

MEASURES = {
    "edges": "edge F1",
    "low_resolution": "PSNR (dB)",
    **dict.fromkeys(WITH_PARTNER, "region IoU"),
}
# Of two images of 8 bits: below the error of rounding, a smaller difference means nothing.
_LEAST_ERROR = 1 / 255**2 / 12


def agreement(
    kind: str, images: UInt8[np.ndarray, "n h w 3"], conditions: Float[np.ndarray, "n h w k"]
) -> Float[np.ndarray, " n"]:
    """How well each image agrees with a condition of `kind` (fractions); larger is better.

    Raises ValueError for an unknown kind or where the shapes do not fit.
    """
    if kind not in CHANNELS:
        raise ValueError(f"condition {kind!r}: expected one of {sorted(CHANNELS)}")
    if conditions.shape != (*images.shape[:3], CHANNELS[kind]):
        raise ValueError(
            f"{kind}: conditions of shape {conditions.shape} for images of {images.shape}"
        )
    return np.array(
        [_one(kind, image, wanted) for image, wanted in zip(images, conditions, strict=True)]
    )


def _one(kind: str, image: np.ndarray, wanted: np.ndarray) -> float:
    if kind == "edges":
        return edge_f1(make_condition(kind, image)[..., 0] > 0.5, wanted[..., 0] > 0.5)
    if kind == "low_resolution":
        return psnr(make_condition(kind, image), wanted)
    if kind == "mask":
        return region_iou(image, (wanted[..., 0] >= 0.5).astype(int))
    pixels = as_bytes(wanted).reshape(-1, wanted.shape[-1])
    _, regions = np.unique(pixels, axis=0, return_inverse=True)
    return region_iou(image, regions.reshape(image.shape[:2]))


def edge_f1(
    found: Bool[np.ndarray, "h w"], wanted: Bool[np.ndarray, "h w"], *, reach: int = 1
) -> float:
    """Harmonic mean of two shares: of found edges near wanted ones, and of wanted near found.

    Near is within `reach` pixels in both directions. Two images without edges agree (1).
    """
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    window = np.ones((2 * reach + 1,) * 2, bool)
    precision = (found & ndimage.binary_dilation(wanted, window)).sum() / found.sum()
    recall = (wanted & ndimage.binary_dilation(found, window)).sum() / wanted.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def psnr(found: Float[np.ndarray, "*n"], wanted: Float[np.ndarray, "*n"]) -> float:
    """Peak signal-to-noise ratio in dB of fractions; at most 58.9, that of rounding to 8 bits."""
    error = np.square(found.astype(np.float64) - wanted).mean()
    return float(-10 * np.log10(max(error, _LEAST_ERROR)))


def region_iou(image: UInt8[np.ndarray, "h w 3"], regions: Integer[np.ndarray, "h w"]) -> float:
    """Mean intersection over union of `regions` and of the image's areas of their colours.

    The colour of a region is the median of the image's pixels in it, and a pixel's area that of the
    nearest colour; so it is 1 if the colours of the image change where the regions do.
    """
    numbers = np.unique(regions)
    colours = np.stack([np.median(image[regions == number], axis=0) for number in numbers])
    distances = np.abs(image[..., None, :].astype(np.float64) - colours).sum(-1)
    areas = numbers[distances.argmin(-1)]
    shares = [
        ((areas == n) & (regions == n)).sum() / ((areas == n) | (regions == n)).sum()
        for n in numbers
    ]
    return float(np.mean(shares))
