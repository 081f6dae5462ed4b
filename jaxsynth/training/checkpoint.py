"""Checkpoints of a running training: its state, its place in the data, and what it was based on.

All use of Orbax lies in this file. States are saved as a flat dict by dotted name, so that a
mismatch names the leaf; the frozen base is never saved, only its identity, which must match at
restore. Saving is asynchronous: the state is copied to the host, then written while steps go on.

Orbax takes as long for a small array as for a large one, and the states of adapters and of small
networks are hundreds of small ones: those that every process has whole are one file of their bytes.
"""

import base64
import hashlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
from jaxtyping import PyTree

from jaxsynth.core.documents import parse_json, take
from jaxsynth.core.errors import UserError
from jaxsynth.core.io import json_digest
from jaxsynth.core.preemption import uninterrupted
from jaxsynth.core.records import differences, to_json

# Orbax 1.0 makes this interface the top level; in 0.12 it is a sub-module of it.
ocp = getattr(orbax.checkpoint, "v1", orbax.checkpoint)

# Bytes of the largest array that is written with others.
SMALL = 1 << 20
_WAY_OUT = "remove that folder to go on from an older checkpoint, or from the beginning"


class _RaisedAnyway(logging.Filter):
    """Drops the traceback of a failed save, which Orbax logs in each thread before it raises it.

    A full disk would be a thousand lines, and the one that says so the last of them.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and "orbax" in record.pathname)


_RAISED_ANYWAY = _RaisedAnyway()


class CheckpointError(UserError):
    """A checkpoint does not fit the run that wants it; the message says where they differ."""


class Checkpoints:
    """The checkpoints below `folder`: one about every `every` steps, the `keep` newest kept.

    Args:
        minutes: the longest time between two, where steps are slow.
        identity: JSON that must be the same at restore, such as the base model's digest.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int,
        minutes: float = math.inf,
        keep: int = 2,
        identity: Mapping[str, Any] | None = None,
    ):
        if every < 1 or keep < 1:
            raise ValueError(f"every={every} and keep={keep}: both are at least 1")
        self.folder = Path(folder).resolve()
        self.every = every
        self._seconds, self._saved = 60 * minutes, time.monotonic()
        self.identity = to_json(identity or {}, "identity")
        logging.getLogger("absl").addFilter(_RAISED_ANYWAY)
        context = ocp.Context()
        # The devices of one process share its disk: parts of copies would only be more programs.
        context.array.saving.use_replica_parallel = jax.process_count() > 1
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
            context=context,
        )

    @property
    def latest(self) -> int | None:
        """The newest saved step, or None."""
        found = self._orbax.latest
        return None if found is None else found.step

    def due(self, before: int, step: int, steps: int) -> bool:
        """Whether to save after going from `before` to `step` of `steps`.

        Of several processes the clocks differ, so that only steps count.
        """
        late = jax.process_count() == 1 and time.monotonic() - self._saved >= self._seconds
        return step >= steps or step // self.every > before // self.every or late

    def save(
        self, step: int, state: PyTree, batches: Any = None, *, seen: dict[str, Any] | None = None
    ) -> None:
        """Save `state` as `step`, unless that step is saved already.

        `seen` is JSON that `restore` returns: what was not yet reported.
        """
        if self.latest == step:
            return
        self._saved = time.monotonic()
        arrays = _flatten(state)
        large = {name: leaf for name, leaf in arrays.items() if not _is_small(leaf)}
        small = jax.device_get({name: arrays[name] for name in arrays.keys() - large.keys()})
        note = {
            "identity": self.identity,
            "seen": seen,
            "data": _position(batches),
            "shapes": _shapes(arrays),
            "digests": _digests(arrays),
            "small": sorted(small),
        }
        items = {"run": _Note(note)}
        if large:
            items["state"] = large
        if small:
            items["small"] = _Small(b"".join(small[name].tobytes() for name in sorted(small)))
        with uninterrupted():  # half a save would go on in threads that an exit takes away
            self._orbax.save_checkpointables_async(step, items, force=True)

    def restore(self, like: PyTree, batches: Any = None) -> tuple[PyTree, dict[str, Any]]:
        """The newest state, with the structure, types and shardings of `like`; `batches` is moved.

        Returns:
            The state, and the `seen` that was saved with it.

        Raises:
            CheckpointError: another identity, another set of names or shapes, or damaged arrays;
                each is named.
        """
        self._orbax.wait()  # the newest may still be on its way to the disk
        where = self.folder / str(self.latest)
        note = _Note({})
        self._load(where, {"run": note})
        note.check(where)
        if lines := differences(note.value["identity"], self.identity, "identity"):
            raise CheckpointError(
                f"{where} belongs to another run (old -> new): {'; '.join(lines)}"
            )
        target = _flatten(like)
        if lines := differences(note.value["shapes"], _shapes(target)):
            shown = "\n  ".join(lines[:20])
            raise CheckpointError(f"{where} holds another state (saved -> wanted):\n  {shown}")
        packed = set(note.value["small"])
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in target.items()
            if name not in packed
        }
        loaded = self._load(where, {"state": abstract})["state"] if abstract else {}
        if packed:
            small = _Small(b"")
            self._load(where, {"small": small})
            loaded |= _unpack(small.data, {name: target[name] for name in sorted(packed)}, where)
        found = _digests(loaded)
        saved = note.value["digests"]
        # Cut otherwise (another number of devices), arrays cannot be compared piece by piece.
        if bad := [x for x in found if found[x].keys() == saved[x].keys() and found[x] != saved[x]]:
            raise CheckpointError(f"{where} is damaged: {bad[0]} is not what was saved; {_WAY_OUT}")
        if note.value["data"] is not None:
            # Of any process: the place is a number of whole batches, the same for all of them.
            _move(batches, note.value["data"], where)
        return _unflatten(like, loaded), note.value["seen"]

    def _load(self, where: Path, items: dict[str, Any]) -> dict[str, Any]:
        """CheckpointError naming the folder where Orbax cannot read it."""
        try:
            return self._orbax.load_checkpointables(None, items)
        except CheckpointError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files
            raise CheckpointError(
                f"{where} cannot be read ({type(error).__name__}); {_WAY_OUT}"
            ) from error

    def close(self) -> None:
        """Wait for the save under way."""
        with uninterrupted():
            self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Small:
    """One file of bytes that all processes have, in Orbax's protocol; the first writes it."""

    _name = "arrays.bin"

    def __init__(self, data: bytes):
        self.data = data

    async def save(self, directory) -> Awaitable[None]:
        async def write() -> None:
            folder = await directory.await_creation()
            if jax.process_index() == 0:
                (folder / self._name).write_bytes(self.data)

        return write()

    async def load(self, directory) -> Awaitable[None]:
        async def read() -> None:
            self.data = (directory / self._name).read_bytes()

        return read()


