"""Blocks in a row, with gradient checkpointing.

B batch, N tokens, C channels, H and W the height and width of a map.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attlas.ops.maps import to_map, to_tokens


class Stage(nn.Module):
    """Blocks on maps (B, C, H, W), one after another.

    Attributes:
        checkpointing: whether activations inside the blocks are computed again in the backward pass, to save memory.
    """

    checkpointing = False

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def run(self, x: Tensor, *rest: Any) -> Tensor:
        """Call every block as `block(x, *rest)`."""
        again = self.checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, *rest, use_reentrant=False) if again else block(x, *rest)
        return x

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Through all blocks."""
        return self.run(x_BCHW)


class TokenStage(Stage):
    """Blocks on tokens, called as `block(x_BNC, grid)`, over a map that comes in and goes out."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Lay the map out as tokens, mix, lay it back."""
        x_BNC, grid = to_tokens(x_BCHW)
        return to_map(self.run(x_BNC, grid), grid)


def set_checkpointing(net: nn.Module, enable: bool = True) -> None:
    """Have all stages inside a network compute activations again in the backward pass, or keep them."""
    for module in net.modules():
        if isinstance(module, Stage):
            module.checkpointing = enable
