"""What the techniques differ in: what learns, the texts that images are told by, the file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxsynth.adapters.inject import AdapterState, extract, mark_trainable
from jaxsynth.adapters.surgery.token_rows import TABLE
from jaxsynth.core.errors import UserError
from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.faces import Faces
from jaxsynth.data.prompts import read_templates
from jaxsynth.data.sources.captioned import captions
from jaxsynth.data.splits import few_shot
from jaxsynth.generation.animations import on_linear_schedule
from jaxsynth.generation.sampler import check_size, size_factor
from jaxsynth.methods.customize.config import Config
from jaxsynth.methods.customize.faces import FaceEncoderConfig
from jaxsynth.methods.customize.motion import check_clips, moving, save_motion
from jaxsynth.models.diffusion.identity import (
    identity_of,
    initial_identity,
    with_identity,
)
from jaxsynth.models.diffusion.image_prompt import (
    ImageProjection,
    Resampler,
    adapter_of,
    initial_adapter,
    with_image_prompts,
)
from jaxsynth.models.diffusion.motion import MotionModules
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.models.shapes import transform
from jaxsynth.tasks.customize import (
    DreamBoothConfig,
    ImagePromptConfig,
    InstantIDConfig,
    InversionConfig,
    Training,
)
from jaxsynth.tasks.motion import ClipConfig
from jaxsynth.tasks.text_to_image import adapted
from jaxsynth.weights.adapters import io as adapter_io
from jaxsynth.weights.adapters.embeddings import (
    embedding_file,
    learned_embedding,
    read_embedding,
    with_embedding,
    with_new_word,
    write_embedding,
)
from jaxsynth.weights.adapters.identities import write_identity
from jaxsynth.weights.adapters.image_prompts import write_image_adapter
from jaxsynth.weights.hf import StableDiffusion
from jaxsynth.weights.image_encoder import ImageEncoder

# What sees images, or says how wide the embeddings of faces are.
Seen = ImageEncoder | Faces | FaceEncoderConfig
# Where a text encoder's new words are among what learns.
_ROWS = f"{TABLE}.rows"


def name_of(training: Training, word: str) -> str:
    """What prompts call the subject after training."""
    if isinstance(training, InversionConfig):
        return training.token
    return f"{training.identifier} {word}" if isinstance(training, DreamBoothConfig) else word


def filled(prompts: Sequence[str], name: str) -> tuple[str, ...]:
    """The prompts with the subject's name."""
    return tuple(prompt.replace("{}", name) for prompt in prompts)


def templates_of(training: Training, template: str) -> tuple[str, ...]:
    """The sentences that a subject is told in; `template` is the data's own."""
    named = training.templates if isinstance(training, InversionConfig) else ""
    return read_templates(named) if named else (template,)


def texts_of(
    training: Training, word: str, data: Dataset, source: ImageSource, seed: int = 0
) -> list[tuple[str, ...]]:
    """The texts of each training image; `seed` is of the orders of captions' parts."""
    if not isinstance(training, InversionConfig | DreamBoothConfig):
        orders = getattr(training, "caption_orders", 1)
        return [reordered(text, orders, [seed, i]) for i, text in enumerate(captions(data, source))]
    return [filled(templates_of(training, data.template), name_of(training, word))] * len(source)


def reordered(caption: str, orders: int, seed: Sequence[int]) -> tuple[str, ...]:
    """The caption, and the orders of its parts between commas; the first part stays first."""
    first, *rest = (part.strip() for part in caption.split(","))
    rng = np.random.default_rng([3, *seed])
    found = [caption]
    for _ in range(orders - 1):
        found.append(", ".join([first, *(rest[i] for i in rng.permutation(len(rest)))]))
    return tuple(found)


