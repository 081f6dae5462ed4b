"""pix2pix and PatchGAN against a torch restatement of the authors' networks; E2GAN's properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import BatchNorm2d, Conv2d, ConvTranspose2d, InstanceNorm2d
from torch.nn.functional import leaky_relu

from jaxsynth.models.gan.e2gan import E2GAN, E2GANConfig
from jaxsynth.models.gan.patchgan import PatchGAN, PatchGANConfig
from jaxsynth.models.gan.pix2pix import Pix2Pix, Pix2PixConfig
from jaxsynth.models.norms import ChannelNorm
from tests.models.torch_parity import nchw, nhwc, randomise, relative_error


def torch_norm(kind, channels):
    return BatchNorm2d(channels) if kind == "batch" else InstanceNorm2d(channels)


class TorchPix2Pix(torch.nn.Module):
    """A U-Net of nested levels, written as two lists."""

    def __init__(self, widths, norm):
        super().__init__()
        bias, last = norm == "instance", len(widths) - 1
        inputs = (3, *widths[:-1])
        self.down = torch.nn.ModuleList(
            Conv2d(a, b, 4, 2, 1, bias=bias) for a, b in zip(inputs, widths, strict=True)
        )
        self.up = torch.nn.ModuleList(
            ConvTranspose2d(
                widths[n] * (1 if n == last else 2), inputs[n], 4, 2, 1, bias=bias or n == 0
            )
            for n in range(last, -1, -1)
        )
        self.down_norms = torch.nn.ModuleList(torch_norm(norm, c) for c in widths[1:-1])
        self.up_norms = torch.nn.ModuleList(torch_norm(norm, c) for c in widths[-2::-1])

    def forward(self, x):
        skips = []
        for n, conv in enumerate(self.down):
            x = conv(leaky_relu(x, 0.2) if n else x)
            if 0 < n < len(self.down) - 1:
                x = self.down_norms[n - 1](x)
            skips.append(x)
        x = skips.pop()
        for n, conv in enumerate(self.up):
            x = conv(torch.relu(x))
            if n < len(self.up_norms):
                x = torch.cat([skips.pop(), self.up_norms[n](x)], 1)
        return torch.tanh(x)


class TorchPatchGAN(torch.nn.Module):
    def __init__(self, widths, norm):
        super().__init__()
        inputs, last = (6, *widths[:-1]), len(widths) - 1
        self.convs = torch.nn.ModuleList(
            Conv2d(a, b, 4, 1 if n == last else 2, 1, bias=n == 0 or norm == "instance")
            for n, (a, b) in enumerate(zip(inputs, widths, strict=True))
        )
        self.norms = torch.nn.ModuleList(torch_norm(norm, c) for c in widths[1:])
        self.conv_out = Conv2d(widths[-1], 1, 4, 1, 1)

    def forward(self, source, image):
        x = torch.cat([source, image], 1)
        for n, conv in enumerate(self.convs):
            x = conv(x)
            x = leaky_relu(self.norms[n - 1](x) if n else x, 0.2)
        return self.conv_out(x)


def copied(model, module):
    """`model` with the weights of a torch module whose lists have the same names."""
    tensors = {name: value.detach().numpy() for name, value in module.named_parameters()}
    transposed = {n for n, m in module.named_modules() if isinstance(m, ConvTranspose2d)}
    flat = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        layer = ".".join(map(str, path[:-1]))
        name = "bias" if path[-1] == "bias" else "weight"
        value = tensors.pop(f"{layer}.{name}")
        if layer in transposed and value.ndim == 4:
            # torch's (in, out, h, w) is the kernel of the convolution that it is the gradient of.
            value = value.transpose(2, 3, 0, 1)[::-1, ::-1]
        elif value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        assert value.shape == variable.shape, (path, value.shape, variable.shape)
        flat.append((path, variable.replace(jnp.asarray(value.copy()))))
    assert not tensors, sorted(tensors)
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(flat))


def images(seed, count=2, size=32):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (count, size, size, 3)).astype(np.float32)


# Training mode: batch norm by the batch's own statistics, which is how pix2pix also runs its tests.
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_pix2pix_equals_the_reference(norm):
    config = Pix2PixConfig(num_downs=5, ngf=2, norm=norm)
    module = randomise(TorchPix2Pix(config.widths, norm)).train()
    model = copied(Pix2Pix(config, rngs=nnx.Rngs(0)), module)
    x = images(0)
    assert relative_error(jax.jit(model.__call__)(x), nhwc(module(nchw(x)))) < 1e-4


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_patchgan_equals_the_reference(norm):
    config = PatchGANConfig(ndf=4, n_layers=3, norm=norm)
    module = randomise(TorchPatchGAN(config.widths, norm)).train()
    model = copied(PatchGAN(config, rngs=nnx.Rngs(0)), module)
    x, y = images(0), images(1)
    expected = module(nchw(x), nchw(y))
    found = jax.jit(model.__call__)(x, y)
    assert found.shape == (2, 2, 2, 1)
    assert relative_error(found, nhwc(expected)) < 1e-4


def count(make):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(make))))


def test_sizes_are_the_published_ones():
    """7.06 M is said of the generator; the others are what the authors' code builds."""
    assert count(lambda: E2GAN(E2GANConfig(), rngs=nnx.Rngs(0))) == 7_056_131
    assert count(lambda: Pix2Pix(Pix2PixConfig(), rngs=nnx.Rngs(0))) == 54_413_955
    assert count(lambda: PatchGAN(PatchGANConfig(), rngs=nnx.Rngs(0))) == 2_768_705


