"""Embeddings of Textual Inversion: files of every tool both ways, with diffusers as the judge."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import TextualInversionLoaderMixin
from safetensors.numpy import save_file

from jaxsynth.cli import main as cli
from jaxsynth.core.errors import UserError
from jaxsynth.weights.adapters.embeddings import (
    FORMATS,
    Embedding,
    read_embedding,
    with_embedding,
    with_new_word,
    write_embedding,
)
from jaxsynth.weights.hf import load_pipeline

WORD, WIDTH = "<dahlia>", 16
VECTORS = np.random.default_rng(0).standard_normal((3, WIDTH)).astype("f4")
TEXTS = [
    f"a photo of the digit {WORD}",
    f"{WORD}, {WORD}!",
    "a photo of <dahlia>s",
    f"one {WORD} two <dahlia>_1",
    "no new word",
]


class Peer(TextualInversionLoaderMixin):
    """The part of a diffusers pipeline that embeddings are loaded into."""

    def __init__(self, folder):
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.components = {"tokenizer": self.tokenizer, "text_encoder": self.text_encoder}
        self.device, self.hf_device_map = torch.device("cpu"), None

    def prompt(self, text: str) -> str:
        return self.maybe_convert_prompt(text, self.tokenizer)

    def states(self, texts):
        ids = self.tokenizer(
            [self.prompt(text) for text in texts],
            padding="max_length", max_length=12, truncation=True, return_tensors="pt",
        ).input_ids  # fmt: skip
        with torch.no_grad():
            return ids.numpy(), self.text_encoder(ids).last_hidden_state.numpy()


@pytest.fixture(scope="module")
def pipeline(base_folder):
    return load_pipeline(base_folder)


def agree(pipeline, peer, word=WORD):
    texts = [text.replace(WORD, word) for text in TEXTS]
    expanded = [pipeline.tokenizer.expand(text) for text in texts]
    assert expanded == [peer.prompt(text) for text in texts]
    if f"{word}_1" in peer.tokenizer.get_vocab():
        assert expanded[0] == f"a photo of the digit {word} {word}_1 {word}_2"
    ids, states = peer.states(texts)
    np.testing.assert_array_equal(pipeline.tokenizer(texts), ids)
    found = pipeline.text_encoder(jnp.asarray(ids)).last_hidden_state
    np.testing.assert_allclose(found, states, atol=1e-5)


@pytest.mark.parametrize("to", FORMATS)
def test_files_of_ours_are_read_by_diffusers(base_folder, pipeline, tmp_path, to):
    file = write_embedding(tmp_path, Embedding(WORD, VECTORS), to)
    peer = Peer(base_folder)
    # kohya's file has no word in it, which diffusers must be told.
    given = {"token": WORD} if to == "kohya" else {}
    peer.load_textual_inversion(str(tmp_path), weight_name=file.name, **given)
    agree(with_embedding(pipeline, Embedding(WORD, VECTORS)), peer)


def tensors(**more):
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.tensor(VECTORS)}, **more}


def parameter_dict(**more):
    found = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.tensor(VECTORS))})
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": found, **more}


# Of each tool: what it saves, the file's name, its word, and whether diffusers reads it.
THEIRS = {
    "diffusers": ({WORD: VECTORS}, "learned_embeds.safetensors", WORD, True),
    "diffusers of one vector": ({WORD: VECTORS[0]}, "one.safetensors", WORD, True),
    "diffusers .bin": ({WORD: torch.tensor(VECTORS)}, "learned_embeds.bin", WORD, True),
    "half": ({WORD: VECTORS.astype("f2")}, "half.safetensors", WORD, True),
    "a word with a dot": ({"<v1.5>": VECTORS}, "dot.safetensors", "<v1.5>", True),
    "A1111": (tensors(name=WORD, step=9, sd_checkpoint=None), "a.pt", WORD, True),
    "the authors": (tensors(), "mine.pt", "mine", False),
    "the authors, parameters": (parameter_dict(), "old.pt", "old", False),
    "kohya": ({"emb_params": VECTORS}, "dahlia.safetensors", "dahlia", False),
}


@pytest.mark.parametrize("name", THEIRS)
def test_files_of_theirs_are_read(base_folder, pipeline, tmp_path, name):
    content, file, word, known = THEIRS[name]
    if file.endswith(".safetensors"):
        save_file(content, tmp_path / file)
    else:
        torch.save(content, tmp_path / file)
    found = read_embedding(tmp_path / file)
    assert found.word == word and found.vectors.dtype == np.float32
    expected = VECTORS[:1] if "one vector" in name else VECTORS
    np.testing.assert_allclose(found.vectors, expected, atol=2e-3 if name == "half" else 0)
    assert read_embedding(tmp_path / file, "<mine>").word == "<mine>"
    if known:
        peer = Peer(base_folder)
        peer.load_textual_inversion(str(tmp_path), weight_name=file)
        agree(with_embedding(pipeline, found), peer, word)


def test_the_command_converts_them(tmp_path, capfd):
    save_file({WORD: VECTORS}, tmp_path / "learned_embeds.safetensors")
    target = tmp_path / "dahlia.pt"
    assert cli.main(["convert", str(tmp_path), str(target), "--to=a1111"]) == 0
    assert "'<dahlia>' of 3 vectors" in capfd.readouterr().out
    back = read_embedding(target)
    assert back.word == WORD and np.array_equal(back.vectors, VECTORS)
    assert cli.main(["convert", str(target), str(tmp_path / "x"), "--to=peft"]) != 0
    assert "is an embedding" in capfd.readouterr().err


REFUSED = {
    "half of SDXL's": ({"clip_l": VECTORS}, "expected clip_l and clip_g, the vectors for SDXL's"),
    "an adapter": ({"a.lora_down.weight": VECTORS, "a.lora_up.weight": VECTORS}, "is an adapter"),
    "several words": ({"<a>": VECTORS, "<b>": VECTORS}, "holds 2 words"),
    "another shape": ({WORD: VECTORS[None]}, r"float32 \(1, 3, 16\), expected float vectors"),
    "no vectors": ({WORD: VECTORS[:0]}, "empty or not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_embedding_is_named(tmp_path, name):
    content, message = REFUSED[name]
    save_file(
        {key: np.ascontiguousarray(x) for key, x in content.items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(UserError, match=message) as error:
        read_embedding(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_an_embedding_of_another_base_is_named(pipeline):
    other = Embedding(WORD, np.zeros((1, 768), np.float32))
    message = r"dog.pt: vectors of width 768 \(Stable Diffusion 1\), and the base's .* width 16:"
    with pytest.raises(UserError, match=message):
        with_embedding(pipeline, other, "dog.pt")


@pytest.mark.parametrize(
    ("word", "vectors", "initializer", "message"),
    [
        (WORD, 1, "a photo", r"initializer 'a photo': is 2 tokens \(a, photo\)"),
        (WORD, 1, "", r"initializer '': is 0 tokens"),
        (WORD, 11, "photo", "vectors: 11, expected 1 to 10"),
        ("photo", 1, "photo", "token 'photo' is in the tokenizer already"),
        ("two words", 1, "photo", "token 'two words': expected one word"),
    ],
)
def test_words_that_cannot_be_are_refused(pipeline, word, vectors, initializer, message):
    with pytest.raises(UserError, match=message):
        with_new_word(pipeline, word, vectors, initializer)


def test_a_word_is_given_once(pipeline):
    once = with_embedding(pipeline, Embedding(WORD, VECTORS))
    for word in (WORD, "<DAHLIA>", "<Dahlia>_2"):
        with pytest.raises(UserError, match=r"b.pt: token .* is in the tokenizer already"):
            with_embedding(once, Embedding(word, VECTORS[:1]), "b.pt")
    two = with_embedding(once, Embedding("<Other>", VECTORS[:2] + 1))
    table = two.text_encoder.text_model.embeddings.token_embedding.embedding[...]
    # Capitals do not matter, neither in the word nor in the text.
    for text in ("<dahlia> <Other>", "<Dahlia> <other>"):
        ids, rows = two.tokenizer([text]), np.concatenate([VECTORS, VECTORS[:2] + 1])
        np.testing.assert_array_equal(table[ids[0, 1:6]], rows)
