"""A way to a smaller map, and then a learned vector for every place of it.

B batch, C channels, H and W height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attlas.blocks.embed import Places
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.ops.maps import to_map, to_tokens


class Placed(nn.Module):
    """embed(x) + places, on maps.

    Args:
        embed: maps to maps, such as a stem.
        dim: C of the maps that it makes.
        grid: of those maps where it is trained; on others the vectors are resampled.
        waves: whether the vectors start as sines and cosines of the places instead of noise.
    """

    def __init__(self, embed: nn.Module, dim: int, grid: Grid, waves: bool = False) -> None:
        super().__init__()
        self.embed = embed
        self.places = Places(dim, grid)
        if waves:
            with torch.no_grad():
                self.places.weight.copy_(place_waves(dim, grid).to(self.places.weight))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A map that knows its places."""
        x_BNC, grid = to_tokens(self.embed(x_BCHW))
        return to_map(self.places(x_BNC, grid), grid)


def place_waves(dim: int, grid: Grid) -> Tensor:
    """Sines, then cosines, of column / 10000^(4i / C), then the same of the row, (H W, C).

    Raises:
        BadInput: channels that do not split in four.
    """
    if dim % 4 or grid.rank != 2:
        raise BadInput(f"waves need channels that split in four and two axes, got {dim} channels on a {grid}")
    frequency = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row_N, column_N = grid.places(frequency.device).double().unbind(1)
    angles = [torch.outer(place_N, frequency) for place_N in (column_N, row_N)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)
