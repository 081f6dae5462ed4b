"""Sweeps: which rate is chosen, what is trained, and which results count."""

from pathlib import Path

import pytest

from jaxsynth.runs.stage import Artifact
from jaxsynth.runs.sweep import best_results, rates_of, sweep

ERRORS = {0.1: 0.3, 0.2: 0.1, 0.4: 0.2}


def test_the_first_seed_tries_every_rate_and_the_others_take_the_best():
    asked = []

    def train(rate: float, seed: int) -> Artifact:
        asked.append((rate, seed))
        # Another seed's error chooses nothing.
        error = ERRORS[rate] if seed == 3 else 1 - ERRORS[rate]
        return Artifact(Path(f"{rate}-{seed}"), {"counts": {"validation": error}})

    rate, made = sweep(tuple(ERRORS), (3, 1), train)
    assert rate == 0.2 and asked == [(0.1, 3), (0.2, 3), (0.4, 3), (0.2, 1)]
    assert {seed: stage.path.name for seed, stage in made.items()} == {3: "0.2-3", 1: "0.2-1"}


def test_results_at_the_chosen_rate_count():
    results = [
        {"rate": rate, "seed": seed, "validation": error + seed}
        for rate, error in ERRORS.items()
        for seed in (0, 1)
    ]
    assert best_results(results) == [result for result in results if result["rate"] == 0.2]
    assert best_results([]) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("lora", "adapter"), (1.0,)), (("oft", "adapter"), (2.0, 3.0)), (("oft",), ())],
)
def test_rates_are_those_of_the_first_name_that_has_some(names, expected):
    assert rates_of({"lora": (1.0,), "adapter": (2.0, 3.0)}, *names) == expected
