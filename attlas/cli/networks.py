"""The published networks as a table."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from attlas.core.errors import BadInput
from attlas.models import figures, model, models

MICRO = "_micro"
"""How the sizes for tests and quick training end; nobody published them."""


def networks_table(names: str) -> Table:
    """One row per network that matches: what was published about it, and where."""
    published = figures()
    table = Table(box=None, header_style="bold", pad_edge=False, caption=_caption(models(names)))
    for heading, justify in (("network", "left"), ("parameters", "right"), ("GMACs", "right"), ("at", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("top-1 %", justify="right", no_wrap=True)
    table.add_column("paper", no_wrap=True)
    table.add_column("source of the figures", overflow="fold")
    for name in models(names):
        entry, said = model(name), published.get(name)
        paper = f"{entry.paper.removeprefix('arXiv:')} ({entry.year})"
        if said is None:
            free = "for tests and quick training" if name.endswith(MICRO) else "any mechanism inside: mixer="
            table.add_row(name, "", "", str(entry.accepted["img_size"]), "", paper, free)
            continue
        count = f"{int(said.parameters):,}" if said.parameters.isdigit() else said.parameters
        macs, top1 = ("" if value is None else f"{value:g}" for value in (said.gmacs, said.top1))
        table.add_row(name, count, macs, str(said.img_size), top1, paper, escape(said.source))
    return table


def _caption(found: list[str]) -> str:
    return f"{len(found)} networks; GMACs of one picture of that side; attlas.models.create(NAME) builds one"


def no_larger(names: str, millions: float) -> list[str]:
    """Networks for classification that match and have at most so many million parameters.

    Wildcards mean those that were published; the small sizes for tests only where they are named as such.

    Raises:
        BadInput: none is left.
    """
    published = figures()

    def fits(name: str) -> bool:
        if name not in published:
            return MICRO in names or name in names.split(",")
        text = published[name].parameters
        return (float(text) / 1e6 if text.isdigit() else float(text.removesuffix("M"))) <= millions

    found = [name for name in models(names, task="classification") if fits(name)]
    if not found:
        raise BadInput(
            f"no network for classification among {names!r} has at most {millions:g} M parameters: --largest"
        )
    return found
