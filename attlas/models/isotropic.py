"""The isotropic skeleton: tokens of one width and one grid from the first block to the last, as in ViT.

B batch, N tokens, P prefix tokens, C channels, H and W height and width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from attlas.blocks.embed import Places, prefix_tokens, with_prefix
from attlas.blocks.stage import Stage
from attlas.core.errors import BadInput, share
from attlas.core.grid import Grid
from attlas.models.backbone import Backbone, classifier
from attlas.ops.maps import to_map, to_tokens


class Isotropic(Backbone):
    """Embed, add places, run blocks, norm, pool, classify; four feature maps at equal steps of the depth.

    Args:
        embed: pictures to a map (B, C, H, W).
        blocks: called as `block(x_BNC, grid)`.
        dim: C.
        grid: that it is trained on, prefix tokens included.
        stride: pixels per place of the map.
        norm: of the tokens after the last block.
        num_classes: of the classifier; 0 for none.
        in_chans: channels of the pictures.
        places: whether a learned vector per place is added.
        pool: "token" reads the first prefix token, "mean" the mean of all that have a place.
        head_norm: of what was pooled.
        drop: dropout after the places.
        joins: how many blocks the places go through before the prefix tokens stand in front of them; where that is
            more than none, prefix tokens have no learned place.
    """

    def __init__(
        self,
        embed: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        dim: int,
        grid: Grid,
        stride: int,
        norm: nn.Module,
        num_classes: int,
        in_chans: int,
        places: bool = True,
        pool: str = "token",
        head_norm: nn.Module | None = None,
        drop: float = 0.0,
        joins: int = 0,
    ) -> None:
        depth = len(blocks)
        ends = sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)})
        super().__init__(in_chans, [dim] * len(ends), [stride] * len(ends))
        if pool not in ("token", "mean") or (pool == "token" and not grid.prefix):
            raise BadInput(f"pool is 'mean', or 'token' where there are prefix tokens, got {pool!r} on a {grid}")
        if not 0 <= joins < depth:
            raise BadInput(f"prefix tokens join before one of the {depth} blocks, 0 to {depth - 1}, got {joins}")
        self.grid, self.pool, self.joins = grid, pool, joins
        self.embed = embed
        self.prefix = prefix_tokens(grid.prefix, dim) if grid.prefix else None
        self.places = Places(dim, Grid(grid.shape) if joins else grid) if places else None
        self.drop = nn.Dropout(share("drop", drop))
        bounds = list(itertools.pairwise(sorted({0, joins, *ends})))
        self.ends, self.depths = ends, [end - start for start, end in bounds]
        self.stages = nn.ModuleList(Stage(blocks[start:end]) for start, end in bounds)
        self.norm = norm
        self.head_norm = head_norm or nn.Identity()
        self.head = classifier(dim, num_classes)

    def forward_features(self, image_BCHW: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """All tokens after the last norm (B, P + H W, C)."""
        x_BNC, grid = to_tokens(self.embed(image_BCHW))
        if not self.joins:
            x_BNC, grid = self._join(x_BNC, grid)
        if self.places is not None:
            x_BNC = self.places(x_BNC, grid)
        x_BNC = self.drop(x_BNC)
        for stage, start in zip(self.stages, itertools.accumulate(self.depths, initial=0), strict=False):
            assert isinstance(stage, Stage)
            if start and start == self.joins:
                x_BNC, grid = self._join(x_BNC, grid)
            x_BNC = stage.run(x_BNC, grid)
            if maps is not None and start + len(stage.blocks) in self.ends:
                maps.append(to_map(grid.split(x_BNC)[1], Grid(grid.shape)))
        return self.norm(x_BNC)

    def headless(self) -> None:
        """Without norms behind the last map."""
        super().headless()
        self.norm, self.head_norm = nn.Identity(), nn.Identity()

    def _join(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """The prefix tokens in front."""
        if self.prefix is None:
            return x_BNC, grid
        return with_prefix(self.prefix, x_BNC), Grid(grid.shape, self.grid.prefix)

    def forward_head(self, x_BNC: Tensor) -> Tensor:
        """Pool and classify."""
        x_BC = x_BNC[:, 0] if self.pool == "token" else x_BNC[:, self.grid.prefix :].mean(1)
        return self.head(self.head_norm(x_BC))
