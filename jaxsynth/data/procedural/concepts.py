"""Concepts: what an image editor can be told to make of a picture, by family.

"Denoised neural weights" (arXiv 2407.11966) has three families, artistic, character and facial
modification; a language model lists the concepts of each, another one paraphrases them, and
combinations give more. Here the lists are built in, read from a file, or asked of any language
model behind an OpenAI-compatible server (llama.cpp, vLLM, Ollama, ...).

The built-in ones are looks ("watercolour", "statue", "hair") in colours, and every look stands for
procedural edits (`edits`): they need no diffusion editor and no faces. So "red hair" tints the top
of whatever picture it is given; it stands for what a real editor does, and is no claim to be it.
"""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxsynth.core.documents import parse_json, read_text, take
from jaxsynth.core.errors import UserError, quoted, shown
from jaxsynth.core.io import write_json
from jaxsynth.data.procedural import edits
from jaxsynth.data.procedural.edits import Edit

FAMILIES = ("artistic", "character", "facial modification")
# Of all colours, those that a look can have: black and white hide the picture.
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "grey")

# What a look does: operations and regions, its colour is put in.
_LOOKS: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "artistic": {
        "watercolour": (("painting", "all"),),
        "sketch": (("sketch", "all"),),
        "comic": (("poster", "all"), ("outlines", "all")),
        "mosaic": (("mosaic", "all"),),
        "halftone": (("dots", "all"),),
        "engraving": (("stripes", "all"),),
        "relief": (("relief", "all"),),
        "haze": (("blur", "all"),),
    },
    "character": {
        "statue": (("relief", "centre"),),
        "ghost": (("blur", "centre"), ("tint", "centre")),
        "zombie": (("tint", "centre"), ("outlines", "centre")),
        "robot": (("mosaic", "centre"),),
        "alien": (("negative", "centre"),),
        "knight": (("checks", "centre"),),
    },
    "facial modification": {
        "hair": (("tint", "top"),),
        "hat": (("checks", "top"),),
        "glasses": (("tint", "middle"), ("outlines", "middle")),
        "beard": (("stripes", "bottom"),),
        "lips": (("tint", "bottom"),),
        "freckles": (("dots", "centre"),),
        "shadows": (("tint", "shadows"),),
        "highlights": (("tint", "lights"),),
    },
}
_WORDINGS = {
    "artistic": ("make it a {}", "a picture as {}", "turn it into {}"),
    "character": ("become a {}", "turn into a {}", "as a {}"),
    "facial modification": ("with {}", "give it {}", "add {}"),
}


