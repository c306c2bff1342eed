"""Pooling: the token mixer of PoolFormer.

    y_n = mean_{m in window(n)} x_m - x_n

The window holds `size` positions on every axis of the grid, centred, and is cut off at the border: the
mean is over the positions that exist. The subtraction is there because the block around the mixer adds
x back. A causal layer, our extension, averages the last `size` positions of one axis, itself included.
Prefix tokens have no neighbours: their mean is themselves, so they give 0.

Time O(N C size^axes), no parameters; the causal state is the last size - 1 tokens.

Source: Yu et al., "MetaFormer Is Actually What You Need for Vision", 2021 (arXiv:2111.11418), official
code sail-sg/poolformer.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec

PLANE = frozenset({Pattern.NONCAUSAL_SELF})

SPEC = Spec(
    name="pool",
    title="MetaFormer Is Actually What You Need for Vision",
    year=2021,
    paper="arXiv:2111.11418",
    equation="y = mean over the window of x − x",
    complexity="O(N C w) time, O(w C) state",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    streams=True,
    examples=(
        Example(grid=(7,), parameters=0),
        Example(grid=(4, 5), prefix=1, parameters=0, patterns=PLANE),
        Example(grid=(3, 4, 2), params={"size": 5}, parameters=0, patterns=PLANE),
    ),
)


class PoolState(NamedTuple):
    """The last size - 1 tokens (B, size - 1, C) and which of them are real (B, size - 1)."""

    x: Tensor
    keep: Tensor


@register(SPEC)
class Pool(Mixer):
    """Average pooling minus identity.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        size: positions of the window on each axis, odd.
    """

    def __init__(self, site: Site, backend: str = "auto", *, size: int = 3) -> None:
        super().__init__(site, backend)
        if size < 1 or size % 2 == 0:
            raise BadInput(f"the window is centred, so its size is odd; got {size}")
        self.size = size

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Sums of x and counts of real positions over zero-padded windows; their ratio is the mean."""
        grid = call.grid
        prefix, x = grid.split(x_BNC)
        keep = x.new_ones(x.shape[:2], dtype=torch.bool)
        if call.mask.keys is not None:
            keep = call.mask.keys[:, grid.prefix :]
        keep = keep.unsqueeze(-1)
        x = x.where(keep, 0)
        if self.site.causal and grid.rank != 1:
            raise BadInput(f"causal pooling runs along one axis, got a {grid}")
        back, ahead = (self.size - 1, 0) if self.site.causal else (self.size // 2, self.size // 2)
        sums, counts = (self._window_sums(grid.unflatten(t), back, ahead) for t in (x, keep.to(x)))
        mixed = (sums / counts.clamp(min=1) - x).where(keep, 0)
        return torch.cat([torch.zeros_like(prefix), mixed], 1)

    def _window_sums(self, x: Tensor, back: int, ahead: int) -> Tensor:
        """Sums over the windows of (B, S1, ..., C), axis after axis, flattened to (B, positions, C)."""
        for axis in range(1, x.ndim - 1):
            border = [0] * (2 * x.ndim)
            border[2 * (x.ndim - 1 - axis)], border[2 * (x.ndim - 1 - axis) + 1] = back, ahead
            x = F.pad(x, border).unfold(axis, self.size, 1).sum(-1)
        return x.flatten(1, -2)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Position by position."""
        grid, reach = call.grid, self.size // 2
        real = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool) if call.mask.keys is None else call.mask.keys
        places = grid.places()
        back, ahead = (self.size - 1, 0) if self.site.causal else (reach, reach)
        rows = [x_BNC[:, n] * 0 for n in range(grid.prefix)]
        for n, place in enumerate(places):
            near = ((places >= place - back) & (places <= place + ahead)).all(1).nonzero()[:, 0] + grid.prefix
            inside = real[:, near].unsqueeze(-1).to(x_BNC)
            mean = (x_BNC[:, near] * inside).sum(1) / inside.sum(1).clamp(min=1)
            own = real[:, grid.prefix + n].unsqueeze(-1)
            rows.append(torch.where(own, mean - x_BNC[:, grid.prefix + n], 0))
        return torch.stack(rows, 1)

    def count(self, sizes: Sizes) -> Cost:
        """One addition for each position of the window; no matrix product."""
        seen = 1
        for length in sizes.grid.shape:
            if self.site.causal:
                seen *= sum(min(n + 1, self.size) for n in range(length))
            else:
                reach = self.size // 2
                seen *= sum(min(n + reach, length - 1) - max(n - reach, 0) + 1 for n in range(length))
        return Cost(sizes.batch * seen * self.site.dim, 0)

    def start(self, batch: int, like: Tensor) -> PoolState:
        """Nothing real yet."""
        x = like.new_zeros(batch, self.size - 1, self.site.dim)
        return PoolState(x, x.new_zeros(x.shape[:2], dtype=torch.bool))

    def advance(self, x_BNC: Tensor, state: PoolState, keep: Tensor | None) -> tuple[Tensor, PoolState]:
        """Pool the segment behind the tokens that its first windows reach back to."""
        real = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool) if keep is None else keep
        x, real = torch.cat([state.x, x_BNC], 1), torch.cat([state.keep, real], 1)
        y = self(x, mask=real)[:, self.size - 1 :]
        first = x.shape[1] - (self.size - 1)
        return y, PoolState(x[:, first:], real[:, first:])
