"""Fits recover the laws that simulated curves were drawn from, and say where they cannot."""

import numpy as np
import pytest

from jaxsynth.methods.scaling import fit as laws

SIZES = np.array([10, 20, 40, 80, 160])


def curve(scale, exponent, offset, noise, rng, seeds=3) -> dict[float, np.ndarray]:
    errors = scale * SIZES**-exponent + offset
    return {
        float(n): e * (1 + noise * rng.standard_normal(seeds))
        for n, e in zip(SIZES, errors, strict=True)
    }


@pytest.mark.parametrize(
    ("scale", "exponent", "offset", "noise"),
    [(1.0, 0.5, 0.0, 0.05), (1.0, 0.5, 0.1, 0.05), (1.0, 0.8, 0.02, 0.05)],
)
def test_the_interval_holds_the_true_exponent_in_90_of_100_studies(scale, exponent, offset, noise):
    held = 0
    for number in range(100):
        rng = np.random.default_rng(number)
        law = laws.fit(curve(scale, exponent, offset, noise, rng), resamples=200)
        assert not law.refused, law.refused
        held += law.exponent.low <= exponent <= law.exponent.high
    assert held >= 90, held


def test_a_clear_law_is_found_with_its_offset_and_where_it_saturates():
    law = laws.fit(curve(2.0, 1.0, 0.05, 0.005, np.random.default_rng(0)))
    for name, wanted in (("scale", 2.0), ("exponent", 1.0), ("offset", 0.05)):
        found = getattr(law, name)
        assert found.low <= wanted <= found.high, name
        assert found.high - found.low < 0.6 * wanted, name
    np.testing.assert_allclose(law.at(SIZES), 2.0 / SIZES + 0.05, rtol=0.05)
    # 2 / n is a tenth of 0.05.
    assert 200 < law.saturates < 800


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ({10.0: [0.5, 0.4], 20.0: [0.4, 0.3], 40.0: [0.3, 0.2]}, "3 sizes"),
        ({float(n): [0.1] for n in SIZES}, "one seed"),
        ({float(n): [0.2, 0.0] for n in SIZES}, "error of 0"),
        ({float(n): [0.30, 0.32, 0.28] for n in SIZES}, "does not fall"),
        # Falls once and then no more: steep with an offset, or slow without.
        (
            dict(
                zip(
                    map(float, SIZES),
                    [[0.72, 0.68], [0.6, 0.68], [0.62, 0.66], [0.6, 0.62], [0.54, 0.56]],
                    strict=True,
                )
            ),
            "fit as well as any",
        ),
    ],
)
def test_what_the_data_cannot_tell_is_refused(errors, reason):
    law = laws.fit(errors)
    assert reason in law.refused and law.exponent is None
    with pytest.raises(ValueError, match=law.refused[:10]):
        law.at(SIZES)


def test_equivalent_real_images_are_read_off_the_real_curve():
    real = curve(1.0, 0.5, 0.0, 0.01, np.random.default_rng(1))
    found, words = laws.worth([40**-0.5, 1.01 * 40**-0.5, 0.99 * 40**-0.5], real)
    assert found.low < 40 < found.high < 50 and found.low > 32 and not words
    assert laws.worth([0.9, 0.91, 0.92], real)[1] == "less than"
    assert laws.worth([0.01, 0.011, 0.012], real)[1] == "more than"
    with pytest.raises(ValueError, match="two real sizes"):
        laws.worth([0.1, 0.2], {10.0: [0.1, 0.2]})
    with pytest.raises(ValueError, match="one seed"):
        laws.worth([0.1], real)


def test_a_difference_is_paired_by_seed():
    one, other = [0.30, 0.20, 0.10], [0.32, 0.22, 0.121]
    found = laws.difference(one, other)
    assert found.low < found.value < found.high < 0
    with pytest.raises(ValueError, match="expected two"):
        laws.difference([0.1], [0.2])
