"""Ratios that a noisy machine cannot bend: contestants take turns, and a ratio is the median of the rounds' ratios."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable

from rich.progress import track

Times = dict[str, list[float]]


def in_rounds(calls: dict[str, Callable[[], object]], rounds: int, what: str = "rounds") -> Times:
    """Seconds of each call in each round, after one call of the same to warm up.

    A round times every contestant once, within seconds, so that whatever else runs slows all alike.
    """
    times: Times = {name: [] for name in calls}
    gc.disable()
    for _ in track(range(rounds), what):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    gc.enable()
    return times


def quartiles(values: Iterable[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")
