"""CLIP's tokenizer on the `tokenizers` library, and a trainer for small ones of the same kind.

Prompts are tokenized in the data path, where importing transformers (and through
it torch) is a cost nobody needs. The text pipeline is CLIP's (Radford et al. 2021): NFC, lower
case, words by a regular expression, byte-level BPE with "</w>" closing each word. It gives the ids
that transformers' CLIPTokenizer gives for the same folder, special and added tokens included.
"""

import copy
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxsynth.core.documents import read_json, read_text, take
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.core.words import counted
from jaxsynth.weights.hub import write_json

_SUFFIX = "</w>"
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_NAMED = {"bos_token": _BOS, "eos_token": _EOS, "pad_token": _EOS, "unk_token": _EOS}
_SPECIAL = (("special", True),)
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")

# CLIP's context, for folders whose tokenizer_config.json does not say.
_CONTEXT = 77
# transformers writes 1e30 for "no limit"; every text is padded to one, so that it must be small.
_NO_LIMIT = 100_000
# Of a vocabulary; the largest there are have less than a million tokens.
_MOST_IDS = 1 << 24
_SETTINGS = "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class _Token:
    """A token that is matched in the raw text, before words are split."""

    content: str
    flags: tuple[tuple[str, bool], ...] = _SPECIAL
    index: int | None = None

    @classmethod
    def read(cls, value: str | Mapping[str, Any], where: str, *, index: int | None = None) -> Self:
        if isinstance(value, str):
            return cls(value, index=index)
        if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
            raise UserError(
                f"{where}: expected a token (text or an object with content): {quoted(value)}"
            )
        flags = tuple((name, bool(value[name])) for name in _TOKEN_FLAGS if name in value)
        return cls(value["content"], flags, index)

    def added(self, *, special: bool) -> AddedToken:
        flags = dict(self.flags)
        flags["special"] = special or flags.get("special", False)
        return AddedToken(self.content, **flags)


