"""Positional attention: weights from where tokens stand and not from what they hold.

    A_h = softmax((p W_q,h + b_q,h) (p W_k,h + b_k,h)ᵀ / √d_p)        the same for every input
    y   = concat_h(A_h (x W_v + b_v)_h) W_o + b_o

p (positions, d_p) are fixed codes, one for each position, by default one-hot; W_q,h and W_k,h keep all d_p
features in each head. Without its biases the layer is linear in x, so that values of any scale pass through it
as those of training do, and a stack of log2 N layers can route along the stages of a parallel algorithm. What
depends on the content of tokens, such as looking up what followed an earlier one, it cannot do.

The published layer around it is MLP(concat(x, y)), with neither residual nor normalisation:
`attlas.models.positional`.

x (B, N, C), context (B, M, C); of x a cross layer reads no more than the length. Weights cost O(N M d_p) per head
whatever the batch, mixing O(B N M C). A causal layer, our extension, keeps the values so far and needs no keys.

Source: Back de Luca et al., "Positional Attention: Expressivity and Learnability of Algorithmic Computation",
2024 (arXiv:2410.01686), official code opallab/positional_attention.
"""

import math

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import EVERY_MASK, Example, Pattern, Spec
from attlas.core.state import KVCache
from attlas.ops.pairs import dense_mask
from attlas.ops.precision import wide
from attlas.ops.softmax import attention_weights

SELF = frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF})
CHANNELS = 2 * (16 * 16 + 16)

SPEC = Spec(
    name="positional",
    title="Positional Attention: Expressivity and Learnability of Algorithmic Computation",
    year=2024,
    paper="arXiv:2410.01686",
    equation="y = softmax(p W_q W_kᵀ pᵀ / √d_p) x W_v W_o",
    complexity="O(N² C) time, O(N C) state",
    patterns=SELF | {Pattern.NONCAUSAL_CROSS},
    masks=EVERY_MASK,
    streams=True,
    examples=(
        Example(parameters=CHANNELS + 2 * 2 * (7 * 7 + 7), patterns=SELF),
        Example(params={"codes": 10}, parameters=CHANNELS + 2 * 2 * (10 * 10 + 10)),
        Example(
            heads=4,
            grid=(2, 3),
            prefix=1,
            parameters=CHANNELS + 2 * 4 * (7 * 7 + 7),
            patterns=frozenset({Pattern.NONCAUSAL_SELF}),
        ),
    ),
)


