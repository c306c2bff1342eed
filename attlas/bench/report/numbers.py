"""Numbers as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from attlas.bench.statistics import Interval

MISSING = "–"


def _scaled(value: float, steps: Sequence[tuple[float, str]]) -> str:
    """Three digits in the largest unit that is not more than the value."""
    size, unit = next((step for step in steps if abs(value) >= step[0] * 0.9995), steps[-1])
    return f"{digits(value / size)}{unit}"


def digits(value: float, count: int = 3) -> str:
    """`count` significant digits, without an exponent: 0.0123, 1.23, 123, 1,234."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{count - 1}e}")
    places = count - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, places)}f}"


def seconds(value: float) -> str:
    """A duration: 1.23 ms, 45.0 s, 3 min 20 s."""
    if value >= 60:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes} min {rest:02d} s"
    return _scaled(value, [(1, " s"), (1e-3, " ms"), (1e-6, " µs"), (1e-9, " ns")])


def milliseconds(value: float) -> str:
    """Seconds written in milliseconds."""
    return digits(value * 1e3)


def memory(value: float) -> str:
    """Bytes: 1.50 MiB."""
    if value < 1024:
        return f"{value:.0f} B"
    return _scaled(value, [(2.0**40, " TiB"), (2.0**30, " GiB"), (2.0**20, " MiB"), (2.0**10, " KiB")])


def count(value: float) -> str:
    """A large number: 1.23 G, 45.6 k, 789."""
    if abs(value) < 1000:
        return digits(value) if value != int(value) else f"{value:.0f}"
    return _scaled(value, [(1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")])


def tokens(value: float) -> str:
    """A length: 512, 1k, 16k, 1.5k where 1k is 1,024; other numbers in full."""
    if value >= 1024 and value % 512 == 0:
        return f"{value / 1024:g}k"
    return f"{round(value):,}"


def percent(share: float) -> str:
    """A share: 0.4 %, 12 %."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.1f} %"


def signed(value: float, places: int) -> str:
    """With its sign, a true minus."""
    return f"{value:+.{places}f}".replace("-", "−")


def interval(value: Interval, places: int, signs: bool = False) -> str:
    """mean ± half, or the mean alone where one value says nothing of the half."""
    mean = signed(value.mean, places) if signs else f"{value.mean:.{places}f}"
    return mean if value.half is None else f"{mean} ± {value.half:.{places}f}"


def places_for(halves: Sequence[float | None]) -> int:
    """Decimals that show two digits of the typical half-width of an interval, 1 to 4; 3 where there is none."""
    known = sorted(half for half in halves if half)
    if not known:
        return 3
    return min(4, max(1, 1 - math.floor(math.log10(known[len(known) // 2]))))


def _short(text: str) -> str:
    """A written number without the zeros behind its point: 1.50 s becomes 1.5 s."""
    return re.sub(r"(\.\d*?)0+(?!\d)", lambda match: match[1].rstrip("."), text)


def short_seconds(value: float) -> str:
    """A duration at a tick of an axis."""
    return _short(seconds(value))


def short_memory(value: float) -> str:
    """Bytes at a tick of an axis."""
    return _short(memory(value))


def short_percent(value: float) -> str:
    """A share at a tick of an axis."""
    return _short(percent(value))


def error(value: float) -> str:
    """The size of a rounding error: 3e-07."""
    return f"{value:.0e}"


def ratio(value: float) -> str:
    """How many times: 0.35, 7.1, 140."""
    return digits(value, 2)
