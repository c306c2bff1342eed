import math

import pytest
import torch

from attlas.bench.statistics import Interval, Scores, composite, difference, interval, within_noise
from attlas.core.errors import BadInput


def test_interval_is_students():
    # Half = t(0.975, 2 degrees of freedom) * s / sqrt(3), with t from the table and s = 1.
    got = interval([1.0, 2.0, 3.0])
    assert got.mean == 2
    assert got.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (got.low, got.high) == (got.mean - got.half, got.mean + got.half)


def test_one_value_has_no_interval_and_none_no_mean():
    assert interval([0.3]) == Interval(0.3, None)
    assert 1e9 in interval([0.3])
    assert interval([0.3, 0.3]) == Interval(0.3, 0.0)
    with pytest.raises(BadInput, match="at least one value"):
        interval([])


def test_interval_covers_the_truth_95_times_in_100():
    torch.manual_seed(0)
    samples = torch.randn(2000, 3, dtype=torch.float64)
    covered = sum(0 in interval(sample.tolist()) for sample in samples) / len(samples)
    assert covered == pytest.approx(0.95, abs=0.015)


def test_difference_is_welchs():
    # Equal sizes and spreads: Student's case with 4 degrees of freedom, half = t * s * sqrt(2 / 3).
    got = difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert got.mean == 1
    assert got.half == pytest.approx(2.776445 * math.sqrt(2 / 3), rel=1e-6)
    # A baseline without spread leaves 2 degrees of freedom.
    assert difference([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]).half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert difference([2.0, 3.0], [1.0]).half is None


def test_within_noise():
    clear = Interval(1.0, 0.5)
    assert not within_noise(clear, None)
    assert not within_noise(clear, Interval(-0.9, 3.0))
    assert within_noise(clear, Interval(-1.1, 3.0))
    assert within_noise(Interval(-0.4, 0.5), None)
    assert within_noise(Interval(5.0, None), None)


def test_composite_is_the_mean_of_z_scores():
    bits = Scores(False, {"a": [1.0, 1.0], "b": [2.0, 2.0], "c": [3.0, 3.0]})
    accuracy = Scores(True, {"a": [0.9, 0.9], "b": [0.5, 0.5], "c": [0.1, 0.1]})
    assert composite([bits, accuracy]) == {"a": Interval(1.0, 0.0), "b": Interval(0.0, 0.0), "c": Interval(-1.0, 0.0)}


def test_composite_reproduces_a_published_scale():
    # CAB's FastSpeech 2 MCD, vanilla and nine mechanisms: mean 3.4245, sample deviation 0.06832.
    values = dict(zip("ab", ([3.4245 - 0.06832 / math.sqrt(2)], [3.4245 + 0.06832 / math.sqrt(2)]), strict=True))
    index = composite([Scores(False, values | {"new": [3.4245 + 0.06832]})], controls=["new"])
    assert index["new"].mean == pytest.approx(-1)


def test_composite_leaves_out_what_misses_a_task_and_does_not_count_controls_twice():
    first = Scores(True, {"a": [1.0], "b": [3.0], "again": [9.0], "half": [2.0]})
    second = Scores(True, {"a": [1.0], "b": [3.0], "again": [1.0], "half": []})
    index = composite([first, second], controls=["again"])
    assert set(index) == {"a", "b", "again"}
    assert index["a"].half is None
    assert index["again"].mean == pytest.approx((7.0 - 1 / math.sqrt(2)) / 2)
    assert composite([first, Scores(True, {"a": [1.0], "b": [1.0]})]) == {}
    assert composite([]) == {}


def test_composite_interval_comes_from_the_seeds():
    spread = {"a": [0.0, 2.0], "b": [3.0, 3.0]}
    index = composite([Scores(True, spread)])
    # mu 2, sigma sqrt 2; the mean of a has a standard error of 1, with 1 degree of freedom.
    assert index["a"].half == pytest.approx(12.706205 / math.sqrt(2), rel=1e-6)
    assert index["b"].half == 0
