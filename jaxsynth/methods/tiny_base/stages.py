"""The recipe of the shipped `tiny` base: a small Stable Diffusion and a small CLIP at 32x32.

Stages: corpus (captioned photos, printed digits, shapes) -> tokenizer -> CLIP -> VAE -> latents ->
UNet -> assembled folder. The text encoder of the diffusion model is the CLIP's own text tower,
frozen, as in Stable Diffusion 1.x (Rombach et al., 2022); the UNet predicts v (Salimans and Ho,
2022) under a cosine schedule, which suits the 8x8 latents better than the linear one. Four latent
tokens a side and few channels keep a step in tens of milliseconds on two CPU cores.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsynth.adapters.inject import Trainable, mark_trainable
from jaxsynth.core.documents import read_json
from jaxsynth.core.io import write_json
from jaxsynth.data.load import load_dataset
from jaxsynth.data.procedural.shapes import Captioned, render_digits, render_shapes
from jaxsynth.diffusion.losses import diffusion_loss
from jaxsynth.diffusion.schedules import NoiseSchedule, add_noise
from jaxsynth.generation.generate import GenerateConfig, sample_images
from jaxsynth.methods.tiny_base.networks import (
    CARD,
    PHOTO_TEMPLATES,
    PIXEL_MEAN,
    PIXEL_STD,
    PREVIEW_PROMPTS,
    SCHEDULER_CONFIG,
    Config,
    TrainConfig,
    clip_config,
    unet_config,
    vae_config,
)
from jaxsynth.models.clip import CLIPConfig, CLIPModel, CLIPTextModel
from jaxsynth.models.diffusion.text_to_image import encode_text
from jaxsynth.models.diffusion.unet import UNet2DCondition, UNet2DConditionConfig
from jaxsynth.models.diffusion.vae import (
    AutoencoderKL,
    AutoencoderKLConfig,
    encode_images,
)
from jaxsynth.report.grids import write_grid
from jaxsynth.runs.stage import Artifact, run_stage
from jaxsynth.training.checkpoint import Checkpoints
from jaxsynth.training.loop import Constant, fit
from jaxsynth.training.metrics import MetricsWriter, read_metrics
from jaxsynth.training.optim import OptimConfig, make_optimizer
from jaxsynth.training.step import init_state, make_train_step
from jaxsynth.weights.hf import (
    Clip,
    StableDiffusion,
    load_clip,
    load_model,
    save_clip,
    save_model,
    save_pipeline,
)
from jaxsynth.weights.tokenizer import Tokenizer, train_tokenizer

# How the sheet of samples is drawn.
PREVIEW = GenerateConfig(guidance_scale=2.0, num_inference_steps=25, batch_size=100)


def run(config: Config, workdir: Path) -> Path:
    """Runs every stage below `workdir` and returns the folder of the finished base."""
    workdir = Path(workdir)
    corpus = run_stage(
        "corpus",
        workdir / "corpus",
        {"corpus": config.corpus, "seed": config.seed},
        {},
        lambda folder: _build_corpus(config, folder),
    )
    tokenizer = run_stage(
        "tokenizer",
        workdir / "tokenizer",
        {"vocab_size": config.vocab_size, "max_length": config.max_length},
        {"corpus": corpus},
        lambda folder: _build_tokenizer(config, corpus.path, folder),
    )
    clip = run_stage(
        "clip",
        workdir / "clip",
        {
            "seed": config.seed,
            "train": config.clip,
            "width": config.width,
            "vision_layers": config.vision_layers,
            "text_layers": config.text_layers,
            "patch_size": config.patch_size,
        },
        {"corpus": corpus, "tokenizer": tokenizer},
        lambda folder: _build_clip(config, corpus.path, tokenizer.path, folder),
    )
    vae = run_stage(
        "vae",
        workdir / "vae",
        {
            "seed": config.seed,
            "train": config.vae,
            "channels": config.vae_channels,
            "latent_channels": config.latent_channels,
            "kl_weight": config.kl_weight,
        },
        {"corpus": corpus},
        lambda folder: _build_vae(config, corpus.path, folder),
    )
    unet = run_stage(
        "unet",
        workdir / "unet",
        {
            "seed": config.seed,
            "train": config.unet,
            "channels": config.unet_channels,
            "heads": config.unet_heads,
            "caption_dropout": config.caption_dropout,
            "snr_gamma": config.snr_gamma,
        },
        {"corpus": corpus, "tokenizer": tokenizer, "clip": clip, "vae": vae},
        lambda folder: _build_unet(config, corpus.path, clip.path, vae.path, folder),
    )
    return run_stage(
        "tiny",
        workdir / "tiny",
        {"seed": config.seed},
        {"clip": clip, "vae": vae, "unet": unet},
        lambda folder: _assemble(config, folder, clip, vae, unet),
    ).path


def _build_corpus(config: Config, folder: Path) -> dict:
    """Writes images.npy, captions.json, and photo.npy: True where a mirror image is fine."""
    corpus = config.corpus
    rng = np.random.default_rng([config.seed, 7])
    parts = [
        render_digits(corpus.digits, corpus.image_size, config.seed),
        render_shapes(corpus.shapes, corpus.image_size, config.seed),
    ]
    photos = load_dataset(corpus.photos)
    images = np.stack([photos.train[i].image for i in range(len(photos.train))])
    expected = (corpus.image_size, corpus.image_size, 3)
    if images.shape[1:] != expected:
        raise ValueError(
            f"corpus.photos: images of shape {images.shape[1:]}, expected {expected}: "
            "resize them or change corpus.image_size"
        )
    captions = [
        PHOTO_TEMPLATES[rng.integers(len(PHOTO_TEMPLATES))].format(photos.display_names[label])
        for label in photos.train.labels
    ]
    parts.append(Captioned(images, captions, np.asarray(photos.train.labels)))
    is_photo = np.concatenate([np.full(len(p.captions), p is parts[-1]) for p in parts])
    np.save(folder / "images.npy", np.concatenate([p.images for p in parts]))
    np.save(folder / "photo.npy", is_photo)
    write_json(folder / "captions.json", [c for p in parts for c in p.captions])
    return {"images": len(is_photo), "photos": int(is_photo.sum())}


@dataclass(frozen=True)
class _Corpus:
    images: np.ndarray  # uint8 (n, size, size, 3)
    captions: list[str]
    is_photo: np.ndarray  # bool (n,)

    @classmethod
    def read(cls, folder: Path) -> "_Corpus":
        captions = read_json(folder / "captions.json", list[str])
        return cls(np.load(folder / "images.npy"), captions, np.load(folder / "photo.npy"))

    def tokens(self, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        """Distinct captions' token ids (u, length) and each image's row in them (n,)."""
        distinct = sorted(set(self.captions))
        row = {caption: i for i, caption in enumerate(distinct)}
        return tokenizer(distinct), np.array([row[c] for c in self.captions], np.int32)


def _build_tokenizer(config: Config, corpus: Path, folder: Path) -> dict:
    captions = read_json(corpus / "captions.json", list[str])
    train_tokenizer(captions, config.vocab_size, config.max_length, folder)
    return {"max_length": Tokenizer(folder).max_length}


def _train(config: TrainConfig, model, loss_fn, data: dict, folder: Path, seed: int):
    """Trains every parameter of `model` on batches drawn from `data`; returns the averaged model.

    `loss_fn(model, data, index, key) -> (loss, metrics)`; `index` (batch,) are rows of the corpus.
    """
    graphdef, trainable, frozen = nnx.split(mark_trainable(model), Trainable, ...)
    count = len(data["row"])
    tx = make_optimizer(
        OptimConfig(
            learning_rate=config.learning_rate,
            schedule="cosine",
            warmup_steps=config.warmup_steps,
            total_steps=config.steps,
            weight_decay=config.weight_decay,
            clip_norm=1.0,
        )
    )

    def loss(trainable, frozen, _batch, key):
        rest, arrays = frozen
        index_key, key = jax.random.split(key)
        index = jax.random.randint(index_key, (config.batch_size,), 0, count)
        return loss_fn(nnx.merge(graphdef, trainable, rest), arrays, index, key)

    state = init_state(trainable, tx, jax.random.key(seed), ema=True)
    with (
        Checkpoints(folder / "checkpoints", every=1000, keep=1) as checkpoint,
        MetricsWriter(folder) as metrics,
    ):
        state = fit(
            state,
            (frozen, jax.tree.map(jnp.asarray, data)),
            Constant({}),
            make_train_step(loss, tx, ema_decay=config.ema_decay),
            steps=config.steps,
            checkpoint=checkpoint,
            metrics=metrics,
            log_every=100,
            description=folder.name,
        )
    return nnx.merge(graphdef, state.ema, frozen)


def _normalise(images: jax.Array) -> jax.Array:
    """uint8 pixels to the CLIP's inputs."""
    pixels = images.astype(jnp.float32) / 255
    return (pixels - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)


