"""A run's copy in a store: what is lost with the machine is fetched, and the run goes on."""

import json
import shutil
import threading

import fsspec
import pytest

from jaxsynth.core.errors import UsageError, UserError
from jaxsynth.runs import mirror
from jaxsynth.runs.mirror import INDEX, Mirror, MirrorError, mirrored
from jaxsynth.runs.stage import MANIFEST, run_stage


@pytest.fixture
def store(tmp_path) -> str:
    return f"file://{tmp_path}/store/runs/one"


def files(folder) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (INDEX, ".lock")
    }


def make(folder, name="a", text="x", fail=False):
    def build(where):
        (where / "part.txt").write_text(text)
        training = where / ".training"
        training.mkdir(exist_ok=True)
        (training / "state").write_text(text)
        if fail:
            raise RuntimeError("the machine is gone")
        return {"letters": len(text)}

    return run_stage(name, folder / name, {"text": text}, {}, build)


@pytest.mark.parametrize("address", ["file://{}/store/runs/one", "memory://bucket/runs/one"])
def test_a_run_goes_on_from_its_copy_on_another_machine(tmp_path, address):
    address = address.format(tmp_path)
    here, there = tmp_path / "here", tmp_path / "there"
    with pytest.raises(RuntimeError, match="gone"), mirrored(here, address):
        made = make(here, "a")
        make(here, "b", fail=True)
    left = files(here)
    assert {"a/part.txt", f"a/{MANIFEST}", "b/.training/state", "b/.started.json"} <= left.keys()
    shutil.rmtree(here)
    with mirrored(there, address):
        assert files(there) == left
        before = (there / "a" / MANIFEST).stat().st_mtime_ns
        assert make(there, "a").digest == made.digest
        assert (there / "a" / MANIFEST).stat().st_mtime_ns == before
        make(there, "b")
    # Under their own names, less what is gone from the folder since.
    opened, root = fsspec.core.url_to_fs(address)
    held = {path.partition("runs/one/")[2] for path in opened.find(root)} - {INDEX}
    assert held == files(there).keys() and "b/.started.json" not in held


def test_only_what_changed_is_copied_and_names_of_writers_at_work_are_not(tmp_path, store):
    folder = tmp_path / "run"
    with mirrored(folder, store):
        make(folder)
        (folder / "a" / ".half.tmp").write_text("")
        half = folder / "a" / "3.orbax-checkpoint-tmp-1"
        half.mkdir()
        (half / "x").write_text("")
    index = json.loads((tmp_path / "store/runs/one" / INDEX).read_text())
    assert set(index["files"]) == {"a/part.txt", "a/.training/state", f"a/{MANIFEST}"}
    again = Mirror(folder, store)
    assert again.begin() == 0 and again.copy() == 0
    (folder / "a" / ".training" / "state").write_text("longer")
    assert again.copy() == 1
    assert (tmp_path / "store/runs/one/a/.training/state").read_text() == "longer"


def test_it_follows_while_the_run_works(tmp_path, store, monkeypatch):
    monkeypatch.setattr(mirror, "EVERY", 0.01)
    copied = tmp_path / "store/runs/one" / INDEX
    with mirrored(tmp_path / "run", store):
        make(tmp_path / "run")
        waiting = threading.Event()
        for _ in range(1000):
            if copied.exists() and f"a/{MANIFEST}" in copied.read_text():
                break
            waiting.wait(0.01)
        else:
            raise AssertionError("was not copied")


def test_a_file_that_goes_meanwhile_is_in_no_index(tmp_path, store, monkeypatch):
    folder = tmp_path / "run"
    make(folder)
    one = Mirror(folder, store)
    one.begin()
    put = one._store.put_file

    def late(source, target):
        # As a checkpoint is removed when a later one is there.
        (folder / "a/.training/state").unlink(missing_ok=True)
        put(source, target)

    monkeypatch.setattr(one._store, "put_file", late)
    one.copy()
    index = json.loads((tmp_path / "store/runs/one" / INDEX).read_text())
    assert set(index["files"]) == {"a/part.txt", f"a/{MANIFEST}"}


def test_what_cannot_be_a_copy_is_refused(tmp_path, store, monkeypatch):
    folder, other = tmp_path / "run", tmp_path / "other"
    with mirrored(folder, store):
        make(folder)
    make(other)
    with pytest.raises(MirrorError, match="copy of another run than"), mirrored(other, store):
        raise AssertionError("the run began")
    with pytest.raises(UsageError, match="lies in --workdir"):
        Mirror(folder, f"file://{folder}/copy")
    with pytest.raises(UsageError, match="mirror=nosuch"):
        Mirror(folder, "nosuch://bucket/run")
    index = tmp_path / "store/runs/one" / INDEX
    known = json.loads(index.read_text())
    for name in ("../up", "/etc/passwd"):
        index.write_text(json.dumps(known | {"files": [name]}))
        with pytest.raises(MirrorError, match="outside of the run's folder"):
            Mirror(tmp_path / "new", store).begin()
    for text in ("{", '{"id": 3, "files": []}', '{"id": "a"}', '{"id": "a", "files": {"b": 1}}'):
        index.write_text(text)
        with pytest.raises(UserError, match=rf"^{store}/{INDEX}: "):
            Mirror(tmp_path / "new", store).begin()
    index.write_text(json.dumps(known | {"files": ["gone.txt"]}))
    with pytest.raises(MirrorError, match=r"gone.txt is listed in .* and is not there"):
        Mirror(tmp_path / "new", store).begin()
    index.write_text(json.dumps(known))


def test_a_fetch_that_was_killed_begins_again(tmp_path, store, monkeypatch):
    with mirrored(tmp_path / "run", store):
        made = make(tmp_path / "run")
    folder = tmp_path / "new"
    fetch = Mirror._fetch

    def die(self, name):
        fetch(self, name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "_fetch", die)
        with pytest.raises(KeyboardInterrupt), mirrored(folder, store):
            raise AssertionError("the run began")
    with mirrored(folder, store):
        assert files(folder) == files(tmp_path / "run")
        assert make(folder).digest == made.digest


def test_a_store_that_fails_is_told_and_the_folder_kept(tmp_path, store, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(MirrorError, match="no space") as told, mirrored(folder, store):
        make(folder)

        def fail(self, *args, **kwargs):
            raise OSError("no space there")

        monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "put_file", fail)
    assert f"{folder} is whole" in str(told.value)
    assert files(folder)
