"""One image in two classes, or among training and test images: told, since figures depend on it."""

from collections.abc import Sequence

import numpy as np

from jaxsynth.core.words import counted
from jaxsynth.data.dataset import Dataset


def repeats(dataset: Dataset) -> list[str]:
    """A sentence for images of the same content that lie in two classes, and one for those that lie
    among the training and the test images; none where all is well."""
    train, test = ((source, source.record_digests()) for source in (dataset.train, dataset.test))
    first: dict[str, tuple[str, int]] = {}
    classes: list[tuple[str, str]] = []
    for source, digests in (train, test):
        for id_, label, digest in zip(source.ids, np.asarray(source.labels), digests, strict=True):
            before, known = first.setdefault(digest, (id_, int(label)))
            if known != label:
                classes.append((before, id_))
    where: dict[str, str] = {}
    for id_, digest in zip(train[0].ids, train[1], strict=True):
        where.setdefault(digest, id_)
    both = [
        (where[digest], id_)
        for id_, digest in zip(test[0].ids, test[1], strict=True)
        if digest in where
    ]
    found = []
    if classes:
        found.append(
            f"{dataset.name}: {counted(len(classes), 'image')} in more than one class, "
            f"{_example(classes)}; move or remove what is wrong"
        )
    if both:
        found.append(
            f"{dataset.name}: {counted(len(both), 'test image')} also among the training images, "
            f"{_example(both)}, so that accuracies may be too high; remove one of each"
        )
    return found


def _example(pairs: Sequence[tuple[str, str]]) -> str:
    return "such as {} and {}".format(*pairs[0])
