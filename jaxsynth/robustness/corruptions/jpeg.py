"""JPEG with loss, on the device: what an image looks like after being saved and read again.

Baseline JPEG as Pillow writes it by default (libjpeg: ITU-R BT.601 colours, chroma of half size in
both directions, the tables of ITU-T T.81 annex K scaled by the quality) and as it is read (chroma
interpolated with weights 3/4 and 1/4). The entropy coding in between loses nothing and is left out.

All of it is in whole numbers, rounded where libjpeg rounds: its slow but accurate cosine transform
(Loeffler, Ligtenberg and Moschytz 1989) with 13 bits of fraction too. So the picture is Pillow's,
and on a CPU, where libjpeg is faster, Pillow makes it.
"""

import io

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from jaxsynth.ops.materialize import materialize

# ITU-T T.81, tables K.1 and K.2.
_LUMA = np.int32(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
_CHROMA = np.full((8, 8), 99, np.int32)
_CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
_ONE = 1 << 16
_HALF = _ONE // 2
# Bits of fraction in the transform, and kept between its two directions.
_BITS, _PASS_BITS = 13, 2


def _constants() -> list[int]:
    """The transform's factors, of cosines c_k = sqrt(2) cos(k pi / 16), as fixed point."""
    c = np.sqrt(2) * np.cos(np.arange(8) * np.pi / 16)
    even = [c[6], c[2] - c[6], c[2] + c[6]]
    sums = [c[3], c[3] - c[7], c[1] + c[3], c[3] + c[5], c[3] - c[5]]
    signs = np.array([[-1, 1, 1, -1], [1, 1, -1, 1], [1, 1, 1, -1], [1, 1, -1, -1]])
    values = [*even, *sums, *(signs @ c[1::2])]
    return [int(value * (1 << _BITS) + 0.5) for value in values]


_C6, _C2_LESS_C6, _C2_AND_C6, _C3, _Z1, _Z2, _Z3, _Z4, _T0, _T1, _T2, _T3 = _constants()


def quantisation_tables(quality: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps of luma and chroma coefficients (8, 8) at a quality of 1 to 100."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    luma, chroma = (((table * percent + 50) // 100).clip(1, 255) for table in (_LUMA, _CHROMA))
    return luma, chroma


def jpeg(image: Float[Array, "h w 3"], quality: int) -> Float[Array, "h w 3"]:
    """The image in [0, 1], rounded to 8 bits, after JPEG of a quality: in 255ths."""
    height, width = image.shape[:2]
    of_luma, of_chroma = quantisation_tables(quality)
    planes = to_planes(jnp.round(image * 255).astype(jnp.int32))
    luma, blue, red = (
        from_coefficients(to_coefficients(plane, table), table)
        for plane, table in zip(planes, (of_luma, of_chroma, of_chroma), strict=True)
    )
    return from_planes(luma, blue, red, (height, width))


def jpeg_by_pillow(
    images: Float[np.ndarray, "n h w 3"], quality: int
) -> Float[np.ndarray, "n h w 3"]:
    """What `jpeg` makes of each image, cut to [0, 1], by libjpeg on the host."""
    found = np.empty(images.shape, np.float32)
    # One after another: Pillow's codec holds Python's lock, so that threads gain nothing.
    for image, into in zip(images, found, strict=True):
        _by_pillow(image, quality, into)
    return found


def _by_pillow(image: np.ndarray, quality: int, into: np.ndarray) -> None:
    np.clip(image, 0, 1, out=into)
    np.multiply(into, np.float32(255), out=into)
    np.rint(into, out=into)
    file = io.BytesIO()
    Image.fromarray(into.astype(np.uint8)).save(file, "JPEG", quality=quality)
    with Image.open(file, formats=["JPEG"]) as saved:
        # XLA divides by a constant as it multiplies by the inverse.
        np.multiply(np.asarray(saved), np.float32(1) / np.float32(255), out=into)


def to_planes(pixels: Int[Array, "h w 3"]) -> tuple[Array, Array, Array]:
    """Luma and the two halved chroma planes (whole blocks of 8), of 8-bit pixels."""
    height, width = pixels.shape[:2]
    # Where blocks reach beyond the image, its last pixels are repeated.
    pixels = jnp.pad(pixels, ((0, height % 2), (0, -width % 16), (0, 0)), mode="edge")
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    luma = (_fixed(0.299) * red + _fixed(0.587) * green + _fixed(0.114) * blue + _HALF) >> 16
    middle = 128 * _ONE + _HALF - 1
    to_blue = _HALF * blue - _fixed(0.16874) * red - _fixed(0.33126) * green
    to_red = _HALF * red - _fixed(0.41869) * green - _fixed(0.08131) * blue
    halved = (_halved((part + middle) >> 16) for part in (to_blue, to_red))
    return tuple(map(_whole_blocks, (luma, *halved)))


def from_planes(
    luma: Int[Array, "a b"], blue: Int[Array, "c d"], red: Int[Array, "c d"], size: tuple[int, int]
) -> Float[Array, "h w 3"]:
    """The image in [0, 1] of a `size`, of its three planes."""
    height, width = size
    luma = luma[:height, :width]
    half = (-(-height // 2), -(-width // 2))
    blue, red = (
        _doubled(plane[: half[0], : half[1]])[:height, :width] - 128 for plane in (blue, red)
    )
    more_red = (_fixed(1.402) * red + _HALF) >> 16
    more_green = (-_fixed(0.34414) * blue - _fixed(0.71414) * red + _HALF) >> 16
    more_blue = (_fixed(1.772) * blue + _HALF) >> 16
    pixels = materialize(jnp.stack([luma + more for more in (more_red, more_green, more_blue)]))
    return jnp.clip(pixels, 0, 255).transpose(1, 2, 0) / jnp.float32(255)


def to_coefficients(
    plane: Int[Array, "a b"], steps: Int[np.ndarray, "8 8"]
) -> Int[Array, "8 8 rows columns"]:
    """The quantised cosine coefficients of each block, as (frequency right, frequency down).

    `steps` as tables are written, (down, right).
    """
    rows, columns = plane.shape[0] // 8, plane.shape[1] // 8
    # Blocks last, so that a transform is a few operations on long rows.
    blocks = (plane - 128).reshape(rows, 8, columns, 8).transpose(3, 1, 0, 2)
    blocks = materialize(_forward(materialize(blocks), 0, -_PASS_BITS))
    blocks = materialize(_forward(blocks, 1, _PASS_BITS))
    # The transform leaves a factor of 8. A CPU divides whole numbers one by one: half a unit away
    # from a whole quotient, floating point ones round down to the same.
    steps = 8 * steps.T[..., None, None]
    size = jnp.floor((jnp.abs(blocks) + (steps / 2 + 0.5).astype(np.float32)) / np.float32(steps))
    return jnp.sign(blocks) * size.astype(jnp.int32)


def from_coefficients(
    coefficients: Int[Array, "8 8 rows columns"], steps: Int[np.ndarray, "8 8"]
) -> Int[Array, "a b"]:
    """The plane of quantised coefficients."""
    rows, columns = coefficients.shape[2:]
    blocks = materialize(coefficients * steps.T[..., None, None])
    blocks = materialize(_inverse(blocks, 1, -_PASS_BITS))
    blocks = materialize(_inverse(blocks, 0, _PASS_BITS + 3))
    return jnp.clip(blocks.transpose(2, 1, 3, 0).reshape(8 * rows, 8 * columns) + 128, 0, 255)


def _forward(blocks: Array, axis: int, shift: int) -> Array:
    """The cosine transform along an axis, then right by `shift` bits (left for a negative one)."""
    part = _split(blocks, axis)
    sums = [part[place] + part[7 - place] for place in range(4)]
    outer, inner = sums[0] + sums[3], sums[1] + sums[2]
    outer_less, inner_less = sums[0] - sums[3], sums[1] - sums[2]
    turned = (inner_less + outer_less) * _C6
    even = (
        (outer + inner) << _BITS,
        turned + outer_less * _C2_LESS_C6,
        (outer - inner) << _BITS,
        turned - inner_less * _C2_AND_C6,
    )
    odd = _odd([part[place] - part[7 - place] for place in range(4)])
    found = [even[place // 2] if place % 2 == 0 else odd[place // 2] for place in range(8)]
    return jnp.stack([_descale(one, _BITS + shift) for one in found], axis)


def _inverse(blocks: Array, axis: int, shift: int) -> Array:
    """The inverse along an axis, then right by `shift` bits (left for a negative one)."""
    part = _split(blocks, axis)
    turned = (part[2] + part[6]) * _C6
    low, high = turned - part[6] * _C2_AND_C6, turned + part[2] * _C2_LESS_C6
    total, less = (part[0] + part[4]) << _BITS, (part[0] - part[4]) << _BITS
    even = (total + high, less + low, less - low, total - high)
    # The odd part is its own inverse, with its inputs and outputs the other way around.
    odd = _odd([part[1], part[3], part[5], part[7]])
    found = [even[place] + odd[place] for place in range(4)]
    found += [even[place] - odd[place] for place in reversed(range(4))]
    return jnp.stack([_descale(one, _BITS + shift) for one in found], axis)


def _split(blocks: Array, axis: int) -> list[Array]:
    return [jax.lax.index_in_dim(blocks, place, axis, keepdims=False) for place in range(8)]


def _odd(part: list[Array]) -> tuple[Array, Array, Array, Array]:
    """The odd frequencies 1, 3, 5, 7 of the differences of mirrored places 0 to 3."""
    ends, middle = (part[0] + part[3]) * _Z1, (part[1] + part[2]) * _Z2
    third, fourth = part[1] + part[3], part[0] + part[2]
    both = (third + fourth) * _C3
    third, fourth = both - third * _Z3, both - fourth * _Z4
    return (
        part[0] * _T3 - ends + fourth,
        part[1] * _T2 - middle + third,
        part[2] * _T1 - middle + fourth,
        part[3] * _T0 - ends + third,
    )


def _descale(value: Array, bits: int) -> Array:
    return (value + (1 << (bits - 1))) >> bits


def _fixed(factor: float) -> int:
    return int(factor * _ONE + 0.5)


def _whole_blocks(plane: Int[Array, "a b"]) -> Int[Array, "c d"]:
    return jnp.pad(plane, [(0, -length % 8) for length in plane.shape], mode="edge")


def _halved(plane: Int[Array, "a b"]) -> Int[Array, "c d"]:
    """Means of 2 x 2, whose halves are rounded down and up in turn."""
    total = plane[::2, ::2] + plane[::2, 1::2] + plane[1::2, ::2] + plane[1::2, 1::2]
    return (total + 1 + jnp.arange(total.shape[1]) % 2) >> 2


def _doubled(plane: Int[Array, "a b"]) -> Int[Array, "c d"]:
    """Twice the size: 3/4 of the nearer and 1/4 of the farther, down and then right."""
    above = jnp.concatenate([plane[:1], plane[:-1]])
    below = jnp.concatenate([plane[1:], plane[-1:]])
    tall = materialize(jnp.stack([3 * plane + above, 3 * plane + below], 1))
    tall = tall.reshape(-1, plane.shape[1])
    before = jnp.concatenate([tall[:, :1], tall[:, :-1]], 1)
    after = jnp.concatenate([tall[:, 1:], tall[:, -1:]], 1)
    pairs = jnp.stack([(3 * tall + before + 8) >> 4, (3 * tall + after + 7) >> 4], 2)
    return materialize(pairs).reshape(tall.shape[0], -1)
