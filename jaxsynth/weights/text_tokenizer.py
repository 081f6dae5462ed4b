"""The tokenizer of a SigLIP folder, whatever its kind, on the `tokenizers` library.

SigLIP's is a sentencepiece model of C4's words, SigLIP 2's is Gemma's of 256,000 pieces.
tokenizer.json holds either whole; what texts are brought to besides is in tokenizer_config.json.
All of them were trained on texts in lower case that end with the end of text and are padded to the
length of the text tower, whose last position is the text's feature (Zhai et al. 2023, arXiv
2303.15343; Tschannen et al. 2025, arXiv 2502.14786, section 2).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import normalizers, processors

from jaxsynth.core.documents import read_json, take
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.weights.hub import write_json

_WHOLE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_SIDES = ("left", "right")
# transformers writes 1e30 for "no limit".
_NO_LIMIT = 100_000
_SAMPLE = "a photo"


class TextTokenizer:
    """Text to token ids: in lower case, with the end of text, padded and cut to `max_length`.

    Attributes: `max_length`, `vocab_size` (added tokens included), `eos_token_id`, `pad_token_id`.
    """

    def __init__(self, folder: str | os.PathLike, *, positions: int):
        """From a Hugging Face folder with tokenizer.json.

        tokenizer_config.json tells `eos_token`, `pad_token`, `model_max_length` (else `positions`,
        what the text tower reads), `padding_side` (else "right"), `do_lower_case` (else true), and
        whether start and end are added (`add_bos_token`, `add_eos_token`; else as tokenizer.json
        has it). UserError naming file and field for what is missing or malformed, and for texts
        that do not end with the end of text.
        """
        folder = Path(folder)
        where, settings_path = folder / _WHOLE, folder / _SETTINGS
        if not where.is_file():
            raise UserError(
                f"{where}: missing: the tokenizer of a SigLIP is read from it, and not from a "
                "sentencepiece model; take the file of the checkpoint that the folder is from, "
                "such as google/siglip2-base-patch16-224"
            )
        settings = read_json(settings_path, optional=True)
        backend = _read(where)
        self._words = {
            name: _named(settings, name, settings_path, backend)
            for name in ("eos_token", "pad_token")
        }
        self.eos_token_id, self.pad_token_id = (
            backend.token_to_id(word) for word in self._words.values()
        )
        self.vocab_size = backend.get_vocab_size()
        limit = take(settings, "model_max_length", float, settings_path, _NO_LIMIT + 1)
        self.max_length = positions if limit > _NO_LIMIT else int(limit)
        if self.max_length < 2:
            raise UserError(
                f"{settings_path}: model_max_length: {self.max_length} leaves no room for a word"
            )
        self._side = take(settings, "padding_side", str, settings_path, "right")
        if self._side not in _SIDES:
            raise UserError(
                f"{settings_path}: padding_side: {quoted(self._side)}, expected left or right"
            )
        if take(settings, "do_lower_case", bool, settings_path, True):
            own = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        self._set_ends(backend, settings, settings_path)
        try:
            last = backend.encode(_SAMPLE).ids[-1:]
        except Exception as error:
            raise UserError(f"{where}: cannot read {_SAMPLE!r}: {_reason(error)}") from None
        if last != [self.eos_token_id]:
            found = "nothing" if not last else quoted(backend.id_to_token(last[0]))
            raise UserError(
                f"{where}: a text ends with {found}, expected {quoted(self._words['eos_token'])}, "
                f"with which SigLIP was trained; set add_eos_token in {_SETTINGS} to true"
            )
        backend.enable_truncation(self.max_length)
        backend.enable_padding(
            direction=self._side,
            length=self.max_length,
            pad_id=self.pad_token_id,
            pad_token=self._words["pad_token"],
        )
        self._backend = backend

    def _set_ends(
        self, backend: tokenizers.Tokenizer, settings: dict[str, Any], path: Path
    ) -> None:
        """Start and end of a text as the settings ask for, where they say so."""
        asked = {
            name: take(settings, f"add_{name}", bool | None, path, None)
            for name in ("bos_token", "eos_token")
        }
        if all(value is None for value in asked.values()):
            return
        ends = {"bos_token": "", "eos_token": self._words["eos_token"]}
        if asked["bos_token"]:
            ends["bos_token"] = _named(settings, "bos_token", path, backend)
        words = [ends[name] if asked[name] else "" for name in ends]
        try:
            backend.post_processor = processors.TemplateProcessing(
                single=[part for part in (words[0], "$A", words[1]) if part],
                special_tokens=[(word, backend.token_to_id(word)) for word in words if word],
            )
        except Exception as error:
            raise UserError(f"{path}: start and end of a text: {_reason(error)}") from None

    @property
    def each(self) -> tuple[Self]:
        """It alone, as `Tokenizer.each`."""
        return (self,)

    @property
    def shape(self) -> tuple[int]:
        """Of a text's ids."""
        return (self.max_length,)

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "b t"]:
        """Ids (b, max_length) int32: words, end, padding; long texts are cut before the end."""
        if isinstance(texts, str):
            raise TypeError(f"tokenizer: expected a list of texts, got the single text {texts!r}")
        encoded = self._backend.encode_batch(list(texts))
        ids = np.asarray([item.ids for item in encoded], np.int32)
        return ids.reshape(len(encoded), self.max_length)

    def save(self, folder: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
        plain.no_padding()
        plain.no_truncation()
        plain.save(str(folder / _WHOLE))
        settings = {
            **self._words,
            "do_lower_case": True,
            "model_input_names": ["input_ids"],
            "model_max_length": self.max_length,
            "padding_side": self._side,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        write_json(folder / _SETTINGS, settings)


def _read(path: Path) -> tokenizers.Tokenizer:
    # The library says little of what is wrong with a file: what is no JSON is told first.
    read_json(path)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:
        # A panic of the library is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{path}: no tokenizer of the tokenizers library: {_reason(error)}"
        ) from None


def _reason(error: BaseException) -> str:
    return quoted(str(error).partition("\n")[0], 200)[1:-1]


def _named(settings: dict[str, Any], name: str, path: Path, backend: tokenizers.Tokenizer) -> str:
    """The word of a special token, which the vocabulary must have."""
    value = take(settings, name, str | dict, path)
    word = take(value, "content", str, f"{path}: {name}") if isinstance(value, dict) else value
    if backend.token_to_id(word) is None:
        raise UserError(f"{path}: {name}: {quoted(word)} is not in the vocabulary of {_WHOLE}")
    return word