def prepared(
    training: Training,
    word: str,
    base: StableDiffusion,
    key: jax.Array,
    encoder: Seen | None = None,
    modules: MotionModules | None = None,
) -> tuple[StableDiffusion, TextToImage]:
    """The pipeline that reads the technique's texts, and its networks with what learns in them.

    `encoder` is for a technique that sees images or faces, and `modules` are those that it adapts.
    UserError for a token that is known already, an initializer that is not one token.
    """
    if isinstance(training, ClipConfig):
        return on_linear_schedule(base), moving(training, base, key, modules)
    if isinstance(training, InversionConfig):
        start = training.initializer or word
        base = with_new_word(base, training.token, training.vectors, start)
        return base, base.networks
    width = base.unet.config.cross_attention_dim
    if isinstance(training, InstantIDConfig):
        assert isinstance(encoder, Faces | FaceEncoderConfig)
        config = training.projection_config(encoder.width, width)
        identity = initial_identity(
            base.unet, config, base.vae.config.downscale, rngs=nnx.Rngs(key)
        )
        model = with_identity(base.networks, identity)
        return base, mark_trainable(
            model, (r".*\.to_[kv]_ip\..*", r"image_projections\..*", r"identity_net\..*")
        )
    if isinstance(training, ImagePromptConfig):
        assert isinstance(encoder, ImageEncoder)
        config = training.projection_config(encoder.features(training.of_patches), width)
        kind = Resampler if training.of_patches else ImageProjection
        projection: Any = kind(config, dtype=base.unet.dtype, rngs=nnx.Rngs(key))
        model = with_image_prompts(base.networks, [initial_adapter(base.unet, projection)])
        return base, mark_trainable(model, (r".*\.to_[kv]_ip\..*", r"image_projections\..*"))
    if isinstance(training, DreamBoothConfig) and training.vectors:
        base = with_new_word(base, training.identifier, training.vectors, word)
    return base, adapted(base, training, key)


def shapes_of(
    training: Training,
    word: str,
    base: StableDiffusion,
    encoder: Seen | None = None,
    modules: MotionModules | None = None,
) -> TextToImage:
    """The networks of `prepared`, of shapes; `base` may be of shapes too."""

    def prepare(model: TextToImage) -> TextToImage:
        own = base.with_networks(model)
        return prepared(training, word, own, jax.random.key(0), encoder, modules)[1]

    return transform(prepare, base.networks)


def bucket_shapes(training: Training, base: StableDiffusion) -> list[tuple[int, int]]:
    """(height, width) of the buckets that images are learned in; none where all become squares.

    UserError for sides that the base's networks do not divide.
    """
    buckets = getattr(training, "buckets", None)
    if buckets is None or not buckets.enabled:
        return []
    try:
        return buckets.shapes(base.image_size, size_factor(base))
    except UserError as error:
        raise UserError(f"buckets.{error}") from None


def class_prompt(training: Training, word: str, template: str) -> str:
    """The prompt of the images that keep the prior, "" where none are needed."""
    if not isinstance(training, DreamBoothConfig) or not training.prior_weight:
        return ""
    return template.format(word)


def check(
    config: Config, data: Dataset, base: StableDiffusion, modules: MotionModules | None = None
) -> None:
    """UserError for what cannot be learned: of data, words, prompts, templates and modules."""
    config.check(data)
    check_size(base, config.image_size)
    training, word = config.training, config.word
    bucket_shapes(training, base.sized(config.image_size))
    if isinstance(training, ClipConfig):
        check_clips(training, data, base, modules)
    if config.shots:
        few_shot(data, config.shots, config.seeds[0])
    if isinstance(training, InversionConfig) or getattr(training, "vectors", 0):
        base, _ = prepared(training, word, base, jax.random.key(0))
    texts = {text for own in texts_of(training, word, data, data.train) for text in own}
    texts |= {*filled(config.prompts, name_of(training, word)), *filled(config.prompts, word)}
    base.tokenizer(sorted(texts))


def save(
    folder: Path,
    training: Training,
    base: StableDiffusion,
    model: TextToImage,
    modules: MotionModules | None = None,
) -> Path:
    """Writes what was learned: an embedding of diffusers' form, and the file of an adapter.

    Returns the latter where there is one. `modules` as in `prepared`.
    """
    if isinstance(training, InstantIDConfig):
        return write_identity(folder, identity_of(model))
    if isinstance(training, ClipConfig):
        return save_motion(folder, training, base, model, modules)
    if isinstance(training, ImagePromptConfig):
        return write_image_adapter(folder, adapter_of(model))
    state = extract(model)
    if not getattr(training, "vectors", 0):
        return adapter_io.save(state, folder)
    token = training.token if isinstance(training, InversionConfig) else training.identifier
    file = write_embedding(folder, learned_embedding(base, token, model))
    rest = {path: value for path, value in state.arrays.items() if not path.endswith(_ROWS)}
    return adapter_io.save(AdapterState(rest, state.config), folder) if rest else file


def load(folder: Path, base: StableDiffusion) -> tuple[StableDiffusion, AdapterState | None]:
    """The pipeline with the word of a folder of `save`, and the adapter, where it has them."""
    if file := embedding_file(folder):
        base = with_embedding(base, read_embedding(file), file)
        if not any((folder / name).is_file() for name in adapter_io.FILES):
            return base, None
    (file,) = adapter_io.find(folder)
    return base, adapter_io.load(file)
