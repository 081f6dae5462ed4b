"""Prompt sources: which sentences the images of a class are drawn from.

The families of the synthetic-clone studies (Sariyildiz et al. 2023, arXiv 2212.08420; Fan et al.
2023, arXiv 2312.04567), each with its bank of sentences for a class c:

    name        c
    template    the data set's own template, "a photo of a c"
    templates   CLIP's templates, or those of a file
    hypernym    "c, h", or "c, h inside b" where there are places b; h from a file
    caption     "c, caption", captions from a file
    context     sentences from a file, such as a language model's, as they are

Several are mixed by weight. Which sentence image i of a class is drawn from follows from the seed,
the class and i alone, so that more images add sentences and change none.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxsynth.core.documents import parse_json, read_text, take
from jaxsynth.core.errors import UserError, quoted
from jaxsynth.core.places import MaybeFile, Templates
from jaxsynth.data.dataset import Dataset
from jaxsynth.data.prompts import prompts, read_templates

FAMILIES = ("name", "template", "templates", "hypernym", "caption", "context")


@dataclass(frozen=True)
class PromptConfig:
    """Which families of prompts, and their files.

    weights: the share of each family; shares need not add up to 1.
    templates: "imagenet7", or a file with a template a line.
    hypernyms, captions, contexts: a file of (class, text) lines, tab-separated (.tsv, .txt), CSV,
        or JSON lines with "class" and "text". Classes are the data set's names or display names.
    places: a file with a place a line.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: {"template": 1.0})
    templates: Templates = "imagenet7"
    hypernyms: MaybeFile = ""
    places: MaybeFile = ""
    captions: MaybeFile = ""
    contexts: MaybeFile = ""

    def __post_init__(self):
        if not self.weights:
            raise ValueError(f"weights: no family of prompts, expected some of {FAMILIES}")
        for name, weight in self.weights.items():
            if name not in FAMILIES:
                raise ValueError(f"weights: {name!r}, expected some of {', '.join(FAMILIES)}")
            if weight <= 0:
                raise ValueError(f"weights: {name!r} is {weight}, expected above 0")
        used = {"hypernyms": "hypernym", "captions": "caption", "contexts": "context",
                "places": "hypernym"}  # fmt: skip
        for name, family in used.items():
            if getattr(self, name) and family not in self.weights:
                raise ValueError(f"{name}: a file, but no weight for the family {family!r}")


@dataclass(frozen=True)
class PromptBank:
    """Distinct sentences, and for each family its share and each class's numbers among them."""

    texts: tuple[str, ...]
    shares: tuple[float, ...]
    members: tuple[tuple[tuple[int, ...], ...], ...]  # by family, then by class

    def choose(self, seed: int, label: int, index: int) -> int:
        """The number of the sentence that image `index` of class `label` is drawn from."""
        if len(self.texts) == len(self.members[0]) and len(self.shares) == 1:
            return self.members[0][label][0]
        rng = np.random.default_rng([seed, label, index])
        family = int(rng.choice(len(self.shares), p=self.shares))
        own = self.members[family][label]
        return own[int(rng.integers(len(own)))]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all of it."""
        content = json.dumps([self.texts, self.shares, self.members])
        return hashlib.sha256(content.encode()).hexdigest()


def make_bank(dataset: Dataset, config: PromptConfig) -> PromptBank:
    """The sentences of a data set's classes; UserError naming file and class without one."""
    numbers: dict[str, int] = {}
    members = []
    for family in config.weights:
        found = _FAMILIES[family](dataset, config)
        for name, texts in zip(dataset.class_names, found, strict=True):
            if not texts:
                raise UserError(f"prompts.{family}: no text for class {name!r}")
        members.append(
            tuple(tuple(numbers.setdefault(t, len(numbers)) for t in texts) for texts in found)
        )
    whole = sum(config.weights.values())
    shares = tuple(weight / whole for weight in config.weights.values())
    return PromptBank(tuple(numbers), shares, tuple(members))


Texts = Sequence[Sequence[str]]


def _hypernyms(dataset: Dataset, config: PromptConfig) -> Texts:
    places = _lines(_named(config.places, "places")) if config.places else []
    found = _by_class(dataset, config.hypernyms, "hypernyms")
    if not places:
        return [
            [f"{name}, {text}" for text in texts]
            for name, texts in zip(dataset.display_names, found, strict=True)
        ]
    return [
        [f"{name}, {text} inside {place}" for text in texts for place in places]
        for name, texts in zip(dataset.display_names, found, strict=True)
    ]


def _captions(dataset: Dataset, config: PromptConfig) -> Texts:
    found = _by_class(dataset, config.captions, "captions")
    return [
        [f"{name}, {text}" for text in texts]
        for name, texts in zip(dataset.display_names, found, strict=True)
    ]


_FAMILIES = {
    "name": lambda dataset, _: [[name] for name in dataset.display_names],
    "template": lambda dataset, _: [[text] for text in prompts(dataset)],
    "templates": lambda dataset, config: [
        [template.format(name) for template in read_templates(config.templates)]
        for name in dataset.display_names
    ],
    "hypernym": _hypernyms,
    "caption": _captions,
    "context": lambda dataset, config: _by_class(dataset, config.contexts, "contexts"),
}


def _named(path: str, field_name: str) -> Path:
    found = Path(path).expanduser()
    if not path or not found.is_file():
        what = f"{path!r}: no such file" if path else "no file is given"
        raise UserError(f"prompts.{field_name}: {what}; expected lines of class and text")
    return found


def _lines(path: Path) -> list[str]:
    found = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not found:
        raise UserError(f"{path}: an empty bank of prompts")
    return found


def _by_class(dataset: Dataset, path: str, field_name: str) -> list[list[str]]:
    """Each class's texts, in the file's order."""
    file = _named(path, field_name)
    labels = {name: i for i, name in enumerate(dataset.display_names)}
    labels |= {name: i for i, name in enumerate(dataset.class_names)}
    found: list[list[str]] = [[] for _ in dataset.class_names]
    for number, name, text in _pairs(file):
        if name not in labels:
            raise UserError(
                f"{file}, line {number}: class {quoted(name)} is not one of {dataset.name}: "
                f"{', '.join(dataset.class_names[:8])}"
            )
        found[labels[name]].append(text)
    for name, texts in zip(dataset.class_names, found, strict=True):
        if not texts:
            raise UserError(f"{file}: no text for class {name!r} (prompts.{field_name})")
    return found


def _pairs(path: Path) -> Iterator[tuple[int, str, str]]:
    """(number, class, text) of every line."""
    for number, line in enumerate(_lines(path), 1):
        if path.suffix == ".jsonl":
            where = f"{path}, line {number}"
            entry = parse_json(line, where)
            yield number, take(entry, "class", str, where), take(entry, "text", str, where)
            continue
        cells = next(csv.reader([line])) if path.suffix == ".csv" else line.split("\t", 1)
        if len(cells) != 2 or not all(cell.strip() for cell in cells):
            raise UserError(f"{path}, line {number}: {quoted(line)}, expected a class and a text")
        yield number, cells[0].strip(), cells[1].strip()
