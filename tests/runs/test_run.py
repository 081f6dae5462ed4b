import json
import os
import time
from dataclasses import dataclass

from jaxsynth.runs.run import COMMAND, read_config, write_record


@dataclass(frozen=True)
class Config:
    steps: int = 3
    method: str = "counting"


def test_a_record_removes_what_a_killed_writer_left_and_no_file_of_a_living_one(tmp_path):
    left, living = tmp_path / ".run.json.0f.tmp", tmp_path / ".report.html.1e.tmp"
    for path, age in ((left, 3600), (living, 0)):
        path.write_text("{")
        os.utime(path, (time.time() - age,) * 2)
    token = COMMAND.set("jaxsynth run")
    write_record(tmp_path, "counting", Config(5))
    COMMAND.reset(token)
    assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, "run.json"]
    assert json.loads((tmp_path / "run.json").read_text())["command"] == "jaxsynth run"
    assert read_config(tmp_path, Config) == Config(5)
