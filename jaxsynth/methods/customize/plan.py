"""What a customisation run needs on a mesh, from its config alone: no weights are read."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxsynth.core.words import counted
from jaxsynth.data.faces import Faces, read_faces
from jaxsynth.data.prompts import default_template
from jaxsynth.generation.animations import at_once, on_linear_schedule
from jaxsynth.generation.planning import plan_images
from jaxsynth.methods.customize.config import Config
from jaxsynth.methods.customize.faces import (
    PUBLISHED_WIDTH,
    FaceEncoderConfig,
)
from jaxsynth.methods.customize.faces import planned as planned_faces
from jaxsynth.methods.customize.motion import motion_of, with_domain
from jaxsynth.methods.customize.techniques import (
    bucket_shapes,
    class_prompt,
    prepared,
    shapes_of,
    templates_of,
)
from jaxsynth.models.diffusion.identity import IdentityPrompted, identity_of, with_identity
from jaxsynth.models.diffusion.image_prompt import ImagePrompted, adapter_of, with_image_prompts
from jaxsynth.models.diffusion.motion import MotionModules
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.runs.sources import count_data
from jaxsynth.tasks.customize import (
    CaptionConfig,
    ImagePromptConfig,
    InstantIDConfig,
    Training,
    customize_task,
)
from jaxsynth.tasks.motion import AnimateDiffConfig, ClipConfig
from jaxsynth.tasks.text_to_image import FinetuneConfig, adapted
from jaxsynth.tasks.told import planned_images
from jaxsynth.training import trainer
from jaxsynth.training.planning import Plan, Program, rows_of
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.adapters.motion import read_motion
from jaxsynth.weights.hf import StableDiffusion, describe_pipeline
from jaxsynth.weights.image_encoder import ImageEncoder, describe_image_encoder


def plan(config: Config, mesh: Mesh) -> list[Program]:
    """The training of the technique, and the drawing of the base's images and of the customised.

    UserError as `trainer.train`, and where the base's configs are not at hand.
    """
    base = describe_pipeline(config.base, dtype=config.dtype, compute_dtype=config.dtype)
    base = base.sized(config.image_size)
    classes, images, note = count_data(config.data)
    training, prompts, every = config.training, len(config.prompts), images
    if config.shots:
        images = config.shots * (1 if config.has_subject else classes)
    # As many texts as there may be: what the images are told by, and the class's prompt.
    template = config.data.template or default_template(config.data.name)
    kinds = CaptionConfig | ImagePromptConfig | InstantIDConfig | ClipConfig
    texts = images if isinstance(training, kinds) else 1
    texts *= len(templates_of(training, template)) * getattr(training, "caption_orders", 1)
    prior = class_prompt(training, config.word, template)
    encoder, features = None, None
    masked = getattr(training, "unmasked_weight", 1.0) < 1
    clips = training if isinstance(training, ClipConfig) else None
    modules, frames = None, 1
    if clips is not None:
        base, frames = on_linear_schedule(base), clips.frames
    start = base
    if config.domain_adapter:
        networks = adapter_io.Networks.of(config.base)
        start = with_domain(base, adapter_io.load(config.domain_adapter, networks))
    if config.motion:
        modules = read_motion(config.motion, base.unet.config, dtype=base.unet.dtype)
    if isinstance(training, ImagePromptConfig):
        encoder = describe_image_encoder(config.image_encoder or config.clip)
        features = encoder.shape(training.of_patches)
    elif isinstance(training, InstantIDConfig):
        encoder, note = _faces(config, note)
        features = (1, encoder.width)
    prompts *= max(1, config.references)
    told = _of_buckets(training, base, note)

    def train(batch: int) -> Plan:
        sized = replace(training, batch_size=batch)
        others = planned_images(base, training.class_images, 1) if prior else None
        task = customize_task(
            base, shapes_of(training, config.word, start, encoder, modules),
            planned_images(
                base, images, texts, features=features, masked=masked,
                followed=config.sees_faces, clips=clips,
            ),
            sized, seed=config.seeds[0], others=others,
        )  # fmt: skip
        rows = batch * (2 if prior else 1)
        return trainer.plan(
            config.technique, task, sized.sized(images), mesh, images=rows, note=told
        )

    def draw(name: str, count: int, learned: bool, batch: int) -> Plan:
        adapt, prompted, moves = None, None, None
        if learned and isinstance(training, FinetuneConfig):
            adapt = partial(_adapted, base, training)
        if learned and isinstance(training, InstantIDConfig):
            prompted = partial(_identified, base, training, encoder)
        elif learned and encoder is not None:
            prompted = partial(_prompted, base, training, encoder)
        if clips is not None:
            batch = at_once(batch, frames, mesh) * frames
            if learned or modules is not None:
                moves = partial(_moving, base, clips, modules)
        own = replace(config.generate, batch_size=batch)
        return plan_images(
            name, base, own, mesh, prompts=count, adapt=adapt, prompted=prompted, moving=moves,
            note=note,
        )  # fmt: skip

    def updates(batch: int) -> int:
        return len(config.seeds) * replace(training, batch_size=batch).sized(images).steps

    def batches(count: int, batch: int) -> int:
        each = batch if clips is None else at_once(batch, frames, mesh)
        return len(config.seeds) * math.ceil(count / each)

    unit, batch = rows_of(mesh), config.generate.batch_size
    names = [("draw, class", 1, False)] if prior else []
    names += [("draw, base", prompts, False), ("draw, customised", prompts, True)]
    field = f"{config.technique}.batch_size"
    programs = [
        Program(
            config.technique, train, field, training.batch_size, unit * training.accumulate, updates
        )
    ]  # fmt: skip
    if config.face_encoder is not None:
        programs.insert(0, planned_faces(config.face_encoder, every, mesh, note))
    for name, count, learned in names:
        build = partial(draw, name, count, learned)
        each = config.generate.images_per_class
        if name == "draw, class":
            each = training.class_images
        calls = partial(batches, count * each)
        programs.append(Program(name, build, "generate.batch_size", batch, unit, calls))
    return programs


def _of_buckets(training: Training, base: StableDiffusion, note: str) -> str:
    """The note of a training, whose largest bucket is the square that is planned."""
    shapes = bucket_shapes(training, base)
    if not shapes:
        return note
    most = min(len(shapes), training.buckets.most)
    side = base.image_size
    told = f"of {counted(most, 'bucket')} at the most, the largest, {side}x{side}, with all images"
    return f"{note}; {told}" if note else told


def _faces(config: Config, note: str) -> tuple[Faces | FaceEncoderConfig, str]:
    """What says how wide embeddings are; those of a file that is not here are as published."""
    if config.face_encoder is not None:
        return config.face_encoder, note
    if Path(config.faces).is_file():
        return read_faces(config.faces), note
    assumed = f"{config.faces}: embeddings of {PUBLISHED_WIDTH} numbers are assumed"
    width = np.zeros((0, PUBLISHED_WIDTH), np.float32)
    empty = Faces((), width, np.zeros((0, 5, 2), np.float32))
    return empty, f"{note}; {assumed}" if note else assumed


def _identified(
    base: StableDiffusion,
    training: InstantIDConfig,
    faces: Faces | FaceEncoderConfig,
    model: TextToImage,
) -> IdentityPrompted:
    own = base.with_networks(model)
    identity = identity_of(prepared(training, "", own, jax.random.key(0), faces)[1])
    return with_identity(model, identity)


def _prompted(
    base: StableDiffusion, training: ImagePromptConfig, encoder: ImageEncoder, model: TextToImage
) -> ImagePrompted:
    own = base.with_networks(model)
    adapter = adapter_of(prepared(training, "", own, jax.random.key(0), encoder)[1])
    return with_image_prompts(model, [adapter])


def _moving(
    base: StableDiffusion, clips: ClipConfig, modules: MotionModules | None, model: TextToImage
) -> TextToImage:
    """The networks with the modules that animations are drawn with: a LoRA is merged into them."""
    if modules is None:
        assert isinstance(clips, AnimateDiffConfig)
        config = clips.modules_config(base.unet.config)
        modules = MotionModules(config, dtype=base.unet.dtype, rngs=nnx.Rngs(0))
    return motion_of(clips, modules).moving(model)


def _adapted(base: StableDiffusion, training: FinetuneConfig, model: TextToImage) -> TextToImage:
    return adapted(base.with_networks(model), training, jax.random.key(0))
