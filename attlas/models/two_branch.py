"""The two-branch skeleton: two sets of tokens on two grids, and blocks that see both.

B batch, N and M tokens of the two branches, C and E their channels, H and W height and width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attlas.blocks.stage import Stage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.models.backbone import Backbone, classifier
from attlas.ops.maps import to_map

Pair = tuple[Tensor, Tensor]
"""The tokens of both branches, (B, N, C) and (B, M, E)."""
Grids = tuple[Grid, Grid]
"""How the tokens of each branch lie."""


class PairStage(Stage):
    """Blocks on pairs, called as `block(pair, grids)`."""

    def forward(self, pair: Pair, grids: Grids) -> Pair:  # type: ignore[override]  # a pair is not one map
        """Through all blocks."""
        return self.run(pair, grids)  # type: ignore[arg-type, return-value]


class TwoBranch(Backbone):
    """Embed in two ways, run stages on both, norms, pool, classify; the last map of each branch, the finer one first.

    Args:
        embed: pictures to a pair and how its tokens lie, (pair, grids).
        stages: called as `stage(pair, grids)`, such as `PairStage`.
        norms: of the tokens of each branch after the last stage.
        head: from the pair to logits, such as `BranchHead`.
        in_chans: channels of the pictures.
        channels, strides: of the branches' maps; strides that are no whole numbers are rounded.
        num_features: channels that the head reads.
    """

    def __init__(
        self,
        embed: nn.Module,
        stages: Sequence[nn.Module],
        norms: Sequence[nn.Module],
        head: nn.Module,
        *,
        in_chans: int,
        channels: tuple[int, int],
        strides: tuple[int, int],
        num_features: int,
    ) -> None:
        super().__init__(in_chans, channels, strides)
        self.num_features = num_features
        self.embed = embed
        self.stages, self.norms = nn.ModuleList(stages), nn.ModuleList(norms)
        self.head = head

    def headless(self) -> None:
        """Without norms behind the last maps."""
        super().headless()
        self.norms = nn.ModuleList(nn.Identity() for _ in self.norms)

    def forward_features(self, image_BCHW: Tensor, maps: list[Tensor] | None = None) -> Pair:  # type: ignore[override]
        """Both branches after their norms."""
        pair, grids = self.embed(image_BCHW)
        for stage in self.stages:
            pair = stage(pair, grids)
        if maps is not None:
            maps += [to_map(grid.split(x)[1], Grid(grid.shape)) for x, grid in zip(pair, grids, strict=True)]
        first, second = (norm(x) for norm, x in zip(self.norms, pair, strict=True))
        return first, second


class BranchHead(nn.Module):
    """Each branch that is read votes with its own linear map; the logits are the mean of the votes.

    Args:
        dims: C and E.
        num_classes: K; 0 gives what was pooled, side by side.
        reads: which branches.
        pool: "token" reads the first token of a branch, "mean" the mean of all.
    """

    def __init__(
        self, dims: tuple[int, int], num_classes: int, *, reads: Sequence[int] = (0, 1), pool: str = "token"
    ) -> None:
        super().__init__()
        if pool not in ("token", "mean"):
            raise BadInput(f"pool is 'token' or 'mean', got {pool!r}")
        self.reads, self.pool, self.num_classes = tuple(reads), pool, num_classes
        self.num_features = sum(dims[branch] for branch in self.reads)
        self.classifiers = nn.ModuleList(classifier(dims[branch], num_classes) for branch in self.reads)

    def forward(self, pair: Pair) -> Tensor:
        """Logits (B, K)."""
        pooled = [pair[branch][:, 0] if self.pool == "token" else pair[branch].mean(1) for branch in self.reads]
        if not self.num_classes:
            return torch.cat(pooled, -1)
        votes = [vote(x_BC) for vote, x_BC in zip(self.classifiers, pooled, strict=True)]
        return torch.stack(votes).mean(0)
