"""Channel attention: every channel multiplied by a factor that the means of all channels choose (squeeze-excite).

    CA(x) = x ⊙ sigmoid(W₂ σ(W₁ mean x))

B batch, N tokens, C channels.

Source: Hu et al., "Squeeze-and-Excitation Networks", 2017 (arXiv:1709.01507).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.ops.maps import to_map, to_tokens

Activation = Callable[[], nn.Module]


class ChannelAttention(nn.Module):
    """The factor.

    Args:
        dim: C.
        hidden: rows of W₁.
        activation: σ.
        gate: in place of the sigmoid.
    """

    def __init__(self, dim: int, hidden: int, activation: Activation = nn.ReLU, gate: Activation = nn.Sigmoid) -> None:
        super().__init__()
        if hidden < 1:
            raise BadInput(f"channel attention has one hidden channel at least, got {hidden} of {dim}: squeeze it less")
        self.squeeze, self.excite = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.activation, self.gate = activation(), gate()

    def forward(self, x_BNC: Tensor, grid: Grid | None = None) -> Tensor:
        """All tokens of a picture times the same factors."""
        return x_BNC * self._factors(x_BNC.mean(1)).unsqueeze(1)

    def _factors(self, mean_BC: Tensor) -> Tensor:
        return self.gate(self.excite(self.activation(self.squeeze(mean_BC))))


class MapChannelAttention(ChannelAttention):
    """The same on maps (B, C, H, W)."""

    def forward(self, x_BCHW: Tensor, grid: Grid | None = None) -> Tensor:
        """All places of a picture times the same factors."""
        return x_BCHW * self._factors(x_BCHW.mean((2, 3)))[..., None, None]


class ChannelConvs(nn.Module):
    """CA(conv(σ(conv(x)))) with two 3 x 3 convolutions: the residual channel attention of RCAN, without the residual.

    Args:
        dim: C.
        hidden: channels between the convolutions.
        squeezed: channels inside the channel attention.
        activation: σ.

    Source: Zhang et al., "Image Super-Resolution Using Very Deep Residual Channel Attention Networks", 2018
    (arXiv:1807.02758).
    """

    def __init__(self, dim: int, hidden: int, squeezed: int, activation: Activation = nn.GELU) -> None:
        super().__init__()
        if hidden < 1:
            raise BadInput(f"there is one channel at least between the convolutions, got {hidden} of {dim}")
        self.conv1, self.conv2 = nn.Conv2d(dim, hidden, 3, padding=1), nn.Conv2d(hidden, dim, 3, padding=1)
        self.activation = activation()
        self.attention = ChannelAttention(dim, squeezed)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Over the grid, then channel by channel."""
        x_BCHW = self.conv2(self.activation(self.conv1(to_map(x_BNC, grid))))
        return self.attention(to_tokens(x_BCHW)[0])
