"""How near a set of images is to held-out real ones, and whether it repeats the shots.

The figures are `quality.metrics`' in the features of the run's CLIP, each with its floor: what real
images get against real ones at the same counts. A set that is drawn by a generator which has seen
few images many times may hold copies of them, so each image is compared with the nearest shot of
its class, and that with how near other real images come to the shots.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxsynth.core.documents import read_json
from jaxsynth.core.io import write_json
from jaxsynth.data.dataset import Dataset
from jaxsynth.data.splits import load_shots, select_ids
from jaxsynth.data.store import ImageStore
from jaxsynth.methods.image_sets import SHOTS_FILE
from jaxsynth.quality.features import clip_features
from jaxsynth.quality.filters import nearest_shot
from jaxsynth.quality.metrics import QualityConfig, evaluate, least_samples
from jaxsynth.report.grids import write_grid
from jaxsynth.report.page import Picture, Section
from jaxsynth.report.tables import Measure, Table
from jaxsynth.runs.stage import MANIFEST, Artifact, Work, stage
from jaxsynth.weights.hf import Clip

FIGURES_FILE = "figures.json"
FIGURES = {
    "fid": "FID", "kid": "KID", "precision": "precision", "recall": "recall", "density": "density",
    "coverage": "coverage",
}  # fmt: skip
# Of real images so many are nearer to a shot than an image that is called a copy.
COPIES = 0.01
# Pairs that are kept of each set, and those that the page shows.
PAIRS, SHOWN = 24, 8


@dataclass(frozen=True)
class Measuring:
    """How sets are compared: `seed` draws the splits and subsets."""

    seed: int


def too_few(data: Dataset, images: int) -> str:
    """Why sets of so many images cannot be compared with the test images, "" where they can."""
    least = least_samples(QualityConfig())
    for what, found, needed in (
        ("test images", len(data.test), 2 * least),
        ("images of a set", images, least),
    ):
        if found < needed:
            return f"sets are not measured: {found} {what}, {needed} or more are needed"
    return ""


@stage()
def measure_set(
    work: Work,
    config: Measuring,
    *,
    data: Dataset,
    clip: Clip,
    images: Artifact,
    shots: Artifact | None = None,
) -> dict:
    """Writes the set's figures, and those of its images that are nearest to a shot."""
    extractor, store = clip_features(clip), ImageStore(images.path)
    held, made = extractor.of_source(data.test), extractor.of_source(store)
    found = {
        "reference": "held-out real images",
        "features": extractor.identity,
        **evaluate(held, made, seed=config.seed),
    }
    counts = {name: found["matched"][name]["mean"] for name in ("fid", "coverage")}
    if shots is not None:
        real = load_shots(shots.path / SHOTS_FILE).train_source(data)
        known, labels = extractor.of_source(real), np.asarray(real.labels)
        own, which = nearest_shot(made, np.asarray(store.labels), known, labels)
        others, _ = nearest_shot(held, np.asarray(data.test.labels), known, labels)
        limit = float(np.quantile(others, 1 - COPIES))
        order = np.argsort(-own, kind="stable")[:PAIRS]
        found["nearest"] = {
            "median": float(np.median(own)),
            "median_real": float(np.median(others)),
            "limit": limit,
            "above": float((own > limit).mean()),
            "pairs": [
                {"image": int(i), "shot": real.ids[which[i]], "cosine": float(own[i])}
                for i in order
            ],
        }
        counts["above"] = found["nearest"]["above"]
    write_json(work.folder / FIGURES_FILE, found)
    return counts


def section(workdir: Path, dataset: Dataset, sets: Mapping[str, list[Path]]) -> list[Section]:
    """What was measured of each set, by the name that the page gives it: its folders by seed.

    A set's folder holds "images" and "alignment"; those that are not finished are left out.
    """
    done = {
        name: [
            x
            for x in folders
            if all((x / part / MANIFEST).is_file() for part in ("alignment", "images"))
        ]
        for name, folders in sets.items()
    }
    found = {
        name: [read_json(x / "alignment" / FIGURES_FILE) for x in folders]
        for name, folders in done.items()
        if folders
    }
    if not found:
        return []
    first = next(iter(found.values()))[0]
    floor = [
        Measure(tuple(one["floor"][name]["mean"] for ones in found.values() for one in ones[:1]))
        for name in FIGURES
    ]
    body: list[list] = [["Real against real (the floor)", *(Measure(x.values[:1]) for x in floor)]]
    for name, ones in found.items():
        cells = [Measure(tuple(one["matched"][x]["mean"] for one in ones)) for x in FIGURES]
        body.append([name, *cells])
    tables = [
        Table(
            ["Set", *FIGURES.values()], body, better=None, digits=3, rules=(1,),
            caption=f"Against held-out real images, {first['samples']['matched']} of each side",
        )
    ]  # fmt: skip
    near = {name: ones for name, ones in found.items() if "nearest" in ones[0]}
    pictures = []
    if near:
        names = ("median", "median_real", "limit", "above")
        rows = [
            [name, *(Measure(tuple(one["nearest"][x] for one in ones)) for x in names)]
            for name, ones in near.items()
        ]
        columns = ["Set", "median", "of real images", "limit", "share above it"]
        tables.append(
            Table(columns, rows, better=None, digits=3, caption="Cosine to the nearest shot")
        )
        pictures.append(_pairs(workdir, dataset, done, near))
    features = first["features"]
    text = (
        f"In the features of {features['network']} ({features['preprocessing']}), which is the "
        "classifier's start, so that other networks may order the sets differently. FID and KID "
        "are distances: smaller is nearer, and the floor is what a perfect generator would get. "
        "An image whose cosine to a shot of its class is above the limit is nearer than "
        f"{100 * (1 - COPIES):.0f} % of the test images are: a copy, or nearly."
    )
    return [Section("How near the sets are to real images", text, tables=tables, images=pictures)]


def _pairs(
    workdir: Path, dataset: Dataset, folders: Mapping[str, list[Path]], near: Mapping[str, list]
) -> Picture:
    """The images of each set's first seed that are nearest to a shot, with that shot below."""
    rows, names = [], []
    for name, ones in near.items():
        pairs = ones[0]["nearest"]["pairs"][:SHOWN]
        store = ImageStore(folders[name][0] / "images")
        shots = select_ids(dataset.train, [pair["shot"] for pair in pairs])
        rows += [[store[pair["image"]].image for pair in pairs], [x.image for x in shots]]
        names += [name, "nearest shot"]
    path = write_grid(workdir / "nearest.png", rows, names, tile=64)
    caption = "The images of each set that are nearest to a shot, and that shot below each."
    return Picture(path, caption, pixelated=True)
