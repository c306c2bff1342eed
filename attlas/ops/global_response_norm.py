"""Global response normalisation: channels compete by their norms over the whole picture.

    y = (γ n + 1) ⊙ x + β,    n = g / (mean_c g + ε),    g_c = ‖x_c‖ over all tokens

B batch, N tokens, C channels.

Source: Woo et al., "ConvNeXt V2", 2023 (arXiv:2301.00808).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attlas.ops.precision import wide


class GlobalResponseNorm(nn.Module):
    """The norm, x itself at first.

    Args:
        dim: C.
        eps: ε.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Normalise."""
        g_B1C = torch.linalg.vector_norm(wide(x_BNC), dim=1, keepdim=True)
        n_B1C = (g_B1C / (g_B1C.mean(-1, keepdim=True) + self.eps)).to(x_BNC.dtype)
        return (self.weight * n_B1C + 1) * x_BNC + self.bias
