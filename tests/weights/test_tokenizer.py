"""The tokenizer against transformers' CLIPTokenizer on the same folders."""

import json
import shutil

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from jaxsynth.core.errors import UserError
from jaxsynth.weights.tokenizer import Tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = ["a photo of a cat", "a clean photo of the digit seven", "it's 5 o'clock!"] * 3
VOCAB, LENGTH = 600, 16
PROBES = [
    *TEXTS[:3],
    "",
    " ",
    "Zebra  ÉCOLE\n\tnaïve",
    "<|endoftext|> hi! <|startoftext|>",
    "x" * 100,
    "word " * 40,
    "!!! it's don't we'll",
    "1234 3.14 wow...",
    "e\u0301 versus é",
    "漢字 🎉 ünïcode",
    "İstanbul ǅ ﬁ",
    "a <sks> dog, <two> <Two>!",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, VOCAB, LENGTH, folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps(content))


def assert_agrees(folder):
    ours = Tokenizer(folder)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    expected = theirs(
        PROBES,
        padding="max_length",
        max_length=ours.max_length,
        truncation=True,
        return_tensors="np",
    ).input_ids
    got = ours(PROBES)
    assert got.dtype == np.int32 and got.shape == (len(PROBES), ours.max_length)
    np.testing.assert_array_equal(got, expected)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.pad_token_id == theirs.pad_token_id
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.vocab_size == len(theirs)
    return ours


def test_trained_folder_agrees_with_transformers(folder):
    ours = assert_agrees(folder)
    assert (ours.max_length, ours.vocab_size) == (LENGTH, VOCAB)
    # The end is the highest id, as legacy CLIP configs (eos_token_id 2) take for granted.
    assert ours.eos_token_id == VOCAB - 1 and ours.bos_token_id == VOCAB - 2


def test_training_learns_words_and_spells_the_rest(folder):
    ours = Tokenizer(folder)
    ids = ours(["photo", "photos", "🎉"])
    body = (ids < ours.bos_token_id).sum(axis=1)
    assert body[0] == 1, "a frequent word is one token"
    assert body[1] > 1
    assert body[2] == 4, "an unseen symbol is its bytes"
    vocab = json.loads((folder / "vocab.json").read_text())
    for letter in ByteLevel.alphabet():
        assert letter in vocab and letter + "</w>" in vocab


def test_training_is_deterministic_and_uses_the_whole_vocabulary(tmp_path):
    for name in ("one", "two"):
        train_tokenizer(iter(TEXTS), 530, LENGTH, tmp_path / name)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    vocab = json.loads((tmp_path / "one/vocab.json").read_text())
    assert sorted(vocab.values()) == list(range(530))
    assert not any(word.startswith("<|reserved") for word in vocab)
    few = train_tokenizer(["a"], 520, 5, tmp_path / "few")
    assert few.vocab_size == 520 and few.eos_token_id == 519
    assert_agrees(tmp_path / "few")
    with pytest.raises(ValueError, match="vocab_size 513, expected at least 514"):
        train_tokenizer(TEXTS, 513, LENGTH, tmp_path / "small")


def test_newer_folders_with_tokenizer_json_agree(folder, tmp_path):
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "vocab.json").exists()
    ours = assert_agrees(tmp_path)
    np.testing.assert_array_equal(ours(PROBES), Tokenizer(folder)(PROBES))


def test_another_padding_token_as_in_sd2(copy):
    edit(copy / "special_tokens_map.json", pad_token="!")
    ours = assert_agrees(copy)
    assert ours.pad_token_id == 0
    assert ours(["a"])[0, -1] == 0


def test_special_tokens_with_flags(copy):
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    edit(copy / "special_tokens_map.json", eos_token={"content": "<|endoftext|>", **flags})
    assert_agrees(copy)


def test_added_tokens_agree_and_survive_saving(copy, tmp_path):
    edit(copy / "special_tokens_map.json", pad_token="!")
    edit(copy / "added_tokens.json", **{"<sks>": VOCAB, "<Two>": VOCAB + 1})
    ours = assert_agrees(copy)
    assert ours.vocab_size == VOCAB + 2
    assert VOCAB in ours(["a <sks> dog"])
    ours.save(tmp_path / "saved")
    again = assert_agrees(tmp_path / "saved")
    np.testing.assert_array_equal(again(PROBES), ours(PROBES))
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "saved")
    theirs.save_pretrained(tmp_path / "theirs")
    np.testing.assert_array_equal(Tokenizer(tmp_path / "theirs")(PROBES), ours(PROBES))


def test_length_comes_from_the_folder_or_the_caller(copy):
    assert Tokenizer(copy, max_length=7)(["word " * 9]).shape == (1, 7)
    edit(copy / "tokenizer_config.json", model_max_length=10**30)
    assert Tokenizer(copy).max_length == 77
    (copy / "tokenizer_config.json").unlink()
    assert Tokenizer(copy).max_length == 77
    with pytest.raises(UserError, match="max_length 2 leaves no room"):
        Tokenizer(copy, max_length=2)


def test_long_texts_end_with_the_end_token(folder):
    ours = Tokenizer(folder)
    ids = ours(["word " * 50])
    assert ids[0, 0] == ours.bos_token_id and ids[0, -1] == ours.eos_token_id
    assert ours([]).shape == (0, LENGTH)


def test_wrong_inputs_are_named(folder):
    ours = Tokenizer(folder)
    with pytest.raises(TypeError, match="expected a list of texts, got the single text 'a cat'"):
        ours("a cat")
    with pytest.raises(TypeError, match="expected texts, got int: 3"):
        ours(["a", 3])


def test_broken_folders_are_named(copy, tmp_path):
    with pytest.raises(UserError, match="no tokenizer here"):
        Tokenizer(tmp_path)
    edit(copy / "added_tokens.json", **{"<sks>": VOCAB + 5})
    with pytest.raises(UserError, match=f"'<sks>' should have id {VOCAB + 5}"):
        Tokenizer(copy)
    (copy / "added_tokens.json").unlink()
    merges = (copy / "merges.txt").read_text()
    (copy / "merges.txt").write_text(merges + "a b c\n")
    with pytest.raises(UserError, match=r"merges\.txt: a merge joins two tokens, got 'a b c'"):
        Tokenizer(copy)
    (copy / "merges.txt").write_text(merges + "q zzz\n")
    with pytest.raises(UserError, match=r"merges\.txt: merge 'q' 'zzz': 'zzz' is not in the vocab"):
        Tokenizer(copy)
    (copy / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"merges\.txt: missing"):
        Tokenizer(copy)
    (copy / "merges.txt").write_text(merges)
    (copy / "vocab.json").write_text("{")
    with pytest.raises(UserError, match=r"vocab\.json: not valid JSON"):
        Tokenizer(copy)
    (copy / "vocab.json").unlink()
    with pytest.raises(UserError, match=r"vocab\.json: missing"):
        Tokenizer(copy)
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {"a": 0}, "merges": ["a t</w>"]}
    (copy / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(UserError, match=r"tokenizer\.json: merge 'a' 't</w>': 't</w>' is not in"):
        Tokenizer(copy)
    (copy / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece"}}))
    with pytest.raises(UserError, match=r"tokenizer\.json: not a CLIP tokenizer"):
        Tokenizer(copy)
