"""The benchmarks: both sides compute the same before anything is timed. No time is asserted."""

import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from jaxsynth.bench import run as bench
from jaxsynth.bench.timing import Timing, Watch, alternate, busy_seconds, cores
from jaxsynth.errors import UsageError


def printer(width: int = 80) -> Console:
    """Prints as the command does into a pipe."""
    return Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True)


@pytest.mark.parametrize("name", ["train-step", "generate"])
def test_both_sides_compute_the_same(name, tmp_path):
    for package in ("torch", "diffusers", "peft"):
        pytest.importorskip(package)
    out = printer()
    path = tmp_path / "figures.json"
    rows = bench.run(
        name,
        peer="torch",
        cases=("tiny", "tiny-cls"),
        reps=1,
        shortest=0.0,
        json=path,
        console=out,
    )
    assert [row.case for row in rows] == ["tiny", "tiny-cls"]
    assert all(row.difference < 1e-3 and row.ratio > 0 for row in rows)
    figures = json.loads(path.read_text())
    assert figures["rows"][1]["peer"]["seconds"] and "torch" in figures["versions"]
    assert "Largest difference of the two sides' results: " in out.file.getvalue()


ROW = bench.Row(
    "tiny-cls",
    "10 adapters, batch 8 each",
    images=80,
    first=123.4,
    ours=Timing((11.0, 12.0, 13.0)),
    peer=Timing((23.0, 24.0, 27.0)),
    difference=2e-5,
    others=0.01,
)


def shown(rows, peer="torch") -> str:
    out = printer()
    bench._show(out, "train-step", rows, peer)
    return out.file.getvalue()


def test_the_table_fits_a_pipe_of_80_columns():
    text = shown([ROW])
    assert max(map(len, text.splitlines())) <= 80
    # Nothing is cut, and nothing but what is meant to begins a new line.
    assert "…" not in text
    title, _, heading, _, _, first, second, note = text.splitlines()
    assert title == "bench train-step: median of 3 measurements, taken in turn"
    assert heading.split() == ["first"]
    assert " ".join(first.split()) == "tiny-cls 123.4 s 12000 ms ±8% 24000 ms ±8% 2.00x"
    assert second.split()[:5] == ["10", "adapters,", "batch", "8", "each"]
    assert " ".join(second.split()[5:]) == "6.7 images/s 3.3 images/s 2.00-2.09"
    assert note == "Largest difference of the two sides' results: 2e-05"
    one_side = shown([replace(ROW, peer=None, difference=None)], "").splitlines()
    assert one_side[0] == "bench train-step: median of 3 measurements" and len(one_side) == 7


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"others": 0.45}, "other processes took 45% of the cores' time"),
        ({"ours": Timing((1.0, 2.0, 4.0))}, "the measurements of one side spread by ±75%"),
        ({"peer": Timing((1.0, 2.0, 4.0))}, "the measurements of one side spread by ±75%"),
    ],
)
def test_no_ratio_where_the_machine_was_busy(change, reason):
    row = replace(ROW, **change)
    assert ROW.disturbed == replace(ROW, others=None).disturbed == "" and row.disturbed == reason
    text = shown([row])
    assert (
        "busy" in text and f"{row.ratio:.2f}" not in text and max(map(len, text.split("\n"))) <= 80
    )
    assert f"tiny-cls: no ratio, {reason}; run it on an idle machine" in bench._notes([row])
    assert bench._figures(row)["ratio"] is None and bench._figures(ROW)["ratio"] == 2.0


def test_time_of_other_processes():
    stat = (
        "cpu  9 9 9 9 9 9 9 9 0 0\n"
        "cpu0 100 20 30 9999 8888 5 6 39 50 0\n"
        "cpu1 1000 0 0 9999 8888 0 0 0 0 0\n"
        "intr 12345\n"
    )
    assert busy_seconds(stat, {0}, 100) == 2.0 and busy_seconds(stat, {0, 1}, 100) == 12.0
    assert busy_seconds(stat, {0, 2}, 100) is None and busy_seconds("", {0}, 100) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/stat")
def test_another_process_on_a_core_is_noticed():
    watch = Watch()
    # On every core, so that some of it is on ours whatever else runs.
    spin = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    children = [subprocess.Popen([sys.executable, "-c", spin]) for _ in cores()]
    assert [child.wait() for child in children] == [0] * len(children)
    assert watch.others() > 0.1


def test_each_side_is_measured_in_turn():
    made = []
    found = alternate(
        {"a": lambda: made.append("a"), "b": lambda: made.append("b")}, 3, shortest=0.0
    )
    assert made == ["a", "b"] + ["a", "b"] * 3
    assert [len(timing.seconds) for timing in found.values()] == [3, 3]


def test_ratio_is_that_of_medians_and_pairs_are_kept():
    ours, peer = Timing((1.0, 2.0, 4.0)), Timing((3.0, 3.0, 4.0))
    row = bench.Row("case", "", images=4, first=9.0, ours=ours, peer=peer, difference=0.0)
    assert row.ratio == 1.5 and row.ratios == [1.0, 1.5, 3.0]
    assert ours.spread == 0.75


def test_mistakes_are_named():
    with pytest.raises(UsageError, match=r"no case 'big', expected tiny, tiny-cls, sd-shaped"):
        bench.run("generate", cases=("big",), console=printer())
    with pytest.raises(UsageError, match="--reps is 0"):
        bench.run("train-step", reps=0, console=printer())


def test_a_missing_peer_says_what_to_install():
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from jaxsynth.errors import UserError\n"
        "try:\n    import jaxsynth.bench.torch_peer\n"
        "except UserError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "peft is not installed (pip install" in found.stdout
