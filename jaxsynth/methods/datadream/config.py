"""What a DataDream run is told."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from jaxsynth.adapters.mixing import check_mixes
from jaxsynth.adapters.registry import AdapterChoice
from jaxsynth.core.config import Text, to_dataclass, to_dict
from jaxsynth.core.limits import (
    BelowOne,
    Count,
    Distinct,
    Finite,
    Natural,
    OneOf,
    Positive,
    Range,
    Seed,
    Share,
    check_limits,
)
from jaxsynth.core.places import Clip, MaybeFileOrFolder, MaybeFolder, MaybeNetwork, Pipeline
from jaxsynth.data.dataset import DataConfig
from jaxsynth.data.names import safe_name
from jaxsynth.data.prompt_banks import PromptConfig
from jaxsynth.generation.generate import GenerateConfig
from jaxsynth.quality.filters import FilterConfig
from jaxsynth.tasks.clip_classifier import ClassifyConfig
from jaxsynth.tasks.supervised import SupervisedConfig
from jaxsynth.tasks.text_to_image import FinetuneConfig
from jaxsynth.training.config import Factors
from jaxsynth.training.sharding import MeshConfig

MODES = ("dset", "cls", "stacked", "loft", "chimera")
# Those with an adapter of each image, drawn with sums of a class's.
MIXED = ("loft", "chimera")
# The set of images that the base draws from each class's prompt, in every run.
PROMPTS = "prompts"
# Real guidance of IsSynth (He et al. 2023, arXiv 2210.07574): from so many shots on, the share of
# the noise that a shot gets; of 100 steps 15, 20, 35, 40 and 50.
ISSYNTH = ((16, 0.15), (8, 0.20), (4, 0.35), (2, 0.40), (1, 0.50))


@dataclass(frozen=True)
class LoftConfig(FinetuneConfig):
    """How an adapter of one image is trained; the defaults are LoFT's released configuration."""

    steps: Natural = 600
    batch_size: Count = 1
    learning_rate: Positive = 1e-3
    warmup_steps: Natural = 10
    rank: Count | None = 2
    text_targets: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        check_mixes(self.adapter_config())


@dataclass(frozen=True)
class ChimeraConfig(FinetuneConfig):
    """How heads of images are trained with what they share; the rates are ChimeraLoRA's."""

    learning_rate: Positive = 1e-4
    rates: Factors = (("lora_B", 10.0),)

    def __post_init__(self):
        super().__post_init__()
        check_mixes(self.adapter_config())


@dataclass(frozen=True)
class SetConfig:
    """A set of images beside those that the method makes, of as many images of each class.

    `kind`: "prompts" are drawn by the base from `prompts` (FakeIt's families), guided by
    `guidance_scale` in the place of `generate`'s; "retrieved" are real photos of the folder `pool`,
    the nearest of each class by the run's CLIP to its `query`, the class's "texts" or its "shots".
    Without a pool they are the training images that are no shots, their labels unseen. "edited" are
    drawn by the base from each class's prompt, beginning with its shots in turn, with noise of the
    given `strength` (DISEF), or of IsSynth's for that many shots where it is left open; `captioned`
    ones are told by the run's `captions`, each image by that of another shot (DISEF too). What is
    drawn is drawn by the base, or, with `by`, by the generator of that mode: "dset" or "cls".
    """

    kind: Annotated[str, OneOf("prompts", "retrieved", "edited")] = "prompts"
    prompts: PromptConfig = field(default_factory=PromptConfig)
    guidance_scale: Finite | None = None
    pool: MaybeFolder = ""
    query: Annotated[str, OneOf("texts", "shots")] = "texts"
    strength: Annotated[float, Range(0, 1, above=True)] | None = None
    captioned: bool = False
    by: Annotated[str, OneOf("", "dset", "cls")] = ""

    def __post_init__(self):
        check_limits(self)
        used = {
            "prompts": ("prompts", "guidance_scale", "by"),
            "retrieved": ("pool", "query"),
            "edited": ("guidance_scale", "strength", "captioned", "by"),
        }
        plain = {
            "prompts": PromptConfig(), "guidance_scale": None, "pool": "", "query": "texts",
            "strength": None, "captioned": False, "by": "",
        }  # fmt: skip
        for name, default in plain.items():
            if name not in used[self.kind] and getattr(self, name) != default:
                raise ValueError(f"{name}: given, but a set of kind {self.kind!r} has none")
        if self.by == "cls" and (self.kind == "prompts" or self.captioned):
            raise ValueError(
                "by: 'cls' has an adapter for each class, but the texts of this set are not those "
                "of classes; expected 'dset'"
            )

    def strength_of(self, shots: int) -> float:
        """The strength for so many shots of each class."""
        if self.strength is not None:
            return self.strength
        return next(found for least, found in ISSYNTH if shots >= least)


