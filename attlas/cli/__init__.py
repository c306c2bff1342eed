"""`attlas` on the command line."""

from __future__ import annotations

import inspect
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import attlas
from attlas.blocks.factory import resolve, settings_of
from attlas.cli import analyze
from attlas.cli.networks import networks_table, no_larger
from attlas.cli.seen import show_mask
from attlas.cli.settings import by_mechanism, parts, read_grid, read_grids, read_names, values
from attlas.core.errors import AttlasError, BadInput
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
app.add_typer(analyze.app, name="analyze")
console = Console()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {
    Pattern.NONCAUSAL_SELF: "NS",
    Pattern.CAUSAL_SELF: "CS",
    Pattern.NONCAUSAL_CROSS: "NC",
    Pattern.CAUSAL_CROSS: "CC",
}


@app.command("list")
def list_(
    names: Annotated[str, typer.Argument(help="Names or wildcards, separated by commas; or the word models.")] = "*",
    networks: Annotated[str, typer.Argument(help="After the word models: names or wildcards of networks.")] = "",
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Such as 'causal self'.")] = None,
    grid: Annotated[int | None, typer.Option(help="Only what serves grids of this many axes.")] = None,
) -> None:
    """The mechanisms that match, in a table; `attlas list models` for published networks."""
    if names == "models":
        if family or pattern or grid:
            raise BadInput("--family, --pattern and --grid are of mechanisms: leave them out after models")
        console.print(networks_table(networks or "*", console.width))
        return
    if networks:
        raise BadInput(f"only the word models is followed by more names; separate them by commas: {names},{networks}")
    found = attlas.mechanisms(names, family=family, pattern=pattern, grid=grid)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("mechanism", "family", "patterns", "grids", "state"):
        table.add_column(heading, no_wrap=True)
    table.add_column("o =", overflow="fold")
    for name in found:
        spec = mechanism(name).spec
        table.add_row(
            name,
            family_of(mechanism(name)),
            " ".join(short if pattern in spec.patterns else "  " for pattern, short in SHORT.items()),
            " ".join(str(rank) if rank in spec.grids else " " for rank in (1, 2, 3)),
            "yes" if spec.streams else "",
            escape(spec.equation.partition("= ")[2]),
        )
    console.print(table)
    legend = ", ".join(f"{short} {pattern}" for pattern, short in SHORT.items())
    console.print(f"[dim]{legend}; grids by number of axes; state: streams with `extend`[/dim]", highlight=False)
    console.print(f"[dim]{len(found)} mechanisms; `attlas show NAME` says more[/dim]", highlight=False)


