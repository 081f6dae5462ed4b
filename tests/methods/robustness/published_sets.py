"""Every kind of published set in its layout, of the drawn shapes' names."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from jaxsynth.data.procedural.shapes import SHAPES
from jaxsynth.robustness import bias_sets
from jaxsynth.robustness.corruptions.registry import SEVERITIES

FOLDER = {"source": "folder"}


def write(path, number=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3))
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path)


def write_sets(root: Path) -> Path:
    """A folder with all of them."""
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_text("\n".join(SHAPES))
    number = 0
    for place, name in enumerate(SHAPES):
        for i in range(2):
            number += 1
            write(root / "val" / name / f"val_{number}.png", number)
            write(root / "depth" / name / f"val_{number}.png", number, mode="L")
            for severity in SEVERITIES:
                write(root / "c" / "snow" / str(severity) / name / f"val_{number}.png", severity)
            write(root / "cues" / name / f"{name}{i + 1}-{SHAPES[place - 1 - i]}1.png", number)
        if place % 2:
            write(root / "sketch" / name / "a.png", place)
        for variant in bias_sets.VARIANTS:
            write(root / "in9" / variant / "val" / name / "1.png", place)
    for i in range(3):
        write(root / "strange" / "deep" / f"{i}.png", i)
        write(root / "focus" / f"P{i}" / "truck" / f"{i}.png", i)
        write(root / "focus" / f"P{i}" / "cat" / f"{i}.png", i)
    write(root / "focus" / "P3" / "bird" / "1.png")
    (root / "focus.json").write_text(
        json.dumps({name: [i] if i < 8 else [] for i, name in enumerate(bias_sets.FOCUS_NAMES)})
    )
    return root


def every(root: Path) -> dict:
    """The fields of a `SetsConfig` that reads those whose classes are shapes."""

    def folder(name, **more):
        return {**FOLDER, "path": str(root / name), **more}

    return {
        "classes": str(root / "classes.txt"),
        "clean": folder("val", depth=str(root / "depth")),
        "shifted": {"sketch": folder("sketch")},
        "ood": {"strange": folder("strange", count=2)},
        "conflict": folder("cues"),
        "background": folder("in9"),
        "corrupted": {"c": folder("c")},
    }
