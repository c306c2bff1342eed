"""The ghost module: half of the channels are projected, the other half made of them by a cheap convolution.

    y = [a, b],    a = σ(BN(W x)),    b = σ(BN(DWConv₃ a))

and the gate of GhostNetV2 that lets its places see along rows and columns ("decoupled fully connected attention"):

    y ⊙ up(sigmoid(BN(DWConv₅ₓ₁ BN(DWConv₁ₓ₅ BN(W′ pool x)))))

pool is the mean of 2 x 2 places, up repeats each to the size of y. The paper has matrices over whole rows and columns;
the official code shares their weights over the places, which are these convolutions, so that any size will do.

B batch, C channels, H and W height and width.

Sources: Han et al., "GhostNet: More Features from Cheap Operations", 2019 (arXiv:1911.11907); Tang et al.,
"GhostNetV2: Enhance Cheap Operation with Long-Range Attention", 2022 (arXiv:2211.12905), official code
huawei-noah/Efficient-AI-Backbones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.conv_norm import ConvNorm

TAPS = 5
"""Of the gate's convolutions, at half the resolution."""


class GhostModule(nn.Module):
    """The module.

    Args:
        dim, out: channels in and out.
        active: whether σ is ReLU; else it is nothing.
        gated: whether the gate of GhostNetV2 multiplies the result.
    """

    def __init__(self, dim: int, out: int, *, active: bool = True, gated: bool = False) -> None:
        super().__init__()
        half = -(-out // 2)
        self.out = out
        self.primary = ConvNorm(dim, half)
        self.cheap = ConvNorm(half, half, 3, groups=half)
        self.activation = nn.ReLU() if active else nn.Identity()
        self.gate = DecoupledGate(dim, out) if gated else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A map of the same size."""
        first = self.activation(self.primary(x_BCHW))
        second = self.activation(self.cheap(first))
        y = torch.cat([first, second], 1)[:, : self.out]
        return y if self.gate is None else y * self.gate(x_BCHW)


class DecoupledGate(nn.Module):
    """Factors between 0 and 1 for every place and each of `out` channels.

    Args:
        dim, out: channels in and out.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.project = ConvNorm(dim, out)
        self.along_rows = ConvNorm(out, out, (1, TAPS), groups=out)
        self.along_columns = ConvNorm(out, out, (TAPS, 1), groups=out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The factors, of the size of x; a side of one place is not halved."""
        size = x_BCHW.shape[2:]
        pooled = F.avg_pool2d(x_BCHW, [min(2, side) for side in size])
        gate = self.along_columns(self.along_rows(self.project(pooled))).sigmoid()
        return F.interpolate(gate, size, mode="nearest")