@register(SPEC)
class Positional(Mixer):
    """Attention between positions.

    Args:
        site: where it is installed; heads divide dim, and its length, else its grid, is the number of positions.
        backend: `auto`, `torch` or `oracle`.
        codes: how many positions have a one-hot code, or the codes themselves (positions, d_p).
    """

    codes: Tensor

    def __init__(self, site: Site, backend: str = "auto", *, codes: int | Tensor | None = None) -> None:
        super().__init__(site, backend)
        if site.dim % site.heads:
            raise BadInput(f"heads must divide dim: {site.dim} channels do not split into {site.heads} heads")
        if codes is None:
            codes = site.length or (site.grid.tokens if site.grid else None)
        if codes is None:
            raise BadInput("positional learns from codes of positions: pass length= (or grid=, or codes=)")
        if isinstance(codes, int):
            codes = torch.eye(max(codes, 0))
        if codes.ndim != 2 or not codes.numel():
            raise BadInput(f"codes are (positions, features), at least one of each, got {tuple(codes.shape)}")
        self.register_buffer("codes", codes.to(torch.get_default_dtype()), persistent=False)
        self.size = codes.shape[1]
        self.qk_proj = nn.Linear(self.size, 2 * self.size * site.heads)  # per head its queries, then its keys
        self.v_proj, self.out_proj = (nn.Linear(site.dim, site.dim) for _ in range(2))
        for projection in (self.qk_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def weights(self, queries: int, keys: int | None = None, mask: Mask | None = None, start: int = 0) -> Tensor:
        """The weights (1, heads, queries, keys); (B, heads, queries, keys) under a mask that tells sequences apart.

        Args:
            queries: how many.
            keys: how many, at the first positions; as many as queries by default.
            mask: which keys may be seen.
            start: position of the first query.
        """
        keys = queries if keys is None else keys
        positions = max(start + queries, keys)
        if positions > len(self.codes):
            raise BadInput(
                f"there are codes for {len(self.codes)} positions, got {positions}: "
                f"build positional with codes={positions}"
            )
        qk_PHD = self.qk_proj(self.codes[:positions]).unflatten(-1, (self.site.heads, 2 * self.size))
        q_HPD, k_HPD = wide(qk_PHD).transpose(0, 1).chunk(2, -1)
        return attention_weights(q_HPD[None, :, start : start + queries], k_HPD[None, :, :keys], mask)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Weights once for all sequences, times their values."""
        v_BHMD = self._values(x_BNC if context_BMC is None else context_BMC, call.mask.keys)
        return self._mix(self.weights(x_BNC.shape[1], v_BHMD.shape[2], call.mask), v_BHMD)

    def _values(self, x_BMC: Tensor, keep: Tensor | None) -> Tensor:
        if keep is not None:  # padding may hold anything, even NaN
            x_BMC = x_BMC.masked_fill(~keep.unsqueeze(-1), 0)
        return self.v_proj(x_BMC).unflatten(-1, (self.site.heads, -1)).transpose(1, 2)

    def _mix(self, weights_BHNM: Tensor, v_BHMD: Tensor) -> Tensor:
        o_BHND = weights_BHNM.to(v_BHMD.dtype) @ v_BHMD
        return self.out_proj(o_BHND.transpose(1, 2).flatten(2))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Head by head and query by query, over the keys that it sees."""
        source = x_BNC if context_BMC is None else context_BMC
        batch, queries, keys = *x_BNC.shape[:2], source.shape[1]
        seen, bias = dense_mask(call.mask, (batch, self.site.heads, queries, keys), x_BNC)
        weight_H2DP = self.qk_proj.weight.view(self.site.heads, 2, self.size, self.size)
        bias_H2D = self.qk_proj.bias.view(self.site.heads, 2, self.size)
        value = source @ self.v_proj.weight.T + self.v_proj.bias
        width = self.site.dim // self.site.heads
        rows = []
        for b in range(batch):
            for n in range(queries):
                heads = []
                for h in range(self.site.heads):
                    q_D = weight_H2DP[h, 0] @ self.codes[n] + bias_H2D[h, 0]
                    m = seen[b, h, n].nonzero().flatten()
                    k_MD = self.codes[m] @ weight_H2DP[h, 1].T + bias_H2D[h, 1]
                    weights_M = (k_MD @ q_D / math.sqrt(self.size) + bias[b, h, n, m]).softmax(0)
                    heads.append(weights_M @ value[b, m, h * width : (h + 1) * width])
                rows.append(torch.cat(heads))
        return self.out_proj(torch.stack(rows).view(batch, queries, -1))

    def count(self, sizes: Sizes) -> Cost:
        """Projections of codes and tokens, the scores once, the values for each sequence."""
        dim, heads, causal = self.site.dim, self.site.heads, self.site.causal and not sizes.cross
        projections = 2 * max(sizes.queries, sizes.keys) * self.size * 2 * self.size * heads
        projections += 2 * sizes.batch * (sizes.queries + sizes.keys) * dim * dim

        def products(pairs: int) -> int:
            return 2 * pairs * heads * self.size + 2 * sizes.batch * pairs * dim

        pairs = Mask(causal=causal).area(sizes.queries, sizes.keys)
        executed = projections + products(sizes.queries * sizes.keys)
        return Cost(projections + products(pairs), executed, sizes.batch * heads * pairs)

    def start(self, batch: int, like: Tensor) -> KVCache:
        """No value yet; keys of no features, for they are known from the positions."""
        return KVCache.empty(batch, self.site.heads, 0, self.site.dim // self.site.heads, like)

    def advance(self, x_BNC: Tensor, state: KVCache, keep: Tensor | None) -> tuple[Tensor, KVCache]:
        """Attend to the values so far and the segment's own."""
        v_BHND = self._values(x_BNC, keep)
        state = state.append(v_BHND[..., :0], v_BHND, keep)
        tokens, queries = state.v.rows.shape[2], x_BNC.shape[1]
        mask = Mask(causal=True, keys=state.keys, queries=keep)
        return self._mix(self.weights(queries, tokens, mask, tokens - queries), state.v.rows), state