class Tokenizer:
    """Text to token ids, padded and cut to `max_length`.

    An added token whose companions ("<dog>_1", "<dog>_2", ...) are added tokens too stands for all
    of them, as diffusers' pipelines read the words of several vectors of Textual Inversion.

    Attributes: `max_length`, `vocab_size` (added tokens included), `bos_token_id`, `eos_token_id`,
    `pad_token_id`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        max_length: int | None = None,
        pad_token: str | None = None,
    ):
        """From a Hugging Face folder: vocab.json + merges.txt, or tokenizer.json.

        `pad_token` stands for the one that the folder names.

        `max_length` None takes the folder's `model_max_length`, or CLIP's 77 if it names none. A
        missing or malformed file is a UserError naming it.
        """
        folder = Path(folder)
        config = read_json(folder / "tokenizer_config.json", optional=True)
        named = {**_NAMED, **{key: config[key] for key in _NAMED if config.get(key) is not None}}
        declared = config.get("added_tokens_decoder")
        if declared is None:
            mapped = read_json(folder / "special_tokens_map.json", optional=True)
            named.update({key: mapped[key] for key in _NAMED if mapped.get(key) is not None})
        if pad_token is not None:
            named["pad_token"] = pad_token
        self._named = {key: _Token.read(value, f"{folder}: {key}") for key, value in named.items()}
        self._vocab, self._merges, in_file = _read_bpe(folder)
        if declared is not None:
            where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
            if not isinstance(declared, dict):
                raise UserError(f"{where}: expected an object, got {quoted(declared)}")
            for key in declared:
                if not (key.isascii() and key.isdecimal()) or len(key) > 9:
                    raise UserError(f"{where}: {quoted(key)}, expected an id")
            added = [_Token.read(value, where, index=int(key)) for key, value in declared.items()]
        else:
            special = {token.content for token in self._named.values()}
            legacy = _ids(folder / "added_tokens.json", optional=True)
            added = [_legacy_token(text, index, text in special) for text, index in legacy.items()]
            added += [token for token in in_file if token.content not in legacy]
        self._added = tuple(sorted(added, key=lambda token: token.index))
        if max_length is None:
            limit = take(config, "model_max_length", float, folder / _SETTINGS, _CONTEXT)
            max_length = _CONTEXT if limit > _NO_LIMIT else int(limit)
        if max_length < 3:
            raise UserError(f"{folder}: max_length {max_length} leaves no room for a word")
        self.max_length = max_length
        self._backend = self._build(folder)

    def _build(self, folder: Path) -> tokenizers.Tokenizer:
        named = self._named
        backend = _backend(self._vocab, self._merges, named["unk_token"].content)
        for token in self._added:
            backend.add_tokens([token.added(special=False)])
            found = backend.token_to_id(token.content)
            if found != token.index:
                raise UserError(
                    f"{folder}: added token {quoted(token.content)} should have id {token.index}, "
                    f"but the vocabulary puts it at {found}"
                )
        present = {token.content for token in self._added}
        for token in named.values():
            if token.content not in present:
                backend.add_tokens([token.added(special=True)])
        ids = {key: backend.token_to_id(token.content) for key, token in named.items()}
        self.bos_token_id, self.eos_token_id = ids["bos_token"], ids["eos_token"]
        self.pad_token_id = ids["pad_token"]
        self.vocab_size = backend.get_vocab_size()
        backend.post_processor = processors.RobertaProcessing(
            (named["eos_token"].content, self.eos_token_id),
            (named["bos_token"].content, self.bos_token_id),
            False,
            False,
        )
        backend.enable_truncation(self.max_length)
        backend.enable_padding(
            length=self.max_length, pad_id=self.pad_token_id, pad_token=named["pad_token"].content
        )
        return backend

    @property
    def each(self) -> tuple[Self]:
        """It alone; a pipeline may have one for each of two text encoders."""
        return (self,)

    @property
    def shape(self) -> tuple[int]:
        """Of a text's ids."""
        return (self.max_length,)

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "b t"]:
        """Ids (b, max_length) int32: start, words, end, padding; long texts are cut before end."""
        if isinstance(texts, str):
            raise TypeError(f"tokenizer: expected a list of texts, got the single text {texts!r}")
        texts = list(texts)
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"tokenizer: expected texts, got {type(text).__name__}: {text!r}")
        encoded = self._backend.encode_batch([self.expand(text) for text in texts])
        ids = np.asarray([item.ids for item in encoded], np.int32)
        return ids.reshape(len(texts), self.max_length)

    def expand(self, text: str) -> str:
        """The text with every word of several vectors followed by its companions.

        As diffusers' `maybe_convert_prompt`, which misses words with capitals: they are found in
        lower case, and looked for as they were given.
        """
        known = {token.content.lower(): token.content for token in self._added}
        if not any(f"{word}_1" in known for word in known):
            return text
        for word in dict.fromkeys(x.lower() for x in self._backend.encode(text).tokens):
            if f"{word}_1" in known:
                whole = " ".join(_companions(known[word], set(known.values())))
                text = re.sub(re.escape(word), lambda _, whole=whole: whole, text, flags=re.I)
        return text

    def with_word(self, word: str, vectors: int = 1) -> Self:
        """A copy with a new word, whose tokens are `word`, "`word`_1", ... with the next ids.

        UserError for a word that is there already or is none, and more tokens than a text has.
        """
        if not word or re.search(r"\s", word):
            raise UserError(f"token {quoted(word)}: expected one word, such as '<dog>'")
        if not 1 <= vectors <= self.max_length - 2:
            raise UserError(
                f"vectors: {vectors}, expected 1 to {self.max_length - 2}, because a text has "
                f"{self.max_length} tokens with its start and its end"
            )
        words = [word, *(f"{word}_{i}" for i in range(1, vectors))]
        # Words are found in lower case.
        known = {x.lower() for x in self._backend.get_vocab(with_added_tokens=True)}
        # A companion of the new word that is there already would be taken for one of its own.
        for text in (*words, f"{word}_{vectors}"):
            if known & {text.lower(), text.lower() + _SUFFIX}:
                raise UserError(
                    f"token {quoted(text)} is in the tokenizer already; give the new word another "
                    "name"
                )
        own = copy.copy(self)
        first = self._backend.get_vocab_size()
        own._added = (
            *self._added,
            *(_legacy_token(x, first + i, False) for i, x in enumerate(words)),
        )
        own._backend = own._build(Path(word))
        return own

    def single(self, word: str) -> int:
        """The id of a word that is one token; UserError naming its tokens where it is more."""
        tokens = self._backend.encode(word, add_special_tokens=False)
        found = [x for x, own in zip(tokens.tokens, tokens.attention_mask, strict=True) if own]
        if len(found) != 1:
            parts = ", ".join(x.removesuffix(_SUFFIX) for x in found) or "nothing"
            raise UserError(
                f"initializer {quoted(word)}: is {counted(len(found), 'token')} ({parts}), "
                "expected a word that is one, such as a plainer name of the subject"
            )
        return int(tokens.ids[0])

    def save(self, folder: str | os.PathLike) -> None:
        """Write the four files of a Stable Diffusion tokenizer folder, which transformers loads."""
        named = {key: token.content for key, token in self._named.items()}
        flagged = {token.content: _flagged(token) for token in self._added}
        for token in self._named.values():
            if token.flags != _SPECIAL:
                flagged.setdefault(token.content, {**_flagged(token), "special": True})
        config: dict[str, Any] = {"model_max_length": self.max_length, **named}
        if flagged:
            ids = {str(self._backend.token_to_id(text)): flags for text, flags in flagged.items()}
            config["added_tokens_decoder"] = ids
        _write_folder(Path(folder), self._vocab, self._merges, config)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_length: int, folder: str | os.PathLike
) -> Tokenizer:
    """Train a CLIP-style BPE on `texts`, write it to `folder` and return it.

    The vocabulary is laid out as OpenAI's: the 256 bytes, the same closing a word, merges, start
    and, highest of all, end of text. So any text can be tokenized, and `vocab_size` is at least
    514. It is met exactly: where the texts give too few merges, reserved tokens that no text
    produces fill the gap before the start token.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fixed = 2 * len(letters) + 2
    if vocab_size < fixed:
        raise ValueError(f"train_tokenizer: vocab_size {vocab_size}, expected at least {fixed}")
    backend = _backend({_EOS: 0}, [], _EOS)
    trainer = trainers.BpeTrainer(
        # The trainer breaks ties between merges by token numbers, and numbers letters that close a
        # word in an order that differs from run to run, unless they are there beforehand.
        special_tokens=[letter + _SUFFIX for letter in letters],
        vocab_size=vocab_size,
        initial_alphabet=letters,
        end_of_word_suffix=_SUFFIX,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    learnt = json.loads(backend.to_str())["model"]["merges"]
    words = [*letters, *(letter + _SUFFIX for letter in letters)]
    known, merges = set(words), []
    for left, right in (pair.split(" ") if isinstance(pair, str) else pair for pair in learnt):
        if len(words) == vocab_size - 2:
            break
        merges.append((left, right))
        # Two merges can spell the same token ("a bc", "ab c"); it is listed once.
        if left + right not in known:
            known.add(left + right)
            words.append(left + right)
    spare = [f"<|reserved_{i}|>" for i in range(vocab_size - 2 - len(words))]
    vocab = {word: index for index, word in enumerate([*words, *spare, _BOS, _EOS])}
    folder = Path(folder)
    _write_folder(folder, vocab, merges, {"model_max_length": max_length, **_NAMED})
    return Tokenizer(folder)


def _write_folder(folder: Path, vocab: dict, merges: Iterable, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fixed = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "tokenizer_class": "CLIPTokenizer",
    }
    write_json(folder / "vocab.json", vocab, indent=None)
    write_json(folder / "tokenizer_config.json", fixed | config)
    write_json(folder / "special_tokens_map.json", {key: config[key] for key in _NAMED})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _backend(vocab: dict, merges: list, unknown: str) -> tokenizers.Tokenizer:
    """CLIP's text pipeline around a vocabulary, without start and end tokens."""
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=_SUFFIX,
            fuse_unk=False,
            unk_token=unknown,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _read_bpe(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[_Token]]:
    """The vocabulary, the merges and, from tokenizer.json, the added tokens."""
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    whole = folder / "tokenizer.json"
    if whole.exists():
        content = read_json(whole)
        model = take(content, "model", dict, whole, {})
        if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != _SUFFIX:
            raise UserError(
                f"{whole}: not a CLIP tokenizer (BPE with end_of_word_suffix {_SUFFIX!r})"
            )
        merges = [
            pair.split(" ") if isinstance(pair, str) else pair
            for pair in take(model, "merges", list, whole)
        ]
        added = []
        for token in take(content, "added_tokens", list, whole, []):
            index = token.get("id", -1) if isinstance(token, dict) else -1
            if type(index) is not int or not -1 <= index < _MOST_IDS:
                raise UserError(f"{whole}: added_tokens: id {quoted(index)}, expected a number")
            added.append(_Token.read(token, str(whole), index=index))
        vocab = _checked_ids(take(model, "vocab", dict, whole), whole)
        return vocab, _merges_of(merges, vocab, whole), added
    if not vocab_path.exists() and not merges_path.exists():
        raise UserError(f"{folder}: no tokenizer here (vocab.json + merges.txt, or tokenizer.json)")
    vocab = _ids(vocab_path)
    if not merges_path.exists():
        raise UserError(f"{merges_path}: missing, and there is no tokenizer.json instead")
    lines = read_text(merges_path).split("\n")
    lines = [line for line in lines if line and not line.startswith("#version")]
    pairs = [line.rstrip("\r").split(" ") for line in lines]
    return vocab, _merges_of(pairs, vocab, merges_path), []


