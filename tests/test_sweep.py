"""`launch/sweep.py`: a grid of runs that share stages, survive a failed point and are summed up."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOKE = f"--config={ROOT}/configs/robustness.py:smoke"


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("sweep_script", ROOT / "launch" / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


WRONG = {
    "--grid sead 0": "config.sead: no such field",
    "--grid seed x": "config.seed='x': expected an integer",
    "--grid seed 1 1": "--grid seed: 1 1 has a value twice",
    "--grid seed": "--grid seed: expected at least one value",
    "--grid seed 1 --grid seed 2": "--grid seed: the field is set twice",
    "--grid seed 1 --config.seed=2": "--grid seed: the field is set twice",
    "--grid seed 1 --config.seed": "--config.seed: expected --config.FIELD=VALUE",
    "--grid method datadream": "--config.method: the config file decides the method",
    "--grid seed 1 --only=1": "--only=1: the points are 0 to 0",
    "--grid seed 1 --start=kubernetes": "--start=kubernetes needs --image=IMAGE",
    "--grid seed 1 -- --partition=x": "only --start=slurm takes arguments of sbatch",
}


@pytest.mark.parametrize("given", WRONG)
def test_a_mistake_is_told_before_any_point_starts(sweep, tmp_path, capsys, given):
    assert sweep.main([SMOKE, f"--workdir={tmp_path / 'all'}", *given.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and WRONG[given] in error and error.count("\n") == 1
    assert not (tmp_path / "all").exists()


def test_a_config_without_a_method_is_named(sweep, tmp_path, capsys):
    (tmp_path / "none.py").write_text("def get_config():\n    return {'seed': 1}\n")
    assert sweep.main([f"--config={tmp_path}/none.py", "--workdir=w", "--grid", "seed", "1"]) == 2
    assert "none.py: no field `method`, expected one of" in capsys.readouterr().err


def test_points_have_folders_of_their_own(sweep):
    def name(*settings):
        return sweep.Point(settings).name

    assert name(("shots", "1,4"), ("train.steps", "9")) == "shots=1,4,steps=9"
    assert "/" not in name(("base", "a/b")) and name(("x", "a/b")) != name(("x", "a_b"))
    long = [name(("x", "y" * 300 + end)) for end in "ab"]
    assert len({*long}) == 2 and max(map(len, long)) < 255


def test_a_job_of_every_point(sweep, tmp_path, capsys):
    grid = "--grid seed 0 1 2 --start=kubernetes --image=here/jaxsynth:1"
    assert sweep.main([SMOKE, "--workdir=/runs/a", *grid.split()]) == 0
    job = json.loads(capsys.readouterr().out)
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == 3
    (container,) = spec["template"]["spec"]["containers"]
    command = container["command"][-1]
    assert container["image"] == "here/jaxsynth:1"
    assert command.endswith("--grid seed 0 1 2 --only=$JOB_COMPLETION_INDEX")
    assert "--start" not in command and "--image" not in command


def test_an_array_of_every_point(sweep, tmp_path, monkeypatch):
    """What `sbatch` is given, by a program of that name that writes it down."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/given\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    grid = "--grid seed 0 1 --start slurm -- --partition=gpu --time=1:00:00"
    assert sweep.main([SMOKE, f"--workdir={tmp_path / 'all'}", *grid.split()]) == 0
    given = (tmp_path / "given").read_text().splitlines()
    assert {"--array=0-1", "--partition=gpu", "--time=1:00:00"} <= {*given}
    assert str(ROOT / "launch" / "sweep.py") in given[-1]
    assert given[-1].startswith("--wrap=") and given[-1].endswith("--only=$SLURM_ARRAY_TASK_ID")
    assert "slurm" not in given[-1].split("--wrap=")[1].split("--only")[0]


@pytest.mark.slow
def test_points_share_stages_and_one_may_fail(tmp_path):
    """A classifier that is not there fails its point; the same one by another path shares all."""
    again = ROOT / "jaxsynth" / "assets" / "tiny" / "clip"
    command = [
        sys.executable, str(ROOT / "launch" / "sweep.py"),
        f"--config={ROOT}/configs/datadream.py:smoke", f"--workdir={tmp_path}",
        "--grid", "clip", "tiny/clip", "/none", str(again), "--config.modes=dset",
    ]  # fmt: skip

    def run() -> list[str]:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1, done.stderr
        return done.stdout.splitlines()

    lines = run()
    assert ["failed" in line for line in lines[:3]] == [False, True, False]
    assert "error: config.clip: '/none': no such folder" in lines[1]
    assert lines[-1].startswith("2 of 3 points")
    (log,) = tmp_path.glob("*assets*/point.log")
    assert log.read_text().count("taken from") >= 7
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["exit_code"] for row in rows] == [0, 2, 0]
    assert rows[0]["results"] == rows[2]["results"] and rows[1]["results"] is None
    # Again: what is finished is passed over, what failed is tried.
    lines = run()
    assert ["skipped" in line for line in lines[:3]] == [True, False, True]
    assert ["failed" in line for line in lines[:3]] == [False, True, False]
