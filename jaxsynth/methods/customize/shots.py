"""Which records are learned from."""

from jaxsynth.data.dataset import Dataset, ImageSource
from jaxsynth.data.splits import few_shot


def shots_of(data: Dataset, shots: int, seed: int) -> ImageSource:
    """So many images or clips of each class, or all (0)."""
    return few_shot(data, shots, seed).train_source(data) if shots else data.train
