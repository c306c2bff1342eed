"""Channel mixers: what follows a token mixer in a block. Each is called as `mlp(x_BNC, grid)`.

B batch, N tokens, C channels, F hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from attlas.core.errors import share
from attlas.core.grid import Grid
from attlas.ops.grid_conv import depthwise, grid_convolution


class Mlp(nn.Module):
    """x ↦ W₂ σ(W₁ x).

    Args:
        dim: C.
        hidden: F.
        activation: σ.
        out: channels that come out, C by default.
        bias: of both.
        drop: dropout after both.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: Callable[[], nn.Module] = nn.GELU,
        out: int | None = None,
        bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias)
        self.activation = activation()
        self.fc2 = nn.Linear(hidden, dim if out is None else out, bias)
        self.drop = nn.Dropout(share("drop", drop))

    def forward(self, x_BNC: Tensor, grid: Grid | None = None) -> Tensor:
        """Token by token."""
        return self.drop(self.fc2(self.drop(self.activation(self.fc1(x_BNC)))))


class ConvMlp(Mlp):
    """The MLP with a depthwise convolution over the grid between its matrices: x ↦ W₂ σ(conv(W₁ x)), as in PVTv2.

    Args:
        dim: C.
        hidden: F.
        kernel: of the convolution on both axes.
        **settings: of `Mlp`.
    """

    def __init__(self, dim: int, hidden: int, *, kernel: int = 3, **settings: object) -> None:
        super().__init__(dim, hidden, **settings)  # type: ignore[arg-type]
        self.conv = depthwise(hidden, kernel, 2)

    def forward(self, x_BNC: Tensor, grid: Grid | None = None) -> Tensor:
        """Mix channels, and each hidden channel over the neighbouring places."""
        assert grid is not None
        h = grid_convolution(self.fc1(x_BNC), self.conv.weight, self.conv.bias, grid)
        return self.drop(self.fc2(self.drop(self.activation(h))))
