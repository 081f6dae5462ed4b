"""What each program of a DataDream run needs on a mesh, from its config alone.

The tasks and the sampler are those that the stages run, of shapes: no weights are read. Of data
that is not here a size is assumed and named.
"""

import math
from dataclasses import replace

import jax
from jax.sharding import Mesh

from jaxsynth.adapters import registry
from jaxsynth.adapters.mixing import mixed_config
from jaxsynth.core.words import counted
from jaxsynth.generation.planning import plan_images
from jaxsynth.methods.datadream.config import MIXED, Config
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.runs.sources import count_data
from jaxsynth.tasks.clip_classifier import ANY_REGIONS, classifier_task
from jaxsynth.tasks.image_heads import headed
from jaxsynth.tasks.networks import CheckpointNetwork
from jaxsynth.tasks.supervised import planned_task as supervised_task
from jaxsynth.tasks.text_to_image import planned_task
from jaxsynth.training import trainer
from jaxsynth.training.planning import Plan, Program, rows_of
from jaxsynth.weights.hf import Clip, StableDiffusion, describe_clip, describe_pipeline
from jaxsynth.weights.networks.classifiers import load_classifier


def plan(config: Config, mesh: Mesh) -> list[Program]:
    """Fine-tuning and generating in each mode, other sets, and the classifiers; the most shots.

    The part of a classifier's training in which a head learns alone is not compiled: it needs less
    than what comes before, with whose updates it is counted.

    UserError as `trainer.train`, and where the configs of base or CLIP are not at hand.
    """
    classes, _, note = count_data(config.data)
    dtypes = {"dtype": config.dtype, "compute_dtype": config.dtype}
    base = describe_pipeline(config.base, **dtypes).sized(config.image_size)
    clip = describe_clip(config.clip, **dtypes)
    programs = [_finetuning(config, base, mode, classes, mesh, note) for mode in config.modes]
    for mode in config.modes:
        programs.append(_generating(config, base, mode, classes, mesh, note))
    for name, one in config.sets.items():
        if one.kind != "retrieved":
            programs.append(_drawing(config, base, name, classes, mesh, note))
    # Real shots, prompts alone, and in each mode synthetic images without and with the shots.
    trainings = 1 + len(config.shots) * (1 + 2 * len(config.modes))
    programs.append(_classifying(config, clip, "", trainings, classes, mesh, note))
    for name in config.recipes:
        trainings = len(config.shots) if config.depends_on_shots(name) else 1
        if config.recipes[name].student:
            programs.append(_teaching(config, name, trainings, classes, mesh, note))
        else:
            programs.append(_classifying(config, clip, name, trainings, classes, mesh, note))
    return programs


def _teaching(
    config: Config, recipe: str, trainings: int, classes: int, mesh: Mesh, note: str
) -> Program:
    """A student's training, `trainings` with each seed; its checkpoint is read for its shapes."""
    own, name = config.recipes[recipe], f"recipe {recipe}"
    student = config.students[own.student]
    network = CheckpointNetwork.of(load_classifier(student.checkpoint, headless=True))
    images = config.generate.images_per_class * classes
    shots = max(config.shots) * classes
    # Of both the shots come as often as the images.
    longest = images * (2 if own.real else 1) if own.sets else shots

    def build(batch: int) -> Plan:
        sized = replace(student.train, batch_size=batch).sized(images)
        task = supervised_task(network, sized, images=longest, longest=longest, num_classes=classes)
        count = 0 if sized.streamed else 1
        return trainer.plan(name, task, sized, mesh, count=count, note=note)

    def updates(batch: int) -> int:
        steps = replace(student.train, batch_size=batch).sized(images).steps
        return len(config.seeds) * trainings * steps

    unit = (rows_of(mesh) if student.train.streamed else 1) * student.train.accumulate
    field, batch = f"students.{own.student}.train.batch_size", student.train.batch_size
    return Program(name, build, field, batch, unit, updates)