@app.command()
def show(
    name: str,
    size: Annotated[str | None, typer.Option(help="Tokens or grid, as 4096 or 56x56; 1024 tokens by default.")] = None,
    dim: Annotated[int | None, typer.Option(help="Channels, 512 by default; not with --mask.")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads; 8 by default.")] = None,
    mask: Annotated[bool, typer.Option("--mask", help="Draw which keys each query sees, instead.")] = False,
    query: Annotated[str | None, typer.Option(help="With --mask: whose keys, as 5, or as 3,4 on a grid.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="With --mask: of the causal pattern.")] = False,
    setting: Annotated[list[str] | None, typer.Option("--set", help="name=value of the mechanism. May repeat.")] = None,
    svg: Annotated[Path | None, typer.Option(help="With --mask: also write this picture.")] = None,
    image: Annotated[Path | None, typer.Option(help="With --mask: tokens are patches of this picture.")] = None,
    seed: Annotated[int | None, typer.Option(help="With --mask: of random weights and tokens; 0 by default.")] = None,
) -> None:
    """One mechanism: its equation, source, settings, backends here, and what it costs; or what its queries see."""
    if mask:
        if dim is not None:
            raise BadInput("--dim is not read with --mask, which draws a small layer: leave it out")
        show_mask(
            console,
            name,
            size=size,
            query=query,
            causal=causal,
            settings=values(setting or []),
            heads=heads,
            svg=svg,
            image=image,
            seed=seed or 0,
        )
        return
    alone = {"query": query, "causal": causal, "svg": svg, "image": image, "seed": seed}
    given = [f"--{option}" for option, value in alone.items() if value is not None and value is not False]
    if given:
        raise BadInput(f"{', '.join(given)}: only with --mask")
    size, dim, heads = size or "1024", 512 if dim is None else dim, 8 if heads is None else heads
    cls, _ = resolve(name)
    spec = cls.spec
    module = sys.modules[cls.__module__]
    console.rule(f"[bold]{name}[/bold]", align="left")
    for paragraph in (inspect.getdoc(module) or "").split("\n\n"):
        lines = paragraph.splitlines()
        formula = any(line.startswith(" ") for line in lines)
        console.print(escape(paragraph if formula else " ".join(lines)), highlight=False, end="\n\n")
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    settings = ", ".join(f"{key}={value!r}" for key, value in settings_of(cls).items()) or "none"
    rows = {
        "paper": f"{spec.title} ({spec.year}), {spec.paper}",
        "patterns": ", ".join(sorted(spec.patterns)),
        "grids": ", ".join(f"{rank}-D" for rank in spec.grids) + (" with prefix tokens" if spec.prefix else ""),
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
    console.print(facts)
    own = values(setting or [])
    console.print(f"\n[bold]at {size} tokens, dim {dim}, {heads} heads[/bold]")
    place = Grid(_grid_for(spec.grids, size), prefix=int(spec.class_token))
    patterns = sorted(p for p in spec.patterns if p.endswith("self")) or sorted(spec.patterns)
    shown = [_show_cost(name, Pattern(pattern), place, dim, heads, own) for pattern in patterns]
    if not any(shown):
        example = spec.examples[0]
        place, own = Grid(example.grid, example.prefix), dict(example.params)
        fitting = "".join(f", {key}={value!r}" for key, value in own.items())
        console.print(escape(f"in small, with dim {example.dim}, {example.heads} heads{fitting}"), highlight=False)
        for pattern in sorted(p for p in example.patterns or patterns if p in patterns):
            _show_cost(name, Pattern(pattern), place, example.dim, example.heads, own)


def _grid_for(ranks: tuple[int, ...], size: str) -> tuple[int, ...]:
    """The grid that the user wrote; for mechanisms of two axes a number of tokens is laid out squarely."""
    grid = read_grid(size)
    if len(grid) == 1 and 1 not in ranks:
        side = max(1, round(grid[0] ** 0.5))
        grid = (side, max(1, grid[0] // side))
    return grid


def _show_cost(name: str, pattern: Pattern, grid: Grid, dim: int, heads: int, settings: dict[str, Any]) -> bool:
    """Print what a layer costs, or why there is none; whether there is one."""
    causal, cross = pattern.startswith("causal"), pattern.endswith("cross")
    tokens = grid.tokens
    try:
        layer = attlas.mixer(name, dim, heads, causal=causal, grid=grid, length=tokens, **settings)
        cost = layer.cost(1, tokens, tokens if cross else None, grid=grid)
        parts = [f"{cost.flops / 1e9:.3g} GFLOP", f"{cost.executed / 1e9:.3g} executed by torch"]
        if cost.pairs:
            parts.append(f"{cost.pairs:,} visible pairs")
        parts.append(f"{sum(p.numel() for p in layer.parameters()):,} parameters")
        inputs = [torch.zeros(1, tokens, dim) for _ in range(1 + cross)]
        explanation = attlas.explain(layer, *inputs, grid=grid)
        console.print(f"  [bold]{pattern}[/bold] on {grid}: {', '.join(parts)}")
        for line in str(explanation).splitlines():
            console.print(f"    {escape(line)}", highlight=False)
    except AttlasError as error:
        console.print(f"  [bold]{pattern}[/bold]: {escape(str(error))}")
        return False
    return True


@app.command()
def doctor() -> None:
    """What runs on this machine, and what to do about what does not."""
    for finding in attlas.doctor():
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
        name, dim, heads, causal=causal, grid=grid, length=Grid(grid).tokens, **values(setting or [])
    ).to(DTYPES[dtype])
    x = torch.zeros(batch, Grid(grid).tokens, dim, dtype=DTYPES[dtype])
    console.print(escape(str(attlas.explain(layer, x, grid=grid))), highlight=False)


PATTERNS = {"causal": (True,), "noncausal": (False,), "both": (False, True)}
DEMO = "softmax,sigmoid,linear,lightning,aaren,pool"
Store_ = Annotated[Path, typer.Option("--store", help="Folder of results; an interrupted run goes on from it.")]
Html = Annotated[Path | None, typer.Option("--html", help="Path of the report; in the store by default.")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Also run again what failed before.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A mechanism's setting, as agent.agents=16. May be repeated.")
]


@app.command()
def bench(
    context: typer.Context,
    names: Annotated[str, typer.Argument(help="Names or wildcards, separated by commas; or the word models.")] = DEMO,
    networks: Annotated[str, typer.Argument(help="After the word models: names or wildcards of networks.")] = "",
    sizes: Annotated[str, typer.Option(help="Lengths or grids: 256..16384 (doubling), 512,1000 or 14x14,56x56.")] = (
        "256..8192"
    ),
    measures: Annotated[str, typer.Option(help="Of forward, forward+backward, prefill, decode.")] = "forward",
    dtypes: Annotated[str, typer.Option(help="Of float32, bfloat16, float16.")] = "float32",
    pattern: Annotated[str, typer.Option(help="causal, noncausal or both.")] = "noncausal",
    backend: Annotated[str, typer.Option(help="Of the mechanisms; one that is named never falls back.")] = "auto",
    batch: Annotated[int | None, typer.Option(help="Sequences, 1 by default; of models pictures, 8.")] = None,
    dim: Annotated[int, typer.Option(help="Channels.")] = 512,
    heads: Annotated[int, typer.Option(help="Heads.")] = 8,
    threads: Annotated[int | None, typer.Option(help="Torch threads.")] = None,
    setting: Settings = None,
    side: Annotated[int, typer.Option(help="Of models: of their pictures, in pixels.")] = 224,
    largest: Annotated[float, typer.Option(help="Of models: million parameters; larger ones are left out.")] = 60,
    decode: Annotated[
        bool, typer.Option("--decode", help="Only the softmax kernels, against this machine's memory and GEMM.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Of each comparison of --decode.", min=3)] = 21,
    scale: Annotated[float, typer.Option(help="Of the lengths of --decode; 0.1 is a quick look.", min=0.01)] = 1.0,
    store: Store_ = Path("runs/bench"),
    html: Html = None,
    retry_failed: Retry = False,
) -> None:
    """Time, FLOPs, memory and state over lengths, against both softmax baselines; the efficiency lengths.

    With the word models, whole image networks instead: images/s, time and memory of one picture.
    """
    from attlas.bench.speed import speed_jobs

    if decode:
        _bench_decode(threads or torch.get_num_threads(), rounds, scale, store)
        return
    if names == "models":
        from attlas.bench.networks import network_jobs

        _refuse(context, "of mechanisms", "sizes", "measures", "pattern", "backend", "dim", "heads", "setting")
        chosen = no_larger(networks or "*", largest, console)
        pictures = 8 if batch is None else batch
        network_list = network_jobs(chosen, side=side, batch=pictures, dtype=dtypes, threads=threads)
        _run(network_list, store, html, "Image networks measured", retry_failed=retry_failed)
        return
    _refuse(context, "of networks: write attlas bench models", "side", "largest")
    if networks:
        raise BadInput(f"only the word models is followed by more names; separate them by commas: {names},{networks}")
    if pattern not in PATTERNS:
        raise BadInput(f"pattern is one of {', '.join(PATTERNS)}, got {pattern!r}")
    mechanisms = read_names(names)
    jobs = speed_jobs(
        mechanisms,
        read_grids(sizes),
        measures=parts(measures),  # type: ignore[arg-type]  # an unknown one is refused there
        dtypes=parts(dtypes),
        causal=PATTERNS[pattern],
        backend=backend,
        params=by_mechanism(setting, mechanisms),
        batch=1 if batch is None else batch,
        dim=dim,
        heads=heads,
        threads=threads,
    )
    _run(jobs, store, html, "Attention mechanisms measured", retry_failed=retry_failed)


def _refuse(context: typer.Context, what: str, *options: str) -> None:
    """Raise where an option was given that would not be read."""
    flags = {option: f"--{option}" for option in options} | {"setting": "--set"}
    sources = {each: context.get_parameter_source(each) for each in options}
    given = [flags[each] for each, source in sources.items() if source is not None and source.name != "DEFAULT"]
    if given:
        raise BadInput(f"{', '.join(given)}: only {what}; leave it out")


def _bench_decode(threads: int, rounds: int, scale: float, store: Path) -> None:
    from attlas.bench import decoding

    result = decoding.measure(threads, rounds, scale)
    decoding.show(result, console)
    path = store / "decode.json"
    decoding.write(result, path, shlex.join(["attlas", *sys.argv[1:]]))
    console.print(f"{path}")


@app.command()
def compare(
    context: typer.Context,
    names: Annotated[str, typer.Argument(help="Names or wildcards, separated by commas.")] = DEMO,
    tasks: Annotated[
        str, typer.Option("--tasks", "--task", help="Of text, masked_text, digits, images, recall.")
    ] = "text",
    seeds: Annotated[int, typer.Option(help="Runs of each mechanism.")] = 3,
    baseline: Annotated[
        str | None, typer.Option(help="What the others are held against: softmax, or vit_micro among networks.")
    ] = None,
    parameters: Annotated[int | None, typer.Option(help="Budget of every model; the baseline's by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps; the task's own by default.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence; the task's own by default.")] = None,
    dim: Annotated[int | None, typer.Option(help="Channels; the task's own by default.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers; the task's own by default.")] = None,
    speed: Annotated[bool, typer.Option(help="Also measure speed over lengths, in the task's pattern.")] = True,
    sizes: Annotated[str, typer.Option(help="Lengths of the speed sweep, as for bench.")] = "256..4096",
    workers: Annotated[int, typer.Option(help="Trainings at a time; -1 is one per core.")] = -1,
    setting: Settings = None,
    store: Store_ = Path("runs/compare"),
    html: Html = None,
    retry_failed: Retry = False,
) -> None:
    """Train small models that differ in the mechanism alone, at equal parameters; one report with their speed.

    With --task images also whole networks by name (see `attlas list models`), as they are: vit_micro,swin_micro.
    """
    from attlas.bench.network import is_network
    from attlas.bench.runner import compare_jobs
    from attlas.bench.speed import speed_jobs
    from attlas.bench.tasks import task_named

    given = {"steps": steps, "length": length, "dim": dim, "layers": layers}
    mechanisms = read_names(names, networks=any(task_named(task).picture for task in parts(tasks)))
    layers_alone = [name for name in mechanisms if not is_network(name)]
    if not layers_alone:
        _refuse(context, "of mechanisms, and networks are as large as they are", "parameters", "dim", "layers", "sizes")
    if baseline is None:
        baseline = "softmax" if layers_alone else "vit_micro"
    params = by_mechanism(setting, [baseline, *mechanisms])
    jobs: list[Any] = [
        *compare_jobs(
            mechanisms,
            parts(tasks),
            seeds=seeds,
            baseline=baseline,
            parameters=parameters,
            params=params,
            sizes={key: value for key, value in given.items() if value is not None},
        )
    ]
    if speed and layers_alone:
        patterns = sorted({task_named(task).causal for task in parts(tasks)})
        own = {name: params[name] for name in layers_alone if name in params}
        jobs += speed_jobs(layers_alone, read_grids(sizes), causal=patterns, params=own)
    _run(jobs, store, html, "Attention mechanisms compared", workers=workers, retry_failed=retry_failed)


@app.command()
def report(
    store: Annotated[Path, typer.Argument(help="Folder of results.")],
    html: Html = None,
) -> None:
    """The tables and the HTML file of a store, once more."""
    from attlas.bench.store import Store, StoreError

    if not store.is_dir():
        raise StoreError(f"there is no store at {store}")
    opened = Store(store)
    runs = opened.runs()
    if not runs:
        raise StoreError(f"{store} holds no run yet: fill it with attlas bench or attlas compare")
    _write_report(opened.records(), html or store / "report.html", runs[-1]["command"], "Attention mechanisms compared")


def _run(jobs: list[Any], path: Path, html: Path | None, title: str, **options: Any) -> None:
    """Do the jobs, show tables, write the report; Ctrl-C ends with 130 and loses nothing."""
    from attlas.bench.runner import run
    from attlas.bench.store import Store

    command = shlex.join(["attlas", *sys.argv[1:]])
    try:
        records = run(jobs, Store(path), command=command, **options)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    _write_report(records, html or path / "report.html", command, title)


def _write_report(records: list[Any], path: Path, command: str, title: str) -> None:
    from attlas.bench import machine
    from attlas.bench.report.html import write_html
    from attlas.bench.report.terminal import terminal_tables

    for table in terminal_tables(records):
        console.print(table)
    try:
        written = write_html(records, path, command=command, machine=machine.describe(), title=title)
    except OSError as error:
        raise BadInput(f"the report could not be written to {path}: {error.strerror}; give another --html") from None
    console.print(f"report: [bold]{escape(str(written))}[/bold]", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; what users can mend is one line, not a traceback."""
    try:
        app()
    except AttlasError as error:
        Console(stderr=True).print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False)
        raise SystemExit(2) from None
