from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from jaxsynth.core.checks import check_config
from jaxsynth.core.errors import UsageError
from jaxsynth.data.dataset import DataConfig


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    sets: dict = field(default_factory=dict)


@pytest.mark.parametrize("name", ["path", "test_path"])
@pytest.mark.parametrize(
    ("photos", "workdir", "message"),
    [
        ("photos", "photos/run", "--workdir .* is inside the folder of the images"),
        ("photos", "photos/cat/deep/run", "is inside the folder of the images"),
        ("run/photos", "run", "the images are inside --workdir"),
        ("photos", "photos", "are the same folder"),
        ("photos/", "link/run", "is inside the folder of the images"),
        ("photos", "./photos/../photos/run", "is inside the folder of the images"),
    ],
)
def test_photos_and_runs_lie_apart(tmp_path, monkeypatch, name, photos, workdir, message):
    monkeypatch.chdir(tmp_path)
    Path(photos).mkdir(parents=True)
    Path("link").symlink_to(photos.rstrip("/"))
    before = sorted(tmp_path.rglob("*"))
    for config in (
        Config(data=replace(DataConfig(), **{name: photos})),
        Config(sets={"a": replace(DataConfig(), **{name: str(tmp_path / photos)})}),
    ):
        with pytest.raises(UsageError, match=rf"config\.\S*{name}: .*{message}.*by --workdir"):
            check_config(config, Path(workdir))
    assert sorted(tmp_path.rglob("*")) == before


def test_other_places_are_fine(tmp_path):
    (tmp_path / "photos").mkdir()
    for config in (
        Config(),
        Config(data=DataConfig(path=str(tmp_path / "photos"))),
        Config(data=DataConfig(source="tfds", path=str(tmp_path))),
        Config(data=DataConfig(source="tfds", path=str(tmp_path / "to be made"))),
    ):
        check_config(config, tmp_path / "photos run")
    with pytest.raises(UsageError, match=r"config\.data\.path: .*missing: no such folder"):
        check_config(Config(data=DataConfig(path=str(tmp_path / "missing"))), tmp_path)


def test_a_workdir_is_no_file(tmp_path):
    (tmp_path / "run").write_text("notes")
    for workdir in (tmp_path / "run", tmp_path / "run" / "deep" / "er"):
        with pytest.raises(UsageError, match=r"--workdir .*run.*: .*run is a file, expected a fol"):
            check_config(Config(), workdir)
    check_config(Config(), tmp_path / "new" / "deep")
