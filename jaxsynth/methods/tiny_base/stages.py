"""The stages of the shipped `tiny` base: a small Stable Diffusion and a small CLIP at 32x32.

Corpus (captioned photos, printed digits, shapes) -> tokenizer -> CLIP -> VAE -> UNet -> assembled
folder. The text encoder of the diffusion model is the CLIP's own text tower, frozen, as in Stable
Diffusion 1.x (Rombach et al., 2022); the UNet predicts v (Salimans and Ho, 2022) under a cosine
schedule, which suits the 8x8 latents better than the linear one. Four latent tokens a side and few
channels keep a step in tens of milliseconds on two CPU cores.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.adapters.inject import mark_trainable
from jaxsynth.core.arrays import read_array
from jaxsynth.core.documents import read_json
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import write_json, write_text
from jaxsynth.data.dataset import Dataset
from jaxsynth.data.procedural.shapes import Captioned, render_digits, render_shapes
from jaxsynth.diffusion.schedules import NoiseSchedule
from jaxsynth.generation.generate import GenerateConfig, sample_images
from jaxsynth.methods.tiny_base.config import (
    CARD,
    PHOTO_TEMPLATES,
    PIXEL_MEAN,
    PIXEL_STD,
    PREVIEW_PROMPTS,
    SCHEDULER_CONFIG,
    PretrainConfig,
)
from jaxsynth.models.clip import CLIPConfig, CLIPModel, CLIPTextModel
from jaxsynth.models.diffusion.text_to_image import encode_text
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.models.diffusion.vae import AutoencoderKL, AutoencoderKLConfig, encode_images
from jaxsynth.report.grids import write_grid
from jaxsynth.runs.stage import Artifact, Work, stage
from jaxsynth.tasks.pretraining import (
    Autoencoding,
    CaptionedDenoising,
    Contrastive,
    pixel_constants,
    pretraining_task,
)
from jaxsynth.training import sharding
from jaxsynth.training.metrics import read_metrics
from jaxsynth.training.space import training_bytes
from jaxsynth.training.trainer import Task, train
from jaxsynth.weights.hf import Clip, StableDiffusion, load_clip, save_clip, save_pipeline
from jaxsynth.weights.models import load_model, save_model
from jaxsynth.weights.tokenizer import Tokenizer, train_tokenizer

# How the sheet of samples is drawn.
PREVIEW = GenerateConfig(guidance_scale=2.0, batch_size=100)


@dataclass(frozen=True)
class Drawing:
    """What the corpus holds besides its photos."""

    digits: int
    shapes: int
    image_size: int
    seed: int


def _corpus_bytes(config: Drawing, *, photos: Dataset) -> int:
    images = config.digits + config.shapes + len(photos.train)
    return images * (3 * config.image_size**2 + 200)


@stage(space=_corpus_bytes)
def make_corpus(work: Work, config: Drawing, *, photos: Dataset) -> dict:
    """Writes images.npy, captions.json, and photo.npy: True where a mirror image is fine."""
    rng = np.random.default_rng([config.seed, 7])
    parts = [
        render_digits(config.digits, config.image_size, config.seed),
        render_shapes(config.shapes, config.image_size, config.seed),
    ]
    images = np.stack([photos.train[i].image for i in range(len(photos.train))])
    expected = (config.image_size, config.image_size, 3)
    if images.shape[1:] != expected:
        raise UserError(
            f"corpus.photos: images of shape {images.shape[1:]}, expected {expected}: "
            "resize them or change corpus.image_size"
        )
    captions = [
        PHOTO_TEMPLATES[rng.integers(len(PHOTO_TEMPLATES))].format(photos.display_names[label])
        for label in photos.train.labels
    ]
    parts.append(Captioned(images, captions, np.asarray(photos.train.labels)))
    is_photo = np.concatenate([np.full(len(p.captions), p is parts[-1]) for p in parts])
    np.save(work.folder / "images.npy", np.concatenate([p.images for p in parts]))
    np.save(work.folder / "photo.npy", is_photo)
    write_json(work.folder / "captions.json", [c for p in parts for c in p.captions])
    return {"images": len(is_photo), "photos": int(is_photo.sum())}


@dataclass(frozen=True)
class Corpus:
    images: np.ndarray  # uint8 (n, size, size, 3)
    captions: list[str]
    is_photo: np.ndarray  # bool (n,)

    @classmethod
    def read(cls, folder: Path) -> "Corpus":
        captions = read_json(folder / "captions.json", list[str])
        return cls(read_array(folder / "images.npy"), captions, read_array(folder / "photo.npy"))

    def tokens(self, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """Distinct captions' token ids (u, length) and each image's row in them (n,)."""
        distinct = sorted(set(self.captions))
        row = {caption: i for i, caption in enumerate(distinct)}
        return tokenizer(distinct), np.array([row[c] for c in self.captions], np.int32)


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's size."""

    vocab_size: int
    max_length: int


