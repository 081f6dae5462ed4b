"""Where numbers go during training: always a JSONL file, TensorBoard beside it if asked.

One line per report: {"step": 100, "loss": 0.12, ...}. After a crash the file runs ahead of the last
checkpoint; `resume` drops those lines, so that the finished file equals an uninterrupted run's.
`clu` would do this too, but its writers import TensorFlow.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxsynth.core.documents import read_lines, take
from jaxsynth.core.io import write_text


class MetricsWriter:
    """Appends to `<folder>/<name>.jsonl`. Use one name per call of `fit`: each has its own steps.

    Only the first process of a multi-process run writes.
    """

    def __init__(self, folder: str | Path, *, name: str = "metrics", tensorboard: bool = False):
        self.path = Path(folder) / f"{name}.jsonl"
        self._tensorboard = tensorboard
        self._events = None
        self._file = None
        self._active = jax.process_index() == 0

    def resume(self, step: int) -> None:
        """Forget every line after `step` (and a line cut off by a crash); 0 forgets all."""
        if not self._active:
            return
        self.close()
        kept = [json.dumps(line) + "\n" for line in read_metrics(self.path) if line["step"] <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(kept))
        self._open(step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line. Values are scalars, or vectors (one entry per stacked adapter)."""
        if not self._active:
            return
        if self._file is None:
            self._open(step)
        plain = {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **plain}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, float(np.mean(value)), step)

    def write_speed(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to `speed.jsonl`, apart from the metrics, which are equal in every run."""
        if self._active:
            with open(self.path.with_name("speed.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Close the files; a later `write` opens them again."""
        for file in (self._file, self._events):
            if file is not None:
                file.close()
        self._file = self._events = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _open(self, step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - lives with the object
        if self._tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "tensorboard=True needs tensorboardX: pip install 'jaxsynth[tensorboard]'"
                ) from error
            self._events = SummaryWriter(str(self.path.with_suffix("")), purge_step=step + 1)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file in order; a missing file has none.

    Raises:
        UserError: a line other than a cut-off last one is no JSON; file and line are named.
    """
    path = Path(path)
    found = list(read_lines(path, cut=True)) if path.is_file() else []
    for line in found:
        take(line, "step", int, path)
    return found


def _plain(value: Any) -> Any:
    """JSON's own types; JSON has no NaN, so what is not finite becomes None."""
    array = np.asarray(value)
    if array.ndim:
        return [_plain(item) for item in array]
    number = array.item()
    return None if isinstance(number, float) and not math.isfinite(number) else number
