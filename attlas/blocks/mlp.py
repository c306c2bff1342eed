"""Channel mixers: what follows a token mixer in a block. Each is called as `mlp(x_BNC, grid)`.

B batch, N tokens, C channels, F hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.grid import Grid
from attlas.ops.grid_conv import depthwise, grid_convolution
from attlas.ops.mlp import Mlp


class ConvMlp(Mlp):
    """The MLP with a depthwise convolution over the grid between its matrices: x ↦ W₂ σ(conv(W₁ x)), as in PVTv2.

    Args:
        dim: C.
        hidden: F.
        kernel: of the convolution on both axes.
        residual: whether what is convolved is added to the convolution.
        late: whether σ stands before the convolution.
        **settings: of `Mlp`.
    """

    def __init__(
        self, dim: int, hidden: int, *, kernel: int = 3, residual: bool = False, late: bool = False, **settings: object
    ) -> None:
        super().__init__(dim, hidden, **settings)  # type: ignore[arg-type]
        self.residual, self.late = residual, late
        self.conv = depthwise(hidden, kernel, 2)

    def forward(self, x_BNC: Tensor, grid: Grid | None = None) -> Tensor:
        """Mix channels, and each hidden channel over the neighbouring places."""
        assert grid is not None
        h = self.fc1(x_BNC)
        h = self._convolve(self.activation(h), grid) if self.late else self.activation(self._convolve(h, grid))
        return self.drop(self.fc2(self.drop(h)))

    def _convolve(self, h_BNF: Tensor, grid: Grid) -> Tensor:
        y_BNF = grid_convolution(h_BNF, self.conv.weight, self.conv.bias, grid)
        return h_BNF + y_BNF if self.residual else y_BNF


class SwiGLU(nn.Module):
    """x ↦ W₂ (silu(W₁ x) ⊙ W₃ x), as in LLaMA.

    Args:
        dim: C.
        hidden: F.
        bias: of all three.
    """

    def __init__(self, dim: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(dim, hidden, bias), nn.Linear(dim, hidden, bias)
        self.out = nn.Linear(hidden, dim, bias)

    def forward(self, x_BNC: Tensor, grid: Grid | None = None) -> Tensor:
        """Token by token."""
        return self.out(F.silu(self.gate(x_BNC)) * self.value(x_BNC))


class ConvGLU(nn.Module):
    """A gated MLP whose gate looks around: x ↦ W₂ (σ(conv(W₁ x)) ⊙ W₃ x), with a depthwise 3 x 3 convolution.

    Args:
        dim: C.
        hidden: F.
        activation: σ.

    Source: Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", 2023 (arXiv:2311.17132).
    """

    def __init__(self, dim: int, hidden: int, *, activation: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.conv = depthwise(hidden, 3, 2)
        self.activation = activation()
        self.out = nn.Linear(hidden, dim)

    def forward(self, x_BNC: Tensor, grid: Grid | None = None) -> Tensor:
        """Mix channels, each gate over the neighbouring places."""
        assert grid is not None
        gate_BNF = grid_convolution(self.gate(x_BNC), self.conv.weight, self.conv.bias, grid)
        return self.out(self.activation(gate_BNF) * self.value(x_BNC))


def llama_width(dim: int, ratio: float = 4.0, multiple: int = 256) -> int:
    """Hidden channels of a gated MLP with about the weights of a plain one that is `ratio` times wider.

    >>> llama_width(384)
    1024
    """
    return -(-int(2 * int(ratio * dim) / 3) // multiple) * multiple
