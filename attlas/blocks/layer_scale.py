"""LayerScale: a small learned factor for every channel of a residual branch.

Source: Touvron et al., "Going deeper with Image Transformers", 2021 (arXiv:2103.17239).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput


class LayerScale(nn.Module):
    """x times a weight per channel.

    Args:
        dim: channels.
        start: of every weight; 1e-4 in the recipe of sigmoid attention.
    """

    def __init__(self, dim: int, start: float = 1e-4) -> None:
        super().__init__()
        if dim < 1:
            raise BadInput(f"LayerScale needs at least one channel, got dim={dim}")
        self.weight = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Scale."""
        return x * self.weight
