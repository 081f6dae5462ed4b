"""Condition images: known pictures, files beside the images and what is wrong with them."""

import jax
import numpy as np
import pytest
from PIL import Image

from jaxsynth.core.errors import UserError
from jaxsynth.data.conditions import (
    CHANNELS,
    WITH_PARTNER,
    as_bytes,
    as_fractions,
    label_colours,
    make_condition,
    partner_file,
    source_conditions,
)
from jaxsynth.data.dataset import SourceError
from jaxsynth.data.procedural.scenes import render_scenes
from jaxsynth.data.procedural.shapes import COLOURS, SHAPES
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.sources.folder import folder_source
from jaxsynth.data.views import Subset
from jaxsynth.ops.space_to_depth import space_to_depth


def picture(height=16, width=20):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=-1)


def square(side=24, first=7, last=16, value=255):
    image = np.zeros((side, side), np.uint8)
    image[first : last + 1, first : last + 1] = value
    return grey(image)


def lines(image, **options):
    return make_condition("edges", image, **options)[..., 0].astype(bool)


@pytest.mark.parametrize("kind", sorted(CHANNELS))
def test_every_kind_is_float32_in_the_unit_range(kind):
    image = picture()
    partner = picture()[..., 0] if kind in WITH_PARTNER else None
    found = make_condition(kind, image, partner=partner)
    assert found.dtype == np.float32 and found.shape == (16, 20, CHANNELS[kind])
    assert found.min() >= 0 and found.max() <= 1 and found.std() > 0
    np.testing.assert_array_equal(found, make_condition(kind, image, partner=partner))


@pytest.mark.parametrize("sigma", [0, 1])
@pytest.mark.parametrize("value", [255, 128])
def test_edges_of_a_square_are_where_it_ends(sigma, value):
    """One closed line, one pixel wide, on one of the two pixels of every step, and nowhere else."""
    found = lines(square(value=value), sigma=sigma)
    inside = np.zeros((24, 24), bool)
    inside[7:17, 7:17] = True
    near = np.zeros_like(inside)
    near[6:18, 6:18] = True
    near[8:16, 8:16] = False
    assert not (found & ~near).any()
    # Away from the corners, each row and column crosses the line twice.
    for cut in (found[9:15], found[:, 9:15].T):
        crossings = np.nonzero(cut)[1].reshape(-1, 2)
        assert (crossings[:, 0] >= 6).all() and (crossings[:, 0] <= 7).all()
        assert (crossings[:, 1] >= 16).all() and (crossings[:, 1] <= 17).all()
        if sigma == 0:
            # Both pixels of a step are equally steep: the later one is taken.
            np.testing.assert_array_equal(crossings, [[7, 17]] * 6)
    assert not lines(np.full((9, 9, 3), value, np.uint8)).any()


def test_edges_run_the_same_way_in_every_direction():
    image = picture(32, 32)
    image[8:24, 8:24] = 255
    np.testing.assert_array_equal(lines(image.swapaxes(0, 1)), lines(image).T)


def test_a_diagonal_edge_has_no_gaps():
    rows, columns = np.mgrid[:20, :20]
    for side in (rows + columns > 20, rows > columns):
        found = lines(grey(255 * side))
        for row, cut in enumerate(found[3:-3], 3):
            (where,) = np.nonzero(cut)
            ends = np.nonzero(np.diff(side[row]))[0][0] + np.array([0, 1])
            assert set(where) <= set(ends) and len(where) >= 1, "on the two pixels of the step"


def test_colours_of_equal_brightness_have_an_edge():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4], image[:, 4:] = (200, 0, 0), (0, 102, 0)
    assert abs(image[0, 0] @ [0.299, 0.587, 0.114] - image[0, 7] @ [0.299, 0.587, 0.114]) < 0.1
    assert lines(image).any(1).all()


def test_hysteresis_keeps_the_weak_part_of_a_line_that_is_strong_somewhere():
    """A vertical step that fades from 200 to 20, and a separate one of 40."""
    image = np.zeros((40, 40))
    image[:, :10] = np.linspace(200, 20, 40)[:, None]
    image[:, 30:] = 40
    options = {"sigma": 0.5, "high": 0.3}
    found = lines(grey(image), low=0.05, **options)
    strong = lines(grey(image), low=0.3, **options)
    fading, apart = found[:, 5:15].any(1), found[:, 25:35].any(1)
    assert fading.all(), "connected with the strong part"
    assert not apart.any(), "as steep as the weak part, but connected with nothing strong"
    assert strong[:20, 5:15].any(1).all() and not strong[30:].any()
    assert lines(grey(image), low=0.05, sigma=0.5, high=0.1)[:, 25:35].any(1).all()


