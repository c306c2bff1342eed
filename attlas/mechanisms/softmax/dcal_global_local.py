"""Global-local cross-attention (GLCA): the few tokens that matter most look at everything again.

    o_n = softmax_m(q_n · k_m / √D + bias_nm) v_m  for n among the prefix tokens and the top R patches,  else 0

The top R are a `share` of the patches (rounded, at least one): those that the class token, the first of the
prefix, holds most of. How much it holds of each is `relevance` (B, N): set it to the class token's row of the
rollout of all layers before (`attlas.analysis.rollout`) and the layer reads it at its next calls; while it is None
the class token's row of this layer's own map, averaged over the heads, takes its place. Indices pass no gradient.
Rows that were not chosen are 0: a model drops them and keeps `chosen`.

q (B, H, N, D), k and v (B, G, N, D). Time O(R N D H).

Source: Zhu et al., "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object
Re-Identification", 2022 (arXiv:2205.02151). No official code; the share, a tenth for recognition and three tenths
for re-identification, and its rounding are a reconstruction, and so is the row that is used without a rollout.
"""

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.errors import share as checked_share
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import EVERY_MASK, Example, Pattern, Spec
from attlas.ops.softmax import attention_weights, blank_padding, softmax_attention

PROJECTIONS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="dcal_global_local",
    title="Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
    year=2022,
    paper="arXiv:2205.02151",
    equation="o = softmax(q kᵀ / √D) v for the class token and the top R patches",
    complexity="O(R N D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    masks=EVERY_MASK,
    grouped=True,
    reconstruction=True,
    class_token=True,
    examples=(
        Example(grid=(3, 4), prefix=1, params={"share": 0.3}, parameters=PROJECTIONS),
        Example(grid=(7,), prefix=2, heads=4, kv_heads=2, parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8)),
    ),
)