def _jitter(images: jax.Array, may_mirror: jax.Array, key: jax.Array, reach: int = 4) -> jax.Array:
    """Shifts each picture by up to `reach` pixels over its own edge; mirrors half the photos."""
    shift_key, flip_key = jax.random.split(key)
    size = images.shape[1]
    padded = jnp.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
    offsets = jax.random.randint(shift_key, (len(images), 2), 0, 2 * reach + 1)

    def crop(picture, offset):
        return jax.lax.dynamic_slice(picture, (*offset, 0), (size, size, 3))

    shifted = jax.vmap(crop)(padded, offsets)
    mirror = jax.random.bernoulli(flip_key, 0.5, (len(images),)) & may_mirror
    return jnp.where(mirror[:, None, None, None], shifted[:, :, ::-1], shifted)


def clip_loss(model: CLIPModel, data: dict, index: jax.Array, key: jax.Array):
    """Contrastive loss in which every pair with the same caption is a match (UniCL).

    Plain CLIP would push apart the many images of a batch that share one caption.
    """
    row = data["row"][index]
    pixels = _normalise(_jitter(data["images"][index], data["is_photo"][index], key))
    image = model.encode_image(pixels)
    text = model.encode_text(data["tokens"][row])
    image = image / jnp.linalg.norm(image, axis=-1, keepdims=True)
    text = text / jnp.linalg.norm(text, axis=-1, keepdims=True)
    logits = jnp.exp(jnp.minimum(model.logit_scale[...], jnp.log(100.0))) * image @ text.T
    same = (row[:, None] == row[None]).astype(jnp.float32)
    target = same / same.sum(-1, keepdims=True)
    to_text = -(target * jax.nn.log_softmax(logits, -1)).sum(-1).mean()
    to_image = -(target * jax.nn.log_softmax(logits.T, -1)).sum(-1).mean()
    accuracy = jnp.take_along_axis(same, logits.argmax(-1)[:, None], 1).mean()
    return (to_text + to_image) / 2, {"accuracy": accuracy}


