"""Blocks in a row, with gradient checkpointing.

B batch, N tokens, C channels, H and W the height and width of a map.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attlas.core.errors import BadInput
from attlas.ops.batch_norm import TokenBatchNorm
from attlas.ops.maps import to_map, to_tokens

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, TokenBatchNorm)


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
            x = _checkpointed(block, x, *rest) if again else block(x, *rest)
        return x

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Through all blocks."""
        return self.run(x_BCHW)


def _checkpointed(block: nn.Module, *inputs: Any) -> Any:
    if torch.compiler.is_compiling():  # a graph writes statistics once, however often it computes them
        return checkpoint(block, *inputs, use_reentrant=False)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=partial(_once_and_again, block))


def _once_and_again(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _same_statistics(block)


@contextmanager
def _same_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norms move copies of their running statistics: they have seen these pictures already."""
    norms = [each for each in block.modules() if isinstance(each, BATCH_NORMS)]
    kept = [(norm, name, value) for norm in norms for name, value in norm.named_buffers(recurse=False)]
    for norm, name, value in kept:
        setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, name, value in kept:
            setattr(norm, name, value)


class TokenStage(Stage):
    """Blocks on tokens, called as `block(x_BNC, grid)`, over a map that comes in and goes out."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Lay the map out as tokens, mix, lay it back."""
        x_BNC, grid = to_tokens(x_BCHW)
        return to_map(self.run(x_BNC, grid), grid)


def set_checkpointing(net: nn.Module, enable: bool = True) -> None:
    """Have all stages inside a network compute activations again in the backward pass, or keep them.

    Raises:
        BadInput: a network without stages, which keeps all.
    """
    stages = [module for module in net.modules() if isinstance(module, Stage)]
    if enable and not stages:
        raise BadInput(f"{type(net).__name__} is not made of stages that can compute activations again")
    for stage in stages:
        stage.checkpointing = enable
