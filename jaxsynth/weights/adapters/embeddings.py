"""Files of Textual Inversion: new words for a text encoder, in the forms of three tools.

| written by | file | what is in it |
|---|---|---|
| diffusers | learned_embeds.safetensors, .bin | {word: (n, width) or (width,)} |
| A1111 | .pt | string_to_token, string_to_param {"*": (n, width)}, name, step, sd_checkpoint |
| the authors (rinongal) | .pt | string_to_token, string_to_param, which may be a ParameterDict |
| kohya | .safetensors, .pt | {"emb_params": (n, width)} |
| all, for SDXL | .safetensors, .pt | {"clip_l": (n, width), "clip_g": (n, width of the second)} |

The word is the name in the file, or the file's own where it has none, as other tools' of SDXL.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxsynth.adapters.surgery.token_rows import add_rows, new_rows, with_rows
from jaxsynth.core import io
from jaxsynth.core.errors import UserError, quoted, shown
from jaxsynth.core.words import counted
from jaxsynth.models.diffusion.text_to_image import TextToImage
from jaxsynth.weights import hub, recognize
from jaxsynth.weights.adapters import tensor_files
from jaxsynth.weights.hf import StableDiffusion
from jaxsynth.weights.pipeline_parts import Tokenizing
from jaxsynth.weights.torch_files.writer import write_pickled

FORMATS = ("diffusers", "a1111", "kohya")
DIFFUSERS_FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
_ENDINGS = {"diffusers": ".safetensors", "a1111": ".pt", "kohya": ".safetensors"}
_KOHYA, _PARAMS, _ANY = "emb_params", "string_to_param", "*"
# Of the first text encoder, and of the second; in the metadata, the word that no key gives.
_SDXL, _WORD = ("clip_l", "clip_g"), "jaxsynth.word"
# The families whose text encoders have these widths.
_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL's second encoder"}


@dataclass(frozen=True)
class Embedding:
    """A word and the vectors that stand for it, float32; `second` are SDXL's second encoder's."""

    word: str
    vectors: Float[np.ndarray, "n d"]
    second: Float[np.ndarray, "n e"] | None = None

    @property
    def both(self) -> list[Float[np.ndarray, "n _"]]:
        """The vectors for each text encoder."""
        return [self.vectors] if self.second is None else [self.vectors, self.second]


def embedding_file(source: str | Path) -> Path | None:
    """The file of an embedding: `source` itself or the one in that folder; None for anything else.

    UserError for a file that cannot be read.
    """
    file = _file_of(Path(source))
    if not file.is_file():
        return None
    names = list(tensor_files.nested(file)) or tensor_files.keys(file)
    return file if _kind(names)[0] == recognize.EMBEDDING else None


def read_embedding(source: str | Path, word: str = "") -> Embedding:
    """The word of a file, under another name if one is given.

    UserError naming the file, and what it holds instead.
    """
    file = _file_of(Path(source))
    if not file.is_file():
        raise UserError(f"{source}: no embedding here, expected a file or {DIFFUSERS_FILES[0]}")
    content = _content(file)
    names = [str(key) for key in content]
    if set(_SDXL) & set(names):
        return _of_two(content, file, word)
    kind, key = _kind(list(content))
    # A word may have any signs in it, so that a lone key without a meaning is one.
    if kind != recognize.EMBEDDING and (kind or len(content) != 1):
        what = recognize.said(kind) if kind else "holds no embedding of a kind known here"
        raise UserError(f"{file}: {what} (keys such as {quoted(key)}), expected an embedding")
    if _PARAMS in content:
        name, values = _of_params(content, file)
    elif len(content) == 1:
        ((name, values),) = content.items()
        name = "" if name == _KOHYA else str(name)
    else:
        raise UserError(
            f"{file}: holds {counted(len(content), 'word')} ({shown(names)}), expected 1"
        )
    return Embedding(word or name or file.stem, _vectors(values, file))


def write_embedding(target: str | Path, embedding: Embedding, to: str = "diffusers") -> Path:
    """Writes one of `FORMATS` to `target`, or into it if its name has not the format's ending.

    Returns the file.

    kohya's has no place for the word, so that the file is to be called like it.
    """
    target = Path(target)
    ending = _ENDINGS[to] if embedding.second is None else ".safetensors"
    if target.suffix != ending:
        name = DIFFUSERS_FILES[0] if to == "diffusers" else f"{_file_name(embedding.word)}{ending}"
        target = target / name
    if embedding.second is not None:
        _write(target, dict(zip(_SDXL, embedding.both, strict=True)), {_WORD: embedding.word})
        return target
    vectors = np.asarray(embedding.vectors, np.float32)
    if to == "a1111":
        content = {
            "string_to_token": {_ANY: 265},  # what A1111 writes: the id of "*"
            _PARAMS: {_ANY: vectors},
            "name": embedding.word,
            "step": 0,
            "sd_checkpoint": None,
            "sd_checkpoint_name": None,
        }
        write_pickled(target, content)
        return target
    _write(target, {embedding.word if to == "diffusers" else _KOHYA: vectors})
    return target


def _write(
    target: Path, vectors: Mapping[str, np.ndarray], more: Mapping[str, str] | None = None
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    wide = {name: np.asarray(value, np.float32) for name, value in vectors.items()}
    io.write_bytes(target, hub.to_bytes(wide, {"format": "pt", **(more or {})}))


def _of_two(content: Mapping[Any, Any], file: Path, word: str) -> Embedding:
    """The embedding of a file for SDXL, which keys give no word."""
    if sorted(map(str, content)) != sorted(_SDXL):
        raise UserError(
            f"{file}: holds {shown(sorted(map(str, content)))}, expected {' and '.join(_SDXL)}, "
            "the vectors for SDXL's two text encoders"
        )
    first, second = (_vectors(content[name], file) for name in _SDXL)
    if len(first) != len(second):
        raise UserError(
            f"{file}: {len(first)} vectors for the first text encoder and {len(second)} for the "
            "second, expected as many"
        )
    own = tensor_files.metadata_of(file).get(_WORD, "")
    return Embedding(word or own or file.stem, first, second)


def with_embedding(
    pipeline: StableDiffusion, embedding: Embedding, source: str | Path = "the embedding"
) -> StableDiffusion:
    """The pipeline with a new word, whose prompts may use it.

    UserError naming `source` for vectors of another base's width (naming both), or a word that the
    pipeline knows already.
    """
    encoders, both = _encoders(pipeline), embedding.both
    if len(both) != len(encoders):
        raise UserError(
            f"{source}: vectors for {len(both)} text encoder{'s (SDXL)' * (len(both) > 1)}, and "
            f"the base has {len(encoders)}: the embedding is for another base"
        )
    for vectors, encoder in zip(both, encoders.values(), strict=True):
        found, width = vectors.shape[-1], encoder.config.hidden_size
        if found != width:
            raise UserError(
                f"{source}: vectors of width {_family(found)}, and the base's text encoder has "
                f"width {_family(width)}: the embedding is for another base"
            )
    try:
        tokenizer = _with_word(pipeline, embedding.word, len(embedding.vectors))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    changed: dict[str, Any] = {}
    for vectors, (name, encoder) in zip(both, encoders.items(), strict=True):
        longer = with_rows(encoder, jnp.asarray(vectors))
        longer.config = dataclasses.replace(longer.config, vocab_size=tokenizer.vocab_size)
        changed[name] = longer
    return dataclasses.replace(pipeline, tokenizer=tokenizer, **changed)


def with_new_word(
    pipeline: StableDiffusion, word: str, vectors: int, initializer: str
) -> StableDiffusion:
    """The pipeline with a word to be learned: trainable rows that start as that of `initializer`.

    In SDXL both text encoders have rows.

    UserError for a word that is known already, and an initializer that is not one token.
    """
    tokenizer = _with_word(pipeline, word, vectors)
    starts = [one.single(initializer) for one in pipeline.tokenizer.each]
    changed: dict[str, Any] = {
        name: add_rows(encoder, vectors, start=start)
        for (name, encoder), start in zip(_encoders(pipeline).items(), starts, strict=True)
    }
    return dataclasses.replace(pipeline, tokenizer=tokenizer, **changed)


def learned_embedding(pipeline: StableDiffusion, word: str, model: TextToImage) -> Embedding:
    """What the rows of `with_new_word` have become in the trained `model`."""
    names = _encoders(pipeline)
    return Embedding(
        word, *(np.asarray(new_rows(getattr(model, name)), np.float32) for name in names)
    )


def _encoders(pipeline: StableDiffusion) -> dict[str, Any]:
    """The text encoders by name."""
    return {name: network for name, network in pipeline.adaptable.items() if name != "unet"}


def _with_word(pipeline: StableDiffusion, word: str, vectors: int) -> Tokenizing:
    """The tokenizer with a word, whose ids are those of the rows after the text encoders'."""
    known = pipeline.tokenizer.vocab_size
    sizes = [encoder.config.vocab_size for encoder in _encoders(pipeline).values()]
    rows = next((size for size in sizes if size != known), known)
    if known != rows:
        raise UserError(
            f"the base's tokenizer has {counted(known, 'token')} and its text encoder "
            f"{counted(rows, 'row')}, so that a new word has no row of its own"
        )
    return pipeline.tokenizer.with_word(word, vectors)


