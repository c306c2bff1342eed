"""The part of the page about speed: cost against length, tables at one length, efficiency lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import NamedTuple

from attlas.bench.efficiency import EfficiencyLength
from attlas.bench.records import Failure, Measure, SpeedResult
from attlas.bench.report import numbers
from attlas.bench.report.digest import FUSED, MATERIALISED, Efficiency, SpeedTable
from attlas.bench.report.svg import Axis, Point, Ring, Series, chart
from attlas.bench.report.table import Cell, Column, Looks, figure, name_cell, number_cell, reason_cell, table

Value = Callable[[SpeedResult], float]

PEAK = Axis("peak memory of a call", numbers.short_memory, log=True, base=2)
STATE = Axis("state", numbers.short_memory, log=True, base=2)


class Across(NamedTuple):
    """What a chart's horizontal axis holds, of a number of tokens and what was measured there.

    `tip` is a place as the last line of a mark's text, and `ticked` whether ticks stand where marks do.
    """

    what: str
    of: Callable[[int, SpeedResult], int]
    text: Callable[[float], str]
    tip: str
    ticked: bool


TOKENS = Across("tokens", lambda tokens, _: tokens, numbers.tokens, tip="", ticked=True)  # each mark says its tokens
PAIRS = Across("visible pairs", lambda _, result: result.pairs, numbers.count, "\n{:,} visible pairs", ticked=False)


def speed_section(sweep: SpeedTable, looks: Looks) -> str:
    """One setting: pictures first, then the numbers behind them."""
    folds = [
        (f"{measure} at {sweep.shown(measure):,} tokens", _at_length(sweep, measure, looks))
        for measure in sweep.measures
    ]
    lengths = [
        (measure, _efficiency(found, looks)) for measure in sweep.measures if (found := sweep.efficiencies(measure))
    ]
    heading = "<h4>From which length each pays off</h4>" if lengths else ""
    return (
        f"<h3>{escape(sweep.setting[0].upper() + sweep.setting[1:])}</h3>"
        f'<div class="charts three">{"".join(_charts(sweep, looks))}</div>'
        f"<h4>Speed, memory and machine</h4>{_folded(folds)}{heading}{_folded(lengths)}"
        f"<h4>Everything measured</h4>{_folded([_all(sweep, looks)], first_open=False)}"
    )


def _folded(parts: Iterable[tuple[str, str]], first_open: bool = True) -> str:
    """Parts under their titles, the first one open."""
    return "".join(
        f"<details{' open' if first_open and index == 0 else ''}><summary>{escape(title)}</summary>{body}</details>"
        for index, (title, body) in enumerate(parts)
    )


# -- pictures --------------------------------------------------------------------------------------------


def _charts(sweep: SpeedTable, looks: Looks) -> Iterable[str]:
    """For each measure its time, memory (decoding: the state), use of the machine, and time against visible pairs."""
    for measure in sweep.measures:
        rings = [ring for each in sweep.efficiencies(measure) for ring in _rings(sweep, each, looks)]
        note = "Medians, bars are quartiles."
        if rings:
            note += " Rings are efficiency lengths: solid against SDPA, dashed against materialised softmax."
        time = Axis("time of a call", numbers.short_seconds, log=True)
        yield _chart(sweep, measure, f"Time, {measure}", time, _time, numbers.seconds, looks, rings, note)
        if measure == "decode":
            yield _chart(sweep, measure, "State behind the sequence", STATE, _state, numbers.memory, looks)
        else:
            yield _chart(sweep, measure, f"Peak memory, {measure}", PEAK, _peak, numbers.memory, looks)
        title, axis, share = _share(measure)
        yield _chart(sweep, measure, f"{title}, {measure}", axis, share, numbers.percent, looks)
        title, note = f"Time against visible pairs, {measure}", "Of mechanisms that say which query sees which key."
        yield _chart(sweep, measure, title, time, _time, numbers.seconds, looks, note=note, across=PAIRS)


def _time(result: SpeedResult) -> float:
    return result.times.median


def _peak(result: SpeedResult) -> float:
    return result.peak_bytes


def _state(result: SpeedResult) -> float:
    return result.state_bytes


def _share(measure: Measure) -> tuple[str, Axis, Value]:
    """What part of the machine a measure is held against: reading for one token, else multiplying."""
    if measure == "decode":
        axis = Axis("state read per second, of what a sum reads", numbers.short_percent, log=True)
        return "Share of the bandwidth", axis, lambda r: r.state_bytes / r.times.median / r.bandwidth
    axis = Axis("needed FLOP/s, of what a matrix product reaches", numbers.short_percent, log=True)
    return "Share of the GEMM rate", axis, lambda r: r.flops / r.times.median / r.gemm_rate


def _chart(
    sweep: SpeedTable,
    measure: Measure,
    title: str,
    axis: Axis,
    value: Value,
    text: Callable[[float], str],
    looks: Looks,
    rings: Iterable[Ring] = (),
    note: str = "",
    across: Across = TOKENS,
) -> str:
    """A cost against tokens or pairs, both logarithmic; "" where nothing is positive."""
    series = []
    for name in sweep.rows:
        points = []
        for tokens, result in sweep.results(name, measure).items():
            height, times = value(result), result.times
            place = across.of(tokens, result)
            tip, last = f"{name}\n{tokens:,} tokens\n{text(height)}", across.tip.format(place)
            point = Point(place, height, tip=tip + last)
            if value is _time:
                tip += f" ({text(times.lower)} to {text(times.upper)})"
                point = Point(place, height, times.lower, times.upper, tip + last)
            if height > 0 and place > 0:
                points.append(point)
        if points:
            series.append(Series(name, looks[name], points))
    if not series:
        return ""
    ticks = sorted({point.x for each in series for point in each.points}) if across.ticked else []
    picture = chart(
        series,
        Axis(across.what, across.text, log=True, ticks=ticks),
        axis,
        title=title,
        description=f"{sweep.setting}; {len(series)} mechanisms, the numbers are in the tables below",
        rings=list(rings),
        width=400,
        height=320,
    )
    return figure(title, picture, note)


def _rings(sweep: SpeedTable, each: Efficiency, looks: Looks) -> Iterable[Ring]:
    times = {tokens: _time(result) for tokens, result in sweep.results(each.name, each.measure).items()}
    for (quantity, baseline), found in each.lengths.items():
        if quantity != "time" or found.always or found.never:
            continue
        yield Ring(
            each.name,
            looks[each.name],
            found.length,
            _between(times, found.length),
            f"{each.name} pays off\nagainst {baseline}\nfrom {found} tokens",
            dashed=baseline == MATERIALISED,
        )


def _between(values: Mapping[int, float], at: float) -> float:
    """Of a cost that is a power law between two lengths."""
    left, right = max(n for n in values if n <= at), min(n for n in values if n >= at)
    if left == right:
        return values[left]
    share = math.log(at / left) / math.log(right / left)
    return values[left] ** (1 - share) * values[right] ** share


# -- numbers ---------------------------------------------------------------------------------------------


def _at_length(sweep: SpeedTable, measure: Measure, looks: Looks) -> str:
    found = sweep.at(measure, sweep.shown(measure))
    columns = [
        Column("mechanism", kind="text"),
        Column("median", "ms"),
        Column("quartiles", "ms"),
        Column("speed", "SDPA is 1"),
        Column("FLOPs", "needed"),
        Column("share", "of bandwidth" if measure == "decode" else "of GEMM rate"),
        Column("memory", "peak"),
        Column("state"),
        Column("backend", kind="text"),
        Column("error", "against the oracle"),
    ]
    reference = found.get(FUSED)
    dense = reference.times.median if isinstance(reference, SpeedResult) else None

    def cells(result: SpeedResult) -> list[Cell]:
        return [
            number_cell(result.times.median, numbers.milliseconds),
            _quartiles(result),
            number_cell(dense and dense / result.times.median, numbers.ratio),
            number_cell(result.flops, numbers.count),
            number_cell(_share(measure)[2](result), numbers.percent),
            number_cell(result.peak_bytes, numbers.memory),
            number_cell(result.state_bytes or None, numbers.memory),
            Cell(escape(", ".join(sorted(set(result.backends.values()))) or numbers.MISSING)),
            number_cell(result.oracle_error, numbers.error),
        ]

    return table(columns, [(name, _row(name, [], outcome, cells, columns, looks)) for name, outcome in found.items()])


def _efficiency(found: Iterable[Efficiency], looks: Looks) -> str:
    kinds = [(quantity, baseline) for quantity in ("time", "memory") for baseline in (FUSED, MATERIALISED)]
    columns = [
        Column("mechanism", kind="text"),
        *(Column(quantity, f"against {baseline}, tokens") for quantity, baseline in kinds),
        Column("exponent", "of time in tokens"),
    ]
    rows = []
    for each in found:
        lengths = [_length(each.lengths.get(kind)) for kind in kinds]
        exponent = number_cell(each.exponent, lambda x: numbers.signed(x, 2).removeprefix("+"))
        rows.append((each.name, [name_cell(each.name, looks), *lengths, exponent]))
    return table(columns, rows)


def _length(found: EfficiencyLength | None) -> Cell:
    if found is None:
        return Cell(numbers.MISSING)
    if found.never:
        return Cell(f'<span class="soft">not up to {found.longest:,}</span>', math.inf)
    if found.always:
        return Cell(f"≤ {found.shortest:,}", found.length)
    if found.lower == found.upper:
        return Cell(f"{found.length:,.0f}", found.length)
    high = "∞" if math.isinf(found.upper) else f"{found.upper:,.0f}"
    return Cell(f"<small>{found.lower:,.0f} – {high}</small> {found.length:,.0f}", found.length)


def _all(sweep: SpeedTable, looks: Looks) -> tuple[str, str]:
    columns = [
        Column("mechanism", kind="text"),
        Column("measure", kind="text"),
        Column("tokens"),
        Column("median", "ms"),
        Column("quartiles", "ms"),
        Column("FLOPs", "needed"),
        Column("FLOPs", "executed"),
        Column("pairs", "visible"),
        Column("memory", "peak"),
        Column("state"),
    ]

    def cells(result: SpeedResult) -> list[Cell]:
        return [
            number_cell(result.times.median, numbers.milliseconds),
            _quartiles(result),
            number_cell(result.flops, numbers.count),
            number_cell(result.executed, numbers.count),
            number_cell(result.pairs or None, numbers.count),
            number_cell(result.peak_bytes, numbers.memory),
            number_cell(result.state_bytes or None, numbers.memory),
        ]

    rows = []
    for name, measures in sweep.rows.items():
        for measure in sweep.measures:
            for tokens, outcome in sorted(measures.get(measure, {}).items()):
                head = [Cell(escape(measure), measure), number_cell(tokens, "{:,}".format)]
                rows.append((name, _row(name, head, outcome, cells, columns, looks)))
    return f"{len(rows)} measurements", table(columns, rows)


def _row(
    name: str,
    head: list[Cell],
    outcome: SpeedResult | Failure,
    cells: Callable[[SpeedResult], list[Cell]],
    columns: list[Column],
    looks: Looks,
) -> list[Cell]:
    role = "softmax" if name in (FUSED, MATERIALISED) else ""
    start = [name_cell(name, looks, role), *head]
    if isinstance(outcome, SpeedResult):
        return start + cells(outcome)
    return [*start, reason_cell([outcome], len(columns) - len(start))]


def _quartiles(result: SpeedResult) -> Cell:
    low, high = result.times.lower, result.times.upper
    return Cell(f"{numbers.milliseconds(low)} – {numbers.milliseconds(high)}", high - low)