@pytest.mark.parametrize("options", [{"low": 0.3}, {"low": -0.1}, {"sigma": -1}])
def test_thresholds_that_make_no_sense_are_refused(options):
    with pytest.raises(UserError, match=r"0 <= low <= high"):
        make_condition("edges", picture(), **options)


def test_low_resolution_loses_detail_and_keeps_means():
    rows, columns = np.mgrid[:32, :32]
    board = grey(255 * ((rows + columns) % 2))
    found = make_condition("low_resolution", board, factor=4)
    np.testing.assert_allclose(found, 0.5, atol=0.01)
    smooth = grey(40 + 3 * rows + 2 * columns)
    found = make_condition("low_resolution", smooth, factor=4)
    assert np.abs(found - smooth / 255).max() < 0.06
    noise = picture(32, 30)
    found = make_condition("low_resolution", noise, factor=5)
    np.testing.assert_allclose(found.mean((0, 1)), (noise / 255).mean((0, 1)), atol=0.02)
    assert found.std() < 0.5 * (noise / 255).std()
    np.testing.assert_array_equal(
        make_condition("low_resolution", noise, factor=1), noise / np.float32(255)
    )
    for factor in (0, 31):
        with pytest.raises(UserError, match=f"factor {factor}, expected 1 to 30"):
            make_condition("low_resolution", noise, factor=factor)


