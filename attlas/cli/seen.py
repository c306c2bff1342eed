"""`attlas show NAME --mask`: what each query of a mechanism sees, in the terminal and as an SVG."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from torch import Tensor

from attlas.analysis.visible import check_svg, draw_svg, draw_text, specimen, token_at, tokens_of_image
from attlas.cli.settings import read_grid
from attlas.core.errors import AttlasError, BadInput
from attlas.core.grid import Grid

PATIENCE = 2.0
"""Seconds after which a progress bar appears."""


def show_mask(
    console: Console,
    name: str,
    *,
    size: str | None,
    query: str | None,
    causal: bool,
    settings: dict[str, Any],
    heads: int | None,
    svg: Path | None,
    image: Path | None,
    seed: int,
) -> None:
    """Draw the pairs of a small layer with random weights: a matrix on one axis, else what one query sees."""
    if svg is not None:
        check_svg(svg)
    shape = None if size is None else read_grid(size)
    if shape is None and image is not None:
        shape = (16, 16)
    made = specimen(name, shape, causal=causal, heads=heads, seed=seed, params=settings or None)
    grid, keys = made.grid, made.x.shape[1] if made.context is None else made.context.shape[1]
    if image is not None:
        picture = tokens_of_image(_read(image), grid.shape, made.x.shape[2], prefix=grid.prefix, seed=seed)
        made = made._replace(x=picture)
    asked = None if query is None else token_at(grid, _read_query(query))
    if asked is None and grid.rank > 1:
        asked = made.query()
    whole = grid.rank == 1 or made.context is not None  # a matrix; on a grid one row is enough
    with _progress(console) as report:
        pairs = made.pairs(queries=None if whole else [asked], progress=report)
    seen = pairs[0] if whole else pairs[0, :, 0].double().mean(0)
    console.print(escape(draw_text(seen, grid=grid, query=asked)), highlight=False, markup=True, soft_wrap=True)
    row = pairs[0, :, asked if whole else 0] if asked is not None else None
    console.print(escape(_caption(grid, asked, row, pairs if whole else None, keys)), highlight=False)
    used = ", ".join(f"{key}={value!r}" for key, value in made.settings.items()) or "its defaults"
    what = "random tokens" if image is None else image.name
    console.print(f"[dim]{escape(name)} with {escape(used)}; random weights, {escape(what)}[/dim]", highlight=False)
    if svg is not None:
        draw_svg(seen, svg, grid=grid, query=asked, title=f"visible pairs of {name}")
        console.print(f"picture: [bold]{escape(str(svg))}[/bold]", highlight=False, soft_wrap=True)


def _caption(grid: Grid, asked: int | None, row_HM: Tensor | None, pairs: Tensor | None, keys: int) -> str:
    parts = []
    if asked is not None and row_HM is not None:
        place = asked - grid.prefix
        where: Any = asked
        if place >= 0 and grid.rank > 1:
            where = tuple(int(at) for at in torch.unravel_index(torch.tensor(place), grid.shape))
        parts.append(f"query {where} on a {grid} sees {int(row_HM.any(0).sum())} of {keys} keys")
    if pairs is not None:
        heads = f" over {pairs.shape[1]} heads" if pairs.shape[1] > 1 else ""
        parts.append(f"{int(pairs.sum()):,} of {pairs.numel():,} pairs{heads}")
    return "; ".join(parts)


def _read_query(text: str) -> int | tuple[int, ...]:
    """A query written as 5, or as 3,4 on a grid."""
    try:
        where = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"a query is written as 5, or as 3,4 on a grid, got {text!r}") from None
    return where[0] if len(where) == 1 else where


def _read(path: Path) -> Tensor:
    """An image file as (height, width, colours)."""
    try:
        import numpy as np
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise AttlasError("reading images needs pillow: pip install 'attlas[examples]'") from None
    try:
        with Image.open(path) as opened:
            return torch.from_numpy(np.array(opened.convert("RGB")))
    except (OSError, UnidentifiedImageError) as error:
        raise BadInput(f"the image {path} could not be read: {error}") from None


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """What is called with rows done and all rows, and shows a bar where that takes long."""
    start, bar = time.perf_counter(), Progress(console=console, transient=True)
    task = bar.add_task("asking gradients", total=None)

    def report(done: int, total: int) -> None:
        if time.perf_counter() - start > PATIENCE and done < total:
            bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()
