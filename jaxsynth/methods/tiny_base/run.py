"""The recipe of the shipped `tiny` base: what `configs/tiny_base.py` runs.

Below the run's folder: corpus, tokenizer, clip, vae, unet, and the finished base in tiny.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxsynth.methods.tiny_base.config import (
    Config,
    clip_config,
    unet_config,
    vae_config,
)
from jaxsynth.methods.tiny_base.stages import (
    Card,
    Compressing,
    Denoising,
    Drawing,
    Pretraining,
    Vocabulary,
    assemble,
    clip_task,
    make_corpus,
    make_tokenizer,
    train_clip,
    train_unet,
    train_vae,
    unet_task,
    vae_task,
)
from jaxsynth.models.clip import CLIPConfig, CLIPModel
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.models.diffusion.vae import AutoencoderKL, AutoencoderKLConfig
from jaxsynth.runs.run import keep_record, record_made
from jaxsynth.runs.sources import count_data, data_source
from jaxsynth.training import trainer
from jaxsynth.training.planning import Plan, Program, rows_of
from jaxsynth.training.task import Task

BASE = "tiny"


@dataclass(frozen=True)
class Slices:
    """What each stage is told, from the run's config."""

    config: Config

    @property
    def corpus(self) -> Drawing:
        corpus = self.config.corpus
        return Drawing(corpus.digits, corpus.shapes, corpus.image_size, self.config.seed)

    @cached_property
    def clip(self) -> Pretraining:
        return Pretraining(clip_config(self.config), self.config.clip, self.config.seed)

    @cached_property
    def vae(self) -> Compressing:
        config = self.config
        return Compressing(vae_config(config), config.vae, config.seed, config.kl_weight)

    @cached_property
    def unet(self) -> Denoising:
        config = self.config
        more = (config.caption_dropout, config.snr_gamma)
        return Denoising(unet_config(config), config.unet, config.seed, *more)


def run(config: Config, workdir: Path) -> Path:
    """Runs every stage below `workdir` and returns the folder of the finished base."""
    make(config, workdir)
    record_made(Path(workdir), config)
    return Path(workdir) / BASE


def make(config: Config, workdir: Path) -> None:
    """Every stage of the run."""
    workdir, slices = Path(workdir), Slices(config)
    keep_record(workdir, config)
    mesh, photos = config.mesh.make(), data_source(config.corpus.photos)
    corpus = make_corpus(workdir / "corpus", slices.corpus, photos=photos)
    words = Vocabulary(config.vocab_size, config.max_length)
    tokenizer = make_tokenizer(workdir / "tokenizer", words, corpus=corpus)
    clip = train_clip(workdir / "clip", slices.clip, mesh=mesh, corpus=corpus, tokenizer=tokenizer)
    vae = train_vae(workdir / "vae", slices.vae, mesh=mesh, corpus=corpus)
    unet = train_unet(workdir / "unet", slices.unet, mesh=mesh, corpus=corpus, clip=clip, vae=vae)
    drawn, shown = config.corpus, (config.preview_images, config.preview_steps)
    card = Card(drawn.photos.class_names, drawn.digits, drawn.shapes, *shown)
    assemble(workdir / BASE, card, clip=clip, vae=vae, unet=unet)


def plan(config: Config, mesh: Mesh) -> list[Program]:
    """The training of each network."""
    _, photos, note = count_data(config.corpus.photos)
    images = config.corpus.digits + config.corpus.shapes + photos

    def program(name: str) -> Program:
        train = getattr(config, name)

        def build(batch: int) -> Plan:
            sized = dataclasses.replace(train, batch_size=batch)
            task, _ = _planned_task(dataclasses.replace(config, **{name: sized}), name)
            return trainer.plan(name, task, sized.sized(images), mesh, note=note)

        def updates(batch: int) -> int:
            return dataclasses.replace(train, batch_size=batch).sized(images).steps

        unit = rows_of(mesh) * train.accumulate
        return Program(name, build, f"{name}.batch_size", train.batch_size, unit, updates)

    return [program(name) for name in ("clip", "vae", "unet")]


def _planned_task(config: Config, name: str) -> tuple[Task, int]:
    """The task of a network, of shapes, and the images of an epoch."""
    slices, corpus = Slices(config), config.corpus
    _, photos, _ = count_data(corpus.photos)
    images, size = corpus.digits + corpus.shapes + photos, corpus.image_size
    texts = (2 * images, config.max_length)

    def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))

    def network(kind, config_kind, values: dict) -> nnx.Module:
        return nnx.eval_shape(lambda: kind(config_kind.from_dict(values), rngs=nnx.Rngs(0)))

    pixels, rows = shape(images, size, size, 3, dtype="uint8"), shape(images, dtype="int32")
    if name == "clip":
        model = network(CLIPModel, CLIPConfig, slices.clip.network)
        pictures = {"images": pixels, "is_photo": shape(images, dtype="bool"), "row": rows}
        return clip_task(model, pictures, shape(*texts, dtype="int32"), slices.clip), images
    if name == "vae":
        model = network(AutoencoderKL, AutoencoderKLConfig, slices.vae.network)
        return vae_task(model, pixels, slices.vae), images
    latents = unet_config(config)
    side, channels = latents["sample_size"], latents["in_channels"]
    encoded = shape(images + photos, side, side, channels)
    arrays = {"mean": encoded, "std": encoded, "row": shape(images + photos, dtype="int32")}
    model = network(UNet2DCondition, UNet2DConditionConfig, slices.unet.network)
    states, empty = shape(*texts, config.width), shape(config.max_length, config.width)
    return unet_task(model, arrays, states, empty, slices.unet), images
