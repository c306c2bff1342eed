"""Tables as HTML that the page can sort."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from attlas.bench.records import Failure
from attlas.bench.report import numbers
from attlas.bench.report.svg import Style, marker

Looks = Mapping[str, Style]
"""Name of a row -> how it looks in every chart."""


@dataclass(frozen=True)
class Column:
    """The head of a column; a press on it sorts. `kind` is a class of the page's style."""

    head: str
    unit: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Cell:
    """HTML, and what its column is sorted by."""

    html: str
    value: float | str | None = None
    span: int = 1
    kind: str = ""


def table(columns: Sequence[Column], rows: Iterable[tuple[str, Sequence[Cell]]]) -> str:
    """A table; a row is the name that the page highlights by, and its cells."""
    heads = []
    for column in columns:
        button = f'<button type="button">{escape(column.head)}</button>' if column.head else ""
        unit = f"<small>{escape(column.unit)}</small>" if column.unit else ""
        heads.append(f'<th scope="col" class="{column.kind}">{button}{unit}</th>')
    body = []
    for name, cells in rows:
        parts = []
        for index, cell in enumerate(cells):
            tag, scope = ("th", ' scope="row"') if index == 0 else ("td", "")
            value = "" if cell.value is None else f' data-value="{_sortable(cell.value)}"'
            span = "" if cell.span == 1 else f' colspan="{cell.span}"'
            kind = cell.kind or columns[index].kind
            parts.append(f'<{tag}{scope}{value}{span} class="{kind}">{cell.html}</{tag}>')
        body.append(f'<tr data-name="{escape(name)}">{"".join(parts)}</tr>')
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _sortable(value: float | str) -> str:
    """As the page's script reads it."""
    return "Infinity" if value == math.inf else escape(str(value))


def name_cell(name: str, looks: Looks, role: str = "") -> Cell:
    """A mechanism with its marker, and what part it plays."""
    tag = f'<span class="tag">{escape(role)}</span>' if role else ""
    return Cell(f"{marker(looks[name])}{escape(name)}{tag}", name)


def number_cell(value: float | None, text: Callable[[float], str]) -> Cell:
    """A number as `text` writes it."""
    return Cell(numbers.MISSING) if value is None else Cell(escape(text(value)), value)


def reason_cell(failures: Iterable[Failure], span: int) -> Cell:
    """Why there are no numbers, across all their columns; each reason once."""
    reasons = dict.fromkeys(f"{each.error}: {each.message}" for each in failures)
    return Cell(escape("; ".join(reasons)), span=span, kind="reason")


def figure(title: str, picture: str, note: str = "") -> str:
    """A chart under its title."""
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<figure><h4>{escape(title)}</h4>{picture}{caption}</figure>"
