"""The published networks as a table."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attlas.cli.settings import parts
from attlas.core.errors import BadInput
from attlas.models import figures, model, models

MICRO = "_micro"
"""How the sizes for tests and quick training end; nobody published them."""

WIDE = 110
"""Columns from which on the sources are shown."""


def networks_table(names: str, width: int) -> Table:
    """One row per network that matches: what was published about it, and where, as far as `width` columns allow."""
    published = figures()
    table = Table(box=None, header_style="bold", pad_edge=False, caption=_caption(models(names), width))
    table.add_column("network", no_wrap=True)
    for heading in ("parameters", "GMACs", "at"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("top-1 %", justify="right", no_wrap=True)
    table.add_column("paper")
    if width >= WIDE:
        table.add_column("source of the figures", overflow="fold")
    for name in models(names):
        entry, said = model(name), published.get(name)
        paper = f"{entry.paper.removeprefix('arXiv:')} ({entry.year})"
        if said is None:
            free = "for tests and quick training" if name.endswith(MICRO) else "any mechanism inside: mixer="
            cells = [name, "", "", str(entry.accepted.get("img_size", "")), "", paper, free]
            table.add_row(*cells[: len(table.columns)])
            continue
        count = f"{int(said.parameters):,}" if said.parameters.isdigit() else said.parameters
        macs, top1 = ("" if value is None else f"{value:g}" for value in (said.gmacs, said.top1))
        cells = [name, count, macs, str(said.img_size), top1, paper, escape(said.source)]
        table.add_row(*cells[: len(table.columns)])
    return table


def _caption(found: list[str], width: int) -> str:
    sources = "" if width >= WIDE else f"; sources of the figures from {WIDE} columns on"
    return f"{len(found)} networks; GMACs of one picture of that side; attlas.models.create(NAME) builds one{sources}"


def no_larger(names: str, millions: float, console: Console) -> list[str]:
    """Networks for classification that match and have at most so many million parameters; says what was left out.

    A wildcard means those that were published; the others where it means none of these, or where it says micro.

    Raises:
        BadInput: none is left.
    """
    published = figures()
    found: list[str] = []
    larger: list[str] = []
    for glob in parts(names):
        matching = models(glob, task="classification")
        known = [name for name in matching if name in published]
        for name in matching if MICRO in glob else known or matching:
            (found if name not in published or _parameters(name) <= 1e6 * millions else larger).append(name)
    if larger:
        console.print(f"[dim]left out, with more than {millions:g} M parameters (--largest): {', '.join(larger)}[/dim]")
    if not found:
        raise BadInput(f"no network for classification among {names!r} has at most {millions:g} M parameters")
    return list(dict.fromkeys(found))


def _parameters(name: str) -> float:
    """As published."""
    text = figures()[name].parameters
    return float(text) if text.isdigit() else 1e6 * float(text.removesuffix("M"))
