import math

import pytest

from attlas.bench.efficiency import (
    cab_length,
    efficiency_length,
    exactly,
    memory_curve,
    scaling_exponent,
    time_curve,
)
from attlas.bench.records import SpeedResult, Times
from attlas.core.errors import BadInput

LENGTHS = [256 << step for step in range(7)]


def curve(cost, spread=0.0, lengths=LENGTHS):
    return {n: Times(cost(n), cost(n) * (1 - spread), cost(n) * (1 + spread), 9) for n in lengths}


QUADRATIC = curve(lambda n: n * n / 1000)


def test_power_laws_cross_exactly():
    found = efficiency_length(curve(lambda n: 3.0 * n), QUADRATIC)
    assert found.length == pytest.approx(3000)
    assert found.lower == found.length == found.upper
    assert (found.shortest, found.longest) == (256, 16384)
    assert str(found) == "3000"


def test_the_crossing_of_a_line_with_an_offset_lies_between_its_neighbours():
    found = efficiency_length(curve(lambda n: 1000 + 2.0 * n), QUADRATIC)
    truth = 1000 + math.sqrt(1000**2 + 1000**2)
    assert 2048 < found.length < 4096
    assert found.length == pytest.approx(truth, rel=0.01)


def test_quartiles_give_the_bracket():
    found = efficiency_length(curve(lambda n: 3.0 * n, 0.1), curve(lambda n: n * n / 1000, 0.1))
    assert found.length == pytest.approx(3000)
    assert found.lower == pytest.approx(3000 * 0.9 / 1.1)
    assert found.upper == pytest.approx(3000 * 1.1 / 0.9)
    assert str(found) == "3000 (2455 to 3667)"


def test_a_superlinear_mechanism_is_no_line():
    found = efficiency_length(curve(lambda n: 0.09 * n**1.5), QUADRATIC)
    assert found.length == pytest.approx(8100)


def test_cheaper_from_the_start_and_never():
    always = efficiency_length(curve(lambda n: 0.1 * n), QUADRATIC)
    assert always.always
    assert not always.never
    assert str(always) == "from the shortest measured, 256"
    never = efficiency_length(curve(lambda n: 17.0 * n), QUADRATIC)
    assert never.never
    assert not never.always
    assert str(never) == "never up to 16384"


def test_uncertain_ends_are_said():
    barely = efficiency_length(curve(lambda n: 16.0 * n, 0.1), QUADRATIC)
    assert str(barely) == "16000 (14400 to over 16384)"
    hardly = efficiency_length(curve(lambda n: 17.0 * n, 0.1), QUADRATIC)
    assert str(hardly) == "never up to 16384 (15300 to over 16384)"
    early = efficiency_length(curve(lambda n: 0.25 * n, 0.1), QUADRATIC)
    assert str(early) == "from the shortest measured, 256 (under 256 to 275)"


def test_a_relapse_counts():
    """Cheaper at 1024, dearer again at 4096: the length is where it stays cheaper."""
    bumpy = {n: exactly(cost.median * 0.5) for n, cost in QUADRATIC.items()}
    bumpy[4096] = exactly(QUADRATIC[4096].median * 2)
    assert efficiency_length(bumpy, QUADRATIC).length == pytest.approx(4096 * math.sqrt(2))


def test_only_common_lengths_count():
    short = curve(lambda n: n * n / 1000, lengths=LENGTHS[:4])
    found = efficiency_length(curve(lambda n: 3.0 * n), short)
    assert found.never
    assert found.longest == 2048


def test_curves_that_cannot_be_compared():
    with pytest.raises(BadInput, match="no common length"):
        efficiency_length(curve(float, lengths=[256]), curve(float, lengths=[512]))
    with pytest.raises(BadInput, match="positive"):
        efficiency_length(curve(lambda n: 0.0), QUADRATIC)


def test_exponents():
    assert scaling_exponent(QUADRATIC) == pytest.approx(2)
    bent = curve(lambda n: 1e6 if n < 4096 else n**1.5)
    assert scaling_exponent(bent) == pytest.approx(1.5)
    with pytest.raises(BadInput, match="two lengths"):
        scaling_exponent(curve(float, lengths=[256]))


def test_cab_takes_the_larger_root():
    assert cab_length(curve(lambda n: 1000 + 2.0 * n), QUADRATIC) == pytest.approx(1000 + 1000 * math.sqrt(2))
    assert cab_length(curve(lambda n: -1000 + 1.0 * n), QUADRATIC) is None


def test_curves_of_results():
    times = Times(2.0, 1.0, 3.0, 5)
    result = SpeedResult(times, 1, 1, 0, 0, 4096, 1.0, 1.0, 0.0, {})
    assert time_curve({256: result}) == {256: times}
    assert memory_curve({256: result}) == {256: Times(4096, 4096, 4096, 1)}
