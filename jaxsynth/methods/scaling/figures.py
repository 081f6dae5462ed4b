"""The page's figures of a scaling study; each one's numbers lie beside it as JSON and CSV."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxsynth.core.words import counted
from jaxsynth.data.names import safe_name
from jaxsynth.data.prompt_banks import PromptConfig
from jaxsynth.data.store import ImageStore
from jaxsynth.methods.scaling import fit as laws
from jaxsynth.methods.scaling.claims import Found, Judged, curves, errors_of
from jaxsynth.methods.scaling.config import REAL, Config
from jaxsynth.methods.scaling.points import source_of, trainings
from jaxsynth.report.figures import write_numbers
from jaxsynth.report.grids import write_grid
from jaxsynth.report.page import Picture, Section
from jaxsynth.report.plots import Series, plot_scaling, plot_scatter, plot_scores
from jaxsynth.runs.stage import MANIFEST, Artifact, load_artifact

SHOWN = 6
# Figures of the suite that are drawn against the number of images, and their axis.
AGAINST_SIZE = {
    "AUROC textures": "AUROC of images of no class, %",
    "R_cc": "accuracy kept under corruptions, %",
    "R_adv FGSM": "accuracy kept under FGSM, %",
    "ECE": "expected calibration error, %",
}


def curve_figure(workdir: Path, found: Found, fitted: Mapping[str, laws.Law]) -> Picture:
    measured = curves(found)
    series, drawn, rows = [], {}, []
    for setting, own_errors in measured.items():
        curve = errors_of(own_errors)
        sizes = list(curve)
        errors = [100 * float(np.mean(own)) for own in curve.values()]
        spread = [100 * float(np.std(own, ddof=1)) if len(own) > 1 else np.nan
                  for own in curve.values()]  # fmt: skip
        series.append(Series(setting, sizes, errors, spread, dashed=setting == REAL))
        if not fitted[setting].refused:
            x = np.geomspace(sizes[0], sizes[-1], 60)
            drawn[setting] = (x, 100 * fitted[setting].at(x))
        rows += [
            {"setting": setting, "size": size, "error": float(np.mean(own)),
             "std": float(np.std(own, ddof=1)) if len(own) > 1 else None, "seeds": len(own)}
            for size, own in curve.items()
        ]  # fmt: skip
    folder = workdir / "figures"
    write_numbers(folder / "error", rows, laws={k: x.as_json() for k, x in fitted.items()})
    path = plot_scaling(
        folder / "error.png", series, drawn, xlabel="images of each class", ylabel="error, %"
    )
    return Picture(path, "Error against images of each class; figures/error.json and .csv.")


def mixing(workdir: Path, config: Config, found: Found) -> list[Section]:
    """Error against the share of real images at one size."""
    series, rows, measured = [], [], curves(found)
    for name in config.sources:
        answers = found.get(f"{name}, mixed")
        if not answers:
            continue
        shares: dict[float, list[float]] = {}
        for one in answers:
            share = one.point.real / (one.point.real + one.point.synthetic)
            shares.setdefault(share, []).append(one.error)
        for share, setting in ((0.0, name), (1.0, REAL)):
            ends = measured.get(setting, {})
            if config.mixed_size in ends:
                shares[share] = list(ends[config.mixed_size].values())
        shares = dict(sorted(shares.items()))
        means = [100 * float(np.mean(own)) for own in shares.values()]
        spread = [100 * float(np.std(own, ddof=1)) if len(own) > 1 else np.nan
                  for own in shares.values()]  # fmt: skip
        series.append(Series(name, list(shares), means, spread))
        rows += [
            {"source": name, "real_share": share, "error": float(np.mean(own)),
             "std": float(np.std(own, ddof=1)) if len(own) > 1 else None}
            for share, own in shares.items()
        ]  # fmt: skip
    if not series:
        return []
    write_numbers(workdir / "figures" / "mixing", rows)
    path = plot_scores(
        workdir / "figures" / "mixing.png", series, xlabel="share of real images",
        ylabel="error, %",
    )  # fmt: skip
    text = (
        f"The same number of images of each class, {config.mixed_size}, of which a share is real."
    )
    return [
        Section("Mixing real and synthetic images", text,
                images=[Picture(path, "Error against the share of real images.")])
    ]  # fmt: skip


def against_size(workdir: Path, judged: Judged) -> list[Section]:
    """Robustness and OOD detection against the number of images, where two sizes were judged."""
    pictures, rows = [], []
    for name, ylabel in AGAINST_SIZE.items():
        series = []
        for setting in dict.fromkeys(row["setting"] for row in judged):
            values: dict[float, list[float]] = {}
            for row in judged:
                if row["setting"] == setting and row.get(name) is not None:
                    values.setdefault(row["size"], []).append(row[name])
            rows += [
                {"figure": name, "setting": setting, "size": size, "value": float(np.mean(own)),
                 "std": _deviation(own)} for size, own in sorted(values.items())
            ]  # fmt: skip
            series += _series(setting, values, 100)
        if any(len(line.x) > 1 for line in series):
            file = workdir / "figures" / f"size_{safe_name(name.replace(' ', '_'))}.png"
            plot_scores(file, series, xlabel="images of each class", ylabel=ylabel, log_x=True)
            pictures.append(Picture(file, f"{name} against images of each class."))
    if not pictures:
        return []
    write_numbers(workdir / "figures" / "robustness_against_size", rows)
    text = "Means over seeds at the sizes that were judged; bars are standard deviations."
    return [Section("Robustness against the number of images", text, images=pictures)]


def guidance_of(config: Config, name: str) -> float:
    """The guidance that a source's images are drawn with."""
    own = config.sources[name].guidance_scale
    return config.generate.guidance_scale if own is None else own


