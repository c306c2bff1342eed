"""Means with what is known of them: confidence intervals, differences, noise, and one index over tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from attlas.bench.extras import extra
from attlas.core.errors import BadInput

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval, mean ± half; half is None after a single value."""

    mean: float
    half: float | None

    @property
    def low(self) -> float:
        """The lower end; minus infinity without an interval."""
        return self.mean - (math.inf if self.half is None else self.half)

    @property
    def high(self) -> float:
        """The upper end; infinity without an interval."""
        return self.mean + (math.inf if self.half is None else self.half)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Scores:
    """What one task gave.

    Attributes:
        higher_is_better: which way the metric runs.
        values: label -> one value per seed.
    """

    higher_is_better: bool
    values: Mapping[str, Sequence[float]]


def interval(values: Sequence[float]) -> Interval:
    """The mean over seeds, by Student's t.

    Raises:
        BadInput: no values.
    """
    return Interval(_mean(values), _half([(values, 1.0)]))


def difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Mean of `values` minus mean of `baseline`, by Welch's t.

    The seeds are not paired: a seed draws different weights for different mechanisms.
    """
    return Interval(_mean(values) - _mean(baseline), _half([(values, 1.0), (baseline, 1.0)]))


def within_noise(gap: Interval, control: Interval | None) -> bool:
    """Whether a difference to the baseline says nothing.

    It does not if 0 lies in its interval, or if it is no larger than the difference between the baseline and
    the noise control, which is the same mathematics with other seeds.
    """
    return 0 in gap or (control is not None and abs(gap.mean) <= abs(control.mean))


def composite(tasks: Sequence[Scores], controls: Collection[str] = ()) -> dict[str, Interval]:
    """The mean over tasks of z-scores, positive is better, for every label that has values on all tasks.

    z = ± (mean - mu) / sigma, with mu and sigma (n - 1) over the labels of the task in this very run; noise
    controls are scored but do not count twice in them. The interval is that of the means, mu and sigma taken
    as they are. Empty where a task has fewer than two different means. Source: the composite index of CAB,
    Zhang et al., 2023 (arXiv:2210.07661).

    Args:
        tasks: of one pattern, so that the same labels can do them.
        controls: labels of noise controls.
    """
    scales = []
    for task in tasks:
        means = [_mean(values) for label, values in task.values.items() if values and label not in controls]
        sigma = statistics.stdev(means) if len(means) > 1 else 0.0
        if not sigma:
            return {}
        scales.append((statistics.fmean(means), sigma if task.higher_is_better else -sigma))
    index = {}
    for label in tasks[0].values if tasks else ():
        rows = [task.values.get(label, ()) for task in tasks]
        if all(rows):
            z = [(_mean(row) - mu) / sigma for row, (mu, sigma) in zip(rows, scales, strict=True)]
            weights = [1 / (sigma * len(rows)) for _, sigma in scales]
            index[label] = Interval(statistics.fmean(z), _half(list(zip(rows, weights, strict=True))))
    return index


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise BadInput("a mean needs at least one value")
    return statistics.fmean(values)


def _half(terms: Sequence[tuple[Sequence[float], float]]) -> float | None:
    """Half the interval of a weighted sum of independent means, with Welch's degrees of freedom."""
    if any(len(values) < 2 for values, _ in terms):
        return None
    parts = [(weight**2 * statistics.variance(row) / len(row), len(row) - 1) for row, weight in terms]
    variance = sum(part for part, _ in parts)
    if not variance:
        return 0.0
    freedom = variance**2 / sum(part**2 / free for part, free in parts)
    quantile = extra("scipy.special", "a confidence interval").stdtrit(freedom, (1 + CONFIDENCE) / 2)
    return float(quantile) * math.sqrt(variance)