class _Note:
    """One JSON file per process, in Orbax's protocol for objects that save themselves.

    It has a digest of itself: a changed number in it would move a training without a word.
    """

    def __init__(self, value: dict[str, Any]):
        self.value = value
        self._name = f"process_{jax.process_index()}_of_{jax.process_count()}.json"

    async def save(self, directory) -> Awaitable[None]:
        # Now: the data iterator moves on while this is written.
        value = json.loads(json.dumps(self.value))
        text = json.dumps(value | {"sha256": json_digest(value)})

        async def write() -> None:
            folder = await directory.await_creation()
            (folder / self._name).write_text(text)

        return write()

    async def load(self, directory) -> Awaitable[None]:
        async def read() -> None:
            file = directory / self._name
            if not file.exists():  # saved by another number of processes, whose notes agree
                files = sorted(directory.glob("process_*_of_*.json"))
                if not files:
                    raise CheckpointError(f"{directory} is damaged: it has no process_*.json")
                file = files[0]
            self.value = parse_json(file.read_bytes(), file)

        return read()

    def check(self, where: Path) -> None:
        """CheckpointError for a note that is not as it was written."""
        try:
            digests = take(self.value, "digests", dict[str, dict[str, str]], where)
            shapes = take(self.value, "shapes", dict, where)
            for name, kind in (("identity", dict), ("seen", dict | None), ("data", dict | None)):
                take(self.value, name, kind, where)
            small = take(self.value, "small", list[str], where, [])  # older ones have none
        except UserError as error:
            raise CheckpointError(f"{error}; {_WAY_OUT}") from None
        written = self.value.pop("sha256", None)
        known = digests.keys() == shapes.keys() and shapes.keys() >= set(small)
        if not known or written not in (None, json_digest(self.value)):
            raise CheckpointError(f"{where} is damaged: its note was changed; {_WAY_OUT}")
        self.value["small"] = small


def _names(tree: PyTree) -> list[str]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def _flatten(tree: PyTree) -> dict[str, jax.Array]:
    leaves = jax.tree.leaves(tree)
    raw = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves]
    return dict(zip(_names(tree), raw, strict=True))


def _unflatten(like: PyTree, loaded: dict[str, jax.Array]) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    new = []
    for name, old in zip(_names(like), leaves, strict=True):
        value = loaded[name]
        if not old.committed:  # Orbax commits to a device; what was free to move stays free
            value = jnp.array(np.asarray(value))
        if _is_key(old):
            value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(old))
        new.append(value)
    return jax.tree.unflatten(structure, new)


def _is_small(leaf: jax.Array) -> bool:
    return leaf.nbytes <= SMALL and leaf.is_fully_replicated


def _unpack(data: bytes, like: Mapping[str, jax.Array], where: Path) -> dict[str, jax.Array]:
    """The arrays of a file of bytes, placed as those of the same names in `like`."""
    wanted = sum(leaf.nbytes for leaf in like.values())
    if len(data) != wanted:
        raise CheckpointError(
            f"{where} is damaged: its small arrays have {len(data)} bytes, not {wanted}; {_WAY_OUT}"
        )
    arrays, start = {}, 0
    for name, leaf in like.items():
        value = np.frombuffer(data, leaf.dtype, leaf.size, start).reshape(leaf.shape)
        start += leaf.nbytes
        arrays[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__)
    return arrays


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _shapes(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in arrays.items()}


def _digests(arrays: Mapping[str, jax.Array]) -> dict[str, dict[str, str]]:
    """SHA-256 of this process's pieces of each array, by where they lie in it."""
    return {
        name: {
            str(shard.index): hashlib.sha256(np.ascontiguousarray(shard.data).tobytes()).hexdigest()
            for shard in leaf.addressable_shards
            if shard.replica_id == 0
        }
        for name, leaf in arrays.items()
    }


def _position(batches: Any) -> Any:
    if not hasattr(batches, "get_state"):
        return None
    state = batches.get_state()
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    return {"json": state}


def _move(batches: Any, position: dict[str, Any], where: Path) -> None:
    if not hasattr(batches, "set_state"):
        raise CheckpointError(
            f"{where} holds a place in the data, but the batches have no set_state"
        )
    try:
        if "base64" in position:
            batches.set_state(base64.b64decode(position["base64"]))
        else:
            batches.set_state(position["json"])
    except Exception as error:  # of another kind of batches, each raises what it will
        raise CheckpointError(
            f"{where} holds a place in the data that the batches do not know "
            f"({type(error).__name__}); {_WAY_OUT}"
        ) from error
