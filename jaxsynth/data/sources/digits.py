"""scikit-learn's handwritten digits, which come with it."""

import numpy as np
from PIL import Image

from jaxsynth.data.dataset import DataConfig, ImageSource, SourceError
from jaxsynth.data.sources.arrays import ArraySource
from jaxsynth.data.views import held_out

VALIDATION = "validation"


def load_digits(
    config: DataConfig,
) -> tuple[tuple[str, ...], ImageSource, ImageSource, str]:
    """Class names, train, test, and how they were split.

    With the `test_split` "validation" half of the training digits stand for the test digits, which
    nothing sees: to choose settings by.
    """
    names = tuple(str(i) for i in range(10))
    train, test = held_out(digits_source(config.image_size), names, 0.5, 0)
    if not config.test_split:
        return names, train, test, "half of each class held out, the same always"
    if config.test_split != VALIDATION:
        raise SourceError(
            f"test_split: digits have no {config.test_split!r}, only {VALIDATION!r}, or nothing "
            "for their test images"
        )
    train, test = held_out(train, names, 0.5, 0)
    return names, train, test, "half of the training digits; the test digits are not seen"


def digits_source(image_size: int = 0) -> ArraySource:
    """scikit-learn's 1797 handwritten digits: 8 x 8 grey, enlarged (bicubic), white on black."""
    from sklearn import datasets  # slow to import, only this source needs it

    size = image_size or 32
    data = datasets.load_digits()
    small = np.round(data.images * (255 / 16)).astype(np.uint8)
    grey = [
        np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC)) for x in small
    ]
    images = np.repeat(np.stack(grey)[..., None], 3, axis=-1)
    ids = tuple(f"{label}/{i:04d}" for i, label in enumerate(data.target))
    return ArraySource(images, data.target.astype(np.int32), ids)
