"""The part of the page about quality: tables with intervals, quality against cost, training curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape

from attlas.bench.report import numbers
from attlas.bench.report.digest import Index, QualityRow, QualityTable
from attlas.bench.report.svg import Axis, Point, Series, chart, forest
from attlas.bench.report.table import Cell, Column, Looks, figure, name_cell, number_cell, reason_cell, table
from attlas.bench.statistics import Interval


def quality_section(task: QualityTable, looks: Looks) -> str:
    """One task."""
    partly = [
        f"{row.name}: {len(row.failures)} of {len(row.failures) + len(row.runs)} seeds failed "
        f"({row.failures[0].error}: {row.failures[0].message})."
        for row in task.ranked
        if row.failures
    ]
    return (
        f"<h3>{escape(task.job.task)}: {escape(task.description)}</h3>"
        f'<p class="soft">{escape(task.setting)}.</p>'
        + _table(task, looks)
        + "".join(f'<p class="note bad">{escape(note)}</p>' for note in partly)
        + _charts(task, looks)
    )


def index_section(index: Index, looks: Looks) -> str:
    """The composite index over several tasks."""
    best_first = sorted(index.scores.items(), key=lambda item: -item[1].mean)
    columns = [
        Column("mechanism", kind="text"),
        Column("index", "higher is better, ± CI"),
        Column("", kind="text"),
    ]
    span = _span(index.scores.values())
    rows = []
    for name, score in best_first:
        picture = _forest(score, span, None, looks, name, 2)
        rows.append(
            (
                name,
                [
                    name_cell(name, looks, index.roles[name]),
                    Cell(_interval(score, 2, signed=True), score.mean),
                    picture,
                ],
            )
        )
    tasks = " and ".join(index.tasks)
    return (
        f"<h3>All {escape(index.pattern)} tasks together</h3>"
        '<p class="soft">Standard deviations above the mean of the mechanisms in this run, averaged over '
        f"{escape(tasks)}.</p>" + table(columns, rows)
    )


def _table(task: QualityTable, looks: Looks) -> str:
    groups = list(dict.fromkeys(group for row in task.ranked for run in row.runs for group in run.details))
    columns = [
        Column("mechanism", kind="text"),
        Column(task.metric or "result", f"{task.direction}, ± CI"),
        Column("", "mean, 95 % CI", "text"),
        Column("difference", "to baseline, ± CI"),
        Column("", "", "text"),
        Column("state", "per sequence"),
        *(Column(group, task.metric) for group in groups),
        Column("parameters", "against budget"),
        Column("training", "tokens/s"),
        Column("time", "of training"),
    ]
    span = _span(row.value for row in task.ranked if row.value)
    places = numbers.places_for([row.value.half for row in task.ranked if row.value])
    rows = []
    for row in task.rows:
        if row.value is None:
            cells = [reason_cell(row.failures, len(columns) - 1)]
        else:
            cells = _cells(task, row, row.value, span, places, groups, looks)
        rows.append((row.name, [name_cell(row.name, looks, row.role), *cells]))
    return table(columns, rows)


def _cells(
    task: QualityTable,
    row: QualityRow,
    value: Interval,
    span: tuple[float, float],
    places: int,
    groups: Sequence[str],
    looks: Looks,
) -> list[Cell]:
    parameters = row.mean("parameters")
    against = numbers.signed(100 * (parameters / task.job.parameters - 1), 1)
    state = row.mean("state_bytes")
    noise = task.baseline.value if task.baseline else None
    return [
        Cell(_interval(value, places), value.mean),
        _forest(value, span, noise, looks, row.name, places),
        Cell(numbers.MISSING) if row.gap is None else Cell(_interval(row.gap, places, signed=True), row.gap.mean),
        _verdict(task, row.gap),
        number_cell(state, numbers.memory) if state else Cell("none", 0),
        *(number_cell(row.detail(group), lambda x: f"{x:.{places}f}") for group in groups),
        Cell(f"{parameters:,.0f} <small>{against} %</small>", parameters),
        number_cell(row.mean("tokens_per_second"), lambda x: f"{x:,.0f}"),
        number_cell(row.mean("seconds"), numbers.seconds),
    ]


def _verdict(task: QualityTable, gap: Interval | None) -> Cell:
    if gap is None:
        return Cell("")
    verdict = task.verdict(gap)
    kind = {"better": "good", "worse": "bad"}.get(verdict, "soft")
    return Cell(f'<span class="{kind}">{verdict}</span>', {"better": 1, "worse": -1}.get(verdict, 0))


def _forest(
    value: Interval, span: tuple[float, float], noise: Interval | None, looks: Looks, name: str, places: int
) -> Cell:
    picture = forest(
        value.mean,
        *_bars(value),
        span=span,
        noise=None if noise is None or noise.half is None else (noise.low, noise.high),
        style=looks[name],
        tip=f"{name}\n{numbers.interval(value, places)}",
    )
    return Cell(picture, value.mean, kind="text forest-cell")


def _charts(task: QualityTable, looks: Looks) -> str:
    """Quality against training time and against state, and the curves; three beside each other, or two."""
    ranked = task.ranked
    if not ranked:
        return ""
    streaming = [row for row in ranked if row.mean("state_bytes") > 0]
    three = len(streaming) > 1
    width, height = (400, 300) if three else (500, 340)
    figures = [_tradeoff(task, ranked, "seconds", Axis("training time", unit=" s"), looks, width, height)]
    if three:
        state = Axis("state per sequence", numbers.short_memory, log=True, base=2)
        figures.append(_tradeoff(task, streaming, "state_bytes", state, looks, width, height))
    figures.append(_curves(task, looks, width, height))
    return f'<div class="charts{" three" if three else ""}">{"".join(figures)}</div>'


def _tradeoff(
    task: QualityTable,
    rows: Sequence[QualityRow],
    attribute: str,
    cost: Axis,
    looks: Looks,
    width: int,
    height: int,
) -> str:
    text = {"seconds": numbers.seconds, "state_bytes": numbers.memory}[attribute]
    series = []
    for row in rows:
        assert row.value is not None
        tip = f"{row.name}\n{numbers.interval(row.value, numbers.places_for([row.value.half]))} {task.metric}"
        low, high = _bars(row.value)
        spent = row.mean(attribute)
        point = Point(spent, row.value.mean, low, high, f"{tip}\n{cost.title} {text(spent)}")
        series.append(Series(row.name, looks[row.name], [point], joined=False))
    title = f"{task.metric[0].upper()}{task.metric[1:]} against {cost.title}"
    picture = chart(
        series,
        cost,
        Axis(f"{task.metric} ({task.direction})"),
        title=title,
        description=f"{task.job.task}: {len(rows)} mechanisms, the numbers are in the table above",
        width=width,
        height=height,
    )
    absent = [row.name for row in task.ranked if row not in rows]
    without = f" Without a state: {', '.join(absent)}." if absent else ""
    return figure(title, picture, f"Means over seeds, bars are 95 % confidence intervals.{without}")


def _curves(task: QualityTable, looks: Looks, width: int, height: int) -> str:
    series, settled = [], []
    for row in task.ranked:
        losses: dict[int, list[float]] = {}
        for run in row.runs:
            for step, loss in _smooth(run.curve):
                losses.setdefault(step, []).append(loss)
        means = {step: statistics.fmean(each) for step, each in sorted(losses.items())}
        settled += [loss for step, loss in means.items() if step > task.job.steps / 10]
        points = [Point(step, loss) for step, loss in means.items()]
        band = [(step, min(losses[step]), max(losses[step])) for step in means]
        series.append(Series(row.name, looks[row.name], points, marked=False, band=band))
    title = "Training curves"
    picture = chart(
        series,
        Axis("step"),
        Axis("training loss in nats", ceiling=max(settled, default=None)),
        title=title,
        description=f"{task.job.task}: training loss over {task.job.steps} steps",
        width=width,
        height=height,
    )
    note = "Running means over a tenth of the curve, averaged over seeds, shaded from the lowest to the highest seed."
    return figure(title, picture, note)


def _smooth(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """A running mean over a tenth of the points, half of them on either side where there are as many."""
    reach = len(curve) // 20
    return [
        (step, statistics.fmean(loss for _, loss in curve[max(0, index - reach) : index + reach + 1]))
        for index, (step, _) in enumerate(curve)
    ]


def _span(values: Iterable[Interval]) -> tuple[float, float]:
    """From the lowest to the highest end of some intervals."""
    ends = [end for value in values for end in (value.low, value.high, value.mean) if math.isfinite(end)]
    return (min(ends), max(ends)) if ends else (0.0, 1.0)


def _bars(value: Interval) -> tuple[float, float] | tuple[None, None]:
    return (None, None) if value.half is None else (value.low, value.high)


def _interval(value: Interval, places: int, signed: bool = False) -> str:
    """mean ± half as HTML, the half in a softer colour."""
    mean, _, half = numbers.interval(value, places, signed).partition(" ± ")
    return f'{mean} <span class="soft">± {half}</span>' if half else mean