@dataclass(frozen=True)
class StudentConfig:
    """A classifier besides CLIP: a checkpoint whose head is replaced, and all of which is trained.

    `checkpoint`: a folder, hub id or file that `load_classifier` takes (ViT, DeiT, ResNet,
    ConvNeXt, Swin, DINOv2, MAE, SigLIP, of transformers or timm), with or without a head. `train`:
    how; an epoch is that of `classify`. `real_weight`: the shots' weight in the loss where other
    images are seen too.
    """

    checkpoint: MaybeNetwork = ""
    train: SupervisedConfig = field(default_factory=SupervisedConfig)
    real_weight: Share = 0.8

    def __post_init__(self):
        check_limits(self)
        if not self.checkpoint:
            raise ValueError("checkpoint: empty, expected a folder, hub id or file of a classifier")


@dataclass(frozen=True)
class Recipe:
    """A row of the table beside the published ones: which images, and how a classifier learns them.

    `sets` has the share of each set of images: a mode's, "prompts", or one of the run's `sets`;
    none trains on the shots alone. `real`: whether the shots are seen too. `keep` filters every
    set. `classify` has the fields of the run's `classify` that differ. `student`: one of the run's
    `students`, which learns in the place of CLIP.
    """

    sets: Mapping[str, Positive] = field(default_factory=dict)
    real: bool = True
    keep: FilterConfig = field(default_factory=FilterConfig)
    classify: Mapping[str, Any] = field(default_factory=dict)
    student: str = ""

    def __post_init__(self):
        check_limits(self)
        if self.student and self.classify:
            raise ValueError(
                f"classify: given, but the student is {self.student!r}, whose settings are those "
                f"of students.{self.student}.train; leave one out"
            )
        # As JSON holds it, so that a run's record gives the same recipe again.
        object.__setattr__(self, "classify", _as_typed(self.classify))
        for name, share in self.sets.items():
            if share <= 0:
                raise ValueError(f"sets: the share of {name!r} is {share}, expected above 0")
        if not self.real and not self.sets:
            raise ValueError("sets: none, and real is false: expected one or the other")
        if self.keep.takes_any and not self.sets:
            raise ValueError("keep: filters images of sets, but sets is empty")