def _classifying(
    config: Config, clip: Clip, recipe: str, trainings: int, classes: int, mesh: Mesh, note: str
) -> Program:
    """The classifier's training, a recipe's own for its name; `trainings` with each seed."""
    images, both, train = config.generate.images_per_class * classes, True, config.classify
    name, field = "classify", "classify.batch_size"
    if recipe:
        own, train = config.recipes[recipe], config.classify_of(recipe)
        both, name = own.real and bool(own.sets), f"recipe {recipe}"
        field = f"recipes.{recipe}.{field}"

    def build(batch: int) -> Plan:
        sized = replace(train, batch_size=batch)
        task = classifier_task(
            clip, ["a photo"] * classes, sized, seed=0, both=both,
            regions=ANY_REGIONS if train.regions and both else None,
        )  # fmt: skip
        return trainer.plan(name, task, sized.sized(images), mesh, note=note)

    def updates(batch: int) -> int:
        steps = replace(train, batch_size=batch).sized(images).steps
        return len(config.seeds) * trainings * steps

    unit = rows_of(mesh) * train.accumulate
    return Program(name, build, field, train.batch_size, unit, updates)


def _drawing(
    config: Config, base: StableDiffusion, name: str, classes: int, mesh: Mesh, note: str
) -> Program:
    """A set that the base draws from sentences, as many as there are classes, or from the shots.

    The latter needs a part of the steps and an encoder besides, which are not counted.
    """
    title, by = f"generate, set {name}", config.sets[name].by

    def adapt(model: TextToImage) -> TextToImage:
        if not by:
            return model
        own = config.finetuning(by).adapter_config()
        return registry.add(model, own, rngs=jax.random.key(0))

    def build(batch: int) -> Plan:
        return plan_images(
            title, base, replace(config.generate, batch_size=batch), mesh, prompts=classes,
            adapt=adapt, adapters=classes if by == "cls" else 1, note=note,
        )  # fmt: skip

    def updates(batch: int) -> int:
        draws = len(config.seeds) * (len(config.shots) if config.needs_shots(name) else 1)
        return draws * math.ceil(classes * config.generate.images_per_class / batch)

    batch = config.generate.batch_size
    return Program(title, build, "generate.batch_size", batch, rows_of(mesh), updates)


def _finetuning(
    config: Config, base: StableDiffusion, mode: str, classes: int, mesh: Mesh, note: str
) -> Program:
    """One adapter for all classes ("dset"), or as many as train together."""
    train, shots = config.finetuning(mode), max(config.shots)
    at_once = 0 if mode == "dset" else config.classes_at_once or classes
    name = f"fine-tune {counted(at_once, 'class')}" if at_once else "fine-tune dset"
    name += f", {mode}" if mode in ("stacked", *MIXED) else ""
    count, images = at_once, shots if at_once else shots * classes
    if mode == "loft":
        count, images = at_once * shots, 1

    def build(batch: int) -> Plan:
        sized = replace(train, batch_size=batch)
        task = planned_task(base, sized, images=images)
        if mode == "chimera":
            task = headed(task, images, sized)
        return trainer.plan(name, task, sized.sized(images), mesh, count=count, note=note)

    def updates(batch: int) -> int:
        sized = replace(train, batch_size=batch)
        groups = math.ceil(classes / (at_once or classes))
        sets = [shots if at_once else shots * classes for shots in config.shots]
        sets = [1] * len(sets) if mode == "loft" else sets
        return len(config.seeds) * groups * sum(sized.sized(own).steps for own in sets)

    unit = train.accumulate * (1 if count else rows_of(mesh))
    field = f"{mode if mode in MIXED else 'finetune'}.batch_size"
    return Program(name, build, field, train.batch_size, unit, updates)


def _generating(
    config: Config, base: StableDiffusion, mode: str, classes: int, mesh: Mesh, note: str
) -> Program:
    adapters, adapter = 1 if mode == "dset" else classes, config.finetuning(mode).adapter_config()
    if mode in MIXED:
        # One shot has no pair.
        adapter = mixed_config(adapter, 2 if mode == "loft" and max(config.shots) > 1 else 1)

    def adapt(model: TextToImage) -> TextToImage:
        return registry.add(model, adapter, rngs=jax.random.key(0))

    def build(batch: int) -> Plan:
        own = mode in MIXED  # an adapter and a text of each image's own
        return plan_images(
            f"generate, {mode}", base, replace(config.generate, batch_size=batch), mesh,
            prompts=batch if own else classes, adapt=adapt, adapters=batch if own else adapters,
            note=note,
        )  # fmt: skip

    def updates(batch: int) -> int:
        """Of every adapter; the images of prompts alone are counted with the first mode's."""
        sets = len(config.shots) + (mode == config.modes[0])
        images = classes * config.generate.images_per_class
        return len(config.seeds) * sets * math.ceil(images / batch)

    batch = config.generate.batch_size
    return Program(f"generate, {mode}", build, "generate.batch_size", batch, rows_of(mesh), updates)
