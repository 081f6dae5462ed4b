"""What is printed: durations, plain lines without a terminal, one line per stage."""

import io

from rich.console import Console

from jaxsynth.core import console
from jaxsynth.core.console import duration, progress, stage_line


def _plain():
    return Console(file=io.StringIO(), soft_wrap=True)


def test_durations():
    assert [duration(x) for x in (0.04, 9.9, 12, 59.6, 185, 3723)] == [
        "0.0 s",
        "9.9 s",
        "12 s",
        "60 s",
        "3:05",
        "1:02:03",
    ]


def test_a_log_file_gets_a_plain_line_now_and_then(monkeypatch):
    out, now = _plain(), [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with progress("draw [a]", 100, start=20, out=out) as bar:
        for _ in range(40):
            now[0] += 0.5
            bar.advance(1, "loss 0.5")
    lines = out.file.getvalue().splitlines()
    assert lines == [
        "draw [a]: 40/100  2.0 it/s  ETA 30 s  loss 0.5",
        "draw [a]: 60/100  2.0 it/s  ETA 20 s  loss 0.5",
    ]


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress("draw", 10, out=out) as bar:
        bar.update(10, "done")
    assert "10/10" in out.file.getvalue()


def test_a_terminal_that_cannot_go_back_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    out = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress("draw", 10, out=out) as bar:
        now[0] += 60
        bar.update(5, "done")
    assert "draw: 5/10" in out.file.getvalue()


def test_a_stage_leaves_one_line():
    out = _plain()
    stage_line("adapters", 61.2, "4 [classes]", out=out)
    assert out.file.getvalue().split() == ["adapters", "1:01", "4", "[classes]"]
