"""The two-layer perceptron.

B batch, N tokens, C channels, F hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from attlas.core.errors import share
from attlas.core.grid import Grid


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
