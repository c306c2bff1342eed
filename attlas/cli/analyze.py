"""`attlas analyze`: rank, sharpness, memory and tiles of mechanisms, as tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attlas.cli.settings import by_mechanism, read_grid, read_names, read_numbers, read_sizes
from attlas.core.errors import AttlasError, BadInput

if TYPE_CHECKING:
    from attlas.analysis.curves import Panel
    from attlas.analysis.rank import Ranks
    from attlas.analysis.tiles import Tiling
    from attlas.bench.inputs import Observed

app = typer.Typer(
    no_args_is_help=True,
    help="What a mechanism's matrices can do: rank, entropy, capacity; what its kernels can: tiles.",
)
console = Console()
T = TypeVar("T")

INPUTS = ("random", "text", "digits")
Names = Annotated[str, typer.Argument(help="Names or wildcards, separated by commas.")]
Input = Annotated[str, typer.Option("--input", help="random, or what a small model learns first: text or digits.")]
Tokens = Annotated[int, typer.Option(help="Random tokens of a sequence; a square number for 2-D mechanisms.", min=2)]
Dim = Annotated[int, typer.Option(help="Channels.", min=1)]
Steps = Annotated[int, typer.Option(help="Of the training, where the input is a task.", min=1)]
Seed = Annotated[int, typer.Option(help="Of tokens, weights and data.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A mechanism's setting, as rala.kernel=0. May be repeated.")
]


def _picture(path: Path | None) -> Path | None:
    """Refuses what is no picture before any work."""
    from attlas.analysis.curves import FORMATS

    if path is not None and path.suffix.lower() not in FORMATS:
        raise BadInput(f"--out is written as {' or '.join(FORMATS)}, got {path.name!r}")
    return path


Out = Annotated[Path | None, typer.Option(help="Picture to draw, .svg or .png; needs matplotlib.", callback=_picture)]
VIDEO = {"window": "18x24x24", "query-tile": "4x8x8", "key-tile": "2x8x8"}
"""The window of HunyuanVideo's layers and the tiles of NATTEN's kernel; on fewer axes the last sizes."""


@app.command()
def rank(
    names: Names = "softmax,sigmoid,linear,lightning",
    source: Input = "random",
    sizes: Annotated[str, typer.Option(help="Head sizes: 4..64 (doubling) or 8,24. Each divides --dim.")] = "4..64",
    tokens: Tokens = 196,
    dim: Dim = 64,
    steps: Steps = 100,
    seed: Seed = 0,
    setting: Settings = None,
    out: Out = None,
) -> None:
    """Ranks of the N x N matrix that a layer multiplies its values with, and of its output, against the head size."""
    from attlas.analysis.curves import Panel
    from attlas.analysis.rank import ranks

    mechanisms = read_names(names)
    observe = _observer(mechanisms, source, tokens, dim, steps, seed, setting)
    heads = {size: dim // size for size in read_sizes(sizes)}
    if any(size * count != dim for size, count in heads.items()):
        raise BadInput(f"head sizes divide dim: {dim} is not a multiple of each of {', '.join(map(str, heads))}")

    def measure(name: str) -> list[Ranks]:
        rows = []
        for count in heads.values():
            layer, x, grid = observe(name, count)
            rows.append(ranks(layer, x, grid=grid))
        return rows

    results = _each(mechanisms, measure)
    features = list(heads)
    size, channels = {"head size": (features, features)}, {"channels": (features, [dim] * len(features))}
    panels = [
        Panel(
            title,
            "head size",
            "rank",
            {
                name: (features, [getattr(row, kind) for row in rows])
                for name, rows in results.items()
                if getattr(rows[0], kind) is not None
            },
            reference,
        )
        for kind, title, reference in (
            ("numerical", "numerical rank of the matrix", size),
            ("effective", "effective rank of the matrix", size),
            ("output_numerical", "numerical rank of the output", channels),
            ("output_effective", "effective rank of the output", channels),
        )
    ]
    _show(panels, features, "size", "{:.1f}")
    for rows in results.values():
        if rows[0].refusal:
            console.print(f"[dim]{escape(rows[0].refusal)}[/dim]", highlight=False)
    _draw([panels[0], panels[1], panels[3]], out)


@app.command()
def entropy(
    names: Names = "softmax,sigmoid,linear,lightning",
    source: Input = "random",
    norms: Annotated[str, typer.Option(help="Lengths of the queries: 1..32 (doubling) or 1,2.5.")] = "0.5..64",
    tokens: Tokens = 196,
    dim: Dim = 64,
    heads: Annotated[int, typer.Option(help="Heads.", min=1)] = 2,
    steps: Steps = 100,
    seed: Seed = 0,
    setting: Settings = None,
    out: Out = None,
) -> None:
    """Entropy of the rows of a layer's matrix, as a share of even rows, against the length of the queries."""
    from attlas.analysis.curves import Panel
    from attlas.analysis.entropy import entropy_by_norm

    mechanisms, lengths = read_names(names), read_numbers(norms)
    observe = _observer(mechanisms, source, tokens, dim, steps, seed, setting)

    def measure(name: str) -> list[float]:
        layer, x, grid = observe(name, heads)
        return entropy_by_norm(layer, x, lengths, grid=grid)

    results = _each(mechanisms, measure)
    lines = {name: (lengths, shares) for name, shares in results.items()}
    panel = Panel("entropy of a row, share of an even one", "length of the query", "entropy", lines, log_y=False)
    _show([panel], lengths, "|q|", "{:.3f}")
    _draw([panel], out)


