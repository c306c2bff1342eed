"""The exchange between the two branches of CrossViT.

    a = Linear_{l→s}(GELU(LN(z_l,0)))                  the class token of l in the width of s
    a ← a + CA(LN([a ; patches of s]))                    asks the patches of s (`crossvit`)
    z_l,0 ← Linear_{s→l}(GELU(LN(a)))                   and comes home

and the same from s to l, both from the tokens before the exchange. Patch tokens pass unchanged.

B batch, N and M patches of the two branches, C and E their channels.

Source: Chen et al., "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification", 2021
(arXiv:2103.14899), official code IBM/CrossViT.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attlas.blocks.drop_path import DropPath
from attlas.blocks.factory import mixer
from attlas.core.errors import BadInput
from attlas.core.grid import Grid


class _Visit(nn.Module):
    """A class token of width `dim` that asks patches of width `other`."""

    def __init__(self, dim: int, other: int, heads: int, drop_path: float, settings: dict[str, Any]) -> None:
        super().__init__()
        self.go = nn.Sequential(nn.LayerNorm(dim, eps=1e-6), nn.GELU(), nn.Linear(dim, other))
        self.norm = nn.LayerNorm(other, eps=1e-6)
        self.ask = mixer("crossvit", other, heads, **settings)
        self.drop_path = DropPath(drop_path)
        self.come_back = nn.Sequential(nn.LayerNorm(other, eps=1e-6), nn.GELU(), nn.Linear(other, dim))

    def forward(self, own_BNC: Tensor, other_BME: Tensor, keep_BM: Tensor | None) -> Tensor:
        guest_B1E = self.go(own_BNC[:, :1])
        joint_BME = torch.cat([guest_B1E, other_BME[:, 1:]], 1)
        grid = Grid((joint_BME.shape[1] - 1,), prefix=1)
        told_B1E = self.ask(self.norm(joint_BME), mask=keep_BM, grid=grid)[:, :1]
        guest_B1E = guest_B1E + self.drop_path(told_B1E)
        return torch.cat([self.come_back(guest_B1E), own_BNC[:, 1:]], 1)


class CrossBranch(nn.Module):
    """Two branches, class token first in both, each asks the other's patches: (B, 1 + N, C), (B, 1 + M, E).

    Args:
        dims: channels of the two branches.
        heads: of the two branches; a visitor uses those of its host.
        drop_path: the share of pictures for which a visitor asks nothing in training.
        **settings: of `crossvit`.
    """

    def __init__(
        self, dims: tuple[int, int], heads: tuple[int, int], *, drop_path: float = 0.0, **settings: Any
    ) -> None:
        super().__init__()
        self.dims = dims
        self.visits = nn.ModuleList(
            _Visit(dims[own], dims[1 - own], heads[1 - own], drop_path, settings) for own in range(2)
        )

    def forward(
        self,
        first_BNC: Tensor,
        second_BME: Tensor,
        *,
        first_keep: Tensor | None = None,
        second_keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Both branches after the exchange; `keep` marks the real tokens of each, (B, 1 + N) and (B, 1 + M)."""
        branches, keeps = (first_BNC, second_BME), (first_keep, second_keep)
        for name, tokens, dim in zip(("first", "second"), branches, self.dims, strict=True):
            if tokens.ndim != 3 or tokens.shape[1] < 2 or tokens.shape[2] != dim:
                raise BadInput(
                    f"the {name} branch is (batch, class token and patches, {dim} channels), got {tuple(tokens.shape)}"
                )
        if first_BNC.shape[0] != second_BME.shape[0]:
            raise BadInput(f"both branches are of one batch, got {first_BNC.shape[0]} and {second_BME.shape[0]}")
        first, second = (
            visit(branches[own], branches[1 - own], keeps[1 - own]) for own, visit in enumerate(self.visits)
        )
        return first, second