def _build_clip(config: Config, corpus: Path, tokenizer: Path, folder: Path) -> dict:
    data = _Corpus.read(corpus)
    tokens, row = data.tokens(Tokenizer(tokenizer))
    arrays = {"images": data.images, "is_photo": data.is_photo, "tokens": tokens, "row": row}
    model = CLIPModel(CLIPConfig.from_dict(clip_config(config)), rngs=nnx.Rngs(config.seed))
    model = _train(config.clip, model, clip_loss, arrays, folder, config.seed)
    size = config.corpus.image_size
    save_clip(Clip(model, Tokenizer(tokenizer), size, PIXEL_MEAN, PIXEL_STD), folder)
    return {"steps": config.clip.steps}


def _build_vae(config: Config, corpus: Path, folder: Path) -> dict:
    data = _Corpus.read(corpus)
    arrays = {"images": data.images, "row": np.zeros(len(data.images), np.int32)}

    def loss(model: AutoencoderKL, data: dict, index: jax.Array, key: jax.Array):
        pixels = data["images"][index].astype(jnp.float32) / 127.5 - 1
        posterior = model.encode(pixels)
        error = model.decode(posterior.sample(key)) - pixels
        mean, logvar = posterior.mean, posterior.logvar
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
        absolute, square = jnp.abs(error).mean(), (error**2).mean()
        metrics = {"psnr": 10 * jnp.log10(4 / square), "kl": kl}
        return absolute + square + config.kl_weight * kl, metrics

    model = AutoencoderKL(
        AutoencoderKLConfig.from_dict(vae_config(config)), rngs=nnx.Rngs(config.seed)
    )
    model = _train(config.vae, model, loss, arrays, folder, config.seed)
    some = data.images[:: max(len(data.images) // 2000, 1)].astype(np.float32) / 127.5 - 1
    latents, _ = encode_images(model, some, batch_size=100)
    scaling = float(1 / latents.std())
    save_model(model, vae_config(config, scaling), folder)
    return {"steps": config.vae.steps, "scaling_factor": scaling}


def _build_unet(config: Config, corpus: Path, clip_dir: Path, vae_dir: Path, folder: Path) -> dict:
    data = _Corpus.read(corpus)
    vae = load_model(AutoencoderKL, AutoencoderKLConfig, vae_dir)
    clip = load_clip(clip_dir)
    tokens, row = data.tokens(clip.tokenizer)
    empty = clip.tokenizer([""])
    mean, std = encode_corpus(vae, data)
    arrays = {
        "mean": mean,
        "std": std,
        # Mirrored photos follow the corpus, with their captions.
        "row": np.concatenate([row, row[data.is_photo]]),
        "states": np.asarray(encode_text(clip.model.text_model, tokens)),
        "empty": np.asarray(encode_text(clip.model.text_model, empty))[0],
    }
    schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)

    def loss(model: UNet2DCondition, data: dict, index: jax.Array, key: jax.Array):
        keys = [jax.random.fold_in(key, i) for i in range(4)]
        x0 = data["mean"][index] + data["std"][index] * jax.random.normal(
            keys[0], data["mean"][index].shape
        )
        noise = jax.random.normal(keys[1], x0.shape)
        t = jax.random.randint(keys[2], (len(index),), 0, 1000)
        text = data["states"][data["row"][index]]
        dropped = jax.random.bernoulli(keys[3], config.caption_dropout, (len(index),))
        text = jnp.where(dropped[:, None, None], data["empty"], text)
        output = model(add_noise(schedule, x0, noise, t), t, text)
        return diffusion_loss(schedule, output, x0, noise, t, snr_gamma=config.snr_gamma), {}

    model = UNet2DCondition(
        UNet2DConditionConfig.from_dict(unet_config(config)), rngs=nnx.Rngs(config.seed)
    )
    model = _train(config.unet, model, loss, arrays, folder, config.seed)
    save_model(model, unet_config(config), folder)
    return {"steps": config.unet.steps}


def encode_corpus(vae: AutoencoderKL, data: _Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Scaled posterior means and standard deviations of the corpus, then of its mirrored photos."""
    images = np.concatenate([data.images, data.images[data.is_photo][:, :, ::-1]])
    parts = [
        encode_images(vae, part.astype(np.float32) / 127.5 - 1, batch_size=256)
        for part in np.array_split(images, max(len(images) // 4096, 1))
    ]
    return tuple(np.concatenate(both) for both in zip(*parts, strict=True))


def _assemble(config: Config, folder: Path, clip: Artifact, vae: Artifact, unet: Artifact) -> dict:
    """The finished base: a diffusers folder, the CLIP in `clip/`, a card and a sheet of samples."""
    tower = load_clip(clip.path)
    text_config = tower.model.config.text_config
    text_encoder = CLIPTextModel(text_config, rngs=nnx.Rngs(0))
    text_encoder.text_model = tower.model.text_model
    pipeline = StableDiffusion(
        unet=load_model(UNet2DCondition, UNet2DConditionConfig, unet.path),
        vae=load_model(AutoencoderKL, AutoencoderKLConfig, vae.path),
        text_encoder=text_encoder,
        tokenizer=tower.tokenizer,
        scheduler_config=SCHEDULER_CONFIG,
    )
    # Half precision halves the files; every weight is far inside its range.
    save_pipeline(pipeline, folder, dtype=jnp.float16)
    save_clip(tower, folder / "clip", dtype=jnp.float16)
    pictures = sample_images(pipeline, PREVIEW_PROMPTS, PREVIEW, seed=0, count=10)
    write_grid(folder / "samples.png", pictures, [p.removeprefix("a ") for p in PREVIEW_PROMPTS])
    (folder / "README.md").write_text(_card(config, {"clip": clip, "vae": vae, "unet": unet}))
    return {"megabytes": sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6}


def _card(config: Config, stages: dict[str, Artifact]) -> str:
    """What the base is, what it saw and how it was trained."""
    lines = []
    for name, stage in stages.items():
        train: TrainConfig = getattr(config, name)
        last = read_metrics(stage.path / "metrics.jsonl")[-1]
        shown = ", ".join(
            f"{key} {last[key]:.3g}" for key in ("loss", "psnr", "accuracy") if key in last
        )
        lines.append(
            f"| {name} | {train.steps} | {train.batch_size} | {train.learning_rate:g} | {shown} |"
        )
    return CARD.format(
        classes=", ".join(config.corpus.photos.class_names),
        digits=config.corpus.digits,
        shapes=config.corpus.shapes,
        rows="\n".join(lines),
    )