def recognisability(workdir: Path, config: Config) -> list[Section]:
    """How recognisable sources are against how diverse, colored by guidance."""
    rows = []
    for name in config.sources:
        counts = [
            dict(load_artifact(folder).counts)
            for seed in config.seeds
            if ((folder := _source(workdir, name, seed) / "measured") / MANIFEST).is_file()
        ]
        if counts:
            rows.append(
                {"source": name, "guidance": guidance_of(config, name), "seeds": len(counts)}
                | {
                    key: float(np.mean([own[key] for own in counts]))
                    for key in ("recognisability", "diversity")
                }
            )
    if not rows:
        return []
    write_numbers(workdir / "figures" / "recognisability", rows)
    names, shares, spreads, shades = (
        [row[key] for row in rows] for key in ("source", "recognisability", "diversity", "guidance")
    )
    path = plot_scatter(
        workdir / "figures" / "recognisability.png", names, spreads,
        [100 * share for share in shares], shades, xlabel="diversity within a class",
        ylabel="recognised, %", shade_label="guidance",
    )  # fmt: skip
    text = (
        f"The share of the first {config.measured} images of each class that a CLIP ({config.clip})"
        " tells as their class, against the spread of its features within a class (0: all alike), "
        "means over seeds. The CLIP is trained on nothing here."
    )
    shown = [Picture(path, "Recognisability against diversity; the color is the guidance.")]
    return [Section("Recognisability and diversity", text, images=shown)]


def against_guidance(workdir: Path, config: Config, found: Found) -> list[Section]:
    """Accuracy against guidance of sources that differ in nothing else."""
    measured, size = curves(found), max(config.sizes)
    groups: dict[tuple[str, int, str], dict[str, float]] = {}
    for name, source in config.sources.items():
        if size in measured.get(name, {}):
            key = (_words(source.prompts), source.shots, repr(source.keep))
            groups.setdefault(key, {})[name] = guidance_of(config, name)
    series, rows = [], []
    for (words, shots, _), members in groups.items():
        if len(set(members.values())) < 2:
            continue
        label = f"{words}, {counted(shots, 'shot')}" if shots else words
        values = {
            guidance: [1 - error for error in measured[name][size].values()]
            for name, guidance in sorted(members.items(), key=lambda pair: pair[1])
        }
        series += _series(label, values, 100)
        rows += [
            {"prompts": label, "guidance": guidance, "size": size,
             "accuracy": float(np.mean(own)), "std": _deviation(own)}
            for guidance, own in values.items()
        ]  # fmt: skip
    if not series:
        return []
    write_numbers(workdir / "figures" / "guidance", rows)
    path = plot_scores(
        workdir / "figures" / "guidance.png", series, xlabel="guidance", ylabel="accuracy, %"
    )
    text = f"Classifiers from {size} images of each class, of sources that differ in guidance only."
    shown = [Picture(path, "Accuracy against guidance.")]
    return [Section("Accuracy against guidance", text, images=shown)]