def test_dropout_needs_a_key_and_is_between_the_outer_levels_and_the_innermost():
    shallow = Pix2Pix(Pix2PixConfig(num_downs=5, ngf=2, norm="instance"), rngs=nnx.Rngs(0))
    deep = Pix2Pix(Pix2PixConfig(num_downs=6, ngf=2, norm="instance"), rngs=nnx.Rngs(0))
    for model, drops in ((shallow, False), (deep, True)):
        call = jax.jit(lambda x, key, model=model: model(x, key=key))
        x = images(0, 1, 64)
        one, other = call(x, jax.random.key(0)), call(x, jax.random.key(1))
        plain = jax.jit(model.__call__)(x)
        assert bool(jnp.allclose(one, other, atol=1e-5)) != drops
        assert bool(jnp.allclose(one, plain, atol=1e-5)) != drops


SMALL = E2GANConfig(widths=(4, 8), kernel_size=3, num_attention_heads=2, cross_attention_dim=6)


def test_e2gan_edits_each_image_by_its_own_text():
    model = E2GAN(SMALL, rngs=nnx.Rngs(0))
    call = jax.jit(model.__call__)
    x, text = images(0), jax.random.normal(jax.random.key(0), (2, 5, 6))
    found = call(x, text)
    assert found.shape == x.shape and float(jnp.abs(found).max()) <= 1
    swapped = call(x[::-1], text[::-1])[::-1]
    np.testing.assert_allclose(found, swapped, atol=1e-5)
    other = call(x, text.at[0].add(1.0))
    assert float(jnp.abs(other[0] - found[0]).max()) > 1e-3
    np.testing.assert_allclose(other[1], found[1], atol=1e-6)


def test_a_discriminator_with_text_judges_by_it():
    model = PatchGAN(
        PatchGANConfig(ndf=4, n_layers=2, norm="instance", text_dim=3), rngs=nnx.Rngs(0)
    )
    x, y, text = images(0), images(1), jnp.ones((2, 3))
    call = jax.jit(model.__call__)
    assert float(jnp.abs(call(x, y, text) - call(x, y, -text)).max()) > 1e-4
    with pytest.raises(ValueError, match="text_dim is 3, and text is missing"):
        model(x, y)


def test_norms_take_their_statistics_from_the_images_at_hand():
    x = jnp.asarray(images(3)) * jnp.array([1.0, 5.0]).reshape(2, 1, 1, 1) + 2
    for over, axes in (("instance", (1, 2)), ("batch", (0, 1, 2))):
        found = ChannelNorm(3, over=over, affine=False, dtype=jnp.float32)(x)
        np.testing.assert_allclose(found.mean(axes), 0, atol=1e-5)
        np.testing.assert_allclose(found.std(axes), 1, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: E2GANConfig(widths=()), r"widths is \(\), expected one or more"),
        (lambda: E2GANConfig(num_attention_heads=3), "3 heads do not divide 256"),
        (lambda: E2GANConfig(kernel_size=4), "kernel_size is 4, expected an odd"),
        (lambda: E2GANConfig.from_dict({"width": 3}), "unknown field 'width'"),
        (lambda: PatchGANConfig(norm="layer"), "norm is 'layer'"),
        (lambda: Pix2PixConfig(num_downs=1), "num_downs is 1, expected at least 2"),
        (
            lambda: E2GAN(SMALL, rngs=nnx.Rngs(0))(jnp.zeros((1, 30, 32, 3)), jnp.zeros((1, 2, 6))),
            "expected multiples of 4",
        ),
    ],
)
def test_wrong_shapes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
