"""The part of the page about whole networks: throughput against parameters, and a table."""

from __future__ import annotations

from html import escape

from attlas.bench.records import NetworkResult
from attlas.bench.report import numbers
from attlas.bench.report.digest import NetworkTable
from attlas.bench.report.svg import Axis, Point, Series, Style, chart, marker
from attlas.bench.report.table import Cell, Column, figure, number_cell, reason_cell, table
from attlas.models import figures, model, models

COLUMNS = (
    Column("network", kind="text"),
    Column("parameters"),
    Column("GMACs", "of one picture"),
    Column("images/s", "at the batch"),
    Column("time", "one picture, ms"),
    Column("quartiles", "ms"),
    Column("memory", "one picture"),
    Column("GMAC/s", "at the batch"),
    Column("top-1", "%, published"),
)


def family(name: str) -> str:
    """What marks of one colour have in common; a network that this version does not know stands alone."""
    return model(name).family if name in models() else name


def network_section(found: NetworkTable) -> str:
    """One setting."""
    return (
        f'<p class="soft">{escape(found.setting)}. Weights are random; memory is what a forward '
        "allocates beyond weights and picture.</p>" + _chart(found) + _table(found)
    )


def _styles(found: NetworkTable) -> dict[str, Style]:
    return {each: Style.number(index) for index, each in enumerate(sorted({family(name) for name in found.rows}))}


def _chart(found: NetworkTable) -> str:
    if not found.measured:
        return ""
    series = []
    for each, style in _styles(found).items():
        names = [name for name in found.measured if family(name) == each]
        points = [
            Point(found.measured[name].parameters, found.images_per_second(name), tip=_tip(found, name))
            for name in sorted(names, key=lambda name: -found.measured[name].parameters)
        ]
        series.append(Series(each, style, points, joined=False))
    picture = chart(
        series,
        Axis("parameters", numbers.count, log=True),
        Axis("images/s", "{:g}".format, log=True),
        title="Throughput against parameters",
        description="One mark for each network; its family stands beside its smallest size.",
        width=1100,
        height=760,
    )
    note = "One mark for each network; the family stands beside its smallest. Rows of the table have the same marks."
    return figure("Throughput against parameters", picture, note)


def _tip(found: NetworkTable, name: str) -> str:
    row = found.measured[name]
    return (
        f"{name}: {numbers.digits(found.images_per_second(name))} images/s, "
        f"{numbers.count(row.parameters)} parameters, {numbers.digits(row.macs / 1e9)} GMACs"
    )


def _table(found: NetworkTable) -> str:
    published, styles = figures(), _styles(found)
    rows = []
    for name, row in found.rows.items():
        first = Cell(f"{marker(styles[family(name)])}{escape(name)}", name)
        if not isinstance(row, NetworkResult):
            rows.append((family(name), [first, reason_cell([row], len(COLUMNS) - 1)]))
            continue
        rate = found.images_per_second(name)
        top1 = published[name].top1 if name in published else None
        span = f"{numbers.milliseconds(row.single.lower)} to {numbers.milliseconds(row.single.upper)}"
        cells = [
            first,
            number_cell(row.parameters, numbers.count),
            number_cell(row.macs / 1e9, numbers.digits),
            number_cell(rate, numbers.digits),
            number_cell(row.single.median, numbers.milliseconds),
            Cell(span, row.single.lower),
            number_cell(row.peak_bytes, numbers.memory),
            number_cell(rate * row.macs / 1e9, numbers.digits),
            number_cell(top1, "{:g}".format),
        ]
        rows.append((family(name), cells))
    return table(COLUMNS, rows)
