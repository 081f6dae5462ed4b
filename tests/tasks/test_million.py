"""Training streams latents at constant memory; on a million of them in `million.py`."""

import pytest

from tests.tasks.million import BATCH, train, write


@pytest.mark.slow
def test_memory_does_not_grow_with_the_latents(tmp_path):
    write(tmp_path / "latents.npz", 240_000)
    marks = train(tmp_path, 240_000)
    assert len(marks) >= 5 and marks[-1][0] >= 200 * BATCH
    # What has been read since the first mark would be 25 MB.
    assert marks[-1][2] - marks[1][2] < 12 * 2**20