@stage()
def make_tokenizer(work: Work, config: Vocabulary, *, corpus: Artifact) -> dict:
    """A byte-pair tokenizer of the corpus's captions."""
    captions = read_json(corpus.path / "captions.json", list[str])
    train_tokenizer(captions, config.vocab_size, config.max_length, work.folder)
    return {"max_length": Tokenizer(work.folder).max_length}


@dataclass(frozen=True)
class Pretraining:
    """How one network is trained: `network` is its config.json."""

    network: dict[str, Any]
    train: PretrainConfig
    seed: int


def _clip_bytes(config: Pretraining, **_: Artifact) -> int:
    return _network_bytes(CLIPModel, CLIPConfig, config)


def _network_bytes(kind: Any, config_kind: Any, config: Pretraining) -> int:
    network = config_kind.from_dict(config.network)
    model = nnx.eval_shape(lambda: mark_trainable(kind(network, rngs=nnx.Rngs(0))))
    return training_bytes(model, config.train)


@stage(processes="all", space=_clip_bytes)
def train_clip(work: Work, config: Pretraining, *, corpus: Artifact, tokenizer: Artifact) -> dict:
    """A CLIP of the corpus and its captions."""
    data, words = Corpus.read(corpus.path), Tokenizer(tokenizer.path)
    tokens, row = data.tokens(words)
    model = CLIPModel(CLIPConfig.from_dict(config.network), rngs=nnx.Rngs(config.seed))
    arrays = {"images": data.images, "is_photo": data.is_photo, "row": row}
    model = _trained(work, config, clip_task(model, arrays, tokens, config), "clip")
    if work.writes:
        size = data.images.shape[1]
        save_clip(Clip(model, words, size, PIXEL_MEAN, PIXEL_STD), work.folder)
    return _last(work, config)


def clip_task(model: CLIPModel, arrays: dict[str, Any], tokens: Any, config: Pretraining) -> Task:
    """The CLIP's training on images, their captions' rows and the captions' tokens."""
    return pretraining_task(
        model,
        Contrastive(),
        arrays,
        batch_size=config.train.batch_size,
        seed=config.seed,
        table=sharding.CLIP,
        constants={"tokens": tokens, **pixel_constants(PIXEL_MEAN, PIXEL_STD)},
    )


@dataclass(frozen=True)
class Compressing(Pretraining):
    """How the autoencoder is trained."""

    kl_weight: float


def _vae_bytes(config: Compressing, **_: Artifact) -> int:
    return _network_bytes(AutoencoderKL, AutoencoderKLConfig, config)


