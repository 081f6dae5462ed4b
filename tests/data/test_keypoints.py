"""Five points of a face: their picture, their files, and what is wrong with one."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxsynth.core.errors import UserError
from jaxsynth.data.decode import covering
from jaxsynth.data.keypoints import (
    COLORS,
    draw_keypoints,
    moved,
    read_keypoint_picture,
    read_keypoints,
)

POINTS = np.array([[340.0, 400], [680, 420], [510, 600], [370, 780], [650, 790]])


def test_the_picture_is_that_of_instantid():
    """At 1024 pixels discs of radius 10 over sticks of half width 4 at three fifths of a color."""
    picture = draw_keypoints(POINTS, (1024, 1024))
    assert picture.shape == (1024, 1024, 3) and picture.dtype == np.uint8
    for (x, y), color in zip(POINTS.astype(int), COLORS, strict=True):
        assert tuple(picture[y, x]) == tuple(picture[y, x + 10]) == color
        assert (picture[y - 11 : y - 10, x] != color).any()
    shades = {tuple(int(0.6 * c) for c in color) for color in COLORS}
    found = {tuple(map(int, c)) for c in np.unique(picture.reshape(-1, 3), axis=0)}
    # No stick starts at the nose, so that its shade of blue is not there.
    assert found == {(0, 0, 0), *COLORS, *(shades - {(0, 0, 153)})}
    middle = (POINTS[0] + POINTS[2]) / 2
    across = np.array([-(POINTS[2] - POINTS[0])[1], (POINTS[2] - POINTS[0])[0]])
    across = across / np.linalg.norm(across)
    seen = [
        picture[tuple(np.round(middle + step * across).astype(int)[::-1])].any()
        for step in (-6, -3, 0, 3, 6)
    ]
    assert seen == [False, True, True, True, False]
    area = (picture == COLORS[1]).all(-1).sum()
    assert area == pytest.approx(np.pi * 100, rel=0.05)


def test_small_pictures_have_small_points_and_those_outside_are_cut():
    small = draw_keypoints(POINTS / 32, (32, 32))
    for (x, y), color in zip((POINTS / 32).astype(int), COLORS, strict=True):
        assert tuple(small[y, x]) == color
    assert 0.02 < small.any(-1).mean() < 0.2
    assert not draw_keypoints(POINTS + 5000, (32, 32)).any()
    # All in one place, where the last is drawn last.
    one = draw_keypoints(np.full((5, 2), 3.0), (8, 8))
    assert tuple(one[3, 3]) == COLORS[4]


def test_files_are_read_and_follow_their_picture(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(POINTS.tolist()))
    sized = {"keypoints": POINTS.tolist(), "width": 1024, "height": 2048}
    (tmp_path / "b.json").write_text(json.dumps(sized))
    np.save(tmp_path / "c.npy", POINTS)
    np.savez(tmp_path / "d.npz", keypoints=POINTS, size=np.array([2048, 1024]))
    for name in ("a.json", "b.json", "c.npy", "d.npz"):
        np.testing.assert_array_equal(read_keypoints(tmp_path / name), POINTS)
    expected = moved(POINTS, (2048, 1024), (64, 64))
    for name in ("b.json", "d.npz"):
        np.testing.assert_allclose(read_keypoints(tmp_path / name, (64, 64)), expected)
    np.testing.assert_array_equal(read_keypoints(tmp_path / "a.json", (64, 64)), POINTS)
    # A bright square is where its centre is moved to.
    wide = np.zeros((64, 96, 3), np.uint8)
    wide[20:28, 60:68] = 255
    fitted = covering(wide, 32, 32).mean(-1)
    y, x = np.mgrid[:32, :32]
    place = [(fitted * axis).sum() / fitted.sum() for axis in (x, y)]
    np.testing.assert_allclose(moved(np.array([63.5, 23.5]), (64, 96), (32, 32)), place, atol=0.1)
    picture = draw_keypoints(POINTS, (1024, 1024))
    Image.fromarray(picture).save(tmp_path / "drawn.png")
    found = read_keypoint_picture(tmp_path / "drawn.png", (1024, 1024))
    np.testing.assert_array_equal(found, picture)
    np.testing.assert_array_equal(read_keypoint_picture(tmp_path / "a.json", (1024, 1024)), picture)


def test_what_is_no_keypoints_is_named(tmp_path):
    np.save(tmp_path / "four.npy", POINTS[:4])
    np.savez(tmp_path / "other.npz", points=POINTS)
    np.savez(tmp_path / "size.npz", keypoints=POINTS, size=np.array([0, 5]))
    (tmp_path / "nan.json").write_text(json.dumps([[1, 2]] * 4 + [["a", 2]]))
    (tmp_path / "lacks.json").write_text(json.dumps({"keypoints": POINTS.tolist(), "width": 3}))
    (tmp_path / "x.txt").write_text("1")
    for name, words in (
        ("four.npy", r"keypoints of shape \(4, 2\), expected \(5, 2\): x and y of left eye"),
        ("other.npz", "key 'keypoints' missing, found points"),
        ("size.npz", "expected height and width"),
        ("nan.json", "keypoints are no table of numbers"),
        ("lacks.json", "height is missing"),
        ("x.txt", "expected keypoints"),
        ("none.json", "none.json"),
    ):
        with pytest.raises(UserError, match=words):
            read_keypoints(tmp_path / name, (8, 8))
