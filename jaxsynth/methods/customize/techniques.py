"""What the techniques differ in: what learns, the texts that images are told by, the file."""

from collections.abc import Sequence
from pathlib import Path

import jax

from jaxsynth.adapters.inject import AdapterState, extract
from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.prompts import read_templates
from jaxsynth.data.sources.captioned import captions
from jaxsynth.data.splits import few_shot
from jaxsynth.generation.sampler import check_size
from jaxsynth.methods.customize.config import Config
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.models.shapes import transform
from jaxsynth.tasks.customize import DreamBoothConfig, InversionConfig, Training
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
from jaxsynth.weights.hf import StableDiffusion


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
    training: Training, word: str, data: Dataset, source: ImageSource
) -> list[tuple[str, ...]]:
    """The texts of each training image."""
    if not isinstance(training, InversionConfig | DreamBoothConfig):
        return [(text,) for text in captions(data, source)]
    return [filled(templates_of(training, data.template), name_of(training, word))] * len(source)


def prepared(
    training: Training, word: str, base: StableDiffusion, key: jax.Array
) -> tuple[StableDiffusion, TextToImage]:
    """The pipeline that reads the technique's texts, and its networks with what learns in them.

    UserError for a token that is known already, an initializer that is not one token.
    """
    if isinstance(training, InversionConfig):
        start = training.initializer or word
        base = with_new_word(base, training.token, training.vectors, start)
        return base, base.networks
    return base, adapted(base, training, key)


def shapes_of(training: Training, word: str, base: StableDiffusion) -> TextToImage:
    """The networks of `prepared`, of shapes; `base` may be of shapes too."""

    def prepare(model: TextToImage) -> TextToImage:
        return prepared(training, word, base.with_networks(model), jax.random.key(0))[1]

    return transform(prepare, base.networks)


def class_prompt(training: Training, word: str, template: str) -> str:
    """The prompt of the images that keep the prior, "" where none are needed."""
    if not isinstance(training, DreamBoothConfig) or not training.prior_weight:
        return ""
    return template.format(word)


def check(config: Config, data: Dataset, base: StableDiffusion) -> None:
    """UserError for what cannot be learned: of data, words, prompts and templates."""
    config.check(data)
    check_size(base, config.image_size)
    training, word = config.training, config.word
    if config.shots:
        few_shot(data, config.shots, config.seeds[0])
    if isinstance(training, InversionConfig):
        base, _ = prepared(training, word, base, jax.random.key(0))
    texts = {text for own in texts_of(training, word, data, data.train) for text in own}
    texts |= {*filled(config.prompts, name_of(training, word)), *filled(config.prompts, word)}
    base.tokenizer(sorted(texts))


def save(folder: Path, training: Training, base: StableDiffusion, model: TextToImage) -> Path:
    """Writes what was learned: an embedding of diffusers' form, or an adapter's file."""
    if isinstance(training, InversionConfig):
        return write_embedding(folder, learned_embedding(base, training.token, model))
    return adapter_io.save(extract(model), folder)


def load(folder: Path, base: StableDiffusion) -> tuple[StableDiffusion, AdapterState | None]:
    """The pipeline with the word of a folder of `save`, or with its adapter beside it."""
    if file := embedding_file(folder):
        return with_embedding(base, read_embedding(file), file), None
    (file,) = adapter_io.find(folder)
    return base, adapter_io.load(file)
