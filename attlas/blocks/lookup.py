"""LookupViT's block: a few compressed tokens think, many lookup tokens are only looked up and told.

    A = softmax((W_q norm p) (W_k norm l)ᵀ / √D)          p asks l
    p ← p + W_o A W_v norm l
    p ← heavy(p)                                            a MetaFormer block on the compressed tokens alone
    l ← l + W_o' Aᵀ W_v' norm p                              the same map, turned: whoever was asked is told
    l ← l + MLP(norm l)                                     with fewer hidden channels than C

A is not normalised again when it is turned: its rows sum to one, its columns do not, so what no compressed token asks
for is told nothing. Lookup tokens never meet but through p.

B batch, N lookup tokens l, M compressed tokens p, C channels, h heads, D = C / h. Time O(M C² + M² C + M N C + N C²)
with a small share of C² for the lookup tokens.

Source: Koner et al., "LookupViT: Compressing visual information to a limited number of tokens", 2024
(arXiv:2407.12753), which has no official code: a reconstruction.
"""

from __future__ import annotations

from torch import Tensor, nn

from attlas.blocks.drop_path import DropPath
from attlas.blocks.metaformer import MetaFormerBlock, Norm
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.ops.softmax import attention_weights


class TwoWayAttention(nn.Module):
    """Cross-attention there, and back by the same map.

    Args:
        dim: C.
        heads: h.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise BadInput(f"heads must divide dim: {dim} channels do not split into {heads} heads")
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.back_v_proj, self.back_out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def gather(self, asking_BMC: Tensor, asked_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """What those who ask hear (B, M, C), and the map (B, h, M, N)."""
        weights_BhMN = attention_weights(
            self._heads(self.q_proj(asking_BMC)), self._heads(self.k_proj(asked_BNC)), Mask()
        )
        v_BhND = self._heads(self.v_proj(asked_BNC))
        heard_BhMD = weights_BhMN.to(v_BhND.dtype) @ v_BhND
        return self.out_proj(heard_BhMD.transpose(1, 2).flatten(2)), weights_BhMN

    def scatter(self, asking_BMC: Tensor, weights_BhMN: Tensor) -> Tensor:
        """What those who were asked are told, (B, N, C)."""
        v_BhMD = self._heads(self.back_v_proj(asking_BMC))
        told_BhND = weights_BhMN.to(v_BhMD.dtype).mT @ v_BhMD
        return self.back_out_proj(told_BhND.transpose(1, 2).flatten(2))

    def _heads(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class LookupBlock(nn.Module):
    """The block, on pairs of lookup and compressed tokens.

    Args:
        attention: both ways.
        heavy: of the compressed tokens.
        mlp: of the lookup tokens.
        norm: makes a norm over C channels of tokens.
        drop_path: the share of pictures for which a branch is dropped in training.
    """

    def __init__(
        self,
        attention: TwoWayAttention,
        heavy: MetaFormerBlock,
        mlp: nn.Module,
        *,
        norm: Norm = nn.LayerNorm,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        dim = heavy.mixer.site.dim
        self.attention, self.heavy, self.mlp = attention, heavy, mlp
        self.asking_norm, self.asked_norm, self.telling_norm, self.mlp_norm = (norm(dim) for _ in range(4))
        self.drop_path = DropPath(drop_path)

    def forward(self, pair: tuple[Tensor, Tensor], grids: tuple[Grid, Grid]) -> tuple[Tensor, Tensor]:
        """Ask, think, tell."""
        lookup_BNC, compressed_BMC = pair
        heard_BMC, weights_BhMN = self.attention.gather(self.asking_norm(compressed_BMC), self.asked_norm(lookup_BNC))
        compressed_BMC = self.heavy(compressed_BMC + self.drop_path(heard_BMC), grids[1])
        told_BNC = self.attention.scatter(self.telling_norm(compressed_BMC), weights_BhMN)
        lookup_BNC = lookup_BNC + self.drop_path(told_BNC)
        return lookup_BNC + self.drop_path(self.mlp(self.mlp_norm(lookup_BNC))), compressed_BMC
