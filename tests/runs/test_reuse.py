"""A finished stage of another run is taken where it is the same, and only then."""

import dataclasses
import io

import pytest
from rich.console import Console

from jaxsynth.core.errors import UsageError
from jaxsynth.runs import reuse
from jaxsynth.runs.folder import LOCK, STARTED
from jaxsynth.runs.stage import MANIFEST, Artifact, load_artifact, run_stage


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 3


class Builder:
    """Writes a file and a log, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, path):
        self.calls += 1
        (path / "sub").mkdir(exist_ok=True)
        (path / "sub" / "file.txt").write_text("hello")
        (path / "metrics.jsonl").write_text("{}\n")
        (path / "checkpoints").mkdir(exist_ok=True)
        (path / "checkpoints" / "4").write_text("large")
        return {"images": 7}


@pytest.fixture
def build():
    return Builder()


@pytest.fixture
def make(build, tmp_path):
    """Makes a stage below a folder, as a run that may take from `runs`."""
    (tmp_path / "runs").mkdir()
    reuse.look_in([tmp_path / "runs"])
    out = Console(file=io.StringIO(), soft_wrap=True)

    def make(folder: str, config=None, inputs=None) -> tuple[Artifact, str]:
        where = tmp_path / "runs" / folder
        artifact = run_stage("make", where, config or Config(), inputs or {}, build, console=out)
        return artifact, out.file.getvalue().splitlines()[-1]

    yield make
    reuse.look_in([])


def test_the_same_stage_is_taken_with_its_files(make, build):
    first, _ = make("one/early")
    second, line = make("two/another name")
    assert build.calls == 1 and second.digest == first.digest
    assert f"taken from {first.path}" in line
    names = {path.name for path in second.path.rglob("*")}
    assert names == {"sub", "file.txt", "metrics.jsonl", MANIFEST, LOCK}
    second.verify()
    # A second call finds it there, and what it is not made of may go.
    third, line = make("two/another name")
    assert "unchanged" in line and third.digest == first.digest


@pytest.mark.parametrize("what", ["config", "input"])
def test_another_stage_is_not(make, build, what):
    other, _ = make("input", Config(9))
    make("one", inputs={"data": other})
    config = Config(4) if what == "config" else None
    inputs = {"data": make("input2", Config(8))[0] if what == "input" else other}
    before = build.calls
    make("two", config, inputs)
    assert build.calls == before + 1


@pytest.mark.parametrize("harm", ["changed", "shorter", "gone", "manifest"])
def test_a_damaged_one_is_left_and_made_anew(make, build, harm):
    first, _ = make("one")
    file = first.path / "sub" / "file.txt"
    if harm == "gone":
        file.unlink()
    elif harm == "manifest":
        (first.path / MANIFEST).write_text('{"stage": 3')
    else:
        file.write_text("hallo" if harm == "changed" else "h")
    second, _ = make("two")
    assert build.calls == 2
    second.verify()


def test_one_that_is_not_finished_is_not_taken(make, build, tmp_path):
    (tmp_path / "runs" / "one").mkdir()
    first, _ = make("one")
    (first.path / MANIFEST).rename(first.path / STARTED)
    make("two")
    assert build.calls == 2


def test_a_file_replaced_in_one_run_stays_in_the_other(make):
    """Files are linked, and every writer of the package puts a new file in the old one's place."""
    from jaxsynth.core.io import write_json

    first, _ = make("one")
    second, _ = make("two")
    write_json(first.path / "metrics.jsonl", {"other": 1})
    assert (second.path / "metrics.jsonl").read_text() == "{}\n"
    load_artifact(second.path).verify()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"--reuse=.*/none: there is no such folder"):
        reuse.look_in([tmp_path / "none"])