@register(SPEC)
class GlobalLocal(Attend):
    """Global-local cross-attention.

    Args:
        site: where it is installed.
        backend: of the softmax attention.
        share: R over the number of patches.
        weight_dropout: share of the attention weights dropped in training.
    """

    relevance: Tensor | None
    """How much the class token holds of each token, (B, N), or None for this layer's own map."""

    def __init__(self, site: Site, backend: str = "auto", *, share: float = 0.1, weight_dropout: float = 0.0) -> None:
        super().__init__(site, backend)
        if not 0 < share <= 1:
            raise BadInput(f"share says which part of the patches looks again, above 0 and up to 1, got {share}")
        self.share = share
        self.weight_dropout = checked_share("weight_dropout", weight_dropout)
        self.relevance = None

    def chosen(self, q_BHND: Tensor, k_BGND: Tensor, call: Call) -> Tensor:
        """Indices (B, P + R) of the rows that are computed: the prefix, then patches by falling relevance."""
        grid, mask = call.grid, call.mask
        batch, tokens = q_BHND.shape[0], q_BHND.shape[2]
        self._check_call(q_BHND, k_BGND, grid)
        relevance_BN = self.relevance
        if relevance_BN is None:
            seen = mask.pairs(tokens, tokens, q_BHND.device)
            row = Mask() if seen is None else Mask.pairs_(seen[:, :, :1])
            row = row.with_(bias=None if mask.bias is None else mask.bias[:, :, :1])
            relevance_BN = attention_weights(q_BHND[:, :, :1], k_BGND, row).mean(1).squeeze(1)
            if mask.queries is not None:
                relevance_BN = relevance_BN.where(mask.queries[:, :1], 0)  # padding in its place prefers nothing
        elif relevance_BN.shape != (batch, tokens):
            raise BadInput(
                f"relevance is (batch, tokens) = {(batch, tokens)}, got {tuple(relevance_BN.shape)}: set the "
                "class token's row of the rollout of this batch, or None"
            )
        if mask.queries is not None:
            relevance_BN = relevance_BN.masked_fill(~mask.queries, -torch.inf)
        # Of equals the first is taken, on every machine: so a stable sort, not topk.
        order_BN = relevance_BN[:, grid.prefix :].sort(dim=-1, descending=True, stable=True).indices
        patches_BR = order_BN[:, : self._rows(grid)] + grid.prefix
        return torch.cat([torch.arange(grid.prefix, device=q_BHND.device).expand(batch, -1), patches_BR], 1)

    def _check_call(self, q: Tensor, k: Tensor, grid: Grid) -> None:
        if not grid.prefix:
            raise BadInput("dcal_global_local asks what the class token holds: pass grid=Grid(shape, prefix=1)")
        if q.shape[2] != k.shape[2]:
            raise BadInput(f"queries and keys are the same tokens here, got {q.shape[2]} and {k.shape[2]}")

    def _rows(self, grid: Grid) -> int:
        return max(1, round(self.share * grid.positions))

    def compute(self, q_BHND: Tensor, k_BGND: Tensor, v_BGNE: Tensor, call: Call) -> Tensor:
        """Gather the chosen queries, attend, scatter."""
        heads, tokens = q_BHND.shape[1:3]
        k_BGND, v_BGNE = blank_padding(call.mask.keys, k_BGND, v_BGNE)
        rows_B1R1 = self.chosen(q_BHND, k_BGND, call)[:, None, :, None]

        def gather(x: Tensor) -> Tensor:
            shape = (q_BHND.shape[0], x.shape[1], rows_B1R1.shape[2], x.shape[3])
            return x.expand(shape[0], -1, -1, -1).gather(2, rows_B1R1.expand(shape))

        seen, bias = call.mask.pairs(tokens, tokens, q_BHND.device), call.mask.bias
        mask = Mask() if seen is None else Mask.pairs_(gather(seen))
        mask = mask.with_(bias=None if bias is None else gather(bias))
        dropout = self.weight_dropout if self.training else 0.0
        o_BHRE = softmax_attention(gather(q_BHND), k_BGND, v_BGNE, mask, dropout=dropout, backend=self.backend)
        o_BHNE = o_BHRE.new_zeros(*q_BHND.shape[:3], v_BGNE.shape[3])
        return o_BHNE.scatter(2, rows_B1R1.expand(-1, heads, -1, v_BGNE.shape[3]), o_BHRE)

    def oracle(self, q_BHND: Tensor, k_BGND: Tensor, v_BGNE: Tensor, call: Call) -> Tensor:
        """All rows densely; those that were not chosen are dropped afterwards."""
        grid, mask = call.grid, call.mask
        self._check_call(q_BHND, k_BGND, grid)
        k_BGND, v_BGNE = blank_padding(mask.keys, k_BGND, v_BGNE)
        weights_BHNM = attention_weights(q_BHND, k_BGND, mask)
        relevance_BN = weights_BHNM[:, :, 0].mean(1) if self.relevance is None else self.relevance
        keep_BN = torch.zeros(relevance_BN.shape, dtype=torch.bool, device=q_BHND.device)
        for b, held in enumerate(relevance_BN.tolist()):
            real = [True] * grid.tokens if mask.queries is None else mask.queries[b].tolist()
            row = held if real[0] or self.relevance is not None else [0.0] * grid.tokens
            patches = range(grid.prefix, grid.tokens)
            ranked = sorted(patches, key=lambda n: (real[n], row[n]), reverse=True)[: self._rows(grid)]
            keep_BN[b, [*range(grid.prefix), *ranked]] = True
        v_BHNE = v_BGNE.repeat_interleave(q_BHND.shape[1] // v_BGNE.shape[1], 1)
        return (weights_BHNM @ v_BHNE).masked_fill(~keep_BN[:, None, :, None], 0)

    def count(self, sizes: Sizes) -> Cost:
        """Two products for each chosen row, and the class token's scores where there is no rollout."""
        batch, heads, size = sizes.batch, self.site.heads, self.site.head_dim
        pairs = batch * heads * (sizes.grid.prefix + self._rows(sizes.grid)) * sizes.keys
        probe = 0 if self.relevance is not None else 2 * batch * heads * sizes.keys * size
        return Cost(4 * pairs * size + probe, 4 * pairs * size + probe, pairs)
