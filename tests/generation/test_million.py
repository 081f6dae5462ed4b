"""A store of a great many images is filled at constant memory; a million are `million.py`'s."""

import pytest

from tests.generation.million import fill


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path):
    marks = fill(tmp_path / "store", 40_000, 8)
    sizes = [size for _, _, size in marks]
    assert marks[-1][0] == 40_000 and len(sizes) >= 10
    # A line of the manifest has 200 bytes and an image 270: kept, 36,000 would be 16 MB.
    assert sizes[-1] - sizes[1] < 4 * 2**20
    rates = [rate for _, rate, _ in marks]
    assert min(rates[5:]) > max(rates[:5]) / 5
