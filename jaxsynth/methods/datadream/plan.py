"""What each program of a DataDream run needs on a mesh, from its config alone.

The tasks and the sampler are those that the stages run, of shapes: no weights are read. Of data
that is not here a size is assumed and named.
"""

import math
from dataclasses import replace

import jax
from jax.sharding import Mesh

from jaxsynth.adapters import registry
from jaxsynth.core.words import counted
from jaxsynth.generation.planning import plan_images
from jaxsynth.methods.datadream.config import Config
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.runs.sources import count_data
from jaxsynth.tasks.clip_classifier import classifier_task
from jaxsynth.tasks.text_to_image import planned_task
from jaxsynth.training import trainer
from jaxsynth.training.planning import Plan, Program, rows_of
from jaxsynth.weights.hf import StableDiffusion, describe_clip, describe_pipeline


def plan(config: Config, mesh: Mesh) -> list[Program]:
    """Fine-tuning and generating in each mode, and the classifier; the largest number of shots.

    UserError as `trainer.train`, and where the configs of base or CLIP are not at hand.
    """
    classes, _, note = count_data(config.data)
    dtypes = {"dtype": config.dtype, "compute_dtype": config.dtype}
    base = describe_pipeline(config.base, **dtypes).sized(config.image_size)
    clip = describe_clip(config.clip, **dtypes)
    programs = [_finetuning(config, base, mode, classes, mesh, note) for mode in config.modes]
    for mode in config.modes:
        programs.append(_generating(config, base, mode, classes, mesh, note))
    images, train = config.generate.images_per_class * classes, config.classify

    def classify(batch: int) -> Plan:
        sized = replace(train, batch_size=batch)
        task = classifier_task(clip, ["a photo"] * classes, sized, seed=0, both=True)
        return trainer.plan("classify", task, sized.sized(images), mesh, note=note)

    def updates(batch: int) -> int:
        """Of real shots, and in each mode of synthetic images without and with them."""
        trainings = len(config.seeds) * (1 + len(config.shots) * (1 + 2 * len(config.modes)))
        return trainings * replace(train, batch_size=batch).sized(images).steps

    unit = rows_of(mesh) * train.accumulate
    programs.append(
        Program("classify", classify, "classify.batch_size", train.batch_size, unit, updates)
    )
    return programs


def _finetuning(
    config: Config, base: StableDiffusion, mode: str, classes: int, mesh: Mesh, note: str
) -> Program:
    """One adapter for all classes ("dset"), or as many as train together ("cls")."""
    train, shots = config.finetuning, max(config.shots)
    count = (config.classes_at_once or classes) if mode == "cls" else 0
    images = shots if count else shots * classes
    name = f"fine-tune {counted(count, 'class')}" if count else "fine-tune dset"

    def build(batch: int) -> Plan:
        sized = replace(train, batch_size=batch)
        task = planned_task(base, sized, images=images)
        return trainer.plan(name, task, sized.sized(images), mesh, count=count, note=note)

    def updates(batch: int) -> int:
        sized, groups = replace(train, batch_size=batch), math.ceil(classes / (count or classes))
        sets = [shots if count else shots * classes for shots in config.shots]
        return len(config.seeds) * groups * sum(sized.sized(own).steps for own in sets)

    unit = train.accumulate * (1 if count else rows_of(mesh))
    return Program(name, build, "finetune.batch_size", train.batch_size, unit, updates)


def _generating(
    config: Config, base: StableDiffusion, mode: str, classes: int, mesh: Mesh, note: str
) -> Program:
    adapters = classes if mode == "cls" else 1

    def adapt(model: TextToImage) -> TextToImage:
        return registry.add(model, config.finetuning.adapter_config(), rngs=jax.random.key(0))

    def build(batch: int) -> Plan:
        return plan_images(
            f"generate, {mode}", base, replace(config.generate, batch_size=batch), mesh,
            prompts=classes, adapt=adapt, adapters=adapters, note=note,
        )  # fmt: skip

    def updates(batch: int) -> int:
        """Of every adapter; the images of prompts alone are counted with the first mode's."""
        sets = len(config.shots) + (mode == config.modes[0])
        images = classes * config.generate.images_per_class
        return len(config.seeds) * sets * math.ceil(images / batch)

    batch = config.generate.batch_size
    return Program(f"generate, {mode}", build, "generate.batch_size", batch, rows_of(mesh), updates)
