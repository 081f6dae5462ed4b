"""`jaxsynth plan`: what it prints, what it advises, and mistakes as one line."""

import importlib.util
import sys
import types
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import pytest

from jaxsynth.cli import main as cli
from jaxsynth.report.plans import slices_table
from jaxsynth.training.chips import CHIPS
from jaxsynth.training.sharding import MeshConfig, make_mesh
from tests.training.linear import linear_program

SLICES = ("v5e:2x4", "v5e:2x4", "v5p:2x2x2")


@dataclass(frozen=True)
class Config:
    batch_size: int = 64
    mesh: MeshConfig = field(default_factory=MeshConfig)


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Calls `plan` of a small method in `tmp_path` and returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXSYNTH_CACHE", "off")
    monkeypatch.setenv("COLUMNS", "200")
    plan = lambda config, mesh: [linear_program(mesh, config.batch_size)]  # noqa: E731
    monkeypatch.setitem(
        sys.modules, "linear_method", types.SimpleNamespace(Config=Config, plan=plan)
    )
    monkeypatch.setitem(cli.METHODS, "linear", "linear_method")
    Path("linear.py").write_text("def get_config():\n    return {'method': 'linear'}\n")

    def call(*argv):
        code = cli.main(("plan", "--config=linear.py", *argv))
        return code, *capfd.readouterr()

    return call


def test_memory_work_and_traffic_are_printed(command):
    code, out, err = command("--devices=8", "--fsdp=2")
    assert (code, err) == (0, "") and "linear on 8 x cpu (data=4, fsdp=2, tensor=1)" in out
    for text in ("temporary", "GFLOP", "received", "all-reduce", "f32[256,256]", "a note"):
        assert text in out
    assert "needs" not in out and "at least" not in out
    assert "The whole run" in out and "1,234" in out
    code, out, _ = command("--devices=8", "--config.mesh.data=2", "--config.mesh.tensor=4")
    assert code == 0 and "(data=2, fsdp=1, tensor=4)" in out


def test_the_compiler_may_be_quick(command):
    """Said, and over with the plan."""
    before = jax.config.jax_exec_time_optimization_effort
    code, out, err = command("--devices=8", "--quick")
    assert (code, err) == (0, "") and "(data=8, fsdp=1, tensor=1), compiled with the least" in out
    assert jax.config.jax_exec_time_optimization_effort == before != -1.0


def test_what_does_not_fit_is_said_with_what_would(command):
    limit = linear_program(make_mesh()).of(2048).bytes / 2**30
    code, out, _ = command("--devices=8", f"--memory={limit}", "--config.batch_size=8192")
    assert code == 0 and f"GiB of each device's {limit:.4g}" in out
    assert "linear: fits with --config.batch_size=2048 " in out
    code, out, _ = command("--devices=8", "--memory=0.000001")
    assert code == 0 and "linear: not even --config.batch_size=8 fits" in out
    code, out, _ = command("--devices=8", f"--memory={limit}", "--fit")
    assert code == 0 and "linear: the largest that fits is --config.batch_size=2" in out
    assert "of each device's" not in out


def test_a_batch_may_follow_the_devices(command):
    code, out, _ = command("--devices=8", "--fsdp=2", "--rows=3", "--only=lin")
    assert code == 0
    # A row of 256 x 256 products, forward and the gradient to the weights, three on each device.
    assert f"{3 * 4 * 256**2 / 1e9:.3g}" in out


def test_slices_are_compared():
    mesh = make_mesh()
    small = replace(linear_program(mesh).compile(), updates=0)
    slices = [("v5e:2x4", CHIPS["v5e"], [small, replace(small, refused=True)])]
    slices += [("v5p:2x2x2", CHIPS["v5p"], [replace(small, moved=2 * small.moved, updates=9000)])]
    rows = slices_table(slices).rows
    assert [row[:3] for row in rows] == [["linear", where, "64"] for where in SLICES]
    assert rows[1][4:] == ["–"] * 4 and [row[5] for row in rows] == ["memory", "–", "memory"]
    assert float(rows[2][4]) == pytest.approx(2e3 * small.moved / CHIPS["v5p"].bandwidth, rel=0.01)
    assert rows[0][7] == "–" and float(rows[2][7]) > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "found neither, expected --topology=KIND:SHAPE, such as v5e:4x4, or --devices=N"),
        (("--devices=8", "--topology=v5e:4x4"), "found both, expected --topology=KIND:SHAPE"),
        (("--devices=8", "--memory=nan"), "--memory=nan: expected GiB above 0"),
        (("--devices=0",), "--devices=0: expected at least 1"),
        (("--devices=4",), "--devices=4: this process has already started JAX with 8"),
        (("--topology=v9:4x4",), "--topology=v9:4x4: no such chip"),
        (("--topology=v5e:4x5",), "expected v5e: and one of 1x1, 2x2"),
        (("--devices=8", "--memory=-1"), "--memory=-1: expected GiB above 0"),
        (("--devices=8", "--fsdp=3"), "do not make 8 devices; expected sizes that do, each of 1, "),
        (("--devices=8", "--rows=0"), "--rows=0: expected at least 1"),
        (("--devices=8", "--only=x"), "--only=x: no such program; there are linear"),
        (("--topology=v5e:3x3,v5e:2x2",), "--topology=v5e:3x3: no such slice"),
        (("--devices=8", "--config.batch_size=9"), "the next that is: 16 (--config.batch_size=)"),
    ],
)
def test_a_mistake_is_one_line(command, argv, message):
    code, _, err = command(*argv)
    assert code in (1, 2) and message in err, err
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs pip install 'jaxsynth[tpu]'"
)
def test_a_slice_has_bounds(command):
    code, out, _ = command("--topology=v5e:2x2")
    assert code == 0 and "linear on 4 x v5e chip (data=4, fsdp=1, tensor=1)" in out
    for text in ("of 15.75 GiB", "bound by", "images/s", "memory"):
        assert text in out
