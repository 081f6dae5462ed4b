"""DataDream (Kim et al., ECCV 2024, arXiv 2407.10910): few-shot guided synthetic data sets.

A text-to-image model learns the few real images there are (one LoRA for the data set, `dset`, or
one per class, `cls`), draws a data set, and a CLIP classifier is trained on it, alone and together
with the real shots. Beside it stand the baselines: the untrained CLIP, the real shots alone, and
images of the same generator from prompts alone.

Below the run's folder:

    shots16-seed0/shots                  the images that may be seen, as lists of ids
    prompt-seed0/images, .../synthetic   prompt-only images, and the classifier trained on them
    shots16-seed0/real                   the classifier trained on the shots
    shots16-seed0/dset/{adapter,images,synthetic,both}
    .../sets/NAME/images                 other sets of images, retrieved or from other prompts
    .../recipes/NAME/classifier          the classifier of another row of the table
    .../alignment                        beside a set's images: how near they are to real ones
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxsynth.adapters import registry
from jaxsynth.core.console import console
from jaxsynth.core.errors import UserError
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import Dataset, ImageSource, source_digest
from jaxsynth.data.names import safe_name
from jaxsynth.data.prompt_banks import PromptBank, make_bank
from jaxsynth.data.prompts import prompts as class_prompts
from jaxsynth.data.sources.captioned import Captions, read_captions
from jaxsynth.data.splits import few_shot
from jaxsynth.generation.sampler import check_size
from jaxsynth.methods.datadream import report as pages
from jaxsynth.methods.datadream.alignment import Measuring, measure_set, too_few
from jaxsynth.methods.datadream.comparison import compare
from jaxsynth.methods.datadream.config import MIXED, MODES, PROMPTS, Config, SetConfig, set_folder
from jaxsynth.methods.datadream.plan import plan
from jaxsynth.methods.datadream.stages import (
    KEPT,
    SET,
    Classifying,
    Drawing,
    Finetuning,
    classify,
    draw_shots,
    finetune_generator,
)
from jaxsynth.methods.datadream.students import Teaching, train_student
from jaxsynth.methods.image_sets import (
    Filtering,
    Generating,
    Retrieving,
    check_merges,
    filter_images,
    generate_images,
    retrieve_images,
)
from jaxsynth.quality.evaluate import open_images
from jaxsynth.runs.results import check_stages
from jaxsynth.runs.run import keep_record, record_made
from jaxsynth.runs.sources import clip_source, data_source, pipeline_source
from jaxsynth.runs.stage import Artifact, Source
from jaxsynth.tasks.networks import CheckpointNetwork
from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.trainer import check_batches
from jaxsynth.weights.hf import Clip, StableDiffusion
from jaxsynth.weights.networks.classifiers import Classifier, load_classifier

__all__ = ["Config", "compare", "make", "plan", "report", "run"]


def run(config: Config, workdir: Path) -> Path:
    """Every stage of the run, then its page; returns the page's path."""
    make(config, workdir)
    record_made(Path(workdir), config)
    return report(workdir)


def make(config: Config, workdir: Path) -> None:
    """Every stage of the run.

    What can be wrong with data, weights and devices is found before the first long stage.
    """
    workdir = Path(workdir)
    run = _Run(config, workdir)
    run.check()
    keep_record(workdir, config)
    drawn = {(k, seed): run.draw(k, seed) for seed in config.seeds for k in config.shots}
    for seed in config.seeds:
        run.prompt_only(seed)
        for shots in config.shots:
            run.few_shot(shots, seed, drawn[shots, seed])
        run.all_recipes(seed, {shots: drawn[shots, seed] for shots in config.shots})


def report(workdir: Path) -> Path:
    """Writes results.json and report.html from the finished stages below `workdir`."""
    if jax.process_index():
        return pages.page_of(Path(workdir))
    check_stages(Path(workdir))
    return pages.write(Path(workdir))


