"""Figures of motion on clips whose motion is known."""

import numpy as np

from jaxsynth.quality.motion import frame_consistency, frame_difference, frame_shift


def textured(side=24, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (side, side, 3), dtype=np.uint8)


def moving(image, *steps):
    return np.stack([np.roll(image, step, (0, 1)) for step in steps])


def test_a_shift_is_found_with_its_sign():
    """Whole pixels, a still clip, one of a single colour, and steps of two kinds."""
    image = textured()
    clips = [
        moving(image, (0, 0), (2, -3), (4, -6), (6, -9)),
        moving(image, *[(0, 0)] * 4),
        np.full((4, 24, 24, 3), 90, np.uint8),
        moving(image, (0, 0), (0, 1), (0, 2), (0, 3)),
    ]
    found = frame_shift(np.stack(clips))
    np.testing.assert_allclose(found, [[2, -3], [0, 0], [0, 0], [0, 1]], atol=0.1)
    # Steps of 1 and of 2 pixels: the more common one.
    uneven = moving(image, (0, 0), (0, 1), (0, 2), (0, 4), (0, 5))
    assert abs(frame_shift(uneven[None])[0, 1] - 1) < 0.25


def test_a_shift_between_pixels():
    """A blob that moves by 0.4 pixels a frame."""
    rows, columns = np.mgrid[:24, :24]
    frames = [
        200 * np.exp(-((rows - 12) ** 2 + (columns - 8 - 0.4 * t) ** 2) / 18) for t in range(6)
    ]
    clip = np.repeat(np.stack(frames).astype(np.uint8)[..., None], 3, -1)
    np.testing.assert_allclose(frame_shift(clip[None])[0], [0, 0.4], atol=0.15)


def test_difference_and_consistency():
    frames = np.zeros((2, 3, 4, 4, 3), np.uint8)
    frames[0, 1] = 51
    np.testing.assert_allclose(frame_difference(frames), [0.2, 0], rtol=1e-6)
    features = np.array([[[1, 0], [2, 0], [0, 5]], [[1, 1], [1, 1], [-1, -1]]], np.float32)
    np.testing.assert_allclose(frame_consistency(features), [0.5, 0.0], atol=1e-6)
