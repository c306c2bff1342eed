"""`attlas` on the command line."""

from __future__ import annotations

import ast
import inspect
import sys
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import attlas
from attlas import doctor as doctoring
from attlas.blocks.factory import resolve, settings_of
from attlas.core.errors import AttlasError, BadInput, UnknownName
from attlas.core.grid import Grid
from attlas.core.registry import family_of, mechanism
from attlas.core.spec import Pattern

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="An atlas of attention that you can run.",
)
console = Console()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _sizes(text: str) -> tuple[int, ...]:
    """A grid written as 4096, 14x14 or 8x14x14."""
    try:
        sizes = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        raise BadInput(f"a size is written as 4096, 14x14 or 8x14x14, got {text!r}") from None
    return Grid(sizes).shape


def _values(pairs: list[str]) -> dict[str, Any]:
    """Settings written as name=value; values are Python literals where they parse as such."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise BadInput(f"a setting is written as name=value, got {pair!r}")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


@app.command("list")
def list_(
    names: Annotated[str, typer.Argument(help="Names or wildcards, separated by commas.")] = "*",
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Such as 'causal self'.")] = None,
    grid: Annotated[int | None, typer.Option(help="Only what serves grids of this many axes.")] = None,
) -> None:
    """The mechanisms that match, in a table."""
    found = attlas.mechanisms(names, family=family, pattern=pattern, grid=grid)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("mechanism", "family", "self", "cross", "grids", "streams", "equation"):
        table.add_column(heading, no_wrap=heading != "equation")
    for name in found:
        spec = mechanism(name).spec
        served = {
            kind: " ".join(p.split()[0] for p in sorted(spec.patterns) if p.endswith(kind)) or "-"
            for kind in ("self", "cross")
        }
        table.add_row(
            name,
            family_of(mechanism(name)),
            served["self"],
            served["cross"],
            " ".join(f"{rank}-D" for rank in spec.grids),
            "yes" if spec.streams else "-",
            escape(spec.equation),
        )
    console.print(table)
    console.print(f"[dim]{len(found)} mechanisms; `attlas show NAME` says more[/dim]")


@app.command()
def show(
    name: str,
    size: Annotated[str, typer.Option(help="Tokens or grid, as 4096 or 56x56.")] = "1024",
    dim: Annotated[int, typer.Option(help="Channels.")] = 512,
    heads: Annotated[int, typer.Option(help="Heads.")] = 8,
) -> None:
    """One mechanism: its equation, source, settings, backends here, and what it costs."""
    cls, _ = resolve(name)
    spec = cls.spec
    module = sys.modules[cls.__module__]
    console.rule(f"[bold]{name}[/bold]", align="left")
    console.print(escape(inspect.getdoc(module) or ""), highlight=False)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    settings = ", ".join(f"{key}={value!r}" for key, value in settings_of(cls).items()) or "none"
    rows = {
        "paper": f"{spec.title} ({spec.year}), {spec.paper}",
        "patterns": ", ".join(sorted(spec.patterns)),
        "grids": ", ".join(f"{rank}-D" for rank in spec.grids)
        + (" with prefix tokens" if spec.prefix else ""),
        "masks": ", ".join(sorted(spec.masks)) or "none",
        "streams": "yes, with `extend`" if spec.streams else "no",
        "complexity": spec.complexity,
        "settings": settings,
        "shell": ", ".join(f"{key}={value!r}" for key, value in spec.shell.items()) or "defaults",
        "variants": ", ".join(f"{spec.name}:{variant}" for variant in spec.variants) or "none",
        "status": "reconstruction: no official code was found" if spec.reconstruction else "published form",
    }
    for key, value in rows.items():
        facts.add_row(key, escape(value))
    console.print()
    console.print(facts)
    console.print(f"\n[bold]at {size} tokens, dim {dim}, {heads} heads[/bold]")
    for pattern in sorted(p for p in spec.patterns if p.endswith("self")):
        _show_cost(name, Pattern(pattern), _grid_for(spec.grids, size), dim, heads)


def _grid_for(ranks: tuple[int, ...], size: str) -> tuple[int, ...]:
    """The grid that the user wrote; for mechanisms of two axes a number of tokens is laid out squarely."""
    grid = _sizes(size)
    if len(grid) == 1 and 1 not in ranks:
        side = max(1, round(grid[0] ** 0.5))
        grid = (side, max(1, grid[0] // side))
    return grid


def _show_cost(name: str, pattern: Pattern, grid: tuple[int, ...], dim: int, heads: int) -> None:
    causal = pattern.startswith("causal")
    try:
        layer = attlas.mixer(name, dim, heads, causal=causal, grid=grid, length=Grid(grid).tokens)
        cost = layer.cost(1, Grid(grid).tokens, grid=grid)
        parts = [f"{cost.flops / 1e9:.3g} GFLOP", f"{cost.executed / 1e9:.3g} executed by torch"]
        if cost.pairs:
            parts.append(f"{cost.pairs:,} visible pairs")
        parts.append(f"{sum(p.numel() for p in layer.parameters()):,} parameters")
        explanation = doctoring.explain(layer, torch.zeros(1, Grid(grid).tokens, dim), grid=grid)
        console.print(f"  [bold]{pattern}[/bold] on {Grid(grid)}: {', '.join(parts)}")
        for line in str(explanation).splitlines():
            console.print(f"    {escape(line)}", highlight=False)
    except AttlasError as error:
        console.print(f"  [bold]{pattern}[/bold]: {escape(str(error))}")


@app.command()
def doctor() -> None:
    """What runs on this machine, and what to do about what does not."""
    for finding in doctoring.doctor():
        mark = "[green]ok[/green]" if finding.usable else "[yellow]--[/yellow]"
        console.print(f"{mark}  [bold]{finding.what}[/bold]  {escape(finding.detail)}", highlight=False)


@app.command()
def explain(
    name: str,
    size: Annotated[str, typer.Option(help="Tokens or grid, as 4096 or 56x56.")] = "1024",
    dim: Annotated[int, typer.Option(help="Channels.")] = 512,
    heads: Annotated[int, typer.Option(help="Heads.")] = 8,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    causal: Annotated[bool, typer.Option(help="Causal self-attention.")] = False,
    setting: Annotated[list[str] | None, typer.Option("--set", help="name=value of the mechanism.")] = None,
) -> None:
    """Which backend runs a mechanism here, and why not a faster one."""
    if dtype not in DTYPES:
        raise BadInput(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    cls, _ = resolve(name)
    grid = _grid_for(cls.spec.grids, size)
    causal = causal or all(p.startswith("causal") for p in cls.spec.patterns)
    layer = attlas.mixer(
        name, dim, heads, causal=causal, grid=grid, length=Grid(grid).tokens, **_values(setting or [])
    ).to(DTYPES[dtype])
    x = torch.zeros(batch, Grid(grid).tokens, dim, dtype=DTYPES[dtype])
    console.print(escape(str(doctoring.explain(layer, x, grid=grid))), highlight=False)


def main() -> None:
    """Run the command line; what users can mend is one line, not a traceback."""
    try:
        app()
    except AttlasError as error:
        Console(stderr=True).print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False)
        raise SystemExit(2) from None