@dataclass(frozen=True)
class Concept:
    """One edit: `family`, the `prompt` that names it, and other wordings of the same.

    `edits` do it procedurally; without any, its images are an image editor's business.
    """

    family: str
    prompt: str
    paraphrases: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()

    def __post_init__(self):
        check_families((self.family,))
        if not self.prompt.strip():
            raise UserError(f"a concept of the family {shown(self.family)} has an empty prompt")

    @property
    def texts(self) -> tuple[str, ...]:
        """All wordings, the prompt first."""
        return (self.prompt, *self.paraphrases)

    def apply(self, images: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n h w 3"]:
        """The images after the concept's procedural edits. UserError where it has none."""
        if not self.edits:
            raise UserError(
                f"concept {self.prompt!r} has no procedural edits: its images need an editor "
                "(generation.edited)"
            )
        return edits.edit(images, self.edits)


def check_families(families: Sequence[str]) -> None:
    """UserError for a family that is not among `FAMILIES`, or for none."""
    if not families:
        raise UserError(f"families: none, expected some of {', '.join(FAMILIES)}")
    for family in families:
        if family not in FAMILIES:
            raise UserError(
                f"concept family {shown(family)}: expected one of {', '.join(FAMILIES)}"
            )


def builtin_concepts(
    families: Sequence[str] = FAMILIES,
    *,
    colours: Sequence[str] = COLOURS,
    combinations: int = 0,
    seed: int = 0,
) -> list[Concept]:
    """Every look of the families in every colour, and so many combinations of two of them.

    Combined are concepts of different looks, in an order that follows from `seed`. UserError for an
    unknown family or colour, or more combinations than there are.
    """
    check_families(families)
    if unknown := set(colours) - set(COLOURS):
        raise UserError(f"colours {sorted(unknown)}: expected some of {', '.join(COLOURS)}")
    singles = {
        (look, colour): concept_of(f"{colour} {look}", family)
        for family in families
        for look in _LOOKS[family]
        for colour in colours
    }
    pairs = [(a, b) for a in singles for b in singles if a[0] < b[0]]
    if combinations > len(pairs):
        raise UserError(f"combinations: {combinations}, there are only {len(pairs)}")
    order = np.random.default_rng(seed).permutation(len(pairs))[:combinations]
    combined = [_combined(singles[pairs[i][0]], singles[pairs[i][1]]) for i in order]
    return [*singles.values(), *combined]


def _combined(first: Concept, second: Concept) -> Concept:
    """Both edits, one after the other; it counts to the first one's family."""
    wordings = zip(first.paraphrases, second.paraphrases, strict=True)
    return Concept(
        first.family,
        f"{first.prompt} and {second.prompt}",
        tuple(f"{a} and {b}" for a, b in wordings),
        first.edits + second.edits,
    )


def concept_of(prompt: str, family: str, paraphrases: Sequence[str] = ()) -> Concept:
    """The concept of a prompt, with the procedural edits that its words name, if they name any.

    Looks ("red hair") and edits ("stripes on the top") may be joined by "and". Without
    `paraphrases` it gets the built-in wordings of its family.
    """
    check_families((family,))
    wordings = paraphrases or [text.format(prompt) for text in _WORDINGS[family]]
    return Concept(family, prompt, tuple(wordings), _edits_of(prompt))


def _edits_of(prompt: str) -> tuple[Edit, ...]:
    looks = {name: steps for known in _LOOKS.values() for name, steps in known.items()}
    found: list[Edit] = []
    for clause in re.split(r",|\band\b", prompt.lower()):
        words = re.findall(r"[a-z]+", clause)
        colour = next((word for word in words if word in edits.COLOURS), "")
        look = next((word for word in words if word in looks), None)
        if look is not None:
            found += [Edit(operation, colour, region) for operation, region in looks[look]]
            continue
        try:
            found += edits.parse(clause)
        except UserError:  # words of no known edit: half an edit would be another concept
            return ()
    return tuple(found)


def split_concepts(
    concepts: Sequence[Concept], train: int, unseen: int, *, seed: int
) -> tuple[list[Concept], list[Concept]]:
    """So many concepts to learn from, and so many others to be judged on, drawn by `seed`.

    The others are combinations of what is learnt: those come first whose every word is in a prompt
    of the former. UserError if there are not as many.
    """
    if min(train, unseen) < 1 or train + unseen > len(concepts):
        raise UserError(
            f"concepts: {train} to train on and {unseen} unseen ones, of {len(concepts)}"
        )
    order = np.random.default_rng(seed).permutation(len(concepts))
    learnt, rest = ([concepts[i] for i in part] for part in (order[:train], order[train:]))
    known = {word for concept in learnt for word in _words(concept)}
    rest.sort(key=lambda concept: not _words(concept) <= known)
    return learnt, rest[:unseen]


def _words(concept: Concept) -> set[str]:
    return set(re.findall(r"\w+", concept.prompt.lower()))


def save_concepts(path: str | Path, concepts: Sequence[Concept]) -> None:
    """Write the JSON that `read_concepts` reads."""
    items = [asdict(c) | {"edits": [asdict(e) for e in c.edits]} for c in concepts]
    write_json(path, {"concepts": items}, indent=2, sort_keys=True)


def read_concepts(path: str | Path, family: str = "") -> list[Concept]:
    """The concepts of a file, in its order.

    A .json holds {"concepts": [{"family", "prompt", "paraphrases", "edits"}, ...]} or that list
    alone; only the prompt is needed where `family` is given. Any other file has a prompt in each
    line, # starts a comment. UserError naming the file and the entry for anything else, for an
    unknown family and for a prompt that comes twice.
    """
    path = Path(path)
    text = read_text(path)
    if path.suffix == ".json":
        found = _from_json(path, text, family)
    else:
        lines = [line.split("#")[0].strip() for line in text.splitlines()]
        found = [
            _named(f"{path}, line {number}", lambda line=line: concept_of(line, family))
            for number, line in enumerate(lines, 1)
            if line
        ]
    if not found:
        raise UserError(f"{path}: no concepts")
    seen: set[str] = set()
    for concept in found:
        if concept.prompt in seen:
            raise UserError(f"{path}: the prompt {shown(concept.prompt)} comes twice")
        seen.add(concept.prompt)
    return found


def _from_json(path: Path, text: str, family: str) -> list[Concept]:
    items = parse_json(text, path, Any)
    items = items.get("concepts") if isinstance(items, dict) else items
    if not isinstance(items, list):
        raise UserError(f"{path}: expected a list of concepts, or it under 'concepts'")
    return [
        _named(f"{path}, concept {n}", lambda item=item: _from_item(item, family))
        for n, item in enumerate(items)
    ]


def _from_item(item: Any, family: str) -> Concept:
    known = {"family", "prompt", "paraphrases", "edits"}
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise UserError(f"expected an object with a prompt, found {quoted(item)}")
    if extra := set(item) - known:
        raise UserError(f"unknown key {quoted(min(extra))}, expected some of {sorted(known)}")
    where = "the concept"
    own = take(item, "family", str, where, family)
    paraphrases = take(item, "paraphrases", tuple[str, ...], where, ())
    concept = concept_of(item["prompt"], own, paraphrases)
    if "edits" not in item:
        return concept
    try:
        steps = [
            edits.parse(step) if isinstance(step, str) else (Edit(**step),)
            for step in take(item, "edits", list, where)
        ]
    except (TypeError, ValueError) as error:
        raise UserError(f"edits: {error}") from None
    return Concept(concept.family, concept.prompt, concept.paraphrases, sum(steps, ()))


def _named(where: str, make) -> Concept:
    try:
        return make()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@dataclass(frozen=True)
class LanguageServer:
    """A language model behind an OpenAI-compatible server, `url` ending in its version ("/v1").

    `timeout` is in seconds, for each answer; `api_key` may be empty, as local servers have none.
    huggingface_hub's client does not serve here: it reaches no local server where HF_HUB_OFFLINE is
    set, as on clusters, and sends the hub's token along.
    """

    url: str
    model: str
    api_key: str = ""
    temperature: float = 0.8
    timeout: float = 120.0

    def ask(self, prompt: str, *, seed: int) -> str:
        """The answer to one message. UserError naming the server for anything but an answer."""
        where = f"{self.url.rstrip('/')}/chat/completions"
        if not where.startswith(("http://", "https://")):
            raise UserError(f"language server {self.url!r}: expected an http address")
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "seed": seed,
        }
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(where, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                found = parse_json(answer.read(_MOST_ANSWERED), where)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(300).decode(errors="replace")
            raise UserError(f"{where}: status {error.code}: {said}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: {error}") from None
        try:
            content = found["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{where}: the answer has no choices[0].message.content") from None
        if not isinstance(content, str):
            raise UserError(f"{where}: the answer is no text: {quoted(content)}")
        return content


_WHAT = {
    "artistic": "artistic styles that a photo can be redrawn in",
    "character": "characters that the person in a photo can be turned into",
    "facial modification": "changes of a face in a photo (hair, glasses, make-up, age)",
}
# Bytes of an answer; what is longer is cut and then no JSON.
_MOST_ANSWERED = 16 << 20
# How often a question is asked before the model is given up.
_PATIENCE = 8


def ask_concepts(
    server: LanguageServer, family: str, count: int, *, paraphrases: int = 3, seed: int = 0
) -> list[Concept]:
    """`count` concepts of a family from a language model, each with so many paraphrases.

    Asks again, naming what it has, until there are enough. UserError for an unknown family, or if
    the model stops bringing new ones.
    """
    check_families((family,))
    prompts = _collect(
        server,
        f"List {{count}} different {_WHAT[family]}. One in a line, two to five words, no "
        "explanations.",
        count,
        seed,
    )
    ask = "Say {count} times in other words, at most eight, one wording in a line: {prompt}"
    found = []
    for number, prompt in enumerate(prompts, 1):
        text = ask.replace("{prompt}", prompt)
        wordings = _collect(server, text, paraphrases, seed + number, known=(prompt,))
        found.append(Concept(family, prompt, tuple(wordings), _edits_of(prompt)))
    return found


def _collect(
    server: LanguageServer, text: str, count: int, seed: int, known: Sequence[str] = ()
) -> list[str]:
    """`count` different lines of the server's answers, none of them among `known`."""
    found: list[str] = []
    for number in range(_PATIENCE):
        question = text.replace("{count}", str(count - len(found)))
        if found:
            question += f" Not these: {'; '.join(found)}."
        for line in server.ask(question, seed=seed + 1000 * number).splitlines():
            # Numbers, bullets and quotes are the model's, as is a line that announces the list.
            words = re.sub(r"^[\s\d.):*•-]+", "", line).strip().rstrip(".").strip("\"'* ")
            taken = {old.lower() for old in (*known, *found)}
            if words and words.lower() not in taken and not words.endswith(":"):
                found.append(words)
        if len(found) >= count:
            return found[:count]
    raise UserError(
        f"{server.url}: {len(found)} of {count} different lines in {_PATIENCE} answers to {text!r}"
    )
