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
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxsynth.core.console import console
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import Dataset
from jaxsynth.data.prompts import prompts as class_prompts
from jaxsynth.data.splits import few_shot
from jaxsynth.generation.sampler import check_size
from jaxsynth.methods.datadream import report as pages
from jaxsynth.methods.datadream.config import Config
from jaxsynth.methods.datadream.plan import plan
from jaxsynth.methods.datadream.stages import (
    Classifying,
    Drawing,
    Finetuning,
    Generating,
    classify,
    draw_shots,
    finetune_generator,
    generate_images,
)
from jaxsynth.runs.results import check_stages
from jaxsynth.runs.run import keep_record
from jaxsynth.runs.sources import clip_source, data_source, pipeline_source
from jaxsynth.runs.stage import Artifact, Source
from jaxsynth.training.config import TrainingConfig
from jaxsynth.training.trainer import check_batches
from jaxsynth.weights.hf import Clip, StableDiffusion

__all__ = ["Config", "make", "plan", "report", "run"]


def run(config: Config, workdir: Path) -> Path:
    """Every stage of the run, then its page; returns the page's path."""
    make(config, workdir)
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
    def mesh(self) -> Mesh | None:
        return self.config.mesh.make()

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
        trainings: dict[str, TrainingConfig] = {"classify": self.config.classify}
        if "dset" in self.config.modes:
            trainings["finetune"] = self.config.finetune
        check_batches(trainings, self.mesh)

    def prompt_only(self, seed: int) -> None:
        """The baselines that see no shots: zero-shot CLIP, and images from prompts alone."""
        folder = self.folder / f"prompt-seed{seed}"
        self.classify("zero-shot", self.folder / "zero-shot", 0)
        images = self.generate("prompt images", folder / "images", seed)
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
            own = folder / mode
            adapter = finetune_generator(
                own / "adapter",
                Finetuning(
                    self.config.finetuning,
                    mode,
                    seed,
                    self.config.dtype,
                    self.config.classes_at_once if mode == "cls" else 0,
                    self.config.image_size,
                ),
                label=f"adapter {mode}: {name}",
                mesh=self.mesh,
                shots=drawn,
                data=self.data,
                base=self.base,
            )
            images = self.generate(f"images {mode}: {name}", own / "images", seed, adapter)
            self.classify(f"synthetic {mode}: {name}", own / "synthetic", seed, images=images)
            self.classify(f"both {mode}: {name}", own / "both", seed, images=images, shots=drawn)

    def generate(
        self, label: str, folder: Path, seed: int, adapter: Artifact | None = None
    ) -> Artifact:
        return generate_images(
            folder,
            Generating(self.config.generate, seed, self.config.dtype, self.config.image_size),
            label=label,
            data=self.data,
            base=self.base,
            adapter=adapter,
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
