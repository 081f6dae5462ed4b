"""Two sets of images, from wherever they lie, to the figures that compare them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsynth.core.errors import UserError
from jaxsynth.core.words import counted
from jaxsynth.data.dataset import ImageSource
from jaxsynth.data.names import natural_key
from jaxsynth.data.sources.files import FileSource, is_image, refuse, visible
from jaxsynth.data.sources.folder import folder_source, is_beside
from jaxsynth.data.store import ImageStore
from jaxsynth.quality.features import FeatureExtractor, read_images
from jaxsynth.quality.metrics import QualityConfig, evaluate, least_samples


def compare(
    real_images: ImageSource | str | Path,
    generated_images: ImageSource | str | Path,
    extractor: FeatureExtractor,
    config: QualityConfig = QualityConfig(),
    *,
    reference: str,
    seed: int,
    per_class: bool = False,
    class_names: Sequence[str] = (),
) -> dict[str, Any]:
    """`metrics.evaluate` of the two sets' features, and which network made them; for JSON.

    `reference` says in words which images the real ones are, such as "held-out images" or "training
    images" (against which a generator that copies its training set looks perfect): every distance
    is from them, and the result carries the words.

    Either set is a source or a path for `open_images`. Images are as they are stored: cut both to
    one size first (`DataConfig.image_size`) where the real ones are photos of any shape, since
    Inception's own protocols stretch them to a square.

    "features" is the extractor's identity. With `per_class`, "classes" holds the same figures
    within each label, and "left_out" says of each class with too few images how many it has.
    `class_names`, in label order, name them; a store's or folder's own must agree with them.
    UserError for too few images, no reference, and labels or class names that do not agree.
    """
    if not reference.strip():
        raise UserError("reference: expected which images the real ones are, in words")
    real, real_names = _opened(real_images)
    generated, generated_names = _opened(generated_images)
    labels = [np.asarray(source.labels) for source in (real, generated)]
    if per_class:
        names = _agreed(tuple(class_names), real_names, generated_names, labels)
    features = [extractor.of_source(source) for source in (real, generated)]
    result = {
        "reference": reference,
        "features": extractor.identity,
        **evaluate(*features, config, seed=seed),
    }
    if not per_class:
        return result
    least = least_samples(config)
    classes, left_out = {}, {}
    for label, name in enumerate(names):
        parts = [values[own == label] for values, own in zip(features, labels, strict=True)]
        counts = {"real": len(parts[0]), "generated": len(parts[1])}
        if counts["real"] < 2 * least or counts["generated"] < least:
            left_out[name] = counts
        else:
            classes[name] = evaluate(*parts, config, seed=seed)
    return {**result, "classes": classes, "left_out": left_out}


def open_images(path: str | Path) -> tuple[ImageSource, tuple[str, ...]]:
    """The images at a path, and the names of their classes: () if they have none.

    An image store, a folder of class folders, a folder of image files, or an .npz of samples.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return read_images(path), ()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder or .npz file")
    if (path / "store.json").exists():
        store = ImageStore(path)
        return store, store.class_names
    children = visible(path)
    if any(child.is_dir() for child in children):
        source, names = folder_source(path)
        return source, tuple(names)
    problems = {
        child: "not an image file"
        for child in children
        if not is_image(child) and not is_beside(child)
    }
    refuse(path, problems)
    ids = sorted((child.name for child in children if is_image(child)), key=natural_key)
    if not ids:
        raise UserError(f"{path}: no images and no class folders")
    return FileSource(path, tuple(ids), np.zeros(len(ids), np.int32)), ()


def _opened(images: ImageSource | str | Path) -> tuple[ImageSource, tuple[str, ...]]:
    if isinstance(images, str | Path):
        return open_images(images)
    return images, tuple(getattr(images, "class_names", ()))


def _agreed(given, real_names, generated_names, labels) -> tuple[str, ...]:
    """The names of the labels 0, 1, ..., which must mean the same class in both sets."""
    named = {"class_names": given, "real": real_names, "generated": generated_names}
    named = {where: names for where, names in named.items() if names}
    count = 1 + max(int(own.max(initial=-1)) for own in labels)
    if not named:
        return tuple(map(str, range(count)))
    (first, names), *others = named.items()
    for where, found in others:
        if found != names:
            raise UserError(
                f"per_class: the classes of {where} are {list(found)}, of {first} {list(names)}"
            )
    if len(names) < count:
        raise UserError(
            f"per_class: labels up to {count - 1}, but {first} has {counted(len(names), 'class')}"
        )
    return names