@dataclass(frozen=True)
class _Run:
    """A run's inputs and the order of its stages."""

    config: Config
    folder: Path
    # Sets of images and adapters so far, by their folders: several rows use one.
    made: dict[Path, Artifact] = field(default_factory=dict)

    @cached_property
    def base(self) -> Source[StableDiffusion]:
        return pipeline_source(self.config.base, self.config.dtype)

    @cached_property
    def clip(self) -> Source[Clip]:
        return clip_source(self.config.clip, self.config.dtype)

    @cached_property
    def data(self) -> Source[Dataset]:
        return data_source(self.config.data)

    @cached_property
    def banks(self) -> dict[str, Source[PromptBank]]:
        """The sentences of each set that is drawn from prompts."""
        return {
            name: self._bank(one) for name, one in self.config.sets.items() if one.kind == "prompts"
        }

    @cached_property
    def captions(self) -> Source[Captions] | None:
        if not self.config.captions:
            return None
        return Source(
            lambda: read_captions(self.config.captions, self.data.value), lambda x: x.digest
        )

    @cached_property
    def students(self) -> dict[str, Source[Classifier]]:
        return {
            name: Source(
                partial(load_classifier, one.checkpoint, headless=True), lambda x: x.digest
            )
            for name, one in self.config.students.items()
        }

    def _bank(self, config: SetConfig) -> Source[PromptBank]:
        return Source(lambda: make_bank(self.data.value, config.prompts), lambda bank: bank.digest)

    @cached_property
    def pools(self) -> dict[str, Source[ImageSource] | None]:
        """The photos that each set is retrieved from; None for the rest of the data set."""
        return {
            name: Source(lambda path=one.pool: open_images(path)[0], source_digest)
            if one.pool
            else None
            for name, one in self.config.sets.items()
            if one.kind == "retrieved"
        }

    @cached_property
    def mesh(self) -> Mesh | None:
        return self.config.mesh.make()

    @cached_property
    def too_few(self) -> str:
        """Why sets of images cannot be measured, "" where they can."""
        data = self.data.value
        return too_few(data, self.config.generate.images_per_class * data.num_classes)

    def check(self) -> None:
        """Loads data and networks and makes the mesh; each raises what a user has to know.

        The shots are drawn for every run of the configuration, and a batch must divide among the
        devices.
        """
        data = self.data.value
        for shots in self.config.shots:
            few_shot(data, shots, 0, val_fraction=self.config.validation_fraction)
        if len(data.class_names) == 1:
            console.print(
                f"{data.name} has one class, {data.class_names[0]!r}: every classifier is right on "
                "it, so that accuracies say nothing",
                markup=False,
            )
        check_size(self.base.value, self.config.image_size)
        for network in (self.base.value, self.clip.value):
            network.tokenizer(list(class_prompts(data)))
        if self.captions is not None:
            for shots, seed in itertools.product(self.config.shots, self.config.seeds):
                drawn = few_shot(data, shots, seed, val_fraction=self.config.validation_fraction)
                self.base.value.tokenizer(self.captions.value.of(drawn.train_source(data)))
        for bank in self.banks.values():
            self.base.value.tokenizer(list(bank.value.texts))
        for name, pool in self.pools.items():
            most = self.config.generate.images_per_class
            if pool is not None and len(pool.value) < most:
                raise UserError(
                    f"sets.{name}.pool: {len(pool.value)} photos, but {most} are asked for of each "
                    "class (generate.images_per_class)"
                )
        trainings: dict[str, TrainingConfig] = {"classify": self.config.classify}
        for name, recipe in self.config.recipes.items():
            if not recipe.student:
                trainings[f"recipes.{name}.classify"] = self.config.classify_of(name)
        for name, student in self.students.items():
            CheckpointNetwork.of(student.value)
            trainings[f"students.{name}.train"] = self.config.students[name].train
        if "dset" in self.config.modes:
            trainings["finetune"] = self.config.finetune
        check_batches(trainings, self.mesh)
        if "stacked" in self.config.modes:
            adapter = self.config.finetuning("stacked").adapter_config()
            model = registry.add(self.base.value.networks, adapter, rngs=jax.random.key(0))
            check_merges(self.base.value, model)
        if self.config.measure_sets and self.too_few:
            console.print(self.too_few, markup=False)

    def prompt_only(self, seed: int) -> None:
        """The baselines that see no shots: zero-shot CLIP, and images from prompts alone."""
        folder = self.folder / f"prompt-seed{seed}"
        self.classify("zero-shot", self.folder / "zero-shot", 0)
        images = self.image_set(PROMPTS, 0, seed, None)
        self.classify("prompt-only", folder / "synthetic", seed, images=images)

    def draw(self, shots: int, seed: int) -> Artifact:
        return draw_shots(
            self.below(shots, seed) / "shots",
            Drawing(shots, seed, self.config.validation_fraction),
            label=f"shots: {_name(shots, seed)}",
            data=self.data,
        )

    def few_shot(self, shots: int, seed: int, drawn: Artifact) -> None:
        """Everything that one draw of shots leads to."""
        folder, name = self.below(shots, seed), _name(shots, seed)
        self.classify(f"real: {name}", folder / "real", seed, shots=drawn)
        for mode in self.config.modes:
            own, images = folder / mode, self.image_set(mode, shots, seed, drawn)
            self.classify(f"synthetic {mode}: {name}", own / "synthetic", seed, images=images)
            self.classify(f"both {mode}: {name}", own / "both", seed, images=images, shots=drawn)

    def all_recipes(self, seed: int, drawn: Mapping[int, Artifact]) -> None:
        """The table's other rows; those that no shot decides are made once for all of them."""
        for name in self.config.recipes:
            if self.config.depends_on_shots(name):
                for shots, own in drawn.items():
                    self.recipe(name, shots, seed, own)
            else:
                self.recipe(name, 0, seed, None)

    def recipe(self, name: str, shots: int, seed: int, drawn: Artifact | None) -> None:
        """A recipe's filters and classifier; `drawn` are the shots that it depends on."""
        recipe, config = self.config.recipes[name], self.config.classify_of(name)
        below = self.below(shots, seed) if drawn else self.folder / f"prompt-seed{seed}"
        folder = below / "recipes" / safe_name(name)
        title = f"{name}: {_name(shots, seed) if drawn else f'seed {seed}'}"
        inputs = {}
        for one in recipe.sets:
            bare = not self.config.needs_shots(one)
            inputs[SET + one] = images = self.image_set(
                one, 0 if bare else shots, seed, None if bare else drawn
            )
            if recipe.keep.takes_any:
                needed = recipe.keep.needs_shots
                inputs[KEPT + one] = filter_images(
                    folder / safe_name(one) / "kept",
                    Filtering(recipe.keep, shots if needed else 0),
                    label=f"kept {one}, {title}",
                    data=self.data,
                    clip=self.clip,
                    images=images,
                    shots=drawn if needed else None,
                )
        count = self.config.generate.images_per_class * self.data.value.num_classes
        if recipe.student:
            own = self.config.students[recipe.student]
            train_student(
                folder / "classifier",
                Teaching(own.train, own.real_weight, count, seed, dict(recipe.sets)),
                label=title,
                mesh=self.mesh,
                data=self.data,
                student=self.students[recipe.student],
                shots=drawn if recipe.real else None,
                **inputs,
            )
            return
        classify(
            folder / "classifier",
            Classifying(config, count, seed, self.config.dtype, dict(recipe.sets)),
            label=title,
            mesh=self.mesh,
            data=self.data,
            clip=self.clip,
            shots=drawn if recipe.real else None,
            **inputs,
        )

    def image_set(self, name: str, shots: int, seed: int, drawn: Artifact | None) -> Artifact:
        """A set of images by its name, made or found made, and its figures where they are asked."""
        folder = set_folder(self.config, self.folder, name, shots, seed)
        if folder not in self.made:
            self.made[folder] = images = self._make_set(name, folder, shots, seed, drawn)
            if self.config.measure_sets and not self.too_few:
                measure_set(
                    folder / "alignment",
                    Measuring(seed),
                    label=f"figures of {name}: {_name(shots, seed) if drawn else f'seed {seed}'}",
                    data=self.data,
                    clip=self.clip,
                    images=images,
                    shots=drawn,
                )
        return self.made[folder]

    def _make_set(
        self, name: str, folder: Path, shots: int, seed: int, drawn: Artifact | None
    ) -> Artifact:
        label = f"{name}: {_name(shots, seed)}"
        if name == PROMPTS:
            return self.generate("prompt images", folder / "images", seed)
        if name in MODES:
            assert drawn is not None
            under = None
            if name == "stacked":
                below = set_folder(self.config, self.folder, "dset", shots, seed)
                under = self.finetune("dset", below, shots, seed, drawn)
            adapter = self.finetune(name, folder, shots, seed, drawn, under)
            mixture = name if name in MIXED else ""
            return self.generate(
                f"images {label}", folder / "images", seed, adapter, under, mixture
            )
        one, config = self.config.sets[name], self.config.generate
        if one.kind == "retrieved":
            assert drawn is not None
            side = self.base.value.sized(self.config.image_size).image_size
            return retrieve_images(
                folder / "images",
                Retrieving(one.query, config, side),
                label=f"images {label}",
                data=self.data,
                clip=self.clip,
                shots=drawn,
                pool=self.pools[name],
            )
        if one.guidance_scale is not None:
            config = replace(config, guidance_scale=one.guidance_scale)
        adapter = None
        if one.by:
            assert drawn is not None
            of_mode = set_folder(self.config, self.folder, one.by, shots, seed)
            adapter = self.finetune(one.by, of_mode, shots, seed, drawn)
        size, strength, bank = self.config.image_size, None, self.banks.get(name)
        if one.kind == "edited":
            strength, label = one.strength_of(shots), f"images {label}"
        else:
            label = f"images {label}" if one.by else f"images {name}: seed {seed}"
        return generate_images(
            folder / "images",
            Generating(config, seed, self.config.dtype, size, strength),
            label=label,
            data=self.data,
            base=self.base,
            adapter=adapter,
            bank=bank,
            shots=drawn if one.kind == "edited" else None,
            captions=self.captions if one.captioned else None,
        )

    def finetune(
        self,
        mode: str,
        folder: Path,
        shots: int,
        seed: int,
        drawn: Artifact,
        under: Artifact | None = None,
    ) -> Artifact:
        """A mode's adapters, made once; those of classes on top of the adapter `under`."""
        if folder / "adapter" not in self.made:
            self.made[folder / "adapter"] = finetune_generator(
                folder / "adapter",
                Finetuning(
                    self.config.finetuning(mode),
                    mode,
                    seed,
                    self.config.dtype,
                    0 if mode == "dset" else self.config.classes_at_once,
                    self.config.image_size,
                    shots if mode in MIXED else 0,
                ),
                label=f"adapter {mode}: {_name(shots, seed)}",
                mesh=self.mesh,
                shots=drawn,
                data=self.data,
                base=self.base,
                under=under,
                captions=self.captions,
            )
        return self.made[folder / "adapter"]

    def generate(
        self,
        label: str,
        folder: Path,
        seed: int,
        adapter: Artifact | None = None,
        under: Artifact | None = None,
        mixture: str = "",
    ) -> Artifact:
        config = self.config
        return generate_images(
            folder,
            Generating(config.generate, seed, config.dtype, config.image_size, mixture=mixture),
            label=label,
            data=self.data,
            base=self.base,
            adapter=adapter,
            under=under,
        )

    def classify(
        self,
        label: str,
        folder: Path,
        seed: int,
        *,
        shots: Artifact | None = None,
        images: Artifact | None = None,
    ) -> Artifact:
        """Train on the shots, the images, both or nothing (zero-shot), and score the test set."""
        trained = shots is not None or images is not None
        count = self.config.generate.images_per_class * self.data.value.num_classes
        return classify(
            folder,
            Classifying(
                self.config.classify if trained else None,
                count if trained else 0,
                seed,
                self.config.dtype,
            ),
            label=label,
            mesh=self.mesh,
            data=self.data,
            clip=self.clip,
            shots=shots,
            images=images,
        )

    def below(self, shots: int, seed: int) -> Path:
        return self.folder / f"shots{shots}-seed{seed}"


def _name(shots: int, seed: int) -> str:
    return f"{counted(shots, 'shot')}, seed {seed}"
