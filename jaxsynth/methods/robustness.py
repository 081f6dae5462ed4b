"""How robust classifiers are: one table of figures with intervals, and paired differences.

Each model is a CLIP, as it is, with an adapter (of a DataDream run's classifier, say), or trained
here on drawn pictures. All are asked about the same drawn sets (`data.cues`): pictures on their own
background, on others', in uncommon contexts, with conflicting cues, of no class, and under attack.
Stages: a model's training, where it is trained here; its answers; the figures of all of them. The
figures are made from the answers alone, so they are made again without a model.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import jax
from jax.tree_util import Partial

from jaxsynth.adapters.base import extract
from jaxsynth.data.rendered import SHAPES
from jaxsynth.data.sources import DataConfig, load_dataset
from jaxsynth.errors import UsageError, UserError
from jaxsynth.methods.pages import stage_details
from jaxsynth.models.clip import CLIPModel
from jaxsynth.report.page import Section, write_page
from jaxsynth.report.tables import Table, to_markdown, to_rich
from jaxsynth.robustness import bias_sets, suite
from jaxsynth.robustness.bootstrap import Interval
from jaxsynth.training.artifact import Artifact, run_stage, write_json
from jaxsynth.training.classifier import ClassifyConfig, of_pixels, train_classifier
from jaxsynth.training.console import console
from jaxsynth.weights.adapters import attach, read_peft, write_peft
from jaxsynth.weights.files import read_json
from jaxsynth.weights.hf import Clip, load_clip

VARIANTS = ("", *bias_sets.VARIANTS)
# Drawn from other random numbers than the pictures that models are asked about.
_TRAINING_SEED = 1_000_003


@dataclass(frozen=True)
class ModelConfig:
    """A classifier of shapes: `clip` (a folder, hub id or "tiny/clip") by its prompts.

    adapter: a peft folder around it. train_on: "", or the drawn set that adapters are trained on
    here, "original" or "mixed_rand" backgrounds. At most one of the two.
    """

    clip: str = "tiny/clip"
    adapter: str = ""
    train_on: str = ""

    def __post_init__(self):
        if self.train_on not in VARIANTS:
            raise ValueError(f"train_on: expected one of {VARIANTS}, found {self.train_on!r}")
        if self.adapter and self.train_on:
            raise ValueError("adapter and train_on: expected one of them at most")


@dataclass(frozen=True)
class Config:
    """One run: every model on every set.

    per_class: pictures a class of each set; the other sets have as many of each of their kinds.
    train_per_class: pictures a class that a model is trained on here. eps: the attacks' radius in
    the largest change of a pixel. autoattack: AutoAttack too, which takes far longer. resamples:
    of the bootstrap. template: a prompt with one {} for the shape.
    """

    method: str = "robustness"
    models: dict[str, ModelConfig] = field(default_factory=dict)
    mode: str = "corrected"
    template: str = "a photo of a {}"
    image_size: int = 32
    per_class: int = 24
    train_per_class: int = 64
    eps: float = 1 / 255
    autoattack: bool = False
    batch_size: int = 64
    resamples: int = 2000
    seed: int = 0
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)

    def __post_init__(self):
        if not self.models:
            raise ValueError("models: expected at least one")
        if self.mode not in ("corrected", "paper"):
            raise ValueError(f"mode: expected 'corrected' or 'paper', found {self.mode!r}")
        if self.per_class < 1 or self.train_per_class < 1:
            raise ValueError("per_class and train_per_class: expected 1 or more")


def run(config: Config, workdir: Path) -> Path:
    """Every stage, then the page; returns the page's path."""
    work = _Work(config, Path(workdir))
    answers = {name: work.answers(name) for name in config.models}
    run_stage(
        "figures",
        work.folder / "figures",
        {"mode": config.mode, "resamples": config.resamples, "seed": config.seed},
        answers,
        lambda folder: _figures(config, answers, folder),
    )
    return report(work.folder)


def report(workdir: Path) -> Path:
    """Prints the table and writes report.html from the finished stages below `workdir`."""
    workdir = Path(workdir)
    found = read_json(workdir / "figures" / "figures.json")
    mode, other = found["mode"], found["other_mode"]
    tables = [
        _table("Figures in per cent, with their 95 % intervals", found["models"][mode]),
        _table(f"What mode={other} makes of the same answers", found["changed"]),
    ]
    if found["differences"]:
        tables.insert(1, _table("Paired differences in points", found["differences"]))
    console.print(to_rich(tables[0]))
    (workdir / "table.md").write_text(to_markdown(tables[0]), "utf-8")
    faults = "\n".join(f"- {name}: {text}" for name, text in suite.PAPER_FAULTS.items())
    sections = [
        Section(
            "Robustness",
            "Models are asked about drawn pictures of which every cue is known. An interval is a "
            "bootstrap's (BCa) over the images; differences are paired, image by image. A figure "
            "that would divide by nothing is left out.",
            tables=tables,
        ),
        Section(
            "The published protocol",
            f"`mode=paper` follows the published code (arXiv 2405.20469) in these:\n\n{faults}",
        ),
        Section("How it was made", details=stage_details(workdir)),
    ]
    return write_page(
        workdir / "report.html",
        "Robustness of classifiers",
        sections,
        facts=[("models", ", ".join(found["models"][mode])), ("mode", mode)],
    )


