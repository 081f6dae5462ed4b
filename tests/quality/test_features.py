"""Features as the networks' own libraries compute them, resizing protocols, statistics files."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxsynth.core.errors import UserError
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.sources.digits import digits_source
from jaxsynth.quality.features import (
    clip_extractor,
    inception_extractor,
    inception_transform,
    read_images,
    read_statistics,
    write_statistics,
)
from jaxsynth.quality.metrics import Statistics, fid, statistics
from jaxsynth.weights.hub import resolve
from tests.models.torch_parity import nchw, relative_error


def pictures(n, size=32, seed=0):
    """Smooth random uint8 images, (h, w) of `size` or square."""
    shape = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (n, 5, 5, 3)).astype(np.float32)
    return np.asarray(jax.image.resize(coarse, (n, *shape, 3), "linear")).astype(np.uint8)


@pytest.fixture(scope="module")
def clip():
    return clip_extractor(batch_size=4)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    pytest.importorskip("torch")
    from tests.models.classifiers.torch_inception import random_inception

    peer = random_inception(seed=1)
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file({name: value.numpy().copy() for name, value in peer.state_dict().items()}, path)
    return peer, path


class TestCLIP:
    def test_features_match_transformers(self, clip):
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        folder = resolve("tiny/clip")
        peer = transformers.CLIPModel.from_pretrained(folder).float().eval()
        images = digits_source().images[:6]
        mean, std = (
            np.array(values, np.float32)
            for values in (
                (0.48145466, 0.4578275, 0.40821073),
                (0.26862954, 0.26130258, 0.27577711),
            )
        )
        pixels = nchw((images.astype(np.float32) / 255 - mean) / std)
        with torch.no_grad():
            tower = peer.vision_model(pixels).pooler_output
            expected = peer.visual_projection(tower)
        assert clip.features(images).shape == (6, clip.dimensions)
        assert relative_error(clip.features(images), expected) < 1e-4

    def test_features_do_not_depend_on_the_batch(self, clip):
        images = digits_source().images[:10]
        found = clip.features(images)
        assert found.dtype == np.float32
        # Other neighbours, other places in the batch, and a last batch that is not full.
        order = np.random.default_rng(0).permutation(10)
        np.testing.assert_allclose(clip.features(images[order]), found[order], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(clip.features(images[3:4]), found[3:4], rtol=1e-5, atol=1e-5)
        other = clip_extractor(batch_size=7)
        np.testing.assert_allclose(other.features(images), found, rtol=1e-4, atol=1e-4)
        assert np.abs(found[0] - found[1]).max() > 0.1

    def test_images_of_any_size(self, clip):
        """A wide picture counts by its middle square; a source may mix sizes."""
        middle = pictures(1, 32)[0]
        wide = np.concatenate([np.zeros((32, 10, 3), np.uint8), middle, middle[:, :10]], axis=1)

        class Mixed(ArraySource):
            def __post_init__(self):
                pass

        source = Mixed([middle, wide], np.zeros(2, np.int32), ("a", "b"))
        first, second = clip.of_source(source)
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)

    def test_identity(self, clip):
        assert clip.identity == {
            "network": "CLIP tiny/clip",
            "digest": clip.digest,
            "preprocessing": "short side to 32 bicubic, centre",
            "dimensions": 128,
        }
        assert len(clip.digest) == 64
        assert clip_extractor(resolve("tiny/clip")).digest == clip.digest

    def test_features_that_are_not_finite_name_their_image(self, clip):
        broken = replace(clip, forward=lambda x: clip.forward(x).at[1].set(jnp.nan))
        with pytest.raises(UserError, match=r"CLIP tiny/clip: .* image '1' are not finite"):
            broken.features(pictures(4))


def bilinear_loop(image, size, *, centred):
    """Every output pixel from its four neighbours."""
    image = image.astype(np.float64)
    h, w = image.shape[:2]
    half = 0.5 if centred else 0.0
    out = np.empty((size, size, 3))
    for i in range(size):
        for j in range(size):
            y = max((i + half) * h / size - half, 0)
            x = max((j + half) * w / size - half, 0)
            y0, x0 = math.floor(y), math.floor(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            upper = image[y0, x0] * (1 - x + x0) + image[y0, x1] * (x - x0)
            lower = image[y1, x0] * (1 - x + x0) + image[y1, x1] * (x - x0)
            out[i, j] = upper * (1 - y + y0) + lower * (y - y0)
    return out


class TestInception:
    @pytest.mark.parametrize("shape", [(8, 8), (31, 17), (15, 40)])
    def test_tensorflow_resize(self, shape):
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
        found = inception_transform(image, resize="tensorflow", size=15)
        expected = (bilinear_loop(image, 15, centred=False) - 128) / 128
        assert found.shape == (15, 15, 3) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)

    @pytest.mark.parametrize("shape", [(8, 8), (31, 17), (15, 40)])
    def test_pytorch_resize(self, shape):
        torch = pytest.importorskip("torch")
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
        found = inception_transform(image, resize="pytorch", size=15)
        scaled = nchw(image[None].astype(np.float32) / 255)
        resized = torch.nn.functional.interpolate(
            scaled, size=(15, 15), mode="bilinear", align_corners=False
        )
        expected = np.moveaxis((2 * resized - 1)[0].numpy(), 0, -1)
        np.testing.assert_allclose(found, expected, atol=1e-5)

    @pytest.mark.parametrize("shape", [(8, 8), (31, 17), (15, 40)])
    def test_clean_resize(self, shape):
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
        found = inception_transform(image, resize="clean", size=15)
        cubic = jax.image.resize(image.astype(np.float32), (15, 15, 3), "cubic", antialias=True)
        expected = (np.clip(cubic, 0, 255) - 128) / 128
        np.testing.assert_allclose(found, expected, atol=1e-4)

    def test_images_of_the_right_size_are_only_scaled(self):
        image = np.random.default_rng(0).integers(0, 256, (15, 15, 3)).astype(np.uint8)
        for resize, expected in (
            ("tensorflow", (image - 128.0) / 128),
            ("clean", (image - 128.0) / 128),
            ("pytorch", image / 127.5 - 1),
        ):
            found = inception_transform(image, resize=resize, size=15)
            np.testing.assert_allclose(found, expected, atol=1e-6)

    @pytest.mark.heavy
    def test_features_match_torch_from_pixels(self, inception_file):
        """uint8 images of 64 x 48 to features at 299, by pytorch-fid's protocol."""
        torch = pytest.importorskip("torch")
        peer, path = inception_file
        extractor = inception_extractor(path, resize="pytorch", batch_size=2)
        images = pictures(2, (64, 48))
        resized = torch.nn.functional.interpolate(
            nchw(images.astype(np.float32) / 255),
            size=(299, 299),
            mode="bilinear",
            align_corners=False,
        )
        with torch.no_grad():
            expected = peer(2 * resized - 1)
        found = extractor.features(images)
        assert found.shape == (2, 2048)
        assert relative_error(found, expected) < 1e-4
        assert extractor.identity["preprocessing"] == "pytorch resize to 299"
        assert extractor.identity["network"] == "InceptionV3"

    def test_unknown_protocol(self, inception_file):
        with pytest.raises(UserError, match="resize: 'bicubic', expected one of tensorflow"):
            inception_extractor(inception_file[1], resize="bicubic")


