"""What curves of fine-tuning say, on curves whose answers are known."""

import math

import pytest

from jaxsynth.methods.weightgen.scores import Curves, duel, reached, repaid_after, verdict

STEPS = (0, 5, 20)


def curves(*l1, prepare=1.0, step=0.5) -> Curves:
    return Curves(STEPS, l1, prepare, step)


def test_steps_and_seconds_to_a_target():
    found = curves((0.3, 0.2, 0.1), (0.3, 0.3, 0.3), (0.1, 0.1, 0.1))
    assert found.steps_to([0.2, 0.2, 0.2]) == [5, math.inf, 0]
    result = reached([found], [[0.2, 0.2, 0.2]])
    assert result.share == pytest.approx(2 / 3) and result.steps == 5
    assert result.seconds == 1.0 + 5 * 0.5
    # Most never get there: no number of steps is claimed.
    assert reached([found], [[0.01, 0.2, 0.01]]).steps == math.inf
    # Of an even number the median lies between the two in the middle.
    even = curves((0.3, 0.1, 0.1), (0.3, 0.3, 0.1))
    assert reached([even], [[0.2, 0.2]]).steps == (5 + 20) / 2
    assert reached([even], [[0.2, 0.01]]).steps == math.inf
    # Of two seeds: three of five concepts get there, the last of them after 5 steps.
    both = reached(
        [found, curves((0.1, 0.1, 0.1), (0.3, 0.3, 0.3), step=1.5)], [[0.2] * 3, [0.2] * 2]
    )
    assert both.steps == 5 and both.share == pytest.approx(3 / 5)
    assert both.seconds == 1.0 + 5 * (0.5 + 1.5) / 2
    with pytest.raises(ValueError, match=r"\(1, 2\) errors at 3 steps"):
        curves((0.1, 0.2))


def test_a_duel_is_by_concept_and_over_all_seeds():
    own = [curves((0.1, 0.1, 0.3)), curves((0.3, 0.2, 0.1))]
    other = [curves((0.2, 0.2, 0.2)), curves((0.2, 0.3, 0.1))]
    found = duel(own, other)
    assert found.difference == pytest.approx((0.0, -0.4, 1 / 3))
    assert found.won == (0.5, 1.0, 0.0) and not found.throughout
    with pytest.raises(ValueError, match="duel"):
        duel(own, other[:1])


def test_verdicts_say_what_is():
    good = duel([curves((0.1, 0.1, 0.1))], [curves((0.2, 0.2, 0.2))])
    assert "A **beats** B from step 0 through the end (-50.0% at step 0" in verdict("A", "B", good)
    mixed = duel([curves((0.1, 0.3, 0.2))], [curves((0.2, 0.2, 0.2))])
    text = verdict("A", "B", mixed)
    assert "**does not beat** B" in text and "ahead at steps 0 only" in text
    assert "at worst +50.0% at step 5" in text
    lost = duel([curves((0.3, 0.3, 0.3))], [curves((0.2, 0.2, 0.2))])
    assert "behind at every step" in verdict("A", "B", lost)


def test_what_is_saved_repays_what_was_spent():
    assert repaid_after(100, own=2, other=12) == 10
    assert repaid_after(100, own=12, other=2) == math.inf
    assert repaid_after(100, own=math.inf, other=5) == math.inf
    assert repaid_after(100, own=2, other=math.inf) == 0
