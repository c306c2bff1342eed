"""Multigrid: a linear operator on functions over a plane as one learned V-cycle.

    u ← u + S(f − A u)                    a smoothing step; the very first, from u = 0, is u = S f
    f_{l+1} = R f_l,    u_{l+1} = Π u_l   down, to a grid of half as many points on each axis
    u_l ← u_l + P u_{l+1}                 up, then further smoothing steps; y = u_0

f is what is given, the right-hand side, u the iterate. A (u to f) and S (f to u) are 3 x 3 convolutions, no two of
them shared; R and Π are 3 x 3 convolutions of stride 2, P a transposed one of stride 2. `steps` counts smoothing
steps before and behind the coarser grids, level by level. There is no activation: without biases y is linear in f.
With `residual` what goes down is R (f − A u), the paper's formula and that of classical multigrid; the official code
can do both, and all published runs restrict f itself.

A grid of m points is followed by one of ⌈m / 2⌉, and the kernel of P has 4 taps where m is even and 3 where it is odd
(on the grid that the layer is built for; on others one row more or less is cut off). `boundary` says how a function
goes on beyond the border, for all convolutions: "dirichlet" with zeros, "periodic" around, "reflect" mirrored. The
official code puts zeros around the input of P in every case, so that its periodic layers do not commute with shifts.

x (B, N, C) on a grid of two axes. Prefix tokens lie outside and give 0. Padding is a hole in which f and u are 0 on
every grid, as they are beyond a Dirichlet border. Time O(N C² taps) for each step of the finest grid and a third more
for all others, memory O(N C).

Source: He, Liu and Xu, "MgNO: Efficient Parameterization of Linear Operators via Multigrid", 2023
(arXiv:2310.19809), official code xlliu2017/MgNO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec

STEPS = ((1, 0), (1, 0), (1, 0), (1, 0), (1, 0), (2, 0))
"""Smoothing steps before and behind the coarser grids, the finest first, in the published runs on Darcy flow."""

BOUNDARIES: dict[str, Literal["zeros", "circular", "reflect"]] = {
    "dirichlet": "zeros",
    "periodic": "circular",
    "reflect": "reflect",
}
"""How a function goes on beyond the border, and the padding mode of that name."""

TAPS = 16 * 16 * 9

SPEC = Spec(
    name="mgno",
    title="MgNO: Efficient Parameterization of Linear Operators via Multigrid",
    year=2023,
    paper="arXiv:2310.19809",
    equation="u ← u + S(f − A u), down by R and Π, up by u + P u′; y = u",
    complexity="O(N C²) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2,),
    examples=(
        # S; A and S twice on the coarse grid, R, Π, P with 4 x 3 taps.
        Example(grid=(6, 5), params={"steps": ((1, 0), (2, 0))}, parameters=7 * TAPS + 16 * 16 * 12),
        # S, A for the restriction, A and S behind, then A and S; R, Π, P with 3 x 4 taps.
        Example(
            grid=(5, 4),
            prefix=1,
            params={"steps": ((1, 1), (1, 0)), "boundary": "reflect", "residual": True},
            parameters=8 * TAPS + 16 * 16 * 12,
        ),
        # S; A and S in the middle; A and S below; R and Π twice; P with 4 x 4 taps and with 4 x 3; biases of S and A.
        Example(
            grid=(4, 6),
            params={"steps": ((1, 0), (1, 0), (1, 0)), "boundary": "periodic", "bias": True},
            parameters=9 * TAPS + 16 * 16 * (16 + 12) + 5 * 16,
        ),
    ),
)


def halved(shape: tuple[int, int]) -> tuple[int, int]:
    """The grid below a grid."""
    height, width = shape
    return (height + 1) // 2, (width + 1) // 2


class _Smooth(nn.Module):
    """u + S(f − A u), or S f where there is no u yet."""

    def __init__(self, operator: nn.Conv2d | None, smoother: nn.Conv2d) -> None:
        super().__init__()
        self.operator = operator
        self.smoother = smoother

    def forward(self, u: Tensor | None, f: Tensor, keep: Tensor | None) -> Tensor:
        """The next u."""
        if u is None or self.operator is None:
            return _blank(self.smoother(f), keep)
        return u + _blank(self.smoother(_blank(f - self.operator(u), keep)), keep)


class _Level(nn.Module):
    """What happens on one grid and on the way to it."""

    def __init__(self, before: list[_Smooth], behind: list[_Smooth]) -> None:
        super().__init__()
        self.before = nn.ModuleList(before)
        self.behind = nn.ModuleList(behind)
        self.operator: nn.Conv2d | None = None
        self.restrict: nn.Conv2d | None = None
        self.inject: nn.Conv2d | None = None
        self.prolong: nn.ConvTranspose2d | None = None
        self.norm: nn.Module = nn.Identity()


class VCycle(nn.Module):
    """One V-cycle as an operator on functions over a plane: f (B, sources, H, W) to u (B, channels, H, W).

    Args:
        sources: channels of f.
        channels: of u.
        steps: smoothing steps (before, behind) of every level, the finest first; at least one before on the finest
            and none behind on the coarsest, where the ways down and up meet.
        boundary: "dirichlet", "periodic" or "reflect".
        residual: restrict f − A u instead of f.
        bias: of A and S.
        shape: the grid that it is built for; None for sizes that are even down to the last level.
        normed: a layer norm of all of u, over channels and grid, behind each prolongation, as published for
            Navier-Stokes. Its weights fit `shape` alone, and its statistics take no `keep`.
    """

    def __init__(
        self,
        sources: int,
        channels: int,
        *,
        steps: Sequence[tuple[int, int]] = STEPS,
        boundary: str = "dirichlet",
        residual: bool = False,
        bias: bool = False,
        shape: tuple[int, int] | None = None,
        normed: bool = False,
    ) -> None:
        super().__init__()
        _check_steps(steps)
        if boundary not in BOUNDARIES:
            raise BadInput(f"boundary is one of {', '.join(map(repr, BOUNDARIES))}, got {boundary!r}")
        if normed and shape is None:
            raise BadInput("layer norms have a weight for every point of the grid: pass shape=(height, width)")
        self.mode = BOUNDARIES[boundary]
        self.residual, self.normed = residual, normed

        def conv(inputs: int, outputs: int, stride: int, biased: bool) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=biased, padding_mode=self.mode)

        def smooth(from_zero: bool) -> _Smooth:
            operator = None if from_zero else conv(channels, sources, 1, bias)
            return _Smooth(operator, conv(sources, channels, 1, bias))

        self.levels: Any = nn.ModuleList()  # of _Level
        for number, (before, behind) in enumerate(steps):
            level = _Level(
                [smooth(from_zero=not number and not step) for step in range(before)],
                [smooth(from_zero=False) for _ in range(behind)],
            )
            if number + 1 < len(steps):
                level.operator = conv(channels, sources, 1, bias) if residual else None
                level.restrict = conv(sources, sources, 2, False)
                level.inject = conv(channels, channels, 2, False)
                kernel = (4, 4) if shape is None else (4 - shape[0] % 2, 4 - shape[1] % 2)
                level.prolong = nn.ConvTranspose2d(channels, channels, kernel, 2, 1, bias=False)
                if normed and shape is not None:
                    level.norm = nn.LayerNorm([channels, *shape])
            self.levels.append(level)
            shape = None if shape is None else halved(shape)

    def forward(self, f_BSHW: Tensor, keep_B1HW: Tensor | None = None) -> Tensor:
        """u (B, channels, H, W) where `keep` is True or there is none, 0 elsewhere."""
        keeps = self._keeps(f_BSHW, keep_B1HW)
        f = _blank(f_BSHW, keeps[0])
        u: Tensor | None = None
        known: list[tuple[Tensor, Tensor]] = []
        for level, keep in zip(self.levels, keeps, strict=True):
            for step in level.before:
                u = step(u, f, keep)
            assert u is not None  # the finest level has a step before all others
            known.append((u, f))
            if level.restrict is not None:
                below = None if keep is None else keep[..., ::2, ::2]
                rest = f if level.operator is None else _blank(f - level.operator(u), keep)
                f, u = _blank(level.restrict(rest), below), _blank(level.inject(u), below)
        assert u is not None
        for level, keep, (fine, f) in reversed(list(zip(self.levels, keeps, known, strict=True))[:-1]):
            u = _blank(level.norm(fine + self._prolong(level.prolong, u, fine)), keep)
            for step in level.behind:
                u = step(u, f, keep)
        return u

    def _keeps(self, f_BSHW: Tensor, keep_B1HW: Tensor | None) -> list[Tensor | None]:
        if self.normed and keep_B1HW is not None:
            raise BadInput("layer norms over the whole grid have no meaning with holes: pass no keep, or normed=False")
        shape, keeps = (f_BSHW.shape[2], f_BSHW.shape[3]), [keep_B1HW]
        for number in range(len(self.levels)):
            if self.mode == "reflect" and min(shape) < 2:
                raise BadInput(
                    f"a {f_BSHW.shape[2]} x {f_BSHW.shape[3]} grid is down to {shape[0]} x {shape[1]} points on level "
                    f"{number}, and a single one has no mirror image: take fewer levels or a larger grid"
                )
            shape = halved(shape)
            last = keeps[-1]
            keeps.append(None if last is None else last[..., ::2, ::2])
        return keeps[:-1]

    def _prolong(self, prolong: nn.ConvTranspose2d, u: Tensor, fine: Tensor) -> Tensor:
        # One ring of what lies beyond the border goes in, and what comes out is cut to the finer grid.
        ring = F.pad(u, (1, 1, 1, 1), "constant" if self.mode == "zeros" else self.mode)
        return F.conv_transpose2d(ring, prolong.weight, None, 2, 2)[..., 1 : 1 + fine.shape[2], 1 : 1 + fine.shape[3]]

    def oracle(self, f_BSHW: Tensor, keep_B1HW: Tensor | None = None) -> Tensor:
        """The same as sums over taps and positions, level below level."""
        self._keeps(f_BSHW, keep_B1HW)  # refuses what forward refuses
        keep = f_BSHW.new_ones(f_BSHW.shape[0], 1, *f_BSHW.shape[2:]) if keep_B1HW is None else keep_B1HW.to(f_BSHW)
        return self._below(0, torch.where(keep > 0, f_BSHW, 0), None, keep)

    def _below(self, number: int, f: Tensor, u: Tensor | None, keep: Tensor) -> Tensor:
        """u of a level, with all that the coarser ones add to it."""
        level, coarse = self.levels[number], keep[..., ::2, ::2]
        for step in level.before:
            u = _taps(step.smoother, f, self.mode) * keep if u is None else u + self._corrected(step, u, f, keep)
        assert u is not None
        if level.restrict is None:
            return u
        rest = f if level.operator is None else (f - _taps(level.operator, u, self.mode)) * keep
        start = _taps(level.inject, u, self.mode) * coarse
        u_below = self._below(number + 1, _taps(level.restrict, rest, self.mode) * coarse, start, coarse)
        u = level.norm(u + _scattered(level.prolong, u_below, u, self.mode)) * keep
        for step in level.behind:
            u = u + self._corrected(step, u, f, keep)
        return u

    def _corrected(self, step: Any, u: Tensor, f: Tensor, keep: Tensor) -> Tensor:
        return _taps(step.smoother, (f - _taps(step.operator, u, self.mode)) * keep, self.mode) * keep

    def cost(self, batch: int, shape: tuple[int, int]) -> Cost:
        """The taps that fall on the grid, and all that the torch backend multiplies."""
        total = Cost(0, 0)
        for level in self.levels:
            below = halved(shape)
            same, down = (self._convolution(shape, out) for out in (shape, below))
            for name, module in level.named_modules():
                if isinstance(module, nn.ConvTranspose2d):
                    counted = self._transposed(below, shape, module.kernel_size)
                elif isinstance(module, nn.Conv2d):
                    counted = down if name in ("restrict", "inject") else same
                else:
                    continue
                channels = 2 * batch * module.in_channels * module.out_channels
                total += Cost(channels * counted[0], channels * counted[1])
            shape = below
        return total

    def _convolution(self, shape: tuple[int, int], outputs: tuple[int, int]) -> tuple[int, int]:
        """Products of positions with the 3 x 3 taps: those on the grid, and all."""
        needed = executed = 1
        for length, count in zip(shape, outputs, strict=True):
            stride = 1 if length == count else 2
            inside = sum(0 <= stride * n + tap < length for n in range(count) for tap in (-1, 0, 1))
            needed *= inside if self.mode == "zeros" else 3 * count
            executed *= 3 * count
        return needed, executed

    def _transposed(self, shape: tuple[int, int], outputs: tuple[int, int], kernel: tuple[int, ...]) -> tuple[int, int]:
        needed = executed = 1
        for length, count, taps in zip(shape, outputs, kernel, strict=True):
            ring = range(length) if self.mode == "zeros" else range(-1, length + 1)
            needed *= sum(0 <= 2 * n - 1 + tap < count for n in ring for tap in range(taps))
            executed *= (length + 2) * taps
        return needed, executed


def _check_steps(steps: Sequence[tuple[int, int]]) -> None:
    for pair in steps:
        if len(pair) != 2 or min(pair) < 0:
            raise BadInput(f"steps are pairs (before, behind), none negative, one for each level, got {tuple(steps)}")
    if not steps or steps[0][0] < 1:
        raise BadInput(f"u begins with a step before on the finest level: steps=((1, 0), ...), got {tuple(steps)}")
    if steps[-1][1]:
        raise BadInput(
            f"the coarsest level has no way up behind which to step: steps=(..., (n, 0)), got {tuple(steps)}"
        )


def _blank(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x.where(keep, 0)


def _beyond(index: Tensor, length: int, mode: str) -> tuple[Tensor, Tensor]:
    """Where on the grid a function that goes on beyond it is read, and whether there is anything."""
    if mode == "circular":
        return index % length, torch.ones_like(index, dtype=torch.bool)
    if mode == "reflect":
        mirrored = index.abs()
        return torch.where(mirrored < length, mirrored, 2 * (length - 1) - mirrored), mirrored >= 0
    return index.clamp(0, length - 1), (index >= 0) & (index < length)


def _taps(conv: nn.Conv2d, x_BIHW: Tensor, mode: str) -> Tensor:
    """A 3 x 3 convolution, tap by tap."""
    starts = [torch.arange(0, length, conv.stride[0], device=x_BIHW.device) for length in x_BIHW.shape[2:]]
    out: Tensor | None = None
    for tap in range(9):
        rows, on_rows = _beyond(starts[0] + tap // 3 - 1, x_BIHW.shape[2], mode)
        columns, on_columns = _beyond(starts[1] + tap % 3 - 1, x_BIHW.shape[3], mode)
        read = x_BIHW[:, :, rows[:, None], columns] * (on_rows[:, None] & on_columns)
        term = torch.einsum("oi,bihw->bohw", conv.weight[:, :, tap // 3, tap % 3], read)
        out = term if out is None else out + term
    assert out is not None
    return out if conv.bias is None else out + conv.bias[:, None, None]


def _scattered(conv: nn.ConvTranspose2d, x_BIHW: Tensor, fine: Tensor, mode: str) -> Tensor:
    """A transposed convolution: position n gives to 2 n − 1 + tap; so do those just beyond the border."""
    out = torch.zeros_like(fine)
    height, width = fine.shape[2:]
    ring = [torch.arange(-1, length + 1) for length in x_BIHW.shape[2:]]
    (rows, on_rows), (columns, on_columns) = (
        _beyond(index, length, mode) for index, length in zip(ring, x_BIHW.shape[2:], strict=True)
    )
    for i, row in enumerate(ring[0].tolist()):
        for j, column in enumerate(ring[1].tolist()):
            if not (on_rows[i] and on_columns[j]):
                continue
            given = torch.einsum("bi,iohw->bohw", x_BIHW[:, :, rows[i], columns[j]], conv.weight)
            for tap_row in range(given.shape[2]):
                for tap_column in range(given.shape[3]):
                    to_row, to_column = 2 * row - 1 + tap_row, 2 * column - 1 + tap_column
                    if 0 <= to_row < height and 0 <= to_column < width:
                        at = F.pad(
                            given[:, :, tap_row : tap_row + 1, tap_column : tap_column + 1],
                            (to_column, width - 1 - to_column, to_row, height - 1 - to_row),
                        )
                        out = out + at
    return out


@register(SPEC)
class MgNO(Mixer):
    """A V-cycle over the tokens of a plane, as many channels out as in.

    Args:
        site: where it is installed; its grid decides on the taps of the transposed convolutions.
        backend: `auto`, `torch` or `oracle`.
        steps: smoothing steps (before, behind) of every level, the finest first.
        boundary: "dirichlet", "periodic" or "reflect".
        residual: restrict f − A u instead of f.
        bias: of A and S.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        steps: Sequence[tuple[int, int]] = STEPS,
        boundary: str = "dirichlet",
        residual: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(site, backend)
        shape = None if site.grid is None or site.grid.rank != 2 else (site.grid.shape[0], site.grid.shape[1])
        self.cycle = VCycle(
            site.dim, site.dim, steps=steps, boundary=boundary, residual=residual, bias=bias, shape=shape
        )

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """The V-cycle as convolutions."""
        return self._on_grid(self.cycle, x_BNC, call)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """The V-cycle as sums over taps."""
        return self._on_grid(self.cycle.oracle, x_BNC, call)

    def _on_grid(self, run: Callable[[Tensor, Tensor | None], Tensor], x_BNC: Tensor, call: Call) -> Tensor:
        grid = call.grid
        prefix, x = grid.split(x_BNC)
        keep = None
        if call.mask.keys is not None:
            keep = grid.unflatten(call.mask.keys[:, grid.prefix :, None]).movedim(-1, 1)
        u_BCHW = run(grid.unflatten(x).movedim(-1, 1), keep)
        return torch.cat([torch.zeros_like(prefix).to(u_BCHW), u_BCHW.flatten(2).transpose(1, 2)], 1)

    def count(self, sizes: Sizes) -> Cost:
        """All convolutions of the cycle."""
        grid: Grid = sizes.grid
        return self.cycle.cost(sizes.batch, (grid.shape[0], grid.shape[1]))