def test_labels_have_the_colours_of_pascal_voc():
    names = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128)}
    names |= {8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    found = label_colours(np.array([list(names)]))
    np.testing.assert_array_equal(found[0], list(names.values()))
    many = label_colours(np.arange(4096).reshape(64, 64)).reshape(-1, 3)
    assert len(np.unique(many, axis=0)) == 4096


def test_segmentation_reads_palettes_labels_and_colours(tmp_path):
    image = picture(2, 3)
    labels = np.array([[0, 1, 2], [2, 15, 1]], np.uint8)
    palette = [10, 20, 30, 40, 50, 60, 70, 80, 90] + [7] * (3 * 13)
    indexed = Image.fromarray(labels)
    indexed.putpalette(palette)
    indexed.save(tmp_path / "palette.png")
    with Image.open(tmp_path / "palette.png") as written:
        assert written.mode == "P"
    expected = np.array(palette).reshape(-1, 3)[labels]
    for name, array, colours in (
        ("palette.png", None, expected),
        ("labels.png", labels, label_colours(labels)),
        ("wide.png", labels.astype(np.uint16) * 300, label_colours(labels.astype(int) * 300)),
        ("colours.png", image, image),
    ):
        if array is not None:
            Image.fromarray(array).save(tmp_path / name)
        found = make_condition("segmentation", image, partner=tmp_path / name)
        np.testing.assert_array_equal(found, colours.astype(np.float32) / 255)
    np.testing.assert_array_equal(
        make_condition("segmentation", image, partner=labels),
        label_colours(labels) / np.float32(255),
    )


def test_depth_of_8_and_16_bits_is_a_fraction_of_the_largest(tmp_path):
    image = picture(2, 2)
    values = np.array([[0, 51], [102, 255]], np.uint8)
    for name, array, largest in (
        ("8.png", values, 255),
        ("16.png", values.astype(np.uint16) * 200, 65535),
        ("grey.png", grey(values), 255),
        ("16.tif", values.astype(np.uint16) * 200, 65535),
    ):
        Image.fromarray(array).save(tmp_path / name)
        found = make_condition("depth", image, partner=tmp_path / name)
        stored = array[..., 0] if array.ndim == 3 else array
        np.testing.assert_allclose(found[..., 0], stored / largest, rtol=1e-6)
    path = tmp_path / "16.png"
    near = make_condition("depth", image, partner=path, depth_range=(20_400, 10_200))
    np.testing.assert_allclose(near[..., 0], [[1, 1], [0, 0]], atol=1e-6)
    own = make_condition("depth", image, partner=path, depth_range="image")
    np.testing.assert_allclose(own[..., 0], values / 255, atol=1e-6)
    flat = make_condition("depth", image, partner=values * 0 + 9, depth_range="image")
    assert not flat.any()
    metres = np.array([[0.5, 1.0], [2.0, 4.5]], np.float32)
    found = make_condition("depth", image, partner=metres, depth_range=(0.5, 4.5))
    np.testing.assert_allclose(found[..., 0], [[0, 0.125], [0.375, 1]])
    with pytest.raises(UserError, match="float32 pixels have no largest value"):
        make_condition("depth", image, partner=metres)
    with pytest.raises(UserError, match=r"depth_range: \(3, 3\) is empty"):
        make_condition("depth", image, partner=values, depth_range=(3, 3))


def test_wrong_partners_are_named(tmp_path):
    image = picture(4, 6)

    def refuse(match, kind, partner, **options):
        with pytest.raises(UserError, match=match):
            make_condition(kind, image, partner=partner, **options)

    Image.fromarray(picture(4, 5)).save(tmp_path / "small.png")
    refuse(
        r"small\.png: 5x4 pixels, expected 6x4 as its image", "segmentation", tmp_path / "small.png"
    )
    refuse(r"5x4 pixels, expected 6x4", "depth", picture(4, 5)[..., 0])
    Image.fromarray(image).save(tmp_path / "colour.png")
    refuse(
        r"colour\.png: expected grey values, found uint8 \(4, 6, 3\)",
        "depth",
        tmp_path / "colour.png",
    )
    Image.fromarray(np.zeros((4, 6, 4), np.uint8)).save(tmp_path / "alpha.png")
    refuse(
        r"alpha\.png: an image of mode RGBA, expected grey or RGB", "mask", tmp_path / "alpha.png"
    )
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    refuse(r"broken\.png: cannot be read as an image", "depth", tmp_path / "broken.png")
    refuse("expected label numbers from 0, found float64", "segmentation", np.zeros((4, 6)))
    refuse("expected label numbers from 0, found int64", "segmentation", np.zeros((4, 6), int) - 1)
    refuse("'depth' needs a file", "depth", None)
    refuse("'edges' takes no file", "edges", tmp_path / "alpha.png")
    refuse("condition 'canny': expected one of", "canny", None)
    with pytest.raises(UserError, match=r"expected a uint8 image \(h, w, 3\), found float64"):
        make_condition("edges", image / 255)


@pytest.fixture
def folders(tmp_path):
    """Photos of two classes, wider than high, and their depths and labels."""
    rng = np.random.default_rng(0)
    for name in ("cat/1.jpg", "cat/2.jpeg", "dog/1.jpg"):
        labels = rng.integers(0, 4, (2, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        for kind, array in (
            ("photos", grey(60 * labels)),
            ("depth", 60 * labels),
            ("labels", labels),
        ):
            path = tmp_path / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path if kind == "photos" else path.with_suffix(".png"))
    return tmp_path


def test_conditions_of_a_source_lie_where_its_images_are_cut(folders):
    source, _ = folder_source(folders / "photos")
    assert partner_file(folders / "depth", "cat/2.jpeg") == folders / "depth/cat/2.png"
    depth = source_conditions(source, "depth", 8, folder=folders / "depth")
    colours = source_conditions(source, "segmentation", 8, folder=folders / "labels")
    small = source_conditions(source, "low_resolution", 8, factor=1)
    assert depth.shape == (3, 8, 8, 1) and colours.shape == small.shape == (3, 8, 8, 3)
    assert np.abs(small[..., :1] - depth).max() < 0.02, "JPEG is nearly exact here"
    known = label_colours(np.arange(4)[None])[0] / np.float32(255)
    assert {tuple(x) for x in colours.reshape(-1, 3)} <= {tuple(x) for x in known}
    edges = source_conditions(source, "edges", 16)
    assert edges.shape == (3, 16, 16, 1) and 0 < edges.mean() < 0.5


def test_missing_and_ambiguous_partners_are_named(folders):
    source, _ = folder_source(folders / "photos")
    (folders / "depth/dog/1.png").rename(folders / "depth/dog/01.png")
    with pytest.raises(UserError, match=r"depth/dog/1\.\*: .* for 'dog/1\.jpg', there is none"):
        source_conditions(source, "depth", 8, folder=folders / "depth")
    (folders / "labels/cat/1.TIF").write_bytes(b"")
    with pytest.raises(UserError, match=r"labels/cat/1\.\*: .*found \['1\.png', '1\.TIF'\]"):
        source_conditions(source, "segmentation", 8, folder=folders / "labels")
    with pytest.raises(UserError, match="nowhere: no such folder of condition images"):
        partner_file(folders / "nowhere", "cat/1.jpg")
    with pytest.raises(UserError, match="'depth' needs the folder of its files"):
        source_conditions(source, "depth", 8)
    with pytest.raises(UserError, match="'edges' takes no folder"):
        source_conditions(source, "edges", 8, folder=folders / "depth")


def test_maps_that_a_source_knows_need_no_folder():
    scenes = render_scenes(3, 16, 0)
    maps = {"depth": scenes.depths, "segmentation": scenes.labels}
    source = ArraySource(scenes.images, np.zeros(3, np.int32), list("abc"), maps)
    depth = source_conditions(source, "depth", 16)
    np.testing.assert_array_equal(depth[..., 0], scenes.depths / np.float32(255))
    backwards = Subset(Subset(source, [2, 1, 0]), [0, 1])
    np.testing.assert_array_equal(source_conditions(backwards, "depth", 16), depth[[2, 1]])
    small = source_conditions(source, "segmentation", 8)
    colours = label_colours(np.unique(scenes.labels)[None])[0] / np.float32(255)
    assert {tuple(x) for x in small.reshape(-1, 3)} <= {tuple(x) for x in colours}, "no mixtures"
    with pytest.raises(UserError, match="'mask' needs the folder of its files"):
        source_conditions(source, "mask", 16)
    with pytest.raises(SourceError, match=r"depth: a map of \(2, 16, 16\) for images of \(3, 16"):
        ArraySource(source.images, source.labels, source.ids, {"depth": scenes.depths[:2]})


def test_pixels_become_channels_of_the_latent_above_them():
    condition = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    small = space_to_depth(condition, 2)
    assert small.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(small[1, 1, 2], condition[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(np.sort(small, axis=None), condition.reshape(-1))
    np.testing.assert_array_equal(space_to_depth(condition[0], 1), condition[0])
    with pytest.raises(ValueError, match="6x4 pixels, expected multiples of 4"):
        space_to_depth(condition, 4)


def test_bytes_hold_what_came_of_bytes():
    fractions = make_condition("low_resolution", picture())
    stored = as_bytes(fractions)
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(as_fractions(stored), fractions)
    np.testing.assert_allclose(jax.jit(as_fractions)(stored), fractions, rtol=1e-6)
    assert as_fractions(fractions.astype(np.float16)).dtype == np.float32


def test_scenes_are_what_their_maps_say():
    scenes = render_scenes(12, 48, 3, shapes=2)
    again = render_scenes(12, 48, 3, shapes=2)
    jax.tree.map(np.testing.assert_array_equal, vars(scenes), vars(again))
    for image, caption, mask, labels, depth in zip(
        scenes.images, scenes.captions, scenes.masks, scenes.labels, scenes.depths, strict=True
    ):
        first, second = caption.removeprefix("a photo of a ").split(" in front of a ")
        (ink, shape), (back_ink, back) = first.split(), second.split()
        found = [1 + SHAPES.index(name) for name in (shape, back)]
        assert set(np.unique(labels)) <= {0, *found} and found[0] in labels
        # The front is the nearest and wholly visible: its pixels are of its colour.
        assert depth[labels == found[0]].min() == depth.max()
        inner = (labels == found[0]) & (mask == 255)
        assert np.abs(np.median(image[inner], axis=0) - COLOURS[ink]).max() < 12
        if (labels == found[1]).sum() > 20:
            hidden = (labels == found[1]) & (mask == 255)
            assert np.abs(np.median(image[hidden], axis=0) - COLOURS[back_ink]).max() < 12
            assert len(np.unique(depth[labels == found[1]])) == 1
        np.testing.assert_array_equal(labels > 0, depth > 0)
        assert (mask[labels > 0] >= 127).all() and (mask[labels == 0] <= 255 - 2).all()
        paper = np.median(image[mask == 0], axis=0)
        assert np.abs(image[mask == 0] - paper).mean() < 6
    one = render_scenes(2, 32, 0, shapes=1)
    assert all(len(c.split()) == 6 for c in one.captions)
    with pytest.raises(ValueError, match="shapes is 5"):
        render_scenes(1, 32, 0, shapes=5)


def test_a_scene_s_maps_are_exact_conditions():
    scenes = render_scenes(1, 32, 1)
    image = scenes.images[0]
    depth = make_condition("depth", image, partner=scenes.depths[0])
    np.testing.assert_array_equal(depth[..., 0], scenes.depths[0] / np.float32(255))
    colours = make_condition("segmentation", image, partner=scenes.labels[0])
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) == len(np.unique(scenes.labels[0]))
    # Edges lie on the border of the mask, give or take a pixel.
    mask = make_condition("mask", image, partner=scenes.masks[0])[..., 0] > 0.5
    border = np.zeros_like(mask)
    for axis in (0, 1):
        for shift in (-1, 1):
            border |= mask != np.roll(mask, shift, axis)
    reach = border.copy()
    for axis in (0, 1):
        for shift in (-1, 1):
            reach |= np.roll(border, shift, axis)
    inner = scenes.labels[0] != np.roll(scenes.labels[0], 1, 0)
    inner |= scenes.labels[0] != np.roll(scenes.labels[0], 1, 1)
    found = lines(image)
    assert found.any() and (found & ~reach & ~inner).mean() < 0.02
