"""InceptionV3 as the Frechet inception distance uses it: images in, 2048 pooled features out.

This is Google's graph of December 2015 (Szegedy et al., arXiv 1512.00567), with whose weights the
published FIDs are measured, not the network of torchvision: average pools leave the padding out of
the mean, and the last block (Mixed_7c) pools by maximum. Names are those of its port to PyTorch
(pt_inception-2015-12-05-6726825d.pth). Inference only, without the classifier.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxsynth.models.layers import InitKeys, convolve
from jaxsynth.models.norms import BatchNorm

FEATURES = 2048
# The side of the images that the network was trained on, and the least that leaves a pixel.
IMAGE_SIZE, SMALLEST = 299, 75

_EPSILON = 1e-3

Pool = Callable[[Array], Array]


class ConvNorm(nnx.Module):
    """Convolution without bias, batch norm, ReLU; `size` is (height, width), padded to keep it."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: tuple[int, int] = (1, 1),
        *,
        stride: int = 1,
        pad: bool = True,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            inputs,
            outputs,
            size,
            strides=stride,
            padding=[(k // 2, k // 2) if pad else (0, 0) for k in size],
            use_bias=False,
            conv_general_dilated=convolve,
            rngs=rngs,
        )
        self.bn = BatchNorm(outputs, epsilon=_EPSILON)

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(self.bn(self.conv(x)))


def _average(x: Array) -> Array:
    """3x3 means at stride 1, over the pixels that there are."""
    return nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _maximum(x: Array) -> Array:
    return nnx.max_pool(x, (3, 3), (1, 1), "SAME")


def _halve(x: Array) -> Array:
    return nnx.max_pool(x, (3, 3), (2, 2), "VALID")


def _chain(x: Array, *layers: ConvNorm) -> Array:
    for layer in layers:
        x = layer(x)
    return x


class InceptionA(nnx.Module):
    """Mixed_5b to 5d: 1x1, 5x5 and two 3x3 at full resolution; 224 + `pool_width` channels."""

    def __init__(self, inputs: int, pool_width: int, *, rngs: nnx.Rngs):
        conv = partial(ConvNorm, rngs=rngs)
        self.branch1x1 = conv(inputs, 64)
        self.branch5x5_1 = conv(inputs, 48)
        self.branch5x5_2 = conv(48, 64, (5, 5))
        self.branch3x3dbl_1 = conv(inputs, 64)
        self.branch3x3dbl_2 = conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = conv(96, 96, (3, 3))
        self.branch_pool = conv(inputs, pool_width)

    def __call__(self, x: Array) -> Array:
        branches = (
            self.branch1x1(x),
            _chain(x, self.branch5x5_1, self.branch5x5_2),
            _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            self.branch_pool(_average(x)),
        )
        return jnp.concatenate(branches, axis=-1)


class InceptionB(nnx.Module):
    """Mixed_6a: to half the resolution; 480 channels more than before."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        conv = partial(ConvNorm, rngs=rngs)
        self.branch3x3 = conv(inputs, 384, (3, 3), stride=2, pad=False)
        self.branch3x3dbl_1 = conv(inputs, 64)
        self.branch3x3dbl_2 = conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = conv(96, 96, (3, 3), stride=2, pad=False)

    def __call__(self, x: Array) -> Array:
        branches = (
            self.branch3x3(x),
            _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            _halve(x),
        )
        return jnp.concatenate(branches, axis=-1)


class InceptionC(nnx.Module):
    """Mixed_6b to 6e: 7x7 as rows and columns, `width` channels in between; 768 channels."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
        conv = partial(ConvNorm, rngs=rngs)
        row, column = (1, 7), (7, 1)
        self.branch1x1 = conv(inputs, 192)
        self.branch7x7_1 = conv(inputs, width)
        self.branch7x7_2 = conv(width, width, row)
        self.branch7x7_3 = conv(width, 192, column)
        self.branch7x7dbl_1 = conv(inputs, width)
        self.branch7x7dbl_2 = conv(width, width, column)
        self.branch7x7dbl_3 = conv(width, width, row)
        self.branch7x7dbl_4 = conv(width, width, column)
        self.branch7x7dbl_5 = conv(width, 192, row)
        self.branch_pool = conv(inputs, 192)

    def __call__(self, x: Array) -> Array:
        double = (
            self.branch7x7dbl_1,
            self.branch7x7dbl_2,
            self.branch7x7dbl_3,
            self.branch7x7dbl_4,
            self.branch7x7dbl_5,
        )
        branches = (
            self.branch1x1(x),
            _chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3),
            _chain(x, *double),
            self.branch_pool(_average(x)),
        )
        return jnp.concatenate(branches, axis=-1)