class _Work:
    """A run's sets and CLIPs, loaded when a stage first needs them, and its stages."""

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder
        for name in config.models:
            if not name or "/" in name or name == "figures":
                raise UsageError(f"config.models: {name!r}: expected a plain name")
        folder.mkdir(parents=True, exist_ok=True)
        self._clips: dict[str, Clip] = {}

    def clip(self, name: str) -> Clip:
        path = self.config.models[name].clip
        if path not in self._clips:
            self._clips[path] = load_clip(path)
        clip = self._clips[path]
        if clip.image_size != self.config.image_size:
            raise UserError(
                f"config.models.{name}: {path} takes {clip.image_size} pixels, "
                f"config.image_size is {self.config.image_size}"
            )
        return clip

    @property
    def prompts(self) -> list[str]:
        return [self.config.template.format(shape) for shape in SHAPES]

    @cached_property
    def sets(self) -> suite.Sets:
        config = self.config
        size, seed = config.image_size, config.seed
        background = bias_sets.drawn_backgrounds(config.per_class, size, seed)
        # An eighth of the ways to be uncommon, and of the pairs of shape and texture.
        few = max(1, config.per_class // 8)
        strange = load_dataset(
            DataConfig(
                source="builtin", name="textures", image_size=size, split_seed=seed,
                images_per_class=2 * config.per_class,
            )
        )  # fmt: skip
        return suite.Sets(
            clean=background.original,
            shifted={"mixed_rand": background.mixed_rand},
            ood={"textures": strange.train},
            context=bias_sets.drawn_contexts(few, size, seed),
            conflict=bias_sets.drawn_conflicts(few, size, seed),
            background=background,
        )

    def answers(self, name: str) -> Artifact:
        """The stage of a model's answers, after that of its training if it is trained here."""
        config, model = self.config, self.config.models[name]
        inputs = {"training": self._train(name)} if model.train_on else {}
        settings = {
            "clip": self.clip(name).digest,
            "adapter": model.adapter,
            "mode": config.mode,
            **{
                key: getattr(config, key)
                for key in ("template", "image_size", "per_class", "eps", "autoattack", "seed")
            },
        }

        def build(folder: Path) -> dict:
            predict = self._predict(name, inputs.get("training"))
            found = suite.answer(
                predict,
                self.sets,
                jax.random.key(config.seed),
                attacks=suite.gradient_attacks(config.mode),
                eps=config.eps,
                with_autoattack=config.autoattack,
                batch_size=config.batch_size,
            )
            suite.save_answers(folder / "answers.npz", found)
            return {"arrays": len(found)}

        return run_stage(
            f"answers of {name}", self.folder / name / "answers", settings, inputs, build
        )

    def _predict(self, name: str, training: Artifact | None) -> Partial:
        clip = self.clip(name)
        model: CLIPModel = clip.model
        folder = self.config.models[name].adapter or (training and training.path / "adapter")
        if folder:
            model = attach(model, read_peft(folder))
        return of_pixels(clip, model, self.prompts)

    def _train(self, name: str) -> Artifact:
        config, on = self.config, self.config.models[name].train_on
        clip = self.clip(name)
        steps = config.classify.num_steps(config.train_per_class * len(SHAPES))
        settings = {
            "clip": clip.digest,
            "on": on,
            "steps": steps,
            "classify": config.classify,
            **{key: getattr(config, key) for key in ("template", "image_size", "seed")},
            "train_per_class": config.train_per_class,
        }

        def build(folder: Path) -> dict:
            drawn = bias_sets.drawn_backgrounds(
                config.train_per_class, config.image_size, config.seed + _TRAINING_SEED
            )
            model = train_classifier(
                clip,
                self.prompts,
                config.classify,
                folder,
                steps=steps,
                seed=config.seed,
                real=getattr(drawn, on),
                description=f"train {name}",
            )
            write_peft(folder / "adapter", extract(model))
            return {"steps": steps}

        return run_stage(
            f"training of {name}", self.folder / name / "training", settings, {}, build
        )


def _figures(config: Config, artifacts: dict[str, Artifact], folder: Path) -> dict:
    """Writes figures.json: every model's, in both modes where they differ, and differences."""
    key = jax.random.key(config.seed)
    answers = {
        name: suite.load_answers(made.path / "answers.npz") for name, made in artifacts.items()
    }
    other = "paper" if config.mode == "corrected" else "corrected"
    models = {
        mode: {
            name: _json(suite.measure(found, key, mode=mode, resamples=config.resamples))
            for name, found in answers.items()
        }
        for mode in (config.mode, other)
    }
    first, *rest = answers
    differences = {
        f"{name} less {first}": _json(
            suite.compare(
                answers[name], answers[first], key, mode=config.mode, resamples=config.resamples
            )
        )
        for name in rest
    }
    # Attacks were made in one mode: their answers are the same in the other.
    changed = {
        name: {
            column: figure
            for column, figure in models[other][name].items()
            if column.split()[0] in ("ECE", "AUROC", "FPR95")
        }
        for name in answers
    }
    write_json(
        folder / "figures.json",
        {
            "mode": config.mode,
            "other_mode": other,
            "models": models,
            "differences": differences,
            "changed": changed,
        },
    )
    return {"models": len(answers)}


def _json(found: dict[str, Interval | None]) -> dict[str, dict | None]:
    return {
        name: None if x is None else {**x.__dict__, "text": x.text()} for name, x in found.items()
    }


def _table(caption: str, found: dict[str, dict]) -> Table:
    """A row for each figure, a column for each model: figures are many."""
    columns = list(next(iter(found.values())))
    rows = [
        [column, *(None if x[column] is None else x[column]["text"] for x in found.values())]
        for column in columns
    ]
    return Table(["figure", *found], rows, caption=caption, better=None)
