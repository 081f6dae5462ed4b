"""Prompts: which sentence stands for a class.

The per-data-set words are those of DataDream (arXiv 2407.10910), whose prompt is "a {word}photo of
a {class}". Its code puts class names into it as they are on disk ("AnnualCrop", "apple_pie");
`display_name` makes them readable and `raw=True` keeps them as they are.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxsynth.core.documents import read_text
from jaxsynth.core.errors import UserError
from jaxsynth.data.dataset import Dataset, SourceError

DEFAULT_TEMPLATE = "a photo of a {}"

# The word before "photo" of DataDream's ten data sets.
WORDS = {
    "imagenet": "",
    "caltech101": "",
    "pets": "pet ",
    "fgvc_aircraft": "aircraft ",
    "cars": "car ",
    "eurosat": "satellite ",
    "dtd": "texture ",
    "flowers102": "flower ",
    "food101": "food ",
    "sun397": "scene ",
}
TEMPLATES = {name: f"a {word}photo of a {{}}" for name, word in WORDS.items()} | {
    "digits": "a photo of the digit {}",
    "cifar10": "a photo of a {}",
}
# Other names of the same data sets, as TFDS and torchvision have them.
ALIASES = {
    "imagenet2012": "imagenet",
    "imagenet_100": "imagenet",
    "oxford_iiit_pet": "pets",
    "oxford_pets": "pets",
    "aircraft": "fgvc_aircraft",
    "cars196": "cars",
    "stanford_cars": "cars",
    "oxford_flowers102": "flowers102",
    "flowers": "flowers102",
}
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# The seven that CLIP's authors found to do as well on ImageNet as their eighty (their notebook on
# prompts for ImageNet); for zero-shot classifiers that average over templates.
IMAGENET_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

# Those of Textual Inversion for an object and for a style (arXiv 2208.01618).
OBJECT_TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
STYLE_TEMPLATES = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a good painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)
_NAMED_TEMPLATES = {
    "imagenet7": IMAGENET_TEMPLATES,
    "object": OBJECT_TEMPLATES,
    "style": STYLE_TEMPLATES,
}

# Two words or more run together, each of three letters or more: "AnnualCrop" but not "McLaren".
_CAMEL = re.compile(r"(?:[A-Z][a-z]{2,}){2,}")


def canonical_name(name: str) -> str:
    """The key of a data set in `TEMPLATES`: lower case, without a TFDS configuration or version."""
    key = name.lower().split("/")[0].split(":")[0].replace("-", "_")
    return ALIASES.get(key, key)


def default_template(name: str) -> str:
    """The template of a data set, "a photo of a {}" for one that is not listed."""
    return TEMPLATES.get(canonical_name(name), DEFAULT_TEMPLATE)


def check_template(template: str) -> str:
    """The template itself if it has exactly one `{}`."""
    if template.count("{}") != 1 or template.replace("{}", "").count("{"):
        raise ValueError(f"template {template!r}: expected exactly one {{}} for the class name")
    return template


def read_templates(name: str) -> tuple[str, ...]:
    """Those of a name, or of a text file, one a line; UserError naming file and line.

    The names are "imagenet7", and "object" and "style" of Textual Inversion.
    """
    if name in _NAMED_TEMPLATES:
        return _NAMED_TEMPLATES[name]
    path, names = Path(name).expanduser(), ", ".join(_NAMED_TEMPLATES)
    if not path.is_file():
        raise UserError(f"templates {name!r}: no such file, and none of {names}")
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: holds no template")
    try:
        return tuple(check_template(line) for line in lines)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def display_name(name: str, *, raw: bool = False) -> str:
    """Readable words of a class name: "apple_pie" -> "apple pie", "AnnualCrop" -> "annual crop"."""
    if raw:
        return name
    words = " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())
    if _CAMEL.fullmatch(words):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words).lower()
    return words or name


def display_names(
    class_names: Sequence[str], given: Mapping[str, str] | None = None, *, raw: bool = False
) -> tuple[str, ...]:
    """The display name of each class; `given` maps class names to names chosen by the user."""
    given = dict(given or {})
    unknown = sorted(set(given) - set(class_names))
    if unknown:
        raise ValueError(f"display_names: no class is called {unknown}; found {list(class_names)}")
    return tuple(given.get(name, display_name(name, raw=raw)) for name in class_names)


def check_distinct(dataset: Dataset) -> None:
    """SourceError where two classes get prompts that CLIP or a person reads alike.

    CLIP's tokenizer lower-cases, joins white space, composes accents and takes wide letters for
    plain ones. Characters that are not seen tell nobody classes apart.
    """
    seen: dict[str, str] = {}
    for class_name, words in zip(dataset.class_names, dataset.display_names, strict=True):
        key = _alike(words)
        if key in seen:
            raise SourceError(
                f"{dataset.name}: classes {seen[key]!r} and {class_name!r} get the same prompt "
                f"({key!r}), so that no model can tell them apart; merge them, rename one, or give "
                'one another name for prompts, as in --config.data.display_names="{'
                f"{class_name!r}: 'another name'"
                '}"'
            )
        seen[key] = class_name


def _alike(words: str) -> str:
    seen = (
        unicodedata.normalize("NFKC", char) if unicodedata.east_asian_width(char) == "F" else char
        for char in words
        if unicodedata.category(char) != "Cf"
    )
    return " ".join(unicodedata.normalize("NFC", "".join(seen)).lower().split())


def prompt(dataset: Dataset, class_: int | str) -> str:
    """The prompt of a class, given by label or by (raw) class name."""
    if isinstance(class_, str):
        if class_ not in dataset.class_names:
            raise ValueError(
                f"class {class_!r} is not in {dataset.name}: found {list(dataset.class_names)}"
            )
        class_ = dataset.class_names.index(class_)
    return dataset.template.format(dataset.display_names[class_])


def prompts(dataset: Dataset) -> tuple[str, ...]:
    """The prompt of each class, in label order."""
    return tuple(prompt(dataset, label) for label in range(len(dataset.class_names)))
