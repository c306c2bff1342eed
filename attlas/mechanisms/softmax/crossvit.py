"""CrossViT's fusion: one class token asks the patches of another branch.

    y_0 = W_o concat_h softmax(q_0 kᵀ / √D) v,    y_n = 0 for every other n

with q_0 of the first token of x and k, v of that token and all tokens that it asks. In self-attention, the form of
the official module, x is the class token followed by the patches that it asks. In cross-attention x is a branch
whole (a class token and its own patches), the context are the patches of the other one, without their class
token: x's patches then play no part. Since y is 0 for them, a residual leaves the patches as they are, bit by
bit. `attlas.blocks.cross_branch.CrossBranch` is the whole exchange, between branches of two widths.

x (B, 1 + N, C), context (B, M, C) -> (B, 1 + N, C); q (B, H, 1, D), k and v (B, H, 1 + N or 1 + M, D). With one
query a mask of pairs has one row, so padding says all there is to say. Time O(M C²), linear in the tokens.

Source: Chen et al., "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification", 2021
(arXiv:2103.14899), official code IBM/CrossViT.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput, share
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.softmax import softmax_attention

SPEC = Spec(
    name="crossvit",
    title="CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification",
    year=2021,
    paper="arXiv:2103.14899",
    equation="y₀ = softmax(q₀ [k₀; k]ᵀ / √D) [v₀; v], all other y = 0",
    complexity="O(N) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS}),
    class_token=True,
    examples=(
        Example(grid=(3, 2), prefix=1, parameters=4 * (16 * 16 + 16)),
        Example(grid=(7,), prefix=1, heads=4, params={"bias": False}, parameters=4 * 16 * 16 + 16),
    ),
)


@register(SPEC)
class CrossViT(Mixer):
    """Cross-attention of one class token.

    Args:
        site: where it is installed.
        backend: of the softmax attention.
        bias: of the query, key and value projections.
        weight_dropout: share of the attention weights dropped in training.
        dropout: on the output, in training.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        bias: bool = True,
        weight_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        dim = site.dim
        if dim % site.heads:
            raise BadInput(f"heads must divide dim: {dim} channels do not split into {site.heads} heads")
        self.weight_dropout = share("weight_dropout", weight_dropout)
        self.dropout = share("dropout", dropout)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim)

    def _asked(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> tuple[Tensor, Tensor | None]:
        """The class token and the tokens that it asks, and which of them are real; padding is 0."""
        if call.grid.prefix != 1:
            raise BadInput(
                f"crossvit asks for the class token, the one token in front of the grid: pass grid=Grid(shape, "
                f"prefix=1), got a {call.grid}"
            )
        keep = call.mask.keys
        asked_BMC = x_BNC
        if context_BMC is not None:
            self._check_tokens("context", context_BMC, self.site.dim)
            asked_BMC = torch.cat([x_BNC[:, :1], context_BMC], 1)
            keep = None if keep is None else F.pad(keep, (1, 0), value=True)
        return (asked_BMC if keep is None else asked_BMC.masked_fill(~keep.unsqueeze(-1), 0)), keep

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """One query; the other rows are zeros."""
        asked_BMC, keep = self._asked(x_BNC, context_BMC, call)
        heads = self.site.heads
        q_BH1D = self.q_proj(asked_BMC[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)
        k_BHMD, v_BHMD = (
            proj(asked_BMC).unflatten(-1, (heads, -1)).transpose(1, 2) for proj in (self.k_proj, self.v_proj)
        )
        dropout = self.weight_dropout if self.training else 0.0
        o_BH1D = softmax_attention(q_BH1D, k_BHMD, v_BHMD, Mask(keys=keep), dropout=dropout, backend=self.backend)
        y_B1C = F.dropout(self.out_proj(o_BH1D.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return F.pad(y_B1C, (0, 0, 0, x_BNC.shape[1] - 1))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """All tokens attend to all, densely; of the rows only the class token's is kept."""
        asked_BMC, keep = self._asked(x_BNC, context_BMC, call)
        heads = self.site.heads
        q, k, v = (
            proj(asked_BMC).unflatten(-1, (heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, M, H, D)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
        real = scores.new_ones(()) if keep is None else keep[:, None, None].to(scores)
        weights = (scores - scores.detach().amax(-1, keepdim=True)).exp() * real
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        y_BMC = self.out_proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))
        y_BNC = torch.zeros_like(x_BNC)
        y_BNC[:, 0] = y_BMC[:, 0]
        return y_BNC

    def count(self, sizes: Sizes) -> Cost:
        """The query's and the output's projection once, the keys' and values' for every token asked."""
        batch, dim, heads = sizes.batch, self.site.dim, self.site.heads
        asked = sizes.keys + sizes.cross
        flops = batch * (2 * (2 + 2 * asked) * dim**2 + 4 * asked * dim)
        return Cost(flops, flops, batch * heads * asked)