@dataclass(frozen=True)
class Config:
    """One run: every number of shots with every seed and mode.

    `shots` are the images of each class that are learned from; `seeds` those of every draw. `base`
    and `clip` are folders, hub ids, or the shipped "tiny" and "tiny/clip". `dtype` is the storage
    and compute type of the frozen networks; adapters stay float32. `image_size` is the side in
    pixels of the images that the generator learns and draws (0: the base's own). `modes`: "dset" is
    one adapter for the whole data set, "cls" one for each class, "stacked" one for each class that
    learns on top of the data set's; "loft" has one for each shot and draws with sums of two of a
    class (arXiv 2505.11703), "chimera" one for each class with a head for each of its shots and
    draws with weighted sums of the heads (ChimeraLoRA, CVPR 2026). `loft` and `chimera` say how
    these train, in `finetune`'s place. `classes_at_once` bounds how many classes' adapters train
    together (0: all). `captions` are texts of the training images, with which the generator is
    fine-tuned in the place of classes' prompts: a .jsonl of lines {"file_name", "text"}, or a
    folder of texts named as the images (`read_captions`). `validation_fraction` of the shots is
    kept from training and chooses the classifier's step; at 0 the last step is taken. `adapter`,
    where it is given, is what the generator learns by (`finetune.adapter`); the classifier's is
    `classify.adapter`.

    `recipes` are more rows of the table by their names, `sets` images that they use, and `students`
    classifiers besides CLIP.
    `measure_sets` compares each set of images with the test images, and with the shots.
    """

    method: str = "datadream"
    base: Pipeline = "tiny"
    clip: Clip = "tiny/clip"
    dtype: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
    image_size: Natural = 0
    data: DataConfig = field(default_factory=DataConfig)
    shots: Annotated[tuple[Count, ...], Distinct()] = (16,)
    modes: Annotated[tuple[Annotated[str, OneOf(*MODES)], ...], Distinct()] = ("dset",)
    seeds: Annotated[tuple[Seed, ...], Distinct()] = (0,)
    validation_fraction: BelowOne = 0.0
    classes_at_once: Natural = 0
    captions: MaybeFileOrFolder = ""
    adapter: AdapterChoice | None = None
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    loft: LoftConfig = field(default_factory=LoftConfig)
    chimera: ChimeraConfig = field(default_factory=ChimeraConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    classify: ClassifyConfig = field(default_factory=ClassifyConfig)
    sets: dict[str, SetConfig] = field(default_factory=dict)
    students: dict[str, StudentConfig] = field(default_factory=dict)
    recipes: dict[str, Recipe] = field(default_factory=dict)
    measure_sets: bool = False
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        check_limits(self)
        if "stacked" in self.modes and "dset" not in self.modes:
            raise ValueError(
                f"modes: {', '.join(self.modes)}; 'stacked' learns on top of 'dset', which is not "
                "among them"
            )
        if self.adapter is not None and set(self.modes) <= set(MIXED):
            raise ValueError(
                f"adapter: given, but {' and '.join(self.modes)} learn by an adapter of their own: "
                f"{self.modes[0]}.adapter"
            )
        for name, default in (("loft", LoftConfig()), ("chimera", ChimeraConfig())):
            if name not in self.modes and getattr(self, name) != default:
                raise ValueError(
                    f"{name}: given, but {name!r} is none of the modes ({', '.join(self.modes)}); "
                    f"add it to `modes` or leave {name} out"
                )
        for name in self.sets:
            if not name or name in (*MODES, PROMPTS) or "/" in name:
                raise ValueError(f"sets: {name!r}, expected another name, without /")
            if self.sets[name].by and self.sets[name].by not in self.modes:
                raise ValueError(
                    f"sets.{name}.by: {self.sets[name].by!r}, expected one of the run's modes: "
                    f"{', '.join(self.modes)}"
                )
            if self.sets[name].captioned and not self.captions:
                raise ValueError(
                    f"sets.{name}.captioned: true, but the run has no `captions`; give a .jsonl or "
                    "a folder of texts"
                )
        known = (*self.modes, PROMPTS, *self.sets)
        for name, recipe in self.recipes.items():
            if not name or "/" in name:
                raise ValueError(f"recipes: {name!r}, expected a name without /")
            for one in recipe.sets:
                if one not in known:
                    raise ValueError(
                        f"recipes.{name}.sets: {one!r}, expected some of {', '.join(known)}"
                    )
            if recipe.student and recipe.student not in self.students:
                raise ValueError(
                    f"recipes.{name}.student: {recipe.student!r}, expected one of `students` ("
                    f"{', '.join(self.students) or 'none are given'}), or empty for CLIP"
                )
            self.classify_of(name)
        if unused := self.students.keys() - {one.student for one in self.recipes.values()}:
            raise ValueError(f"students: {min(unused)!r} is the student of none of `recipes`")
        if self.adapter is not None and self.finetune.adapter not in (None, self.adapter):
            raise ValueError(
                "adapter and finetune.adapter are both given, and are one setting; give one"
            )

    def finetuning(self, mode: str) -> FinetuneConfig:
        """How a mode fine-tunes the generator: its own, or `finetune` with the run's `adapter`."""
        if mode in MIXED:
            return getattr(self, mode)
        if self.adapter is None:
            return self.finetune
        return dataclasses.replace(self.finetune, adapter=self.adapter)

    def classify_of(self, recipe: str) -> ClassifyConfig:
        """How a recipe's classifier is trained; ConfigError naming a field that it has not."""
        own = self.recipes[recipe].classify
        return to_dataclass(
            ClassifyConfig, _merged(to_dict(self.classify), own), path=f"recipes.{recipe}.classify"
        )

    def needs_shots(self, name: str) -> bool:
        """Whether a set of images is another one for other shots."""
        if name in (*MODES, PROMPTS):
            return name != PROMPTS
        return self.sets[name].kind != "prompts" or bool(self.sets[name].by)

    def depends_on_shots(self, recipe: str) -> bool:
        """Whether a recipe's classifier is another one for other shots."""
        own = self.recipes[recipe]
        return own.real or own.keep.needs_shots or any(map(self.needs_shots, own.sets))


def set_folder(config: Config, workdir: Path, name: str, shots: int, seed: int) -> Path:
    """Where the images of a set lie below a run's folder, in `images`."""
    needs = config.needs_shots(name)
    below = workdir / (f"shots{shots}-seed{seed}" if needs else f"prompt-seed{seed}")
    if name == PROMPTS:
        return below
    return below / name if name in MODES else below / "sets" / safe_name(name)


def _as_typed(value: Any) -> Any:
    """A setting from the command line as the text that it is; its type is found with its field."""
    if isinstance(value, Text):
        return value.text
    if isinstance(value, Mapping):
        return {str(name): _as_typed(item) for name, item in value.items()}
    return value


def _merged(values: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `own`, field by field where both are parts that no kind chooses."""
    found = dict(values)
    for name, value in own.items():
        old, part = found.get(name), isinstance(value, Mapping) and "kind" not in value
        found[name] = _merged(old, value) if part and isinstance(old, dict) else _texts(value)
    return found


def _texts(value: Any) -> Any:
    """Strings as text of the command line, whose type is the field's."""
    if isinstance(value, Mapping):
        return {name: _texts(item) for name, item in value.items()}
    return Text(value) if isinstance(value, str) else value