@app.command()
def capacity(
    names: Names = "pavlovian_*,linear,lightning,softmax",
    sizes: Annotated[str, typer.Option(help="Head sizes: 8..64 (doubling) or 8,24.")] = "8..64",
    level: Annotated[float, typer.Option(help="Share of right answers.", min=0.13, max=0.99)] = 0.5,
    limit: Annotated[int, typer.Option(help="Most pairs that are tried.", min=1)] = 1024,
    seed: Seed = 0,
    setting: Settings = None,
    out: Out = None,
) -> None:
    """Pairs of a random key and one of eight values that a head can be asked for, against its size."""
    from attlas.analysis.capacity import hebbian_pairs, stored_pairs
    from attlas.analysis.conditioning import exponent, guaranteed_pairs
    from attlas.analysis.curves import Panel

    mechanisms, features = read_names(names), read_sizes(sizes)
    given = by_mechanism(setting, mechanisms)

    def measure(name: str) -> list[int]:
        params = given.get(name, {})
        return [stored_pairs(name, size, level=level, limit=limit, seed=seed, **params) for size in features]

    results = _each(mechanisms, measure)
    panel = Panel(
        f"pairs stored, {level:.0%} retrieved",
        "head size D",
        "pairs",
        {name: (features, pairs) for name, pairs in results.items()},
        {
            "Hebb in theory, ∝ D": (features, [hebbian_pairs(size, level) for size in features]),
            "Hebb, whatever the values": (features, [guaranteed_pairs(size, seed=seed) for size in features]),
        },
    )
    _show([panel], features, "D", "{:.0f}")
    for name, pairs in results.items():
        if len(pairs) > 1 and min(pairs) > 0 and max(pairs) < limit:
            console.print(f"{escape(name)} grows as D^{exponent(features, pairs):.2f}", highlight=False)
        elif max(pairs) >= limit:
            console.print(f"{escape(name)} reaches the limit of {limit} pairs: raise --limit", highlight=False)
    _draw([panel], out)


