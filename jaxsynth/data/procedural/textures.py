"""Textures: stripes, checks, dots and waves of drawn colors, sizes and directions."""

import numpy as np

from jaxsynth.data.procedural.shapes import COLOURS

TEXTURES = ("stripes", "checks", "dots", "waves")
# Rendered this many times larger and averaged down.
OVERSAMPLE = 2


def texture_pattern(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """How much ink (0 to 1) a texture has at each of `OVERSAMPLE` times `size` pixels a side.

    Its period, direction and phase are drawn.
    """
    side = size * OVERSAMPLE
    period = size * rng.uniform(0.15, 0.4)
    turn = rng.uniform(0, np.pi)
    y, x = np.mgrid[:side, :side] / OVERSAMPLE
    phase = rng.uniform(0, 2 * np.pi, 2)
    u = 2 * np.pi * (x * np.cos(turn) + y * np.sin(turn)) / period + phase[0]
    v = 2 * np.pi * (y * np.cos(turn) - x * np.sin(turn)) / period + phase[1]
    if kind == "stripes":
        level = np.sin(u)
    elif kind == "checks":
        level = np.sin(u) * np.sin(v)
    elif kind == "dots":
        level = np.cos(u) + np.cos(v) - 0.9
    else:
        level = np.sin(u + 1.2 * np.sin(v * 0.7))
    # An edge a pixel wide, for all but the waves.
    return (level + 1) / 2 if kind == "waves" else 1 / (1 + np.exp(-level * 12))


def average_down(picture: np.ndarray) -> np.ndarray:
    """(h, w, 3) from `OVERSAMPLE` times as many pixels a side."""
    side = len(picture) // OVERSAMPLE
    return picture.reshape(side, OVERSAMPLE, side, OVERSAMPLE, 3).mean((1, 3))


def render_texture(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A texture in two colors that can be told apart, uint8 (size, size, 3)."""
    weight = texture_pattern(kind, size, rng)
    names = list(COLOURS)
    while True:
        ink, paper = (np.array(COLOURS[names[k]]) for k in rng.choice(len(names), 2, replace=False))
        if np.abs(ink - paper).sum() > 150:
            break
    picture = average_down(weight[..., None] * ink + (1 - weight[..., None]) * paper)
    picture = picture + rng.normal(0, 3, picture.shape)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)
