"""How clips move: by how much frames differ, how much of them is kept, how far things shift.

Shifts are found by phase correlation (Kuglin and Hines 1975): where a picture moves as a whole over
a plain ground, the inverse transform of the normalised cross-power spectrum of two frames has its
peak at the shift between them.
"""

import numpy as np
from jaxtyping import Float, UInt8

from jaxsynth.quality.similarity import paired_cosine

# Of the spectrum: frequencies with less than this share of the strongest say nothing of a shift.
_LEAST = 1e-3


def frame_difference(clips: UInt8[np.ndarray, "n f h w 3"]) -> Float[np.ndarray, " n"]:
    """Of each clip the mean absolute difference of neighbouring frames, of pixels from 0 to 1."""
    values = clips.astype(np.float32) / 255
    return np.abs(np.diff(values, axis=1)).mean(axis=(1, 2, 3, 4))


def frame_consistency(features: Float[np.ndarray, "n f d"]) -> Float[np.ndarray, " n"]:
    """Of each clip the mean cosine of the features of neighbouring frames."""
    count, frames, width = features.shape
    before, after = (features[:, rows].reshape(-1, width) for rows in (slice(-1), slice(1, None)))
    return paired_cosine(before, after).reshape(count, frames - 1).mean(1)


def frame_shift(clips: UInt8[np.ndarray, "n f h w 3"]) -> Float[np.ndarray, "n 2"]:
    """Of each clip how far a frame lies from the one before: (down, right) in pixels, averaged.

    The spectra of all pairs of neighbouring frames are added, so that the peak is of what they have
    in common; its place between pixels is that of a parabola. Shifts of up to half of the side are
    told apart. A clip that stands still, or is of one colour, has shift 0.
    """
    grey = clips.astype(np.float64).mean(-1)
    grey -= grey.mean(axis=(2, 3), keepdims=True)
    spectra = np.fft.fft2(grey)
    cross = spectra[:, 1:] * spectra[:, :-1].conj()
    size = np.abs(cross)
    strong = size > _LEAST * size.max(axis=(2, 3), keepdims=True)
    unit = np.where(strong, cross / np.where(strong, size, 1), 0)
    peaks = np.fft.ifft2(unit.sum(axis=1)).real
    return np.stack([_peak(values) for values in peaks])


def _peak(values: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "2"]:
    place = np.unravel_index(values.argmax(), values.shape)
    found = []
    for axis, at in enumerate(place):
        line = np.moveaxis(values, axis, -1)[place[1 - axis]]
        before, here, after = (line[(at + step) % len(line)] for step in (-1, 0, 1))
        bend = before - 2 * here + after
        fine = at + (0.5 * (before - after) / bend if bend else 0.0)
        found.append(fine - len(line) if fine > len(line) / 2 else fine)
    return np.asarray(found)
