"""The benchmarks: both sides compute the same before anything is timed. No time is asserted."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from jaxsynth.bench import run as bench
from jaxsynth.bench.timing import Timing, alternate
from jaxsynth.errors import UsageError


@pytest.mark.parametrize("name", list(bench.CASES))
def test_both_sides_compute_the_same(name, tmp_path):
    for package in ("torch", "diffusers", "peft"):
        pytest.importorskip(package)
    out = Console(file=io.StringIO(), width=300)
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
    text = out.file.getvalue()
    assert "torch ms" in text and "tiny-cls" in text


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
        bench.run("generate", cases=("big",), console=Console(file=io.StringIO()))
    with pytest.raises(UsageError, match="--reps is 0"):
        bench.run("train-step", reps=0, console=Console(file=io.StringIO()))


def test_a_missing_peer_says_what_to_install():
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from jaxsynth.errors import UserError\n"
        "try:\n    import jaxsynth.bench.torch_peer\n"
        "except UserError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "peft is not installed (pip install" in found.stdout