def costs(workdir: Path, config: Config, found: Found) -> list[Section]:
    """Error against the device-seconds that a point took: adapter, its images, its training."""
    rows, series = [], []
    for setting, answers in found.items():
        source, shared = source_of(setting), {}
        for folder, points in trainings(config, setting).items():
            if (workdir / folder / MANIFEST).is_file():
                made = load_artifact(workdir / folder)
                each = device_seconds(made) / max(made.counts["points"], 1)
                shared |= dict.fromkeys(points, each)
        values: dict[float, list[tuple[float, float]]] = {}
        for one in answers:
            point = one.point
            drawn = learned = 0.0
            if point.synthetic:
                folder = _source(workdir, source, point.seed)
                # Of images that were chosen all were drawn.
                every = config.generate.images_per_class
                taken = every if _chooses(config, setting) else point.synthetic
                drawn = device_seconds(load_artifact(folder / "images")) * taken / every
                if (folder / "adapter" / MANIFEST).is_file():
                    learned = device_seconds(load_artifact(folder / "adapter"))
            rows.append(
                {"setting": setting, "seed": point.seed, "real": point.real,
                 "synthetic": point.synthetic, "adapter": learned, "images": drawn,
                 "training": shared[point], "device_seconds": learned + drawn + shared[point],
                 "error": one.error}
            )  # fmt: skip
            values.setdefault(point.size, []).append((rows[-1]["device_seconds"], one.error))
        if not setting.endswith(", mixed"):
            means = [np.mean(own, 0) for _, own in sorted(values.items())]
            x, y = zip(*means, strict=True)
            series.append(Series(setting, list(x), [100 * error for error in y]))
    write_numbers(workdir / "figures" / "cost", rows)
    path = plot_scaling(
        workdir / "figures" / "cost.png", series, {}, xlabel="device-seconds", ylabel="error, %"
    )
    text = (
        "Seconds times devices of what a point needs: its adapter, its share of the source's "
        "images (all of them where they are filtered or chosen) and of its setting's training, "
        "compilation included. Of a stage that was interrupted the last start alone is counted."
    )
    return [Section("Cost", text, images=[Picture(path, "Error against device-seconds.")])]


def device_seconds(made: Artifact) -> float:
    """What a stage took; 1 device of stages that say no number."""
    return made.manifest["seconds"] * made.counts.get("devices", 1)


def _chooses(config: Config, setting: str) -> bool:
    name = source_of(setting)
    return setting.endswith("practiced") or config.sources[name].keep.takes_any


def _words(prompts: PromptConfig) -> str:
    """A source's prompts in words: families, and the files that make them other ones."""
    files = [x for x in (prompts.captions, prompts.contexts, prompts.hypernyms) if x]
    return " and ".join(prompts.weights) + "".join(f" of {Path(file).name}" for file in files)


def _source(workdir: Path, name: str, seed: int) -> Path:
    return workdir / safe_name(name) / f"seed{seed}"


def _series(label: str, values: Mapping[float, Sequence[float]], scale: float) -> list[Series]:
    """Means and deviations over seeds by x; [] of no values."""
    ordered = sorted(values.items())
    if not ordered:
        return []
    x = [at for at, _ in ordered]
    means = [scale * float(np.mean(own)) for _, own in ordered]
    spread = [np.nan if len(own) < 2 else scale * float(np.std(own, ddof=1)) for _, own in ordered]
    return [Series(label, x, means, spread, dashed=label == REAL)]


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def pictures(workdir: Path, config: Config, found: Found, dataset) -> list[Section]:
    """The first images of each source, classes below each other."""
    stores = {
        name: workdir / safe_name(name) / f"seed{config.seeds[0]}" / "images"
        for name in dict.fromkeys(source_of(setting) for setting in found if setting != REAL)
    }
    stores = {name: path for name, path in stores.items() if (path / MANIFEST).is_file()}
    if not stores:
        return []
    opened = {name: ImageStore(path) for name, path in stores.items()}
    count = min(dataset.num_classes, 10)
    lines = []
    for label in range(count):
        line = []
        for store in opened.values():
            own = np.flatnonzero(store.labels == label)[:SHOWN]
            line += [store[int(i)].image for i in own] + [None] * (SHOWN - len(own))
        lines.append(line)
    headings = [text for name in opened for text in (name, *[""] * (SHOWN - 1))]
    path = write_grid(
        workdir / "samples.png", lines, list(dataset.display_names[:count]), tile=64,
        headings=headings,
    )  # fmt: skip
    drawn = [load_artifact(path).counts["images"] for path in stores.values()]
    text = (
        f"Seed {config.seeds[0]}; {counted(sum(drawn), 'image')} in all, which every size takes "
        "its first of."
    )
    return [Section("What was drawn", text, images=[Picture(path, pixelated=True)])]
