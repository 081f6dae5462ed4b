"""Rehearsals: what a run would make, without making it, and the room that it needs."""

import shutil
from dataclasses import dataclass

import pytest

from jaxsynth.core.io import read_json, write_json, write_text
from jaxsynth.runs import rehearsal
from jaxsynth.runs.artifact import Artifact, StageError
from jaxsynth.runs.rehearsal import Step, needed, rehearse
from jaxsynth.runs.stage import MANIFEST, STARTED, Work, stage
from jaxsynth.runs.sweep import sweep


@dataclass(frozen=True)
class Writing:
    letters: int


@stage(space=lambda config: config.letters)
def write_words(work: Work, config: Writing) -> dict:
    write_text(work.folder / "words.txt", "x" * config.letters)
    return {"validation": config.letters}


@stage(space=lambda config, words: (words.path / "words.txt").stat().st_size)
def copy_words(work: Work, config: Writing, *, words: Artifact) -> dict:
    shutil.copy(words.path / "words.txt", work.folder / "copy.txt")
    return {}


def make(folder, letters=30_000):
    words = write_words(folder / "words", Writing(letters))
    copy_words(folder / "copy", Writing(1), words=words)


def test_a_rehearsal_finds_what_is_there_and_makes_nothing(tmp_path):
    folder = tmp_path / "run"
    words, copy = Step("write_words", folder / "words", "to do", bytes=30_000), folder / "copy"
    assert rehearse(lambda: make(folder)) == (
        [words, Step("copy_words", copy, "to do", bytes=None)], ""
    )  # fmt: skip
    assert not folder.exists()

    made = write_words(folder / "words", Writing(30_000))
    steps, _ = rehearse(lambda: make(folder))
    assert [step.state for step in steps] == ["finished", "to do"]
    assert steps[0].seconds == made.manifest["seconds"]
    assert needed(steps) == steps[1].bytes == 30_000 and not copy.exists()

    make(folder)
    # As a kill leaves it: begun, and some of it there.
    manifest = read_json(copy / MANIFEST)
    write_json(
        copy / STARTED, {key: manifest[key] for key in ("stage", "format", "config", "inputs")}
    )
    (copy / MANIFEST).unlink()
    (copy / "copy.txt").write_text("x" * 7_000)
    steps, _ = rehearse(lambda: make(folder))
    assert steps[1].state == "begun" and 20_000 < steps[1].bytes <= 23_000

    make(folder)
    steps, _ = rehearse(lambda: make(folder))
    assert [step.state for step in steps] == ["finished", "finished"] and needed(steps) == 0
    # What was made from a stage that is gone is as good as before, if that comes out the same.
    shutil.rmtree(folder / "words")
    assert [step.state for step in rehearse(lambda: make(folder))[0]] == ["to do", "finished"]


def test_a_rehearsal_refuses_what_the_run_refuses(tmp_path):
    make(tmp_path)
    with pytest.raises(StageError, match=r"letters: 30000 -> 31"):
        rehearse(lambda: make(tmp_path, letters=31))
    assert rehearsal.rehearsing() is None


def test_a_rehearsal_ends_where_files_decide_what_follows(tmp_path):
    def read() -> None:
        words = write_words(tmp_path / "words", Writing(5))
        write_words(tmp_path / "more", Writing(len((words.path / "words.txt").read_text())))

    steps, unknown = rehearse(read)
    assert [step.name for step in steps] == ["write_words"]
    assert unknown == "write_words is yet to be made, and what follows depends on it"
    write_words(tmp_path / "words", Writing(5))
    assert len(rehearse(read)[0]) == 2 and rehearse(read)[1] == ""


def test_of_a_sweep_the_first_rate_stands_for_the_best(tmp_path):
    def make() -> None:
        sweep((30, 20, 10), (0, 1), lambda rate, seed: write_words(
            tmp_path / f"{rate}-{seed}", Writing(rate)
        ))  # fmt: skip

    names = [step.folder.name for step in rehearse(make)[0]]
    assert names == ["30-0", "20-0", "10-0", "30-1"]
    write_words(tmp_path / "20-0", Writing(20))
    assert [step.folder.name for step in rehearse(make)[0]][-1] == "20-1"
