"""What a customisation run found: results.json, a table and one HTML page."""

from pathlib import Path

import jax
import numpy as np

from jaxsynth.core.arrays import read_arrays
from jaxsynth.core.console import console
from jaxsynth.core.io import write_json
from jaxsynth.methods.customize import motion_report
from jaxsynth.methods.customize.config import Config
from jaxsynth.methods.customize.stages import FIGURES
from jaxsynth.report.page import Picture, Section, write_page
from jaxsynth.report.tables import Measure, Table, to_markdown, to_rich
from jaxsynth.robustness.metrics.bootstrap import difference, interval, mean
from jaxsynth.runs.results import check_stages, how_it_was_made
from jaxsynth.runs.run import read_config
from jaxsynth.runs.stage import MANIFEST, load_artifact

TITLES = {
    "textual_inversion": "Textual Inversion",
    "dreambooth": "DreamBooth",
    "lora": "LoRA on captions",
    "ip_adapter": "IP-Adapter",
    "instantid": "InstantID",
    "animatediff": "AnimateDiff",
    "motion_lora": "MotionLoRA",
}
_OF_ALL = (
    "Cosines of CLIP's features. Similarity: of each image with every held-out photo, averaged; "
    "prompt: of each image with its prompt, the subject called by its class. The base and the "
    "customised model draw the same prompts, none of which was trained on, from the same noise."
)
_OF_REFERENCES = (
    "Cosines of CLIP's features. Similarity: of each image with the held-out one that it was to be "
    "like; another's: with the next of those; prompt: with its prompt. The base draws the same "
    "prompts from the same noise and sees no image."
)
_OF_FACES = (
    "Similarity: the cosine of a face encoder's embeddings, of each image with the face that it "
    "was to be of, which nothing was trained on; another's: with the next of those, whose "
    "keypoints it was given. Prompt: the cosine of CLIP's features with its prompt. The base draws "
    "the same prompts from the same noise and sees no face."
)


def report(workdir: Path) -> Path:
    """Writes results.json, the table and report.html from the finished stages."""
    workdir, page = Path(workdir), Path(workdir) / "report.html"
    check_stages(workdir)
    found = sorted(workdir.glob(f"measured-seed*/{MANIFEST}"))
    if not found:
        raise FileNotFoundError(f"{workdir}: no finished seed (measured-seed<n>)")
    if jax.process_index():
        return page
    stages = {path.parent: load_artifact(path.parent) for path in found}
    stages = dict(sorted(stages.items(), key=lambda item: item[1].manifest["config"]["seed"]))
    config = read_config(workdir, Config)
    title = TITLES[config.technique]
    results = [
        {"seed": x.manifest["config"]["seed"], "technique": config.technique, **x.counts}
        for x in stages.values()
    ]
    if config.sees_clips:
        gains = motion_report.gains(list(stages), config.technique)
        table = motion_report.compared(results, config.technique, title)
    else:
        gains = {name: _gain(list(stages), name) for name in ("similarity", "prompt")}
        if config.sees_images:
            gains["similarity, from another's"] = _gain(list(stages), "others")
        table = compared(results, title)
    write_json(workdir / "results.json", {"seeds": results, "gains": gains})
    console.print(to_rich(table))
    lines = [f"{name}: {text}" for name, text in gains.items()]
    console.print("\n".join(lines), markup=False)
    (workdir / "table.md").write_text(
        "\n".join([to_markdown(table), *(f"- {line}" for line in lines)]) + "\n", "utf-8"
    )
    first = next(iter(stages))
    if config.sees_clips:
        shown = motion_report.section(first, config.technique, table, lines)
        subtitle = "Motion is learned from clips"
    else:
        shown = _section(config, first, table, lines)
        subtitle = "A text-to-image model learns from a few images"
    return write_page(
        page,
        title,
        [shown, how_it_was_made(workdir)],
        subtitle=f"{subtitle}.",
        facts=[("technique", title), ("seeds", str(len(results)))],
    )


def _caption(config: Config) -> str:
    if config.sees_faces:
        here = "" if config.face_encoder else " Here CLIP takes the place of the face encoder."
        return _OF_FACES + here
    return _OF_REFERENCES if config.sees_images else _OF_ALL


def _section(config: Config, first: Path, table: Table, lines: list[str]) -> Section:
    return Section(
        "Alike to photos that were not learned from",
        f"{_caption(config)}\n\n"
        "Difference of the customised model from the base, over the images of all seeds, "
        "with the 95 % interval of a bootstrap:\n\n" + "\n".join(f"- {line}" for line in lines),
        tables=[table],
        images=[
            Picture(
                first / "images.png",
                "The held-out images, and of each prompt what the base draws, and the "
                "customised model like each of them, from the same noise."
                if config.sees_images
                else "The photos that were learned from, held-out ones, and of each prompt "
                "the images of the base and of the customised model, from the same noise.",
                pixelated=True,
            )
        ],
    )


def compared(results: list[dict], title: str) -> Table:
    """The photos themselves, the untouched base and the customised model."""

    def measure(key: str) -> Measure:
        return Measure(tuple(result[key] for result in results))

    rows = [
        ["photos learned from", measure("photos"), None],
        ["untouched base", measure("base"), measure("base_prompt")],
        [title, measure("custom"), measure("custom_prompt")],
    ]
    if "custom_others" in results[0]:
        rows.append([f"{title}, with another's image", measure("custom_others"), None])
    return Table(
        ["Images", "similarity", "prompt"],
        rows,
        caption="Cosines, mean ± standard deviation of seeds",
        better=None,
        digits=3,
        rules=(1,),
    )


def _gain(folders: list[Path], name: str) -> str:
    """The mean difference from the base with its interval, images of all seeds paired by noise.

    With "others" it is that to one's own reference from that to another's.
    """
    end = "_prompt" if name == "prompt" else ""
    keys = (f"base{end}", f"custom{end}") if name != "others" else ("custom_others", "custom")
    arrays = [read_arrays(folder / FIGURES, keys) for folder in folders]
    before, after = (np.concatenate([x[key] for x in arrays]) for key in keys)
    figure = difference(mean(after), mean(before))
    return interval(figure, len(before), jax.random.key(0)).text(scale=1.0, digits=3)
