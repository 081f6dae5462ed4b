"""The data set that a config names.

Six kinds of sources stand behind `load_dataset`: scikit-learn's digits and procedural pictures (so
that everything runs without a download), folders of photos in classes or with captions, folders of
clips, and TensorFlow Datasets. All give the same `Dataset`; labels are known without decoding a
single image.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from jaxsynth.data import prompts
from jaxsynth.data.dataset import SOURCES, DataConfig, Dataset, SourceError
from jaxsynth.data.sources import builtin
from jaxsynth.data.sources.captioned import load_captioned
from jaxsynth.data.sources.clips import load_clips
from jaxsynth.data.sources.digits import load_digits
from jaxsynth.data.sources.folder import Loaded, load_folder
from jaxsynth.data.sources.tfds import load_tfds
from jaxsynth.data.views import select_classes

LOADERS: dict[str, Callable[[DataConfig], Loaded]] = dict(
    zip(
        SOURCES,
        (load_digits, builtin.load_builtin, load_folder, load_captioned, load_clips, load_tfds),
        strict=True,
    )
)
# The settings that each source reads, beside those that are about classes and prompts.
READ = {
    "digits": {"name", "image_size", "test_split"},
    "builtin": {"name", "image_size", "test_fraction", "split_seed", "images_per_class"},
    "folder": {"name", "path", "image_size", "test_fraction", "split_seed", "train_split",
               "test_split", "test_path", "labels"},
    "captions": {"name", "path", "image_size", "test_fraction", "split_seed"},
    "clips": {"name", "path", "image_size", "test_fraction", "split_seed"},
    "tfds": {"name", "path", "image_size", "test_fraction", "split_seed", "train_split",
             "test_split"},
}  # fmt: skip
ALWAYS = {"source", "template", "class_names", "display_names", "raw_names"}


def source_of(config: DataConfig) -> str:
    """The source that a config names or implies. SourceError for a setting that it ignores."""
    source = config.source
    if not source and config.path:
        source = "folder"
    elif not source and config.name:
        source = "builtin" if config.name in builtin.NAMES else "tfds"
    source = source or "digits"
    if source not in SOURCES:
        raise SourceError(f"source: expected one of {', '.join(SOURCES)}, found {source!r}")
    defaults = DataConfig()
    for name in (field.name for field in fields(config)):
        unread = name not in READ[source] | ALWAYS
        if unread and getattr(config, name) != getattr(defaults, name):
            able = [other for other, read in READ.items() if name in read]
            raise SourceError(
                f"{name}: {getattr(config, name)!r} is not used by source {source!r}; leave it "
                f"out, or choose a source that uses it: --config.data.source={' or '.join(able)}"
            )
    return source


def load_dataset(config: DataConfig) -> Dataset:
    """The data set a config names. Raises `SourceError` where the data is not as expected."""
    source = source_of(config)
    class_names, train, test, split = LOADERS[source](config)
    given = dict(config.display_names)
    name = config.name
    if source == "digits":
        name = name or "digits"
        if not config.raw_names:
            given = dict(zip(class_names, prompts.DIGIT_NAMES, strict=True)) | given
    elif source in ("folder", "captions", "clips"):
        name = name or Path(os.path.abspath(Path(config.path).expanduser())).name
    dataset = Dataset(
        name=name,
        class_names=class_names,
        display_names=prompts.display_names(class_names, given, raw=config.raw_names),
        template=prompts.check_template(config.template or prompts.default_template(name)),
        train=train,
        test=test,
        split=split,
    )
    if config.class_names:
        dataset = select_classes(dataset, config.class_names)
    prompts.check_distinct(dataset)
    return dataset