def _merges_of(pairs: list[Any], vocab: dict[str, int], path: Path) -> list[tuple[str, str]]:
    """Merges, each of two tokens and to one that the vocabulary has."""
    merges = [_pair(pair, path) for pair in pairs]
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocab:
                raise UserError(
                    f"{path}: merge {quoted(left)} {quoted(right)}: {quoted(token)} is not in the "
                    "vocabulary"
                )
    return merges


def _ids(path: Path, *, optional: bool = False) -> dict[str, int]:
    """Tokens with their ids."""
    return _checked_ids(read_json(path, optional=optional), path)


def _checked_ids(vocab: dict[str, Any], path: Path) -> dict[str, int]:
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < _MOST_IDS:
            raise UserError(
                f"{path}: token {quoted(token)} has id {quoted(index)}, expected 0 to "
                f"{_MOST_IDS - 1}"
            )
    return vocab


def _pair(parts: Any, path: Path) -> tuple[str, str]:
    pair = isinstance(parts, list) and len(parts) == 2 and all(isinstance(x, str) for x in parts)
    if not pair:
        found = " ".join(map(str, parts)) if isinstance(parts, list) and len(parts) < 9 else parts
        raise UserError(f"{path}: a merge joins two tokens, got {quoted(found)}")
    return parts[0], parts[1]


def _legacy_token(text: str, index: int, special: bool) -> _Token:
    """An entry of added_tokens.json, with the flags that transformers gives it."""
    return _Token(text, (("normalized", not special), ("special", special)), index)


def _companions(word: str, known: set[str]) -> list[str]:
    """A word and those of `known` that go on with its vectors."""
    found = [word]
    while f"{word}_{len(found)}" in known:
        found.append(f"{word}_{len(found)}")
    return found


def _flagged(token: _Token) -> dict[str, Any]:
    defaults = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": token.content, **defaults, **dict(token.flags)}
