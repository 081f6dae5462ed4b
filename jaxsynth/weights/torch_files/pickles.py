"""The pickles in PyTorch's files, read by a machine that cannot call anything.

A pickle is a program for a stack machine, and Python's own machine lets it call any function, set
any attribute and ask for any amount of memory. This one knows the plain data, the storages and the
tensors of a state dict. What it makes of them are numbers, texts, lists, tuples, dicts and the
immutable records below; every other instruction is refused by its name, and time and memory grow
with the length of the pickle and with nothing that it says. `pickletools` of the standard library
takes the instructions apart.
"""

import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxsynth.core.errors import UserError, quoted

DTYPES = {
    "BFloat16Storage": ml_dtypes.bfloat16,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "ShortStorage": np.int16,
}
# A tensor takes about 40 instructions and each of an optimizer's states for it as many.
MOST_INSTRUCTIONS = 2_000_000
LONGEST_TEXT = 1 << 20
# Of numpy's arrays.
MOST_AXES = 64
# The magic number of old files has 77 bits, sizes have 64.
_MOST_BITS = 128


class Storage(NamedTuple):
    """A file's array of numbers: `length` elements under `key`."""

    dtype: type
    key: str
    length: int


class Tensor(NamedTuple):
    """A view of a storage; strides and offset are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Namespace(NamedTuple):
    """The `args` of a training checkpoint; what they were is of no interest here."""


class _Kind(NamedTuple):
    """The class of a storage."""

    dtype: type


class _Name(NamedTuple):
    """A function or class that a state dict needs."""

    name: str


_REBUILD = _Name("torch._utils _rebuild_tensor_v2")
_PARAMETER = _Name("torch._utils _rebuild_parameter")
_ORDERED = _Name("collections OrderedDict")
# The first files of Textual Inversion keep their vectors in one; its attributes may hold a set.
_PARAMETERS = _Name("torch.nn.modules.container ParameterDict")
_SETS = tuple(_Name(f"{module} set") for module in ("__builtin__", "builtins"))
_NAMESPACE = _Name("argparse Namespace")
_KNOWN: dict[str, Any] = {
    **{
        known.name: known
        for known in (_REBUILD, _PARAMETER, _ORDERED, _PARAMETERS, _NAMESPACE, *_SETS)
    },
    **{f"torch {name}": _Kind(dtype) for name, dtype in DTYPES.items()},
}


class _Bounded:
    """A file of which no single read is longer than what any text in it may be."""

    def __init__(self, handle: BinaryIO):
        self._handle = handle
        self.tell = handle.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LONGEST_TEXT:
            raise ValueError("a text that is too long")
        return self._handle.read(size)

    def readline(self) -> bytes:
        return self._handle.readline(LONGEST_TEXT)


class Machine:
    """Runs one pickle. `path` and `name` are what an error calls it."""

    def __init__(self, path: Path, name: str):
        self._path, self._name = path, name
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0
        # The ParameterDict that was made last.
        self._module: dict[Any, Any] | None = None
        # The storages that the pickle named, by key.
        self.storages: dict[str, Storage] = {}

    def run(self, handle: BinaryIO) -> Any:
        """What the pickle at the place of `handle` holds, and `handle` behind it.

        UserError naming the file, and the instruction or the name that is refused.
        """
        code, at, start = "its first instruction", 0, handle.tell()
        try:
            instructions = pickletools.genops(_Bounded(handle))
            for number, (opcode, argument, place) in enumerate(instructions, 1):
                code, at = opcode.name, (place or start) - start
                if number > MOST_INSTRUCTIONS:
                    raise UserError(
                        f"{self._path}: {self._name} has more than {MOST_INSTRUCTIONS} "
                        "instructions, expected a dict of tensors"
                    )
                step = _STEPS.get(code)
                if step is None:
                    raise UserError(
                        f"{self._path}: {self._name} is refused, because it uses the pickle "
                        f"instruction {code}, which no dict of tensors needs"
                    )
                step(self, argument)
            return self._stack.pop()
        # What a malformed pickle runs into: `pickletools` raises the first two, an empty stack and
        # an unknown number of the memo the others. Their texts would show the file's contents.
        except (ValueError, OverflowError, IndexError, KeyError) as error:
            detail = f"{error}, " if isinstance(error, _Damage) else ""
            raise UserError(
                f"{self._path}: {self._name} is damaged: {detail}at or after {code}, byte {at}"
            ) from None

    def _push(self, value: Any) -> None:
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise _Damage(f"a number of more than {_MOST_BITS} bits")
        if isinstance(value, str) and not value.isascii():
            value.encode()  # ValueError for halves of characters, which could not be printed
        self._stack.append(value)

    def _mark(self, _: None) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        found, self._stack = self._stack, self._outer.pop()
        return found

    def _pop(self, _: None) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._marked()

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise _Damage("too few values")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def _list(self, values: list[Any]) -> list[Any]:
        target = self._stack[-1]
        if type(target) is not list:
            raise _Damage(f"appends to a {type(target).__name__}")
        target.extend(values)
        return target

    def _set(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise _Damage(f"sets an item of a {type(target).__name__}")
        target.update(_pairs(values))

    def _append(self, _: None) -> None:
        self._list([self._stack.pop()])

    def _set_item(self, _: None) -> None:
        value = self._stack.pop()
        self._set([self._stack.pop(), value])

    def _name_of(self, name: str) -> None:
        if name not in _KNOWN:
            shown = quoted(name.replace(" ", ".", 1))[1:-1]
            raise UserError(
                f"{self._path}: refused, because it asks for {shown}, and only what "
                "tensors need is allowed"
            )
        self._stack.append(_KNOWN[name])

    def _instance(self, name: str) -> None:
        self._name_of(name)
        raise _Damage("an instruction of Python 2's classes")

    def _stack_name(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise _Damage("a name that is no text")
        self._name_of(f"{module} {name}")

    def _call(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(arguments) is not tuple:
            raise _Damage("arguments that are no tuple")
        if function is _REBUILD:
            self._stack.append(_tensor(*arguments[:4]) if len(arguments) >= 4 else _tensor())
        elif function is _ORDERED:
            self._stack.append(self._ordered(arguments))
        elif function is _PARAMETER and arguments and type(arguments[0]) is Tensor:
            self._stack.append(arguments[0])
        elif function is _PARAMETERS and not arguments:
            self._module = {}
            self._stack.append(self._module)
        elif function is _NAMESPACE and not arguments:
            self._stack.append(Namespace())
        elif function in _SETS:
            self._stack.append(())  # what it held is of no interest here
        else:
            raise _Damage("calls what is no function")

    def _ordered(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        """An OrderedDict; Python 2 gave its items as a list of pairs."""
        if not arguments:
            return {}
        items = arguments[0]
        if len(arguments) != 1 or type(items) is not list:
            raise _Damage("an OrderedDict of other than pairs")
        self._count(items)
        if not all(type(item) in (list, tuple) and len(item) == 2 for item in items):
            raise _Damage("an OrderedDict of other than pairs")
        return _pairs([part for item in items for part in item])

    def _count(self, items: list[Any] | dict[Any, Any]) -> None:
        """Counts items that are copied, because a container may be given many times."""
        self._copied += len(items)
        if self._copied > MOST_INSTRUCTIONS:
            raise _Damage(f"more than {MOST_INSTRUCTIONS} items")

    def _build(self, _: None) -> None:
        """The state of an object: a ParameterDict's parameters; a module's versions or a command's
        arguments are left out.
        """
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) not in (dict, Namespace):
            raise _Damage(f"sets attributes of a {type(target).__name__}")
        held = state.get("_parameters") if type(state) is dict else None
        if type(held) is dict and target is self._module:
            self._count(held)
            target.update(held)

    def _storage(self, _: None) -> None:
        pid = self._stack.pop()
        if type(pid) is not tuple or len(pid) not in (5, 6):
            raise _Damage("a storage that is described in another way than PyTorch's")
        kind, dtype, key, _, length, *view = pid
        # A sixth, of the old format, is a part of another storage: not written since PyTorch 0.4.
        valid = type(kind) is str and kind == "storage" and view in ([], [None])
        valid = valid and type(dtype) is _Kind and type(key) is str
        if not valid or type(length) is not int or length < 0:
            raise _Damage("a storage that is described in another way than PyTorch's")
        found = Storage(dtype.dtype, key, length)
        if self.storages.setdefault(key, found) != found:
            raise _Damage(f"storage {quoted(key)} is described in two ways")
        self._stack.append(found)


class _Damage(ValueError):
    """What is wrong, in words that show nothing of the file."""


def _pairs(values: list[Any]) -> dict[Any, Any]:
    if len(values) % 2:
        raise _Damage("a key without a value")
    for key in values[::2]:
        # Whatever else has a hash may take for ever to have it computed.
        if type(key) not in (str, int, float, bool, type(None)):
            raise _Damage(f"a dict with a key of type {type(key).__name__}")
    return dict(zip(values[::2], values[1::2], strict=True))


def _tensor(storage: Any = None, offset: Any = 0, shape: Any = (), strides: Any = ()) -> Tensor:
    if type(storage) is not Storage:
        raise _Damage("a tensor without a storage")
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise _Damage("a tensor whose shape and strides do not go together")
    if len(shape) > MOST_AXES:
        raise _Damage(f"a tensor of {len(shape)} axes, expected {MOST_AXES} at most")
    if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
        raise _Damage("a tensor whose offset, shape or strides are no counts")
    return Tensor(storage, offset, shape, strides)


def _putting(value: Callable[["Machine"], Any]) -> Callable[["Machine", Any], None]:
    """The instruction that puts on the stack what `value` makes (and takes from it)."""

    def step(machine: "Machine", _: Any) -> None:
        found = value(machine)
        machine._stack.append(found)

    return step


_Step = Callable[[Machine, Any], None]
_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, argument: None),
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
         "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
         "BINUNICODE8"),
        Machine._push,
    ),
    "NONE": _putting(lambda machine: None),
    "NEWTRUE": _putting(lambda machine: True),
    "NEWFALSE": _putting(lambda machine: False),
    "EMPTY_LIST": _putting(lambda machine: []),
    "EMPTY_TUPLE": _putting(lambda machine: ()),
    "EMPTY_DICT": _putting(lambda machine: {}),
    "LIST": _putting(lambda machine: machine._marked()),
    "TUPLE": _putting(lambda machine: tuple(machine._marked())),
    "DICT": _putting(lambda machine: _pairs(machine._marked())),
    "TUPLE1": lambda machine, _: machine._tuple_of(1),
    "TUPLE2": lambda machine, _: machine._tuple_of(2),
    "TUPLE3": lambda machine, _: machine._tuple_of(3),
    "APPEND": Machine._append,
    "APPENDS": lambda machine, _: machine._list(machine._marked()),
    "SETITEM": Machine._set_item,
    "SETITEMS": lambda machine, _: machine._set(machine._marked()),
    "MARK": Machine._mark,
    "POP": Machine._pop,
    "POP_MARK": lambda machine, _: machine._marked(),
    "DUP": _putting(lambda machine: machine._stack[-1]),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine._get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), Machine._put),
    "MEMOIZE": lambda machine, _: machine._put(len(machine._memo)),
    "GLOBAL": Machine._name_of,
    "INST": Machine._instance,
    "STACK_GLOBAL": Machine._stack_name,
    "REDUCE": Machine._call,
    "NEWOBJ": Machine._call,
    "BUILD": Machine._build,
    "BINPERSID": Machine._storage,
}  # fmt: skip
