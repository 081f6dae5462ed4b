"""Each family of prompts has its sentences, mixes keep their shares, and banks are checked."""

from collections import Counter

import numpy as np
import pytest

from jaxsynth.core.errors import UserError
from jaxsynth.data.dataset import Dataset
from jaxsynth.data.prompt_banks import PromptConfig, make_bank
from jaxsynth.data.sources.arrays import ArraySource


@pytest.fixture
def pets() -> Dataset:
    source = ArraySource(np.zeros((2, 4, 4, 3), np.uint8), np.arange(2, dtype=np.int32), "ab")
    return Dataset("pets", ("cat", "house_dog"), ("cat", "house dog"), "a photo of a {}", source,
                   source)  # fmt: skip


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    texts = {
        "hypernyms.tsv": "cat\tfeline\nhouse dog\tcanine\n",
        "places.txt": "kitchen\ngarden\n",
        "captions.csv": 'cat,"asleep, on a mat"\nhouse_dog,running\n',
        "contexts.jsonl": '{"class": "cat", "text": "a cat at dusk"}\n'
        '{"class": "house_dog", "text": "two dogs"}\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return {name.split(".")[0]: str(tmp_path / name) for name in texts}


@pytest.mark.parametrize(
    ("family", "used", "wanted"),
    [
        ("name", (), {"cat"}),
        ("template", (), {"a photo of a cat"}),
        ("hypernym", ("hypernyms",), {"cat, feline"}),
        (
            "hypernym",
            ("hypernyms", "places"),
            {"cat, feline inside kitchen", "cat, feline inside garden"},
        ),
        ("caption", ("captions",), {"cat, asleep, on a mat"}),
        ("context", ("contexts",), {"a cat at dusk"}),
    ],
)
def test_each_family_has_its_sentences(pets, files, family, used, wanted):
    bank = make_bank(pets, PromptConfig({family: 1.0}, **{name: files[name] for name in used}))
    found = {bank.texts[bank.choose(0, 0, i)] for i in range(40)}
    assert found == wanted
    assert not found & {bank.texts[bank.choose(0, 1, i)] for i in range(40)}


def test_clips_templates_stand_for_every_class(pets):
    bank = make_bank(pets, PromptConfig({"templates": 1.0}))
    assert len(bank.texts) == 14
    found = {bank.texts[bank.choose(0, 1, i)] for i in range(200)}
    assert len(found) == 7 and "art of the house dog." in found


def test_a_mix_keeps_its_shares_and_more_images_change_none(pets, files):
    bank = make_bank(pets, PromptConfig({"name": 3.0, "context": 1.0}, contexts=files["contexts"]))
    drawn = Counter(bank.texts[bank.choose(5, 0, i)] for i in range(1000))
    assert 0.7 < drawn["cat"] / 1000 < 0.8
    first = [bank.choose(5, 0, i) for i in range(10)]
    assert first == [bank.choose(5, 0, i) for i in range(20)][:10]
    assert first != [bank.choose(6, 0, i) for i in range(10)]


def test_another_text_is_another_bank(pets, files, tmp_path):
    config = PromptConfig({"context": 1.0}, contexts=files["contexts"])
    before = make_bank(pets, config).digest
    assert make_bank(pets, config).digest == before
    (tmp_path / "contexts.jsonl").write_text(
        '{"class": "cat", "text": "x"}\n{"class": "house_dog", "text": "y"}\n'
    )
    assert make_bank(pets, config).digest != before


@pytest.mark.parametrize(
    ("family", "field", "text", "message"),
    [
        ("caption", "captions", "", "an empty bank"),
        ("caption", "captions", "cat\tasleep\n", "no text for class 'house_dog'"),
        ("caption", "captions", "cat\ta\nhorse\tb\n", "line 2: class 'horse' is not one of pets"),
        ("context", "contexts", "cat\n", "line 1: 'cat', expected a class and a text"),
    ],
)
def test_a_bank_that_will_not_do_is_refused_with_file_and_line(
    pets, tmp_path, family, field, text, message
):
    path = tmp_path / "bank.tsv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        make_bank(pets, PromptConfig({family: 1.0}, **{field: str(path)}))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": {}}, "no family"),
        ({"weights": {"poem": 1.0}}, "'poem', expected"),
        ({"weights": {"name": 0.0}}, "'name' is 0.0"),
        ({"captions": "x.tsv"}, "captions: a file, but no weight"),
    ],
)
def test_settings_that_contradict_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PromptConfig(**fields)


def test_a_missing_file_is_named(pets):
    with pytest.raises(UserError, match=r"prompts\.captions: 'nowhere\.tsv'"):
        make_bank(pets, PromptConfig({"caption": 1.0}, captions="nowhere.tsv"))
    with pytest.raises(UserError, match=r"prompts\.hypernyms: no file is given"):
        make_bank(pets, PromptConfig({"hypernym": 1.0}))