class InceptionD(nnx.Module):
    """Mixed_7a: to half the resolution; 512 channels more than before."""

    def __init__(self, inputs: int, *, rngs: nnx.Rngs):
        conv = partial(ConvNorm, rngs=rngs)
        self.branch3x3_1 = conv(inputs, 192)
        self.branch3x3_2 = conv(192, 320, (3, 3), stride=2, pad=False)
        self.branch7x7x3_1 = conv(inputs, 192)
        self.branch7x7x3_2 = conv(192, 192, (1, 7))
        self.branch7x7x3_3 = conv(192, 192, (7, 1))
        self.branch7x7x3_4 = conv(192, 192, (3, 3), stride=2, pad=False)

    def __call__(self, x: Array) -> Array:
        wide = (self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4)
        branches = (
            _chain(x, self.branch3x3_1, self.branch3x3_2),
            _chain(x, *wide),
            _halve(x),
        )
        return jnp.concatenate(branches, axis=-1)


class InceptionE(nnx.Module):
    """Mixed_7b and 7c: branches that fan out into a row and a column; 2048 channels."""

    def __init__(self, inputs: int, pool: Pool, *, rngs: nnx.Rngs):
        conv = partial(ConvNorm, rngs=rngs)
        row, column = (1, 3), (3, 1)
        self.branch1x1 = conv(inputs, 320)
        self.branch3x3_1 = conv(inputs, 384)
        self.branch3x3_2a = conv(384, 384, row)
        self.branch3x3_2b = conv(384, 384, column)
        self.branch3x3dbl_1 = conv(inputs, 448)
        self.branch3x3dbl_2 = conv(448, 384, (3, 3))
        self.branch3x3dbl_3a = conv(384, 384, row)
        self.branch3x3dbl_3b = conv(384, 384, column)
        self.pool = pool
        self.branch_pool = conv(inputs, 192)

    def __call__(self, x: Array) -> Array:
        single = self.branch3x3_1(x)
        double = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        branches = (
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        )
        return jnp.concatenate(branches, axis=-1)


class InceptionV3(nnx.Module):
    """The network up to its last pooling ("pool_3"), in float32."""

    def __init__(self, *, rngs: nnx.Rngs):
        rngs = InitKeys(rngs)
        conv = partial(ConvNorm, rngs=rngs)
        self.Conv2d_1a_3x3 = conv(3, 32, (3, 3), stride=2, pad=False)
        self.Conv2d_2a_3x3 = conv(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3 = conv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = conv(64, 80)
        self.Conv2d_4a_3x3 = conv(80, 192, (3, 3), pad=False)
        self.Mixed_5b = InceptionA(192, 32, rngs=rngs)
        self.Mixed_5c = InceptionA(256, 64, rngs=rngs)
        self.Mixed_5d = InceptionA(288, 64, rngs=rngs)
        self.Mixed_6a = InceptionB(288, rngs=rngs)
        self.Mixed_6b = InceptionC(768, 128, rngs=rngs)
        self.Mixed_6c = InceptionC(768, 160, rngs=rngs)
        self.Mixed_6d = InceptionC(768, 160, rngs=rngs)
        self.Mixed_6e = InceptionC(768, 192, rngs=rngs)
        self.Mixed_7a = InceptionD(768, rngs=rngs)
        self.Mixed_7b = InceptionE(1280, _average, rngs=rngs)
        self.Mixed_7c = InceptionE(2048, _maximum, rngs=rngs)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        """Features of images in [-1, 1], 299 x 299 where figures are to be compared with others'.

        Any size from 75 x 75 works. ValueError for other shapes.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < SMALLEST:
            raise ValueError(
                f"InceptionV3: images are {images.shape}, expected (batch, h, w, 3) with h and w "
                f"{SMALLEST} or more"
            )
        x = _chain(images, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3)
        x = _chain(_halve(x), self.Conv2d_3b_1x1, self.Conv2d_4a_3x3)
        x = _halve(x)
        for block in (
            *(self.Mixed_5b, self.Mixed_5c, self.Mixed_5d),
            *(self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e),
            *(self.Mixed_7a, self.Mixed_7b, self.Mixed_7c),
        ):
            x = block(x)
        return x.mean((1, 2))