@stage(processes="all", space=_vae_bytes)
def train_vae(work: Work, config: Compressing, *, corpus: Artifact) -> dict:
    """An autoencoder of the corpus's images, its latents scaled to a deviation of one."""
    data = Corpus.read(corpus.path)
    model = AutoencoderKL(AutoencoderKLConfig.from_dict(config.network), rngs=nnx.Rngs(config.seed))
    model = _trained(work, config, vae_task(model, data.images, config), "vae")
    some = data.images[:: max(len(data.images) // 2000, 1)].astype(np.float32) / 127.5 - 1
    latents, _ = encode_images(model, some, batch_size=100)
    scaling = float(1 / latents.std())
    if work.writes:
        save_model(model, {**config.network, "scaling_factor": scaling}, work.folder)
    return {**_last(work, config), "scaling_factor": scaling}


def vae_task(model: AutoencoderKL, images: Any, config: Compressing) -> Task:
    """The autoencoder's training on uint8 images."""
    return pretraining_task(
        model,
        Autoencoding(config.kl_weight),
        {"images": images},
        batch_size=config.train.batch_size,
        seed=config.seed,
        table=sharding.VAE,
    )


@dataclass(frozen=True)
class Denoising(Pretraining):
    """How the denoiser is trained."""

    caption_dropout: float
    snr_gamma: float


def _unet_bytes(config: Denoising, **_: Artifact) -> int:
    return _network_bytes(UNet2DCondition, UNet2DConditionConfig, config)


@stage(processes="all", space=_unet_bytes)
def train_unet(
    work: Work,
    config: Denoising,
    *,
    corpus: Artifact,
    clip: Artifact,
    vae: Artifact,
) -> dict:
    """A denoiser of the corpus's latents, told its captions by the CLIP's text tower."""
    data, tower = Corpus.read(corpus.path), load_clip(clip.path)
    tokens, row = data.tokens(tower.tokenizer)
    mean, std = encode_corpus(load_model(AutoencoderKL, AutoencoderKLConfig, vae.path), data)
    # Mirrored photos follow the corpus, with their captions.
    arrays = {"mean": mean, "std": std, "row": np.concatenate([row, row[data.is_photo]])}
    encoder = text_encoder(tower)
    states = np.asarray(encode_text(encoder, jnp.asarray(tokens)))
    empty = np.asarray(encode_text(encoder, jnp.asarray(tower.tokenizer([""]))))[0]
    model = UNet2DCondition(
        UNet2DConditionConfig.from_dict(config.network), rngs=nnx.Rngs(config.seed)
    )
    model = _trained(work, config, unet_task(model, arrays, states, empty, config), "unet")
    if work.writes:
        save_model(model, config.network, work.folder)
    return _last(work, config)


def unet_task(
    model: UNet2DCondition, arrays: dict[str, Any], states: Any, empty: Any, config: Denoising
) -> Task:
    """The denoiser's training on latents and rows of captions."""
    return pretraining_task(
        model,
        CaptionedDenoising(config.caption_dropout, config.snr_gamma, config.train.remat),
        arrays,
        batch_size=config.train.batch_size,
        seed=config.seed,
        table=sharding.UNET,
        constants={
            "schedule": NoiseSchedule.from_config(SCHEDULER_CONFIG),
            "states": states,
            "empty": empty,
        },
    )


def text_encoder(tower: Clip) -> CLIPTextModel:
    """The CLIP's text tower on its own."""
    encoder = CLIPTextModel(tower.model.config.text_config, rngs=nnx.Rngs(0))
    encoder.text_model = tower.model.text_model
    return encoder


def encode_corpus(vae: AutoencoderKL, data: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Scaled posterior means and standard deviations of the corpus, then of its mirrored photos."""
    images = np.concatenate([data.images, data.images[data.is_photo][:, :, ::-1]])
    parts = [
        encode_images(vae, part.astype(np.float32) / 127.5 - 1, batch_size=256)
        for part in np.array_split(images, max(len(images) // 4096, 1))
    ]
    return tuple(np.concatenate(both) for both in zip(*parts, strict=True))


@dataclass(frozen=True)
class Card:
    """What the finished base's card says of its corpus, and how many images it shows."""

    classes: tuple[str, ...]
    digits: int
    shapes: int
    images: int = 10
    inference_steps: int = 25


def _assembled_bytes(config: Card, **networks: Artifact) -> int:
    """As much as the networks that it is made of, which are stored in half of that."""
    files = [file for one in networks.values() for file in one.path.glob("*.safetensors")]
    return sum(file.stat().st_size for file in files)


@stage(space=_assembled_bytes)
def assemble(work: Work, config: Card, *, clip: Artifact, vae: Artifact, unet: Artifact) -> dict:
    """The finished base: a diffusers folder, the CLIP in `clip/`, a card and a sheet of samples."""
    tower = load_clip(clip.path)
    pipeline = StableDiffusion(
        unet=load_model(UNet2DCondition, UNet2DConditionConfig, unet.path),
        vae=load_model(AutoencoderKL, AutoencoderKLConfig, vae.path),
        text_encoder=text_encoder(tower),
        tokenizer=tower.tokenizer,
        scheduler_config=SCHEDULER_CONFIG,
    )
    # Half precision halves the files; every weight is far inside its range.
    save_pipeline(pipeline, work.folder, dtype=jnp.float16)
    save_clip(tower, work.folder / "clip", dtype=jnp.float16)
    drawn = replace(PREVIEW, num_inference_steps=config.inference_steps)
    pictures = sample_images(pipeline, PREVIEW_PROMPTS, drawn, seed=0, count=config.images)
    titles = [prompt.removeprefix("a ") for prompt in PREVIEW_PROMPTS]
    write_grid(work.folder / "samples.png", pictures, titles)
    rows = [_card_row(name, x) for name, x in (("clip", clip), ("vae", vae), ("unet", unet))]
    text = CARD.format(
        classes=", ".join(config.classes),
        digits=config.digits,
        shapes=config.shapes,
        rows="\n".join(rows),
    )
    write_text(work.folder / "README.md", text)
    files = work.folder.rglob("*.safetensors")
    return {"megabytes": sum(file.stat().st_size for file in files) / 1e6}


def _card_row(name: str, stage: Artifact) -> str:
    """A network's line in the card, from what its stage counted."""
    counts, train = stage.counts, stage.manifest["config"]["train"]
    shown = ", ".join(f"{k} {counts[k]:.3g}" for k in ("loss", "psnr", "accuracy") if k in counts)
    rate = train["learning_rate"]
    return f"| {name} | {train['steps']} | {train['batch_size']} | {rate:g} | {shown} |"


def _trained(work: Work, config: Pretraining, task: Task, description: str) -> nnx.Module:
    sized = config.train.sized(1)
    return train(task, sized, work.training, mesh=work.mesh, description=description)


def _last(work: Work, config: Pretraining) -> dict:
    """The steps, and the training's last metrics."""
    if jax.process_index():
        return {}
    last = read_metrics(work.training / "metrics.jsonl")[-1]
    shown = {name: last[name] for name in ("loss", "psnr", "accuracy") if name in last}
    return {"steps": config.train.steps, **shown}
