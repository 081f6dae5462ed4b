"""The metrics file: readable, cut back at a resume, and unhurt by a crash or a NaN."""

import numpy as np
import pytest

from jaxsynth.core.errors import UserError
from jaxsynth.training.metrics import MetricsWriter, read_metrics


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.resume(0)
        for step in (10, 20, 30):
            metrics.write(step, {"loss": np.float32(step), "each": np.array([1.0, np.nan])})
    path = tmp_path / "metrics.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 40, "lo')  # a crash in the middle of a line
    assert len(read_metrics(path)) == 3
    with MetricsWriter(tmp_path) as metrics:
        metrics.resume(20)
        metrics.write(30, {"loss": 0.5})
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[0] == {"step": 10, "loss": 10.0, "each": [1.0, None]}
    assert lines[2]["loss"] == 0.5


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_tensorboard_files_lie_beside(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(tmp_path, name="fine", tensorboard=True) as metrics:
        metrics.write(1, {"loss": 0.5, "each": np.array([1.0, 2.0])})
    assert list((tmp_path / "fine").glob("events.out.*"))
