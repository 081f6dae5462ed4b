"""Five points of a face, and the picture of them that InstantID's IdentityNet follows.

The points are the left and the right eye as one sees them, the tip of the nose, and the left and
the right corner of the mouth, (x, y) in pixels. The picture, as the authors' code draws it (Wang et
al. 2024, arXiv 2401.07519), has on black a stick from each of the others to the nose, at three
fifths of its color, and over them a disc in the full color of each point: red, green, blue, yellow
and magenta.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from jaxsynth.core.arrays import read_array, read_arrays
from jaxsynth.core.documents import parse_json, read_text
from jaxsynth.core.errors import UserError
from jaxsynth.data.decode import IMAGE_SUFFIXES, covering, decode_image

POINTS = ("left eye", "right eye", "nose", "left mouth corner", "right mouth corner")
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
_NOSE = 2
_STICK_SHADE = 0.6
# Half the width of a stick and the radius of a disc, in pixels of a picture of this short side and
# of larger ones; in smaller pictures they shrink with it, down to what is still seen.
_STICK, _DISC, _PUBLISHED_SIDE = 4.0, 10.0, 1024
_LEAST_STICK, _LEAST_DISC = 0.75, 1.0


def draw_keypoints(
    points: Float[np.ndarray, "5 2"], size: tuple[int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture of (height, width) `size` that InstantID draws of the five points.

    A stick is an ellipse from point to point. Points outside of the picture are cut off.
    """
    height, width = size
    scale = min(1.0, min(size) / _PUBLISHED_SIDE)
    stick, disc = max(_STICK * scale, _LEAST_STICK), max(_DISC * scale, _LEAST_DISC)
    # A disc stands on a whole pixel, the one that its numbers are cut to.
    points = np.trunc(np.asarray(points, np.float64))
    y, x = np.mgrid[:height, :width]
    picture = np.zeros((height, width, 3))
    for i in (0, 1, 3, 4):
        (ax, ay), (bx, by) = points[i], points[_NOSE]
        length = float(np.hypot(ax - bx, ay - by))
        if length == 0:
            continue
        across, down = (ax - bx) / length, (ay - by) / length
        dx, dy = x - (ax + bx) / 2, y - (ay + by) / 2
        along, beside = dx * across + dy * down, dy * across - dx * down
        inside = (along / (length / 2)) ** 2 + (beside / stick) ** 2 <= 1
        picture[inside] = np.multiply(COLORS[i], _STICK_SHADE)
    for (px, py), color in zip(points, COLORS, strict=True):
        picture[(x - px) ** 2 + (y - py) ** 2 <= disc**2] = color
    return picture.astype(np.uint8)


def read_keypoint_picture(path: str | Path, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """The picture of a file's five points, or the file's own picture, in (height, width) `size`.

    UserError naming the file as `read_keypoints` and `decode_image`.
    """
    path = Path(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return covering(decode_image(path), *size)
    return draw_keypoints(read_keypoints(path, size), size)


def read_keypoints(
    path: str | Path, size: tuple[int, int] | None = None
) -> Float[np.ndarray, "5 2"]:
    """The five (x, y) of a .json, .npy or .npz, in pixels of a picture of `size` (height, width).

    JSON is a list of five pairs, or {"keypoints": [...], "width": ..., "height": ...}; an .npz has
    "keypoints", and "size" (height, width) where they are those of another picture. The middle of
    such a picture is what covers `size`. UserError naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.suffix == ".json":
        values, own = _of_json(path)
    elif path.suffix == ".npz":
        arrays = read_arrays(path, ("keypoints",), optional=("size",))
        values, own = arrays["keypoints"], arrays.get("size")
    elif path.suffix == ".npy":
        values, own = read_array(path), None
    else:
        raise UserError(f"{path}: expected keypoints (.json, .npy, .npz) or a picture of them")
    points = _numbers(path, "keypoints", values)
    if points.shape != (len(POINTS), 2):
        raise UserError(
            f"{path}: keypoints of shape {points.shape}, expected (5, 2): x and y of "
            f"{', '.join(POINTS)}"
        )
    if own is None or size is None:
        return points
    sides = _numbers(path, "size", own)
    if sides.shape != (2,) or not (sides > 0).all():
        raise UserError(f"{path}: size {sides.tolist()}, expected height and width in pixels")
    return moved(points, (float(sides[0]), float(sides[1])), size)


def moved(
    points: Float[np.ndarray, "*n 2"], old: tuple[float, float], new: tuple[int, int]
) -> Float[np.ndarray, "*n 2"]:
    """Points of a picture of (height, width) `old` where `data.decode.covering` has them."""
    scale = max(new[0] / old[0], new[1] / old[1])
    corner = np.array([old[1] * scale - new[1], old[0] * scale - new[0]]) / 2
    # The middle of pixel 0 lies at a half.
    return (points + 0.5) * scale - 0.5 - corner


def _of_json(path: Path) -> tuple[Any, Any]:
    text = read_text(path)
    if text.lstrip().startswith("["):
        return parse_json(text, path, list), None
    content = parse_json(text, path)
    sides = content["height"], content["width"]
    return content["keypoints"], sides


def _numbers(path: Path, name: str, values: Any) -> np.ndarray:
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{path}: {name} are no table of numbers") from None
    if not np.isfinite(found).all():
        raise UserError(f"{path}: {name} are not finite")
    return found