class Touch:
    """Unpickling it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


class TestFiles:
    def test_round_trip(self, tmp_path, clip):
        x = np.random.default_rng(0).normal(size=(300, 128)).astype(np.float32)
        written = statistics(x, network=clip.label)
        write_statistics(tmp_path / "real.npz", written)
        read = read_statistics(tmp_path / "real.npz", clip)
        np.testing.assert_array_equal(read.mu, written.mu)
        np.testing.assert_array_equal(read.sigma, written.sigma)
        assert (read.count, read.network) == (300, clip.label)
        assert fid(read, x + 1) == pytest.approx(128, rel=1e-5)
        # As pytorch-fid reads it.
        with np.load(tmp_path / "real.npz") as file:
            assert file["mu"].shape == (128,) and file["sigma"].shape == (128, 128)

    def test_reference_batches(self, tmp_path):
        """A file as ADM's: statistics of the whole data set, spatial ones, and some images."""
        images, mu = pictures(3, 16), np.arange(4.0, dtype=np.float32)
        arrays = {"arr_0": images, "mu": mu, "sigma": np.eye(4), "mu_s": mu, "sigma_s": np.eye(4)}
        np.savez(tmp_path / "VIRTUAL.npz", **arrays)
        read = read_statistics(tmp_path / "VIRTUAL.npz")
        assert (read.count, read.network) == (0, "")
        assert read.mu.dtype == np.float64
        np.testing.assert_array_equal(read.mu, mu)
        source = read_images(tmp_path / "VIRTUAL.npz")
        np.testing.assert_array_equal(source[2].image, images[2])
        assert source[2].label == 0 and source.ids[2] == "VIRTUAL.npz/2"
        np.savez(tmp_path / "samples.npz", images, np.array([5, 6, 7]))
        assert read_images(tmp_path / "samples.npz").labels.tolist() == [5, 6, 7]

    def test_pickled_objects_are_not_opened(self, tmp_path):
        trap = np.array([Touch(tmp_path / "touched")], dtype=object)
        np.savez(tmp_path / "a.npz", mu=trap, sigma=np.eye(1))
        with pytest.raises(UserError, match=r"a\.npz: mu: pickled objects, expected numbers"):
            read_statistics(tmp_path / "a.npz")
        assert not (tmp_path / "touched").exists()
        np.load(tmp_path / "a.npz", allow_pickle=True)["mu"]
        assert (tmp_path / "touched").exists()

    def test_other_networks(self, tmp_path, clip):
        write_statistics(tmp_path / "a.npz", Statistics(np.zeros(128), np.eye(128), 9, "other"))
        with pytest.raises(UserError, match=r"a\.npz: made by other, but images go to CLIP tiny"):
            read_statistics(tmp_path / "a.npz", clip)
        assert read_statistics(tmp_path / "a.npz").network == "other"
        np.savez(tmp_path / "b.npz", mu=np.zeros(2048), sigma=np.eye(2048))
        with pytest.raises(UserError, match="2048 dimensions, but CLIP tiny/clip has 128"):
            read_statistics(tmp_path / "b.npz", clip)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"mu": np.zeros(2)}, "key 'sigma' missing, found mu"),
            ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"mu \(2,\) and sigma \(3, 3\)"),
            ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "mu: expected finite floats"),
            ({"mu": np.zeros(2), "sigma": np.eye(2, dtype=int)}, "sigma: .* found int64"),
        ],
    )
    def test_statistics_that_do_not_fit(self, tmp_path, arrays, message):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(UserError, match=r"a\.npz: " + message):
            read_statistics(tmp_path / "a.npz")

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"mu": np.zeros(2)}, "key 'arr_0' missing"),
            ({"arr_0": np.zeros((2, 4, 4, 3), np.float32)}, r"arr_0: float32 .* expected uint8"),
            ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, int)}, "arr_1: int"),
        ],
    )
    def test_images_that_do_not_fit(self, tmp_path, arrays, message):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(UserError, match=r"a\.npz: " + message):
            read_images(tmp_path / "a.npz")

    def test_files_that_are_none(self, tmp_path):
        with pytest.raises(UserError, match=r"a\.npz: no such file"):
            read_statistics(tmp_path / "a.npz")
        np.save(tmp_path / "b.npy", np.zeros(3))
        with pytest.raises(UserError, match=r"b\.npy: a single array, expected an \.npz"):
            read_statistics(tmp_path / "b.npy")
        (tmp_path / "c.npz").write_bytes(b"PK\x03\x04 cut short")
        with pytest.raises(UserError, match=r"c\.npz: cannot be read as an \.npz"):
            read_statistics(tmp_path / "c.npz")
        with pytest.raises(UserError, match=r"d\.txt: expected a name ending in \.npz"):
            write_statistics(tmp_path / "d.txt", Statistics(np.zeros(1), np.eye(1)))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["b.npy", "c.npz"]