def _file_of(source: Path) -> Path:
    return next((source / name for name in DIFFUSERS_FILES if (source / name).is_file()), source)


def _content(file: Path) -> dict[Any, Any]:
    return tensor_files.nested(file) or dict(tensor_files.load(file)[0])


def _kind(names: list[Any]) -> tuple[str, str]:
    """What a file with these keys is, and one of them that says so."""
    if number := next((name for name in names if type(name) is int), None):
        return "a hypernetwork", str(number)
    return recognize.kind_of([str(name) for name in names])


def _of_params(content: dict[Any, Any], file: Path) -> tuple[str, Any]:
    """The word, "" where the file has none, and the values of A1111's and the authors' files."""
    params = content[_PARAMS]
    if not isinstance(params, dict) or len(params) != 1:
        raise UserError(
            f"{file}: {_PARAMS}: expected one word with its vectors, found {shown(params)}"
        )
    ((key, values),) = params.items()
    name = content.get("name")
    if isinstance(name, str) and name:
        return name, values
    return "" if key == _ANY else str(key), values


def _vectors(values: Any, file: Path) -> Float[np.ndarray, "n d"]:
    array = np.asarray(values) if isinstance(values, np.ndarray) else None
    if array is None or array.ndim not in (1, 2) or not jnp.issubdtype(array.dtype, jnp.floating):
        what = f"{array.dtype} {array.shape}" if array is not None else shown(values)
        raise UserError(f"{file}: {what}, expected float vectors (n, width)")
    array = np.atleast_2d(array).astype(np.float32)
    if not array.size or not np.isfinite(array).all():
        raise UserError(f"{file}: the vectors {array.shape} are empty or not finite")
    return array


def _family(width: int) -> str:
    return f"{width} ({_WIDTHS[width]})" if width in _WIDTHS else str(width)


def _file_name(word: str) -> str:
    """A word as a file's name: its letters, digits and signs that files may have."""
    return "".join(x for x in word if x.isalnum() or x in "-_.") or "embedding"
