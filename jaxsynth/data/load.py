"""The data set that a config names.

Four kinds of sources stand behind `load_dataset`: scikit-learn's digits and procedural pictures (so
that everything runs without a download), folders of photos, and TensorFlow Datasets. All give the
same `Dataset`; labels are known without decoding a single image.
"""

from __future__ import annotations

from pathlib import Path

from jaxsynth.data import prompts
from jaxsynth.data.dataset import DataConfig, Dataset, SourceError
from jaxsynth.data.sources.builtin import load_builtin
from jaxsynth.data.sources.digits import digits_source
from jaxsynth.data.sources.folder import load_folder
from jaxsynth.data.sources.tfds import load_tfds
from jaxsynth.data.views import held_out, select_classes


def load_dataset(config: DataConfig) -> Dataset:
    """The data set a config names. Raises `SourceError` where the data is not as expected."""
    given = dict(config.display_names)
    if config.source == "digits":
        name = config.name or "digits"
        class_names = tuple(str(i) for i in range(10))
        if not config.raw_names:
            given = dict(zip(class_names, prompts.DIGIT_NAMES, strict=True)) | given
        train, test = held_out(digits_source(config.image_size), class_names, 0.5, 0)
        split = "half of each class held out, the same always"
    elif config.source == "folder":
        name = config.name or Path(config.path).name
        class_names, train, test, split = load_folder(config)
    elif config.source == "builtin":
        name = config.name
        class_names, train, test, split = load_builtin(config)
    elif config.source == "tfds":
        name = config.name
        class_names, train, test, split = load_tfds(config)
    else:
        raise SourceError(
            f"source: expected digits, builtin, folder or tfds, found {config.source!r}"
        )
    template = config.template or prompts.default_template("digits" if name == "digits" else name)
    dataset = Dataset(
        name=name,
        class_names=class_names,
        display_names=prompts.display_names(class_names, given, raw=config.raw_names),
        template=prompts.check_template(template),
        train=train,
        test=test,
        split=split,
    )
    return select_classes(dataset, config.class_names) if config.class_names else dataset
