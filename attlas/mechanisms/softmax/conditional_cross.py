"""Conditional cross-attention: the query is a condition, so one network has an embedding space for each.

    y_n = W_o concat_h softmax_m(q · k_m / √D) v_m    for all n,    q = W_q e_c,    k = W_k x,    v = W_v x

e_c is learned for each condition c, such as an attribute of a garment: a row of a table ("embed"), or a fully
connected layer on the one-hot c ("onehot_fc"), which is a row and a bias that all conditions share. All else is
common to the spaces. The published layer gives every one of N tokens the query q; their rows are then the same
row, so one is computed and handed to all. Which condition it is, `condition` says: one for the batch or one for
each sequence, (B,); it is read at every call and is 0 at first.

x (B, N, C) -> (B, N, C), or from the tokens of a context (B, M, C); q (B, H, 1, D), k and v (B, H, M, D). With
one query a mask of pairs has one row, so padding says all there is to say. Time O(M C²), linear in the tokens.

Source: Song et al., "Conditional Cross Attention Network for Multi-Space Embedding without Entanglement in Only a
SINGLE Network", 2023 (arXiv:2307.13254). No official code; a reconstruction.
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

PROJECTIONS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="conditional_cross",
    title="Conditional Cross Attention Network for Multi-Space Embedding without Entanglement in Only a SINGLE Network",
    year=2023,
    paper="arXiv:2307.13254",
    equation="y = softmax((W_q e_c) kᵀ / √D) v",
    complexity="O(N) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS}),
    reconstruction=True,
    examples=(
        Example(grid=(3, 2), prefix=1, params={"conditions": 3}, parameters=PROJECTIONS + 3 * 16),
        Example(grid=(5,), heads=4, params={"embedding": "onehot_fc"}, parameters=PROJECTIONS + (8 + 1) * 16),
    ),
)


@register(SPEC)
class ConditionalCross(Mixer):
    """Cross-attention from a condition to the tokens.

    Args:
        site: where it is installed.
        backend: of the softmax attention.
        conditions: how many there are; FashionAI has eight attributes.
        embedding: "embed" or "onehot_fc".
        bias: of the query, key and value projections.
        weight_dropout: share of the attention weights dropped in training.
        dropout: on the output, in training.
    """

    condition: int | Tensor
    """The condition of the next calls: a number, or a tensor of one for each sequence."""

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        conditions: int = 8,
        embedding: str = "embed",
        bias: bool = True,
        weight_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        dim = site.dim
        if dim % site.heads:
            raise BadInput(f"heads must divide dim: {dim} channels do not split into {site.heads} heads")
        if conditions < 1:
            raise BadInput(f"conditions is at least 1, got {conditions}")
        if embedding not in ("embed", "onehot_fc"):
            raise BadInput(f"embedding is 'embed' or 'onehot_fc', got {embedding!r}")
        self.conditions = conditions
        self.condition = 0
        self.weight_dropout = share("weight_dropout", weight_dropout)
        self.dropout = share("dropout", dropout)
        self.table = nn.Embedding(conditions, dim) if embedding == "embed" else nn.Linear(conditions, dim)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim)

    def embedded(self, batch: int) -> Tensor:
        """e_c of each sequence, (B, 1, C)."""
        condition = self.condition
        if isinstance(condition, int):
            if not 0 <= condition < self.conditions:
                raise BadInput(f"condition is 0 to {self.conditions - 1}, got {condition}")
            condition = torch.full((batch,), condition, device=self.table.weight.device)
        elif condition.shape != (batch,) or condition.dtype not in (torch.int32, torch.int64):
            raise BadInput(
                f"condition is one integer for each of {batch} sequences, got {condition.dtype} "
                f"{tuple(condition.shape)}"
            )
        if isinstance(self.table, nn.Linear):
            return (F.embedding(condition, self.table.weight.T) + self.table.bias).unsqueeze(1)
        return self.table(condition).unsqueeze(1)

    def ask(self, queries_BNC: Tensor, asked_BMC: Tensor, keep_BM: Tensor | None = None) -> Tensor:
        """The attention with any tokens in the condition's place, (B, N, C); x in it gives softmax attention."""
        if keep_BM is not None:
            asked_BMC = asked_BMC.masked_fill(~keep_BM.unsqueeze(-1), 0)
        q, k, v = (
            proj(x).unflatten(-1, (self.site.heads, -1)).transpose(1, 2)
            for proj, x in ((self.q_proj, queries_BNC), (self.k_proj, asked_BMC), (self.v_proj, asked_BMC))
        )
        dropout = self.weight_dropout if self.training else 0.0
        o_BHND = softmax_attention(q, k, v, Mask(keys=keep_BM), dropout=dropout, backend=self.backend)
        return F.dropout(self.out_proj(o_BHND.transpose(1, 2).flatten(2)), self.dropout, self.training)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """One row for all tokens."""
        asked_BMC = self._asked(x_BNC, context_BMC)
        return self.ask(self.embedded(x_BNC.shape[0]), asked_BMC, call.mask.keys).expand(-1, x_BNC.shape[1], -1)

    def _asked(self, x_BNC: Tensor, context_BMC: Tensor | None) -> Tensor:
        if context_BMC is None:
            return x_BNC
        self._check_tokens("context", context_BMC, self.site.dim)
        return context_BMC

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """As published: the condition is repeated for every token, and every token attends."""
        asked_BMC = self._asked(x_BNC, context_BMC)
        (batch, tokens, _), heads = x_BNC.shape, self.site.heads
        condition = torch.as_tensor(self.condition).expand(batch)
        one_hot = F.one_hot(condition, self.conditions).to(x_BNC)
        e_BC = self.table(one_hot) if isinstance(self.table, nn.Linear) else one_hot @ self.table.weight
        q_BNHD = self.q_proj(e_BC.unsqueeze(1).repeat(1, tokens, 1)).unflatten(-1, (heads, -1))
        keep = call.mask.keys
        y_BNC = []
        for b in range(batch):
            real_MC = asked_BMC[b] if keep is None else asked_BMC[b, keep[b]]
            k_MHD, v_MHD = (proj(real_MC).unflatten(-1, (heads, -1)) for proj in (self.k_proj, self.v_proj))
            scores = torch.einsum("nhd,mhd->hnm", q_BNHD[b], k_MHD) / math.sqrt(q_BNHD.shape[-1])
            y_BNC.append(self.out_proj(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v_MHD).flatten(1)))
        return torch.stack(y_BNC)

    def count(self, sizes: Sizes) -> Cost:
        """The condition's and the output's projection once, those of keys and values for every token."""
        batch, dim, keys = sizes.batch, self.site.dim, sizes.keys
        flops = batch * (2 * (2 + 2 * keys) * dim**2 + 4 * keys * dim)
        return Cost(flops, flops, batch * self.site.heads * keys)
