"""Procedural edits: what they do to known pictures, and how a text names them."""

import numpy as np
import pytest

from jaxsynth.core.errors import UserError
from jaxsynth.data.procedural.edits import COLOURS, OPERATIONS, REGIONS, Edit, edit, parse


def photos(count=3, height=24, width=32):
    """Smooth colours with an edge, no two images alike."""
    rows, columns = np.indices((height, width))
    images = [
        np.stack([3 * rows + 9 * n, 4 * columns, 60 + 0 * rows], -1)
        + 120 * (columns > 10 + n)[..., None]
        for n in range(count)
    ]
    return np.clip(np.stack(images), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_every_operation_changes_each_image_by_itself(operation):
    images = photos()
    before = images.copy()
    found = edit(images, Edit(operation, "red"))
    assert found.dtype == np.uint8 and found.shape == images.shape
    np.testing.assert_array_equal(images, before)
    assert np.abs(found.astype(int) - images).mean() > 2
    np.testing.assert_array_equal(found[1:], edit(images[1:], Edit(operation, "red")))
    np.testing.assert_array_equal(found, edit(images, f"red {operation}"))
    other = edit(images, Edit(operation, "blue"))
    assert np.abs(found.astype(int) - other).mean() > 1, "the colour counts"


@pytest.mark.parametrize("region", sorted(set(REGIONS) - {"all"}))
def test_a_region_is_all_that_changes(region):
    images = photos()
    found = edit(images, Edit("negative", region=region))
    whole = edit(images, Edit("negative"))
    mask = np.broadcast_to(REGIONS[region](images.astype(np.float32) / 255), images.shape[:3])
    np.testing.assert_array_equal(found[mask == 0], images[mask == 0])
    np.testing.assert_array_equal(found[mask == 1], whole[mask == 1])
    assert (mask == 0).any() and (mask == 1).any()


def test_known_pictures():
    grey = np.full((1, 16, 16, 3), 128, np.uint8)
    tinted = edit(grey, "red tint")[0, 0, 0].astype(int)
    assert np.abs(tinted - np.array(COLOURS["red"])).max() < 20
    for extreme in (0, 255):
        flat = np.full((1, 16, 16, 3), extreme, np.uint8)
        np.testing.assert_array_equal(edit(flat, "blue tint"), flat)
        np.testing.assert_array_equal(edit(flat, "negative"), 255 - flat)
    for name in ("blur", "mosaic", "painting", "outlines"):
        np.testing.assert_array_equal(edit(grey, name), grey)
    board = np.indices((32, 32)).sum(0) % 2 * 255
    noise = np.repeat(board[None, ..., None], 3, -1).astype(np.uint8)
    np.testing.assert_allclose(edit(noise, "mosaic"), 128, atol=1)
    assert len(np.unique(edit(photos(), "poster"))) <= 3
    step = np.zeros((1, 16, 16, 3), np.uint8)
    step[:, :, 8:] = 255
    lines = edit(step, "red outlines")
    np.testing.assert_array_equal(lines[:, :, [0, 15]], step[:, :, [0, 15]])
    assert (lines[0, :, 8] == COLOURS["red"]).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red stripes", [Edit("stripes", "red")]),
        ("Blurred background", [Edit("blur", region="border")]),
        ("make the sky blue", [Edit("tint", "blue", "top")]),
        (
            "a mosaic, then green halftone dots on the bright parts",
            [Edit("mosaic"), Edit("dots", "green", "lights")],
        ),
        ("gray sketch and pink outlines", [Edit("sketch", "grey"), Edit("outlines", "pink")]),
    ],
)
def test_texts_name_edits(text, expected):
    assert list(parse(text)) == expected
    images = photos(1)
    np.testing.assert_array_equal(edit(images, text), edit(images, expected))


def test_an_edit_prints_the_text_that_names_it():
    for operation in OPERATIONS:
        for region in REGIONS:
            one = Edit(operation, "green", region)
            assert parse(str(one)) == (one,)


def test_what_is_not_known_is_refused():
    with pytest.raises(UserError, match="'happy' names no edit"):
        parse("red stripes and happy")
    with pytest.raises(UserError, match="the text is empty"):
        parse(" , ")
    with pytest.raises(ValueError, match=r"Edit.region: 'inside', expected one of"):
        Edit("tint", region="inside")
    with pytest.raises(UserError, match=r"expected uint8 images \(n, h, w, 3\), found float32"):
        edit(photos().astype(np.float32), "blur")
