"""What the programs need that a training really runs."""

from typing import Any

import pytest

from jaxsynth.training import loop


def memory_of_programs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that gets the compiler's memory analysis of the first training program from now on."""
    measured: list[Any] = []
    make = loop._program

    def measuring(*arguments):
        program = make(*arguments)

        def call(*values):
            if not measured:
                measured.append(program.lower(*values).compile().memory_analysis())
            return program(*values)

        call.trace = program.trace  # pyrefly: ignore[missing-attribute]
        return call

    monkeypatch.setattr(loop, "_program", measuring)
    return measured
