r"""Patterns for the names of layers, matched in a time that grows with pattern and name alone.

An adapter's file says by regular expressions which layers it is for, and Python's matcher takes for
ever over some that have twenty letters. Here an expression becomes a nondeterministic automaton
whose states are followed all at once (Thompson, "Regular expression search algorithm", 1968).

The expressions are Python's, without what needs a memory (`(...)\1`) or looks around (`(?=...)`):
letters, `.`, `[...]`, `\d \w \s`, `^ $`, groups, `|`, `* + ? {m,n}`. Whether a repetition is greedy
makes no difference to whether a name matches.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

from jaxsynth.core.errors import UserError, quoted

# Of one pattern. An automaton of that many states is followed over all names of a network in less
# than the steps, which take some seconds, unless a pattern is made to be slow.
_MOST_STATES, _MOST_STEPS, _MOST_LEVELS = 50_000, 3_000_000, 50
_MOST_REMEMBERED = 50_000

_Test = Callable[[str], bool]
_CATEGORIES: dict[str, _Test] = {
    "d": str.isdecimal,
    "w": lambda c: c.isalnum() or c == "_",
    "s": str.isspace,
}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
_REPEAT = re.compile(r"\{(\d{0,6})(,?)(\d{0,6})\}")


class PatternError(ValueError):
    """A pattern that is none, that needs what is not implemented, or that takes too long."""


@contextmanager
def in_file(source: str | os.PathLike) -> Iterator[None]:
    """Names the file of a pattern that is used inside and is none."""
    try:
        yield
    except PatternError as error:
        raise UserError(f"{os.fspath(source)}: {error}") from None


def matches_whole(pattern: str, name: str) -> bool:
    """Whether a pattern matches all of a name, as `re.fullmatch` does."""
    return _compiled(pattern).matches(name, 0)


def matches_end(pattern: str, name: str) -> bool:
    """Whether a pattern matches all of a dotted name, or all that comes after one of its dots."""
    compiled = _compiled(pattern)
    starts = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
    return any(compiled.matches(name, start) for start in starts)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> "_Automaton":
    return _Automaton(pattern)


class _Automaton:
    """States are numbers; each reads a letter that passes its test, or goes on without reading."""

    def __init__(self, pattern: str):
        self._pattern = pattern
        tree = _Parser(pattern).whole()
        self._literal = _literal(tree)
        self._tests: list[_Test | None] = []
        self._next: list[tuple[int, ...]] = []
        # Places where a name has to begin ("^") or end ("$") for the state to go on.
        self._where: list[str] = []
        self._steps = 0
        self._known: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        if self._literal is None:
            if _size(tree) > _MOST_STATES:
                raise PatternError(f"pattern {quoted(pattern)}: more than {_MOST_STATES} states")
            self._end = self._state()
            self._start = self._build(tree, self._end)

    def matches(self, name: str, start: int) -> bool:
        """Whether the pattern matches `name` from `start` to its end."""
        if self._literal is not None:
            letters, begins = self._literal
            return (start == 0 or not begins) and name[start:] == letters
        last = len(name)
        current = self._closure(frozenset([self._start]), start == 0, start == last)
        for place in range(start, last):
            if not current:
                return False
            current = self._after(current, name[place], place + 1 == last)
        return self._end in current

    def _after(self, current: frozenset[int], letter: str, last: bool) -> frozenset[int]:
        key = current, letter
        if not last and key in self._known:
            return self._known[key]
        moved: set[int] = set()
        for state in current:
            test = self._tests[state]
            if test is not None and test(letter):
                moved.update(self._next[state])
        found = self._closure(frozenset(moved), False, last)
        self._count(len(current))
        if not last:
            if len(self._known) > _MOST_REMEMBERED:
                self._known.clear()
            self._known[key] = found
        return found

    def _closure(self, states: frozenset[int], first: bool, last: bool) -> frozenset[int]:
        """The states and those that are reached from them without reading a letter."""
        found, waiting = set(states), list(states)
        while waiting:
            state = waiting.pop()
            stopped = (self._where[state] == "^" and not first) or (
                self._where[state] == "$" and not last
            )
            if self._tests[state] is not None or stopped:
                continue
            fresh = [other for other in self._next[state] if other not in found]
            found.update(fresh)
            waiting += fresh
        self._count(len(found))
        return frozenset(found)

    def _count(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise PatternError(f"pattern {quoted(self._pattern)}: takes too long to match")

    def _state(
        self, following: tuple[int, ...] = (), test: _Test | None = None, where: str = ""
    ) -> int:
        self._next.append(following)
        self._tests.append(test)
        self._where.append(where)
        return len(self._next) - 1

    def _build(self, tree: tuple, after: int) -> int:
        """The state from which `tree` is read, and then `after`."""
        kind, *parts = tree
        if kind == "letter":
            return self._state((after,), lambda c, letter=parts[0]: c == letter)
        if kind == "test":
            return self._state((after,), parts[0])
        if kind == "place":
            return self._state((after,), where=parts[0])
        if kind == "row":
            for part in reversed(parts[0]):
                after = self._build(part, after)
            return after
        if kind == "either":
            return self._state(tuple(self._build(part, after) for part in parts[0]))
        inner, least, most = parts
        if most is None:
            # A state that reads the part again or goes on.
            again = self._state()
            self._next[again] = (self._build(inner, again), after)
            after = again
        else:
            end = after
            for _ in range(most - least):
                after = self._state((self._build(inner, after), end))
        for _ in range(least):
            after = self._build(inner, after)
        return after


def _size(tree: tuple) -> int:
    kind, *parts = tree
    if kind in ("row", "either"):
        return 1 + sum(map(_size, parts[0]))
    if kind == "repeat":
        inner, least, most = parts
        return 1 + (_size(inner) + 1) * (least + 1 if most is None else most)
    return 1


def _literal(tree: tuple) -> tuple[str, bool] | None:
    """The letters of a pattern that is nothing else, and whether they begin the name."""
    parts = tree[1] if tree[0] == "row" else [tree]
    begins = bool(parts) and parts[0] == ("place", "^")
    parts = parts[1:] if begins else parts
    parts = parts[:-1] if parts and parts[-1] == ("place", "$") else parts
    if all(part[0] == "letter" for part in parts):
        return "".join(part[1] for part in parts), begins
    return None


class _Parser:
    """A pattern as nested tuples: ("row", parts), ("either", parts), ("repeat", part, m, n), ..."""

    def __init__(self, pattern: str):
        self._pattern, self._place, self._level = pattern, 0, 0

    def whole(self) -> tuple:
        tree = self._either()
        if self._place < len(self._pattern):
            raise self._error("a bracket that was not opened")
        return tree

    def _error(self, what: str) -> PatternError:
        return PatternError(f"pattern {quoted(self._pattern)}, letter {self._place + 1}: {what}")

    def _peek(self, letters: str = "") -> str:
        """The next letter if it is one of `letters`, or any; "" otherwise and at the end."""
        found = self._pattern[self._place : self._place + 1]
        return found if not letters or (found and found in letters) else ""

    def _take(self) -> str:
        found = self._peek()
        if not found:
            raise self._error("ends too early")
        self._place += 1
        return found

    def _either(self) -> tuple:
        parts = [self._row()]
        while self._peek("|"):
            self._place += 1
            parts.append(self._row())
        return parts[0] if len(parts) == 1 else ("either", parts)

    def _row(self) -> tuple:
        parts = []
        while self._peek() and not self._peek("|)"):
            part = self._repeated(self._atom())
            # A group of a row is the row's.
            parts += part[1] if part[0] == "row" else [part]
        return parts[0] if len(parts) == 1 else ("row", parts)

    def _repeated(self, part: tuple) -> tuple:
        found = self._peek("*+?{")
        counted = _REPEAT.match(self._pattern, self._place) if found == "{" else None
        if not found or (found == "{" and counted is None):
            return part
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(found, (0, None))
        if counted is not None:
            low, comma, high = counted.groups()
            least = int(low or 0)
            most = int(high) if high else None if comma else least
            if not (low or high) or (most is not None and most < least):
                raise self._error("a repetition of no count")
        if part[0] == "place":
            raise self._error("a repetition of a place")
        self._place = counted.end() if counted else self._place + 1
        if self._peek("?"):  # not greedy
            self._place += 1
        if self._peek("*+?"):
            raise self._error("a repetition of a repetition, which is not implemented")
        return "repeat", part, least, most

    def _atom(self) -> tuple:
        letter = self._take()
        if letter == "(":
            return self._group()
        if letter == "[":
            return "test", self._class()
        if letter == ".":
            return "test", lambda c: c != "\n"
        if letter in "^$":
            return "place", letter
        if letter in "*+?":
            raise self._error("a repetition of nothing")
        if letter != "\\":
            return "letter", letter
        escaped = self._take()
        if escaped in "AZ":
            return "place", "^" if escaped == "A" else "$"
        test = self._category(escaped)
        return ("test", test) if test else ("letter", self._escaped(escaped))

    def _group(self) -> tuple:
        self._level += 1
        if self._level > _MOST_LEVELS:
            raise self._error(f"more than {_MOST_LEVELS} groups in one another")
        if self._peek("?"):
            named = re.compile(r"\?(:|P<\w{1,100}>)").match(self._pattern, self._place)
            if named is None:
                raise self._error("a group that looks around or sets flags, not implemented")
            self._place = named.end()
        tree = self._either()
        if self._take() != ")":
            raise self._error("a group that is not closed")
        self._level -= 1
        return tree

    def _category(self, letter: str) -> _Test | None:
        test = _CATEGORIES.get(letter.lower())
        if test is None or letter.islower():
            return test
        return lambda c: not test(c)

    def _escaped(self, letter: str) -> str:
        if letter in _CONTROLS:
            return _CONTROLS[letter]
        if letter.isalnum():
            raise self._error("an escape that is not implemented")
        return letter

    def _class(self) -> _Test:
        negated = bool(self._peek("^"))
        self._place += negated
        letters: set[str] = set()
        tests: list[_Test] = []
        first = True
        while first or not self._peek("]"):
            first = False
            low = self._take()
            if low == "\\":
                low = self._take()
                if test := self._category(low):
                    tests.append(test)
                    continue
                low = self._escaped(low)
            if self._peek("-") and self._pattern[self._place + 1 : self._place + 2] not in (
                "]",
                "",
            ):
                self._place += 1
                high = self._take()
                high = self._escaped(self._take()) if high == "\\" else high
                if high < low:
                    raise self._error("a range that ends before it begins")
                tests.append(lambda c, low=low, high=high: low <= c <= high)
            else:
                letters.add(low)
        self._place += 1
        return lambda c: (c in letters or any(test(c) for test in tests)) != negated
