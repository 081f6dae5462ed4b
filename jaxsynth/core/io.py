"""Files written whole or not at all, and digests of files.

Every file that another process or a later run may read is written here: to a temporary neighbor
first, which then takes the file's name. A reader sees the old file or the new one, never a part.
Temporary names hold a random UUID, because processes on several hosts may share both the folder and
the process id.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from jaxsynth.core.documents import read_json as read_json

# Ends the name of every temporary file; the names begin with a dot.
TEMPORARY = ".tmp"

# A file changed this recently may change again without another time stamp, so that its digest is
# not remembered (seconds; file systems stamp times in steps of up to two).
_SETTLED = 2.0
_memory: dict[tuple[str, int, int, int, int], str] = {}


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary neighbor of `path` that takes its place when the block ends without an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name[:60]}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write the whole file or none of it; it is on disk when this returns."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write text in UTF-8, the whole file or none of it."""
    write_bytes(path, text.encode("utf-8"))


def write_json(
    path: str | os.PathLike, value: Any, *, indent: int | None = 1, sort_keys: bool = False
) -> None:
    """Write JSON with a line break at its end, the whole file or none of it."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys)
    write_text(path, text + "\n")


def json_digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests_cached(paths: Sequence[str | os.PathLike]) -> list[str]:
    """`file_digest` of each path, remembered between runs in the user's cache folder.

    A digest is remembered for the file's resolved path, size, inode and times of change (mtime and
    ctime, in nanoseconds): writing to a file, replacing it and setting its times back all change
    one of them.
    """
    keys = [_key(path) for path in paths]
    unknown = {key: path for key, path in zip(keys, paths, strict=True) if key not in _memory}
    if unknown:
        _memory.update(_recall(list(unknown)))
    missing = {key: path for key, path in unknown.items() if key not in _memory}
    fresh: dict[tuple, str] = {}
    if missing:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            fresh = dict(zip(missing, pool.map(file_digest, missing.values()), strict=True))
        limit = (time.time() - _SETTLED) * 1e9
        settled = {key: digest for key, digest in fresh.items() if max(key[3], key[4]) < limit}
        _memory.update(settled)
        _remember(settled)
    return [_memory[key] if key in _memory else fresh[key] for key in keys]


def _key(path: str | os.PathLike) -> tuple[str, int, int, int, int]:
    found = os.stat(path)
    return (
        os.path.realpath(path),
        found.st_size,
        found.st_ino,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )


def cache_folder() -> Path:
    """Where what can be computed again is remembered: $XDG_CACHE_HOME/jaxsynth, or ~/.cache/..."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxsynth"


def _cache() -> sqlite3.Connection:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(folder / "digests.sqlite", timeout=10)
    try:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS digests "
            "(path TEXT PRIMARY KEY, size INT, inode TEXT, mtime INT, ctime INT, digest TEXT)"
        )
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _recall(keys: Sequence[tuple[str, int, int, int, int]]) -> dict[tuple, str]:
    """The remembered digests of these files. None of a cache that cannot be read: it saves time."""
    query = "SELECT size, inode, mtime, ctime, digest FROM digests WHERE path = ?"
    found = {}
    try:
        with closing(_cache()) as cache:
            for key in keys:
                row = cache.execute(query, (os.fsencode(key[0]),)).fetchone()
                if row and (row[0], int(row[1]), row[2], row[3]) == key[1:]:
                    found[key] = row[4]
    except (sqlite3.Error, OSError):
        return {}
    return found


def _remember(digests: dict[tuple, str]) -> None:
    """Keep the digests for later runs, where the user's cache folder can be written."""
    rows = [
        (os.fsencode(path), size, str(inode), mtime, ctime, digest)
        for (path, size, inode, mtime, ctime), digest in digests.items()
    ]
    try:
        with closing(_cache()) as cache, cache:
            cache.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?, ?)", rows)
    except (sqlite3.Error, OSError):
        return  # the digests stay in memory
