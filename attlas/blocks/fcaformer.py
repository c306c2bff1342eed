"""Blocks that hand tokens on: forward cross-attention, token merge and enhancement, MLP.

    x ← x + γ₁ ⊙ FCA(LN(x), [s of earlier blocks])
    s = DWConv_{7x7, stride 4}(x)                   the merged tokens that later blocks see
    x ← BN(DWConv_{3x3}(x))                        without a residual
    x ← x + γ₂ ⊙ MLP(LN(LN(x)))

Every block of a stage but the last hands on ⌈H / 4⌉ ⌈W / 4⌉ tokens, made of what it has after its attention; a block
sees those of the latest 12 before it, through its keys and values only (see the mechanism `fcaformer`). Padding is 0
to both convolutions, and has no share in the statistics of BN; a merged token with nothing but padding within reach is
padding itself.

B batch, N tokens of the grid, M tokens handed on, C channels, H and W axes of the grid.

Source: Zhang et al., "FcaFormer: Forward Cross Attention in Hybrid Vision Transformer", 2022 (arXiv:2211.07198),
official code hkzhang-git/FcaFormer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attlas.blocks.drop_path import DropPath
from attlas.blocks.factory import mixer
from attlas.blocks.layer_scale import LayerScale
from attlas.blocks.stage import Stage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.state import check_keep
from attlas.ops.batch_norm import TokenBatchNorm
from attlas.ops.grid_conv import grid_convolution

MERGED, TAPS, LOCAL = 4, 7, 3
"""Positions of an axis that one handed token stands for, taps that make it, taps of the local convolution."""


def _picture(grid: Grid | Sequence[int]) -> Grid:
    """The grid, whose tokens are merged and convolved."""
    grid = grid if isinstance(grid, Grid) else Grid(tuple(grid))
    if grid.rank != 2 or grid.prefix:
        raise BadInput(f"tokens are merged on a picture: grid is (height, width) without prefix tokens, got a {grid}")
    return grid


def merged_tokens(grid: Grid | Sequence[int]) -> int:
    """How many tokens a block hands on.

    >>> merged_tokens((14, 14))
    16
    """
    height, width = _picture(grid).shape
    return -(-height // MERGED) * -(-width // MERGED)


class FcaBlock(nn.Module):
    """One block.

    Args:
        dim: C.
        heads: of the attention.
        grid: (height, width) that it is trained on.
        handed: tokens of earlier blocks that it sees.
        hands_on: whether it makes tokens for later blocks.
        ratio: how many times wider the MLP is.
        start: of γ₁ and γ₂.
        drop_path: the share of pictures for which a branch is dropped in training.
        backend: of the attention.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: Grid | Sequence[int],
        *,
        handed: int = 0,
        hands_on: bool = True,
        ratio: float = 4.0,
        start: float = 1e-6,
        drop_path: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        hidden = int(ratio * dim)
        if hidden < 1:
            raise BadInput(f"ratio says how many times wider the MLP is, at least {1 / dim:.3g} here, got {ratio}")
        self.grid = _picture(grid)
        self.norm = nn.LayerNorm(dim)
        self.mix = mixer("fcaformer", dim, heads, grid=self.grid, handed=handed, backend=backend)
        self.scale, self.mlp_scale = LayerScale(dim, start), LayerScale(dim, start)
        self.drop_path = DropPath(drop_path)
        self.merge = nn.Conv2d(dim, dim, TAPS, MERGED, TAPS // 2, groups=dim, bias=False) if hands_on else None
        self.local = nn.Conv2d(dim, dim, LOCAL, padding=LOCAL // 2, groups=dim, bias=False)
        self.local_norm = TokenBatchNorm(dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )

    def forward(
        self,
        x_BNC: Tensor,
        handed_BMC: Tensor | None = None,
        *,
        keep: Tensor | None = None,
        handed_keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens after the block, and those that it hands on, if it does.

        Args:
            x_BNC: tokens on the block's grid.
            handed_BMC: what earlier blocks handed on, in one sequence.
            keep, handed_keep: which of both are real, (B, N) and (B, M); see `merged_keep`.

        Raises:
            BadInput: shapes that do not fit, or handed_keep without handed tokens.
        """
        if handed_keep is not None and handed_BMC is None:
            raise BadInput("handed_keep marks handed tokens, and there are none: pass them, too")
        keep = check_keep(keep, *x_BNC.shape[:2])
        if keep is not None:
            x_BNC = x_BNC.where(keep.unsqueeze(-1), 0)
        seen = Mask(keys=keep) if handed_BMC is None else Mask(keys=handed_keep, queries=keep)
        mixed = self.mix(self.norm(x_BNC), handed_BMC, mask=seen, grid=self.grid)
        x = x_BNC + self.drop_path(self.scale(mixed))
        if keep is not None:
            x = x.where(keep.unsqueeze(-1), 0)
        handed = None if self.merge is None else self.merge(self.grid.unflatten(x.mT, -1)).flatten(2).mT
        x = self.local_norm(grid_convolution(x, self.local.weight, None, self.grid, keep), keep)
        return x + self.drop_path(self.mlp_scale(self.mlp(x))), handed


def merged_keep(keep_BN: Tensor, grid: Grid | Sequence[int]) -> Tensor:
    """Which of the tokens that a block hands on are real, (B, M): those that have a real one within reach."""
    real = _picture(grid).unflatten(keep_BN.unsqueeze(1).float(), -1)
    return F.max_pool2d(real, TAPS, MERGED, TAPS // 2).flatten(1) > 0


class FcaStage(Stage):
    """Blocks of one resolution; no tokens are handed beyond it.

    Args:
        dim: C.
        heads: of every block.
        grid: (height, width).
        depth: blocks.
        latest: of how many blocks before it one sees the tokens.
        drop_path: of each block; none by default.
        **settings: of `FcaBlock`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: Grid | Sequence[int],
        depth: int,
        *,
        latest: int = 12,
        drop_path: Sequence[float] | None = None,
        **settings: Any,
    ) -> None:
        if min(depth, latest) < 1:
            raise BadInput(f"depth and latest count blocks, at least 1, got {depth} and {latest}")
        super().__init__(
            FcaBlock(
                dim,
                heads,
                grid,
                handed=min(index, latest) * merged_tokens(grid),
                hands_on=index < depth - 1,
                drop_path=0.0 if drop_path is None else drop_path[index],
                **settings,
            )
            for index in range(depth)
        )
        self.grid, self.latest = _picture(grid), latest

    def forward(self, x_BNC: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """The tokens after the last block; `keep` (B, N) marks the real ones."""
        real = None if keep is None else merged_keep(keep, self.grid)
        handed: list[Tensor] = []
        for block in self.blocks:
            latest = handed[-self.latest :]
            context = torch.cat(latest, 1) if latest else None
            context_keep = real.repeat(1, len(latest)) if latest and real is not None else None
            run = partial(block, keep=keep, handed_keep=context_keep)
            if self.checkpointing and torch.is_grad_enabled():
                x_BNC, own = checkpoint(run, x_BNC, context, use_reentrant=False)
            else:
                x_BNC, own = run(x_BNC, context)
            handed.append(own)
        return x_BNC
