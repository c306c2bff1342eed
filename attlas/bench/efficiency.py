"""From which length a mechanism pays off, and how its cost grows.

The efficiency length of a mechanism is the smallest length from which on it stays cheaper than a baseline, as
far as both were measured. The idea is CAB's (Zhang et al., "CAB: Comprehensive Attention Benchmarking on Long
Sequence Modeling", 2023, arXiv:2210.07661), which fits a parabola to the baseline and a line to the mechanism.
Here nothing is fitted, since few mechanisms are lines: between two measured lengths costs are joined by power
laws, so a crossing lies where the log of their ratio, linear in log N, is zero. Ask it of time and of memory, and
of softmax attention with all scores in memory as of a fused kernel: the answers differ.

A curve maps tokens to `Times`; bytes, which do not scatter, are `exactly` that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from attlas.bench.records import SpeedResult, Times
from attlas.core.errors import BadInput

Curve = Mapping[int, Times]


def time_curve(results: Mapping[int, SpeedResult]) -> dict[int, Times]:
    """Tokens -> seconds of one call."""
    return {tokens: result.times for tokens, result in results.items()}


def memory_curve(results: Mapping[int, SpeedResult]) -> dict[int, Times]:
    """Tokens -> peak bytes of one call."""
    return {tokens: exactly(result.peak_bytes) for tokens, result in results.items()}


def exactly(value: float) -> Times:
    """A cost without scatter."""
    return Times(value, value, value, 1)


@dataclass(frozen=True)
class EfficiencyLength:
    """From which length one mechanism is cheaper than another.

    Attributes:
        length: tokens; `shortest` where it is cheaper from there, infinite where never up to `longest`.
        lower: the same were the mechanism at its lower and the baseline at its upper quartile.
        upper: the reverse.
        shortest, longest: tokens between which both were measured.
    """

    length: float
    lower: float
    upper: float
    shortest: int
    longest: int

    @property
    def always(self) -> bool:
        """Cheaper at every measured length."""
        return self.length <= self.shortest

    @property
    def never(self) -> bool:
        """Not cheaper at the longest measured length."""
        return math.isinf(self.length)

    def __str__(self) -> str:
        if self.never:
            text = f"never up to {self.longest}"
        elif self.always:
            text = f"from the shortest measured, {self.shortest}"
        else:
            text = f"{self.length:.0f}"
        if self.lower == self.upper:
            return text
        low = f"under {self.shortest}" if self.lower <= self.shortest else f"{self.lower:.0f}"
        high = f"over {self.longest}" if math.isinf(self.upper) else f"{self.upper:.0f}"
        return f"{text} ({low} to {high})"


def efficiency_length(mechanism: Curve, baseline: Curve) -> EfficiencyLength:
    """From which length `mechanism` stays cheaper than `baseline`.

    Raises:
        BadInput: no length at which both were measured, or a cost that is not positive.
    """
    lengths = sorted(mechanism.keys() & baseline.keys())
    if not lengths:
        raise BadInput(f"no common length: {sorted(mechanism)} and {sorted(baseline)} tokens were measured")
    pairs = [(mechanism[n], baseline[n]) for n in lengths]
    if min(min(ours.lower, theirs.lower) for ours, theirs in pairs) <= 0:
        raise BadInput("costs must be positive to be compared by their ratio")
    return EfficiencyLength(
        length=_crossing(lengths, [ours.median / theirs.median for ours, theirs in pairs]),
        lower=_crossing(lengths, [ours.lower / theirs.upper for ours, theirs in pairs]),
        upper=_crossing(lengths, [ours.upper / theirs.lower for ours, theirs in pairs]),
        shortest=lengths[0],
        longest=lengths[-1],
    )


def _crossing(lengths: Sequence[int], ratios: Sequence[float]) -> float:
    """Where the ratio falls below one for good."""
    last = max((index for index, ratio in enumerate(ratios) if ratio >= 1), default=None)
    if last is None:
        return lengths[0]
    if last == len(lengths) - 1:
        return math.inf
    here, there = math.log(ratios[last]), math.log(ratios[last + 1])
    return lengths[last] * (lengths[last + 1] / lengths[last]) ** (here / (here - there))


def scaling_exponent(curve: Curve, points: int = 3) -> float:
    """The slope of log cost over log N, by least squares through the `points` longest lengths.

    Raises:
        BadInput: fewer than two lengths.
    """
    lengths = sorted(curve)[-points:]
    if len(lengths) < 2:
        raise BadInput(f"a slope needs two lengths, got {lengths}")
    slope, _ = np.polyfit(np.log(lengths), np.log([curve[n].median for n in lengths]), 1)
    return float(slope)


def cab_length(mechanism: Curve, baseline: Curve) -> float | None:
    """CAB's original efficiency length, for comparison: the larger root of parabola minus line; None if complex.

    CAB fits the line to all lengths for memory and to those of at least 512 tokens for time.
    """
    parabola, line = (
        np.polyfit(list(curve), [cost.median for cost in curve.values()], degree)
        for curve, degree in ((baseline, 2), (mechanism, 1))
    )
    roots = np.roots(np.polysub(parabola, line))
    return None if np.iscomplex(roots).any() or not roots.size else float(roots.real.max())
