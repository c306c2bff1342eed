"""What a swap did, module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from torch import nn

from attlas.core.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

WIDTH = 120
"""Columns of `str(report)`."""


class Verdict(StrEnum):
    """What became of a module."""

    EXACT = "exact"
    APPROXIMATE = "approximate"
    NEW = "new"
    LEFT = "left"


MEANING = {
    Verdict.EXACT: "the same function in evaluation, nothing to train",
    Verdict.APPROXIMATE: "another function of the weights that were carried: finetune or distil",
    Verdict.NEW: "has parameters that did not exist: train them",
    Verdict.LEFT: "as it was",
}


@dataclass(frozen=True)
class Row:
    """One attention module.

    Attributes:
        name: of the module in the model.
        kind: class of the module that was there.
        verdict: exact, approximate, new or left.
        carried: numbers in parameters that were carried over.
        new: names of parameters that did not exist, inside the module, and how many numbers each holds.
        dropped: names of old parameters that have no meaning any more, and how many numbers each held.
        notes: what else is to know; for a module that was left the reason.
    """

    name: str
    kind: str
    verdict: Verdict
    carried: int = 0
    new: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Report:
    """The rows of a swap, and the way back.

    `print(report)` shows a table; `report.undo()` puts the old modules back, with the weights that they had.
    """

    def __init__(self, mechanism: str, rows: list[Row], dry_run: bool) -> None:
        self.mechanism, self.rows, self.dry_run = mechanism, rows, dry_run
        self.old: dict[str, nn.Module] = {}
        """The modules that were there, by name; a teacher for distillation. Empty after a dry run or undo."""
        self.teachers: dict[str, nn.Module] = {}
        """The same, each in a form that answers the calls of the module that stands there now."""
        self._undo: Callable[[], None] | None = None

    def of(self, verdict: Verdict | str) -> list[Row]:
        """The rows with this verdict."""
        return [row for row in self.rows if row.verdict == verdict]

    @property
    def swapped(self) -> list[str]:
        """Names of the modules that were swapped (or would be)."""
        return [row.name for row in self.rows if row.verdict is not Verdict.LEFT]

    def undo(self) -> None:
        """Put the old modules back, as they were.

        Raises:
            BadInput: nothing was swapped, it was undone already, or the model was changed there since.
        """
        if self._undo is None:
            raise BadInput("nothing to undo: this was a dry run" if self.dry_run else "nothing to undo: it was undone")
        self._undo()
        self._undo, self.old, self.teachers = None, {}, {}

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=WIDTH)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __repr__(self) -> str:
        return f"<Report of {self.mechanism}: {self._summary()}>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        yield Text(f"{self.mechanism}: {self._summary()}{' (dry run, nothing was changed)' if self.dry_run else ''}")
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for title in ("modules", "", "was", "is", "carried", "new", "dropped", "remarks"):
            number = title in ("", "carried", "new", "dropped")
            table.add_column(title, justify="right" if number else "left", no_wrap=number, overflow="fold")
        fresh: dict[str, None] = {}
        for rows in _alike(self.rows):
            row = rows[0]
            names = row.name if len(rows) == 1 else f"{row.name}\n... {rows[-1].name}"
            counts = (sum(each.carried for each in rows), _sum(rows, "new"), _sum(rows, "dropped"))
            cells = (names, str(len(rows)), row.kind, row.verdict.value, *map(_count, counts), "; ".join(row.notes))
            table.add_row(*map(Text, cells))
            fresh |= dict.fromkeys(row.new)
        yield table
        for verdict in Verdict:
            if self.of(verdict):
                yield Text(f"{verdict}: {MEANING[verdict]}")
        dropped = dict.fromkeys(name for row in self.rows for name in row.dropped)
        for title, parameters in (("new", fresh), ("dropped", dropped)):
            if parameters:
                yield Text(f"{title} parameters: {', '.join(parameters)}")

    def _summary(self) -> str:
        return ", ".join(f"{len(self.of(verdict))} {verdict}" for verdict in Verdict if self.of(verdict))


def _alike(rows: list[Row]) -> Iterable[list[Row]]:
    """Rows that differ in nothing but the name and the sizes, in the order of their first."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        key = (row.kind, row.verdict, tuple(row.new), tuple(row.dropped), row.notes)
        groups.setdefault(key, []).append(row)
    return groups.values()


def _sum(rows: list[Row], attribute: str) -> int:
    return sum(sum(getattr(row, attribute).values()) for row in rows)


def _count(count: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count) if count else ""