@app.command()
def tiles(
    grid: Annotated[str, typer.Argument(help="Positions, as 32768, 256x256 or 30x48x80.")] = "30x48x80",
    window: Annotated[
        str | None, typer.Option(help="Places of the window on each axis; the last of 18x24x24 by default.")
    ] = None,
    stride: Annotated[
        str | None, typer.Option(help="On each axis; by default all that double, as far as the window goes.")
    ] = None,
    dilation: Annotated[str, typer.Option(help="On each axis, or one for all.")] = "1",
    causal: Annotated[str, typer.Option(help="Causal axes, counted from 0 and separated by commas.")] = "",
    query_tile: Annotated[
        str | None, typer.Option(help="Queries that a kernel takes at a time; the last of 4x8x8 by default.")
    ] = None,
    key_tile: Annotated[
        str | None, typer.Option(help="Keys that it takes at a time; the last of 2x8x8 by default.")
    ] = None,
    out: Out = None,
) -> None:
    """How much of what neighborhood attention saves a tiled kernel can keep, against the stride.

    The defaults are HunyuanVideo's latent video and the tiles of NATTEN's kernel for Blackwell; on fewer axes the last
    sizes of each.
    """
    from attlas.analysis.curves import Panel
    from attlas.analysis.tiles import Tiling

    places = read_grid(grid)
    axes = _read_axes(causal, len(places))
    plain = Tiling.of(
        places,
        _per_axis("window", window, len(places)),
        dilation=_per_axis("dilation", dilation, len(places)),
        causal=axes,
        query_tile=_per_axis("query-tile", query_tile, len(places)),
        key_tile=_per_axis("key-tile", key_tile, len(places)),
    )
    largest = max(axis.window for axis in plain.axes)
    smallest = plain.smallest_stride()
    doubling = [2**power for power in range(largest.bit_length())]
    shown = {_written(plain.with_stride(each)): plain.with_stride(each) for each in dict.fromkeys([*doubling, largest])}
    if stride is not None:
        given = plain.with_strides(_per_axis("stride", stride, len(places)))
        shown = {_written(given): given}
    if smallest is not None:
        least = plain.with_strides(smallest)
        shown[_written(least)] = least
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("stride", "tiles visited", "of", "speed-up at most", "share of the FLOPs' bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    for text, tiling in shown.items():
        bound = tiling.bound()
        row = (f"{tiling.visited():,}", f"{tiling.tiles():,}", f"{bound:.2f}", f"{bound / tiling.flop_bound():.0%}")
        table.add_row(text, *row)
    console.print(table)
    console.print(f"FLOPs alone allow {plain.flop_bound():.2f} without a stride", highlight=False)
    if smallest is None:
        console.print("no stride up to the window makes every visited tile full", highlight=False)
    else:
        console.print(f"{_written(least)} is the smallest stride that reaches its FLOPs' bound", highlight=False)
    strides = sorted({*range(1, largest, max(1, largest // 128)), *doubling, largest})
    bounds = [plain.with_stride(each).bound() for each in strides]
    limit = "FLOPs alone" if smallest is None else f"FLOPs alone, and stride {_written(least)}"
    limits = {limit: (strides, [plain.with_stride(each).flop_bound() for each in strides])}
    lines, title = {"tiles": (strides, bounds)}, f"{grid}, window {'x'.join(str(axis.window) for axis in plain.axes)}"
    _draw([Panel(title, "stride on every axis", "speed-up at most", lines, limits, log_y=False)], out)


def _per_axis(option: str, text: str | None, rank: int) -> tuple[int, ...]:
    """Sizes written as 18x24x24, or one for all axes; without any the last of `VIDEO`."""
    if text is None:
        return read_grid(VIDEO[option])[-rank:]
    try:
        sizes = read_grid(text)
    except BadInput:
        raise BadInput(f"--{option} is written as 18x24x24, or as one size of at least 1, got {text!r}") from None
    return sizes * rank if len(sizes) == 1 else sizes


def _read_axes(text: str, rank: int) -> tuple[bool, ...]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    if any(part not in map(str, range(rank)) for part in chosen):
        raise BadInput(f"causal axes are numbers from 0 to {rank - 1}, separated by commas, got {text!r}")
    return tuple(str(axis) in chosen for axis in range(rank))


def _written(tiling: Tiling) -> str:
    """The strides as they are typed."""
    return "x".join(str(axis.stride) for axis in tiling.axes)


def _observer(
    names: list[str], source: str, tokens: int, dim: int, steps: int, seed: int, setting: list[str] | None
) -> Callable[[str, int], Observed]:
    """A function of a name and a number of heads to a layer and what it reads."""
    from attlas.bench.inputs import in_trained_model, on_random_tokens

    if source not in INPUTS:
        raise BadInput(f"input is one of {', '.join(INPUTS)}, got {source!r}")
    given = by_mechanism(setting, names)

    def observe(name: str, heads: int) -> Observed:
        params = given.get(name, {})
        if source == "random":
            return on_random_tokens(name, dim=dim, heads=heads, tokens=tokens, seed=seed, **params)
        return in_trained_model(name, source, dim=dim, heads=heads, steps=steps, seed=seed, **params)

    return observe


def _each(names: list[str], measure: Callable[[str], T]) -> dict[str, T]:
    """What was measured of each; what refuses is left out with its reason. Where all refuse that is an error."""
    results, reasons = {}, {}
    for name in names:
        try:
            results[name] = measure(name)
        except AttlasError as error:
            reasons[name] = error
            console.print(f"[dim]left out: {escape(str(error))}[/dim]", highlight=False)
    if not results:
        raise next(iter(reasons.values()))
    return results


def _show(panels: Sequence[Panel], columns: Sequence[float], what: str, number: str) -> None:
    for panel in panels:
        console.print(f"[bold]{panel.title}[/bold]", highlight=False)
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("mechanism", no_wrap=True)
        for column in columns:
            table.add_column(f"{what} {column:g}", justify="right", no_wrap=True)
        for rows, style in ((panel.lines, None), (panel.references, "dim")):
            for name, (_, values) in rows.items():
                table.add_row(escape(name), *(number.format(value) for value in values), style=style)
        console.print(table)


def _draw(panels: Sequence[Panel], out: Path | None) -> None:
    if out is not None:
        from attlas.analysis.curves import draw_curves

        draw_curves(panels, out)
        console.print(f"picture: [bold]{escape(str(out))}[/bold]", highlight=False, soft_wrap=True)
