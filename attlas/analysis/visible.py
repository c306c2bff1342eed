"""Which keys each query's output depends on, asked of any mechanism by gradients, and pictures of it.

    query n sees key m   <=>   d o_n / d v_m != 0      in float64

Weights that float64 rounds to 0, as those of a softmax some e^745 times below the largest, are not seen, and what
arithmetic leaves where 0 is meant is: `rounding` sets a share of a row's largest gradient that is none, if you want
one. Sums that are taken by Fourier transforms may need it; of the mechanisms here none does at sizes that fit a
picture.

For a mechanism of the form (q, k, v) -> o the values are asked: that a query moves its own output through q is no
pair. Others have no values and are asked for d y_n / d x_m. What depends on content is shown for the content given.

Rows are measured all at once: the sequence is copied along the batch, copy n is asked for output n, and one backward
pass per head answers all copies.

B batch, H heads, N queries, M keys, R rows asked for, C channels, E value size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attlas.blocks.factory import mixer, resolve
from attlas.core.errors import AttlasError, BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Mixer
from attlas.core.spec import Example, Pattern

ENTRIES = 2**22
"""Numbers that a (copies, H, N, M) tensor may hold; it bounds how many rows are measured together."""

PICTURED = {1: (24,), 2: (8, 8), 3: (3, 6, 6)}
"""Grids that show a mechanism well, by rank."""

Query = int | Sequence[int]


def visible_pairs(
    layer: Mixer,
    x_BNC: Tensor | None = None,
    *,
    context_BMC: Tensor | None = None,
    grid: Grid | Sequence[int] | None = None,
    keep: Tensor | None = None,
    queries: Sequence[int] | None = None,
    seed: int = 0,
    rounding: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Which keys each query's output depends on, (B, H, N, M) bool; H is 1 where the mechanism is no attend.

    >>> from attlas import mixer
    >>> visible_pairs(mixer("softmax", 8, causal=True), grid=(3,))[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]

    Args:
        layer: of any mechanism; a copy of it is measured, in float64.
        x_BNC: tokens; by default one random sequence on the grid.
        context_BMC: the other sequence of a cross pattern, whose tokens are then the keys.
        grid: how the tokens lie, by default the layer's own.
        keep: (B, M) bool, False where a key is padding.
        queries: rows that are wanted, in this order; all by default.
        seed: of the random tokens and of the direction in which an output is asked.
        rounding: share of a row's largest gradient up to which a gradient is none, such as 1e-14.
        progress: called with the rows measured so far and all of them.

    Raises:
        BadInput, Unsupported: no sequence of tokens, rows that it lacks, or what the layer itself refuses.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        place = layer.site.grid if grid is None else grid
        if x_BNC is None:
            if place is None:
                raise BadInput("without tokens the grid says how many there are: pass x or grid")
            place = place if isinstance(place, Grid) else Grid(tuple(place))
            x_BNC = torch.randn(1, place.tokens, layer.site.dim)
        home = next(layer.parameters(), x_BNC).device
        inputs = [each.to(home) for each in (x_BNC, context_BMC) if each is not None]
        shapes = [tuple(each.shape) for each in inputs]
        if any(len(shape) != 3 or not 0 < shape[0] == len(x_BNC) for shape in shapes):
            raise BadInput(f"tokens are (B, N, C) of at least one sequence, got {' and '.join(map(str, shapes))}")
        batch, tokens, keys = len(x_BNC), x_BNC.shape[1], inputs[-1].shape[1]
        rows = list(range(tokens) if queries is None else queries)
        if any(not 0 <= row < tokens for row in rows):
            raise BadInput(f"queries are places in a sequence of {tokens} tokens, got {rows}")
        layer = copy.deepcopy(layer).double().eval().requires_grad_(False)
        together = max(1, ENTRIES // (max(layer.site.heads, 1) * tokens * keys))
        sequences = []
        for index in range(batch):
            own = [each[index : index + 1] for each in inputs]
            real = None if keep is None else keep[index : index + 1].to(home)
            parts = []
            for start in range(0, len(rows), together):
                some = rows[start : start + together]
                parts.append(_measure(layer, own, real, place, some, rounding))
                if progress is not None:
                    progress(index * len(rows) + start + len(some), batch * len(rows))
            sequences.append(torch.cat(parts, 1) if parts else torch.zeros(1, 0, keys, dtype=torch.bool))
        return torch.stack(sequences)


def _measure(
    layer: Mixer,
    sequence: list[Tensor],
    keep_1M: Tensor | None,
    grid: Grid | Sequence[int] | None,
    rows: list[int],
    rounding: float,
) -> Tensor:
    """(H, R, M), which keys these rows of one sequence depend on."""
    copies = len(rows)
    inputs = [each.double().repeat(copies, 1, 1) for each in sequence]
    mask = None if keep_1M is None else Mask.padding(keep_1M.expand(copies, -1))
    source, output = _asked(layer, inputs, mask, grid)
    own_RHE = output[torch.arange(copies), :, rows]
    asked_RH = own_RHE @ torch.randn(own_RHE.shape[-1], dtype=own_RHE.dtype, device=own_RHE.device)
    heads, keys = asked_RH.shape[1], source.shape[2]
    seen_HRM = torch.zeros(heads, copies, keys, dtype=torch.bool)
    if not asked_RH.requires_grad:
        return seen_HRM
    for head in range(heads):
        wanted = asked_RH[:, head].sum()
        (grad,) = torch.autograd.grad(wanted, source, retain_graph=head < heads - 1, allow_unused=True)
        if grad is not None:
            size_RM = grad.abs().amax((1, 3))
            seen_HRM[head] = size_RM > rounding * size_RM.amax(-1, keepdim=True)
    return seen_HRM


def _asked(
    layer: Mixer, inputs: list[Tensor], mask: Mask | None, grid: Grid | Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """What is asked: (R, G, M, E) whose gradients are wanted, and (R, H, N, E) whose rows depend on it."""
    attend: Any = getattr(layer, "attend", None)
    if not isinstance(attend, Attend):
        source = inputs[-1].unsqueeze(1).requires_grad_()
        return source, layer(*inputs[:-1], source.squeeze(1), mask=mask, grid=grid).unsqueeze(1)
    values: list[Tensor] = []
    outputs: list[Tensor] = []

    def cut(module: Attend, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q, k, v = args
        values.append(v.detach().clone().requires_grad_())
        return q, k, values[-1]

    def catch(module: Attend, args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    handles = [attend.register_forward_pre_hook(cut), attend.register_forward_hook(catch)]
    try:
        layer(*inputs, mask=mask, grid=grid)
    finally:
        for handle in handles:
            handle.remove()
    return values[0], outputs[0]


class Specimen(NamedTuple):
    """A small layer of a mechanism with random weights, what it reads, and how its tokens lie."""

    layer: Mixer
    x: Tensor
    context: Tensor | None
    grid: Grid
    settings: dict[str, Any]

    def pairs(self, **options: Any) -> Tensor:
        """The pairs that it sees, by `visible_pairs`."""
        return visible_pairs(self.layer, self.x, context_BMC=self.context, grid=self.grid, **options)

    def query(self) -> int:
        """A token to ask: the one in the middle, or the first where that one sees nothing and has a class token."""
        place = middle(self.grid)
        return 0 if self.grid.prefix and not self.pairs(queries=[place]).any() else place


def specimen(
    name: str,
    grid: Sequence[int] | None = None,
    *,
    causal: bool = False,
    heads: int | None = None,
    seed: int = 0,
    params: Mapping[str, Any] | None = None,
) -> Specimen:
    """A layer of the mechanism to look at: its declared tiny example, by default on a grid that shows well.

    No weight is 0, so that what leads to the keys is open. Where the mechanism has no noncausal pattern it is causal;
    where it has no self-attention, keys come from a context of as many tokens.

    Args:
        name: of the mechanism, with a variant behind a colon where it has any.
        grid: the shape of the positions; by default that of `PICTURED` or, where it does not fit the example's
            settings, that of the example.
        causal: build it causal.
        heads: the example's by default.
        seed: of weights and tokens.
        params: settings of the mechanism, {} for its own defaults; those of its example by default.

    Raises:
        UnknownName, BadInput, Unsupported: the mechanism cannot be built this way.
    """
    if heads is not None and heads < 1:
        raise BadInput(f"heads are at least 1, got {heads}")
    spec = resolve(name)[0].spec
    causal = causal or all(pattern.startswith("causal") for pattern in spec.patterns)
    cross = Pattern.of(causal, cross=False) not in spec.patterns and Pattern.of(causal, cross=True) in spec.patterns
    example = _example(spec.examples, Pattern.of(causal, cross), None if grid is None else len(grid))
    settings = dict(example.params if params is None else params)

    def make(shape: Sequence[int]) -> Specimen:
        place = Grid(tuple(shape), prefix=int(spec.class_token))
        return _specimen(name, example, place, causal, cross, heads, seed, settings)

    if grid is not None:
        return make(grid)
    try:
        made = make(PICTURED[len(example.grid)])
        made.pairs(queries=[0])
        return made
    except AttlasError:
        if params is not None:
            raise
        return make(example.grid)


def _specimen(
    name: str,
    example: Example,
    grid: Grid,
    causal: bool,
    cross: bool,
    heads: int | None,
    seed: int,
    settings: dict[str, Any],
) -> Specimen:
    dim, kv_heads = example.dim, example.kv_heads
    if heads is not None and heads != example.heads:
        dim, kv_heads = max(1, dim // example.heads) * heads, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = mixer(
            name,
            dim,
            heads or example.heads,
            kv_heads=kv_heads,
            causal=causal,
            grid=grid,
            length=grid.tokens,
            **settings,
        )
        for parameter in layer.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        x = torch.randn(1, grid.tokens, dim)
        context = torch.randn(1, grid.tokens, dim) if cross else None
    return Specimen(layer.eval(), x, context, grid, settings)


def share_of_draws(
    name: str,
    causal: bool,
    grid: Sequence[int],
    *,
    params: Mapping[str, Any] | None = None,
    draws: int = 3,
) -> Tensor:
    """In which share of random specimens any head of query n sees key m, (N, M) in [0, 1].

    What depends on content, such as clusters, shows as a share between 0 and 1. Arguments and errors are those of
    `specimen`.
    """
    made = (specimen(name, grid, causal=causal, seed=seed, params=params).pairs(seed=seed) for seed in range(draws))
    return torch.stack([pairs[0].any(0) for pairs in made]).double().mean(0)


def _example(examples: Sequence[Example], pattern: Pattern, rank: int | None) -> Example:
    """The declared example that shows this pattern best on a grid of this rank.

    Without a rank, causal mechanisms show best on one axis, others on two.
    """
    wanted = rank or (1 if pattern.startswith("causal") else 2)

    def distance(example: Example) -> tuple[bool, bool]:
        return example.patterns is not None and pattern not in example.patterns, len(example.grid) != wanted

    return min(examples, key=distance)


def tokens_of_image(image_HW3: Tensor, grid: Sequence[int], dim: int, *, prefix: int = 0, seed: int = 0) -> Tensor:
    """Tokens (1, prefix + H W, dim) of a picture: each is a random projection of 4 x 4 means of its own patch.

    Tokens of patches that look alike are alike; prefix tokens are random.
    """
    if len(grid) != 2:
        raise BadInput(f"a picture lies on two axes, the grid {'x'.join(map(str, grid))} has {len(grid)}")
    if image_HW3.ndim != 3:
        raise BadInput(f"a picture is (height, width, colours), got {tuple(image_HW3.shape)}")
    height, width = grid
    fine = torch.nn.functional.adaptive_avg_pool2d(image_HW3.double().movedim(-1, 0), (4 * height, 4 * width))
    patches = fine.unflatten(1, (height, 4)).unflatten(3, (width, 4)).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)
    patches = (patches - patches.mean(0)) / patches.std().clamp(min=1e-12)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(patches.shape[1], dim, dtype=torch.float64, generator=generator)
    front = torch.randn(prefix, dim, dtype=torch.float64, generator=generator)
    return torch.cat([front, patches @ directions / patches.shape[1] ** 0.5]).float().unsqueeze(0)


def token_at(grid: Grid, query: Query) -> int:
    """The place in the sequence of a position, given by its coordinates, or of a token given by its place."""
    if isinstance(query, int):
        if not 0 <= query < grid.tokens:
            raise BadInput(f"query {query} is outside of the {grid.tokens} tokens of the {grid}")
        return query
    where = tuple(query)
    if len(where) != grid.rank or not all(0 <= at < size for at, size in zip(where, grid.shape, strict=True)):
        raise BadInput(f"a query on the {grid} is {grid.rank} coordinates inside of it, got {where}")
    place = 0
    for at, size in zip(where, grid.shape, strict=True):
        place = place * size + at
    return grid.prefix + place


def middle(grid: Grid) -> int:
    """The token in the middle of the grid."""
    return token_at(grid, tuple(size // 2 for size in grid.shape))


def shares(pairs: Tensor) -> Tensor:
    """The share of heads that see, (N, M) or (M,), of pairs (1, H, N, M), (H, N, M), (N, M) or a row (M,)."""
    if pairs.ndim == 4 and pairs.shape[0] != 1:
        raise BadInput(f"a picture shows one sequence, got {pairs.shape[0]}: pass pairs[0]")
    if not 1 <= pairs.ndim <= 4:
        raise BadInput(f"pairs are (H, N, M), (N, M) or a row (M,), got {tuple(pairs.shape)}")
    return pairs.double().flatten(0, -3).mean(0) if pairs.ndim > 2 else pairs.double()


def _laid_out(pairs: Tensor, grid: Grid | Sequence[int] | None, query: Query | None) -> tuple[Tensor, Grid, int | None]:
    """What is drawn: a matrix (N, M) or the row (M,) of one query, the grid of its keys, and the query.

    Queries and keys of two lengths are two sequences, of which the grid may be either's: all of them are drawn.
    """
    share = shares(pairs)
    rows, keys = share.shape[0], share.shape[-1]
    place = grid if isinstance(grid, Grid) else Grid((keys,) if grid is None else tuple(grid))
    if place.tokens not in (rows, keys):
        row = f"row {keys} keys" if share.ndim == 1 else f"pairs {rows} queries and {keys} keys"
        raise BadInput(f"the {place} has {place.tokens} tokens, the {row}")
    asked = place if place.tokens == rows else Grid((rows,))
    token = None if query is None else token_at(asked, query)
    if share.ndim == 2 and rows == keys and place.rank > 1:
        token = middle(place) if token is None else token
        share = share[token]
    return share, place if place.tokens == keys else Grid((keys,)), token


SIGNS = ("· ", "▒▒", "██")
BLOCKS = {(False, False): "·", (True, False): "▀", (False, True): "▄", (True, True): "█"}


def draw_text(
    pairs: Tensor, *, grid: Grid | Sequence[int] | None = None, query: Query | None = None, width: int = 96
) -> str:
    """The pairs for a terminal: on one axis the matrix, two rows a line, else what one query sees on its grid.

    On a grid a cell says whether all heads see it, some, or none; `<>` is the query, and frames stand below one
    another. A matrix wider than `width` is drawn coarser: a cell is filled where anything in it is seen.
    """
    share, place, token = _laid_out(pairs, grid, query)
    if share.ndim == 2:
        return _blocks(share, width)
    cells = [SIGNS[0 if part <= 0 else 2 if part >= 1 else 1] for part in share.tolist()]
    if token is not None:
        cells[token] = "<>"
    lines = ["prefix " + "".join(cells[: place.prefix])] if place.prefix else []
    rest, columns = cells[place.prefix :], place.shape[-1]
    rows = ["".join(rest[start : start + columns]) for start in range(0, len(rest), columns)]
    per_frame = place.shape[-2] if place.rank > 1 else 1
    for frame, start in enumerate(range(0, len(rows), per_frame)):
        if place.rank == 3:
            lines.append(f"frame {frame}")
        lines += rows[start : start + per_frame]
    return "\n".join(lines)


def _blocks(share_NM: Tensor, width: int) -> str:
    queries, keys = share_NM.shape
    if keys > width:
        cells = (max(2, round(queries * width / keys)), width)
        share_NM = torch.nn.functional.adaptive_max_pool2d(share_NM[None], cells)[0]
    if share_NM.shape[0] % 2:
        share_NM = torch.cat([share_NM, share_NM.new_zeros(1, share_NM.shape[1])])
    return "\n".join(
        "".join(BLOCKS[above > 0, below > 0] for above, below in zip(top, bottom, strict=True))
        for top, bottom in zip(share_NM[0::2].tolist(), share_NM[1::2].tolist(), strict=True)
    )


SEEN, ASKED, WRITING = "#4457c2", "#d1495b", "#777"
LEGEND = 120  # pixels of one entry


def svg(
    pairs: Tensor, *, grid: Grid | Sequence[int] | None = None, query: Query | None = None, title: str = "visible pairs"
) -> str:
    """A small SVG that needs nothing else: on one axis the matrix, else what one query sees on its grid.

    Args:
        pairs: (1, H, N, M), (H, N, M) or (N, M) as of `visible_pairs`, or the row (M,) of one query; numbers
            between 0 and 1 are shares.
        grid: how the keys lie; one axis by default.
        query: place of a token or coordinates on the grid; on more than one axis the middle by default.
        title: what the picture is called where it is read aloud.
    """
    share, place, token = _laid_out(pairs, grid, query)
    panels = _matrix(share, token) if share.ndim == 2 else _frames(share, place, token)
    drawing, width, height = panels
    entries = [("seen", SEEN, "1")]
    if bool(((share > 0) & (share < 1)).any()):
        entries = [("by all heads", SEEN, "1"), ("by some heads", SEEN, ".45")]
    marks = [
        f'<rect x="{LEGEND * number}" y="{height + 8}" width="10" height="10" fill="{colour}" opacity="{opacity}"/>'
        f'<text x="{LEGEND * number + 15}" y="{height + 17}">{what}</text>'
        for number, (what, colour, opacity) in enumerate(entries)
    ]
    if token is not None:
        at = LEGEND * len(entries)
        marks.append(
            f'<rect x="{at + 1}" y="{height + 9}" width="8" height="8" fill="none" stroke="{ASKED}" stroke-width="2"/>'
            f'<text x="{at + 15}" y="{height + 17}">the query</text>'
        )
    width, height = max(width, LEGEND * len(marks)), height + 22
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title, quote=True)}" font-family="system-ui, sans-serif" font-size="11" '
        f'fill="{WRITING}">{drawing}{"".join(marks)}</svg>\n'
    )


def check_svg(path: Path) -> None:
    """Refuse a path that does not end in .svg."""
    if path.suffix.lower() != ".svg":
        raise BadInput(f"the picture of pairs is an .svg, got {path.name!r}")


def draw_svg(
    pairs: Tensor,
    path: Path,
    *,
    grid: Grid | Sequence[int] | None = None,
    query: Query | None = None,
    title: str = "visible pairs",
) -> None:
    """Write `svg` to a file.

    Raises:
        BadInput: the path does not end in .svg or cannot be written.
    """
    check_svg(path)
    text = svg(pairs, grid=grid, query=query, title=title)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise BadInput(f"the picture could not be written to {path}: {error.strerror}; give another path") from None


def _matrix(share_NM: Tensor, token: int | None) -> tuple[str, int, int]:
    """Queries downwards, keys to the right: the drawing, its width and height."""
    queries, keys = share_NM.shape
    cell = max(1, min(12, 320 // max(queries, keys)))
    left, top = 14, 14
    drawing = _cells(share_NM, cell, left, top)
    if token is not None:
        drawing += _outline(left, top + token * cell, keys * cell, cell)
    drawing += f'<text x="{left}" y="10">keys</text><text transform="translate(3 {top}) rotate(90)">queries</text>'
    return drawing, left + keys * cell, top + queries * cell


def _frames(share_M: Tensor, grid: Grid, token: int | None) -> tuple[str, int, int]:
    """The positions as they lie, one panel per frame and a strip for the prefix: drawing, width, height."""
    columns = grid.shape[-1]
    rows = grid.shape[-2] if grid.rank > 1 else 1
    frames = grid.shape[0] if grid.rank == 3 else 1
    cell = max(2, min(20, 480 // (columns * frames), 240 // rows))
    drawing, top, front = "", 0, grid.prefix
    if front:
        drawing += _cells(share_M[None, :front], cell, 44, 0) + '<text x="0" y="10">prefix</text>'
        top = cell + 8
    if frames > 1:
        top += 14
    panel = columns * cell + 12
    for frame, share in enumerate(share_M[front:].view(frames, rows, columns)):
        drawing += _cells(share, cell, frame * panel, top)
        if frames > 1:
            drawing += f'<text x="{frame * panel}" y="{top - 4}">frame {frame}</text>'
    if token is not None and token < front:
        drawing += _outline(44 + token * cell, 0, cell, cell)
    elif token is not None:
        frame, place = divmod(token - front, rows * columns)
        row, column = divmod(place, columns)
        drawing += _outline(frame * panel + column * cell, top + row * cell, cell, cell)
    return drawing, max(frames * panel - 12, 44 + front * cell if front else 0), top + rows * cell


def _outline(x: int, y: int, width: int, height: int) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="{ASKED}" stroke-width="2"/>'


def _cells(share: Tensor, cell: int, x: int, y: int) -> str:
    """A sheet with its cells filled where they are seen; neighbours in a row are one piece of the path."""
    rows, columns = share.shape
    drawing = f'<rect x="{x}" y="{y}" width="{columns * cell}" height="{rows * cell}" fill="#8882"/>'
    for chosen, opacity in ((share >= 1, "1"), ((share > 0) & (share < 1), ".45")):
        pieces = []
        for row, line in enumerate(chosen.int()):
            steps = torch.diff(line, prepend=line.new_zeros(1), append=line.new_zeros(1))
            starts, ends = ((steps == sign).nonzero().flatten().tolist() for sign in (1, -1))
            pieces += [
                f"M{x + start * cell} {y + row * cell}h{(end - start) * cell}v{cell}h{(start - end) * cell}z"
                for start, end in zip(starts, ends, strict=True)
            ]
        if pieces:
            drawing += f'<path d="{"".join(pieces)}" fill="{SEEN}" opacity="{opacity}"/>'
    if cell > 4:
        lines = [f"M{x + column * cell} {y}v{rows * cell}" for column in range(1, columns)]
        lines += [f"M{x} {y + row * cell}h{columns * cell}" for row in range(1, rows)]
        drawing += f'<path d="{"".join(lines)}" stroke="#fff" stroke-opacity=".5" fill="none"/>'
    return drawing
