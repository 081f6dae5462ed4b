import os
import shutil
import sqlite3
import time

import pytest

from jaxsynth.core import io


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(io, "_memory", {})
    return tmp_path / "cache" / "jaxsynth" / "digests.sqlite"


def _settle(path):
    """Let the file look as if it had been left alone for a while."""
    time.sleep(max(0.0, path.stat().st_ctime + 0.05 - time.time()))


def test_writers_leave_nothing_but_the_file(tmp_path):
    io.write_json(tmp_path / "a.json", {"b": 1, "a": "é"})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n "b": 1,\n "a": "é"\n}\n'
    io.write_json(tmp_path / "a.json", {"b": 1, "a": 2}, indent=None, sort_keys=True)
    assert (tmp_path / "a.json").read_text() == '{"a": 2, "b": 1}\n'
    io.write_text(tmp_path / "t", "x\n")
    io.write_bytes(tmp_path / "b", b"\0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b", "t"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    io.write_text(tmp_path / "x", "old")
    with pytest.raises(ZeroDivisionError), io.replacing(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_two_writers_of_one_process_id_do_not_meet(tmp_path):
    with io.replacing(tmp_path / "x") as one, io.replacing(tmp_path / "x") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "x").read_text() == "one"


def test_a_name_of_the_longest_kind_can_be_written(tmp_path):
    io.write_text(tmp_path / ("n" * 255), "x")
    assert (tmp_path / ("n" * 255)).read_text() == "x"


def test_digests_are_remembered_until_the_file_changes(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(io, "_SETTLED", 0.01)
    path = tmp_path / "photo"
    path.write_bytes(b"one")
    _settle(path)
    first = io.file_digests_cached([path])[0]
    assert first == io.file_digest(path)
    read = []
    plain = io.file_digest
    monkeypatch.setattr(io, "file_digest", lambda p: read.append(p) or plain(p))
    monkeypatch.setattr(io, "_memory", {})  # a later process
    assert io.file_digests_cached([path])[0] == first and not read
    assert io.file_digests_cached([os.path.relpath(path)])[0] == first and not read
    # Of the same size, and with the times of the old file.
    (tmp_path / "other").write_bytes(b"two")
    shutil.copystat(path, tmp_path / "other")
    os.replace(tmp_path / "other", path)
    assert io.file_digests_cached([path])[0] == plain(path) != first
    assert len(read) == 1


def test_a_file_changed_just_now_is_not_remembered(tmp_path, cache):
    path = tmp_path / "photo"
    for content in (b"one", b"two"):
        path.write_bytes(content)
        assert io.file_digests_cached([path])[0] == io.file_digest(path)
    assert not io._memory
    with sqlite3.connect(cache) as connection:
        assert connection.execute("SELECT count(*) FROM digests").fetchone() == (0,)
    connection.close()


@pytest.mark.parametrize("broken", ["not a database", "a folder"])
def test_a_cache_that_cannot_be_used_costs_time_only(tmp_path, cache, broken):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"x" * 5000) if broken == "not a database" else cache.mkdir()
    path = tmp_path / "photo"
    path.write_bytes(b"one")
    assert io.file_digests_cached([path])[0] == io.file_digest(path)
