"""What each program of a scaling study needs on a mesh, from its config alone."""

import math
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsynth.adapters import registry
from jaxsynth.generation.planning import plan_images
from jaxsynth.methods.scaling.config import REAL, Config
from jaxsynth.methods.scaling.points import settings
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.runs.sources import count_data
from jaxsynth.tasks.contrastive import planned_task as planned_clone
from jaxsynth.tasks.supervised import planned_task
from jaxsynth.tasks.text_to_image import planned_task as planned_finetuning
from jaxsynth.training import trainer
from jaxsynth.training.planning import Plan, Program, rows_of
from jaxsynth.weights.hf import StableDiffusion, describe_pipeline


def plan(config: Config, mesh: Mesh) -> list[Program]:
    """The largest adapter, a source's images, a setting's points, and each clone.

    Of captions as many are assumed as there are classes.

    UserError as `trainer.train`, and where the base's config is not at hand.
    """
    classes, _, note = count_data(config.data)
    programs = []
    if config.sources:
        base = describe_pipeline(config.base, dtype=config.dtype, compute_dtype=config.dtype)
        shots = max(source.shots for source in config.sources.values())
        if shots:
            programs.append(_finetuning(config, base, shots * classes, mesh, note))
        programs.append(_generating(config, base, shots, classes, mesh, note))
    counted = settings(config)
    for setting in [REAL, *config.sources][:2]:  # all sources have as many points
        name = REAL if setting == REAL else "synthetic"
        programs.append(_training(config, name, len(counted[setting]), classes, mesh, note))
    programs += [_clone(config, name, classes, mesh, note) for name in config.clones]
    return programs


def _finetuning(
    config: Config, base: StableDiffusion, images: int, mesh: Mesh, note: str
) -> Program:
    train, name = config.finetune, "adapter"

    def build(batch: int) -> Plan:
        sized = replace(train, batch_size=batch)
        task = planned_finetuning(base, sized, images=images)
        return trainer.plan(name, task, sized.sized(images), mesh, note=note)

    def updates(batch: int) -> int:
        """Of every source with shots, with every seed."""
        sized = replace(train, batch_size=batch)
        each = [source.shots * images // most for source in config.sources.values() if source.shots]
        return len(config.seeds) * sum(sized.sized(own).steps for own in each)

    most = max(source.shots for source in config.sources.values())
    unit = train.accumulate * rows_of(mesh)
    return Program(name, build, "finetune.batch_size", train.batch_size, unit, updates)


def _generating(
    config: Config, base: StableDiffusion, shots: int, classes: int, mesh: Mesh, note: str
) -> Program:
    def adapt(model: TextToImage) -> TextToImage:
        if not shots:
            return model
        return registry.add(model, config.finetune.adapter_config(), rngs=jax.random.key(0))

    def build(batch: int) -> Plan:
        return plan_images(
            "images", base, replace(config.generate, batch_size=batch), mesh, prompts=classes,
            adapt=adapt, adapters=1, note=note,
        )  # fmt: skip

    def updates(batch: int) -> int:
        each = math.ceil(classes * config.generate.images_per_class / batch)
        return len(config.seeds) * len(config.sources) * each

    batch = config.generate.batch_size
    return Program("images", build, "generate.batch_size", batch, rows_of(mesh), updates)


def _training(
    config: Config, name: str, points: int, classes: int, mesh: Mesh, note: str
) -> Program:
    """All points of a setting together, or one that is streamed."""
    longest = classes * max(config.real_sizes if name == REAL else config.sizes)

    def build(batch: int) -> Plan:
        sized = replace(config.train, batch_size=batch)
        task = planned_task(
            config.network, sized, images=len(config.seeds) * longest, longest=longest,
            num_classes=classes,
        )  # fmt: skip
        count = 0 if sized.streamed else config.points_at_once or points
        return trainer.plan(
            f"training, {name}", task, sized.sized(longest), mesh, count=count, note=note
        )

    def updates(batch: int) -> int:
        """Of every setting of this kind, in calls of this program."""
        sized = replace(config.train, batch_size=batch)
        chosen = [x for s, x in settings(config).items() if (s == REAL) == (name == REAL)]
        if sized.streamed:
            every = [point for own in chosen for point in own]
            return sum(
                sized.sized(classes * (point.real + point.synthetic)).steps for point in every
            )
        groups = [math.ceil(len(own) / (config.points_at_once or len(own))) for own in chosen]
        return sum(groups) * sized.sized(longest).steps

    batch, streamed = config.train.batch_size, config.train.streamed
    unit = config.train.accumulate * (rows_of(mesh) if streamed else 1)
    return Program(f"training, {name}", build, "train.batch_size", batch, unit, updates)


def _clone(config: Config, name: str, classes: int, mesh: Mesh, note: str) -> Program:
    train, tokenizer = config.clones[name], describe_pipeline(config.base).tokenizer.each[0]
    tokens = np.asarray(tokenizer(["a photo"] * classes))
    images = classes * config.generate.images_per_class

    def build(batch: int) -> Plan:
        sized = replace(train, batch_size=batch, captions=batch // train.per_caption)
        task = planned_clone(config.network, sized, images=images, captions=classes, tokens=tokens)
        return trainer.plan(f"clone {name}", task, sized.sized(images), mesh, note=note)

    unit = math.lcm(rows_of(mesh), train.per_caption)

    def updates(batch: int) -> int:
        return len(config.seeds) * replace(train, batch_size=batch).sized(images).steps

    title = f"clones.{name}.batch_size"
    return Program(f"clone {name}", build, title, train.batch_size, unit, updates)
