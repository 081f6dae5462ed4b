"""What a compiled program moves, read from its HLO: bytes of memory and collectives between chips.

XLA's own analysis counts the body of a loop once, and a network whose blocks are scanned is one
loop. Here each loop counts as often as it runs. Memory traffic is what instructions read and write
in a chip's main memory: operands and results, of those that are only sliced the slice, and nothing
of what the compiler keeps in on-chip memory (a layout's memory space other than 0).
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# Those that move nothing, or whose parts are counted by themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while",
    "conditional", "call", "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Collective:
    """Those of one kind: how many run, their bytes, and the bytes that a chip receives for them."""

    kind: str
    count: float
    bytes: float
    received: float

    def divided(self, by: int) -> "Collective":
        """Of one of `by` equal parts of a program."""
        return Collective(self.kind, self.count / by, self.bytes / by, self.received / by)


@dataclass(frozen=True)
class Traffic:
    """Of one run of a program on one chip.

    `largest` holds, for each kind, the largest single array. `unknown` counts the loops whose
    length is not in the HLO; they count once.
    """

    bytes: float
    collectives: tuple[Collective, ...]
    largest: dict[str, str]
    unknown: int

    @property
    def received(self) -> float:
        """Bytes that a chip receives from others."""
        return sum(one.received for one in self.collectives)


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str
    root: bool


# Instructions by name, in the order of the text.
_Computation = dict[str, _Instruction]


def traffic(text: str) -> Traffic:
    """The traffic of a compiled program (`compiled.as_text()`)."""
    computations, entry = _parse(text)
    totals: Counter[str] = Counter()
    largest: dict[str, tuple[int, str]] = {}
    unknown: set[str] = set()

    def visit(name: str, times: float, fused: bool) -> None:
        computation = computations[name]
        for one in computation.values():
            kind = one.opcode.removesuffix("-start")
            if kind in KINDS:
                shapes = [computation[name].shape for name in one.operands if name in computation]
                size, shape = max(_sizes("".join([one.shape, *shapes]), anywhere=True))
                group = _group_size(one.rest)
                totals[f"{kind} count"] += times
                totals[f"{kind} bytes"] += times * size
                share = (group - 1) / group * (2 if kind == "all-reduce" else 1)
                totals[f"{kind} received"] += times * size * share
                largest[kind] = max(largest.get(kind, (0, "")), (size, shape))
                continue
            if not fused:
                totals["bytes"] += times * _moved(one, computation, computations)
            trips = 1
            if one.opcode == "while":
                found = _trips(one, computations)
                unknown.update([one.name] if found is None else [])
                trips = found or 1
            if one.opcode in ("fusion", "call", "conditional", "while", "async-start"):
                for called in _called(one):
                    visit(called, times * trips, fused or one.opcode in ("fusion", "async-start"))

    visit(entry, 1.0, False)
    collectives = tuple(
        Collective(kind, *(totals[f"{kind} {what}"] for what in ("count", "bytes", "received")))
        for kind in KINDS
        if totals[f"{kind} count"]
    )
    names = {kind: shape for kind, (_, shape) in largest.items()}
    return Traffic(totals["bytes"], collectives, names, len(unknown))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = {}, ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            shape, rest = _split_type(found[3])
            opcode, _, rest = rest.partition("(")
            end = _closing(rest)
            operands = re.findall(r"%([\w.\-]+)", rest[:end])
            current[found[2]] = _Instruction(
                found[2], shape, opcode.strip(), operands, rest, bool(found[1])
            )
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    """A result's type, which may be a tuple, and what follows."""
    end = 1 + _closing(text[1:]) if text.startswith("(") else text.index(" ") - 1
    return text[: end + 1], text[end + 1 :]


def _closing(text: str) -> int:
    """Where the parenthesis closes that was open before `text`."""
    first = text.find(")")  # of nearly every list of operands
    if first >= 0 and "(" not in text[:first]:
        return first
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    return len(text)


def _called(one: _Instruction) -> list[str]:
    found = list(_CALLED.findall(one.rest))
    for names in _BRANCHES.findall(one.rest):
        found += re.findall(r"[\w.\-]+", names)
    return found


def _trips(loop: _Instruction, computations: dict[str, _Computation]) -> int | None:
    """How often a loop runs: from its annotation, or from the number that its counter stops at."""
    if found := _TRIPS.search(loop.rest):
        return int(found[1])
    condition = computations[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    limits = [
        int(one.rest.partition(")")[0])
        for one in condition.values()
        if one.opcode == "constant" and one.shape.startswith(("s32[]", "u32[]"))
    ]
    return limits[0] if len(limits) == 1 else None


def _group_size(rest: str) -> int:
    """How many devices take part in a collective together."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
    return 2  # a permutation's pairs


def _sizes(shape: str, *, anywhere: bool = False) -> Iterator[tuple[int, str]]:
    """Bytes of each array of a type, `anywhere` or in main memory alone."""
    for kind, dims, space in _SHAPE.findall(shape):
        digits = re.search(r"\d+", kind)
        bits = 8 if kind == "pred" else int(digits[0]) if digits else 0
        if bits and (anywhere or space in ("", "0")):
            count = math.prod(int(size) for size in dims.split(",") if size)
            yield count * bits // 8, f"{kind}[{dims}]"


def _bytes(shape: str, *, anywhere: bool = False) -> int:
    return sum(size for size, _ in _sizes(shape, anywhere=anywhere))


def _moved(
    one: _Instruction, computation: _Computation, computations: dict[str, _Computation]
) -> int:
    """Bytes that an instruction reads and writes in main memory."""
    if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
        return 0
    if one.opcode.endswith("-start"):
        return _bytes(one.shape)  # what it reads is part of its result's type
    if one.opcode == "fusion":
        inner = computations[_called(one)[0]]
        return sum(_read(part, inner) for part in inner.values()) + _written(one.shape, inner)
    if one.opcode in _SLICES:
        return 2 * _bytes(one.shape)
    shapes = [computation[name].shape for name in one.operands if name in computation]
    if one.opcode == "dynamic-update-slice":
        return 2 * _bytes(shapes[1])
    if one.opcode == "custom-call" and not one.operands:
        return 0  # an allocation
    return _bytes(one.shape) + sum(map(_bytes, shapes))


def _read(one: _Instruction, inner: _Computation) -> int:
    """Bytes that a fusion reads of a parameter: of one that is only sliced, the slices."""
    if one.opcode != "parameter" or not (whole := _bytes(one.shape)):
        return 0
    total = 0
    for use, name in _uses(one.name, inner):
        first = use.operands[0] == name
        if first and use.opcode in _SLICES:
            total += _bytes(use.shape, anywhere=True)
        elif not (first and use.opcode == "dynamic-update-slice"):  # that is written in place
            return whole
    return min(total, whole)


def _uses(name: str, inner: _Computation) -> Iterator[tuple[_Instruction, str]]:
    """Instructions that read a value, bitcasts looked through, with the name they read it by."""
    for one in inner.values():
        if name in one.operands:
            if one.opcode == "bitcast":
                yield from _uses(one.name, inner)
            else:
                yield one, name


def _written(shape: str, inner: _Computation) -> int:
    """Bytes that a fusion writes: of an array that it updates in place, the update."""
    root = next(one for one in inner.values() if one.root)
    results = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0
    for one in results:
        while one.opcode == "bitcast" and one.operands[0] in inner:
            one = inner[one.operands[0]]
        if one.opcode == "dynamic-update-slice":
            total += _bytes(inner[one.operands[1]].shape, anywhere=True)
        else:
            total += _bytes(one.shape)
    return min(total, _bytes(shape))
