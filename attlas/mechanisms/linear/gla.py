"""Gated linear attention: the state forgets by gates that the token sets, one for each key channel.

    S_t = diag(α_t) S_{t−1} + k_t v_tᵀ,    o_t = q_t S_t / √D,    α_t = σ(W_2 W_1 x_t + b)^(1/16)
    y_t = W_o (silu(W_g x_t) * norm(o_t))

As pairs: the weight of token m for token n is Σ_d q_nd k_md Π_{m<j<=n} α_jd / √D. The gates go through `rank`
channels; the root of order `divisor` holds them near 1, so that memories are long. The norm divides each head of each
token by its root mean square and has one weight per feature, shared by the heads. Queries and keys have `expand_k`
times the channels of the tokens, values and output gate `expand_v` times. There are no positions: gates tell where a
token stands. Padding neither enters the state nor lets it fade.

x (B, N, C), q, k, α (B, H, N, D), v (B, H, N, E). Time O(N D E H) beside the projections, memory O(N C); the state is
S, D E numbers per head, in float32 at least.

Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2023 (arXiv:2312.06635),
official code fla-org/flash-linear-attention.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.gated import flops, gated_linear_attention
from attlas.ops.precision import as_written, wide
from attlas.ops.recurrent import LogGates, alone, head_size, normed_heads, projection_flops, roomy

EPS = 1e-5

SPEC = Spec(
    name="gla",
    title="Gated Linear Attention Transformers with Hardware-Efficient Training",
    year=2023,
    paper="arXiv:2312.06635",
    equation="o_t = q_t S_t / √D,  S_t = diag(α_t) S_{t−1} + k_t v_tᵀ",
    complexity="O(N D²) time, O(D²) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    streams=True,
    examples=(
        Example(dim=32, parameters=2 * 32 * 16 + 3 * 32 * 32 + (32 * 16 + 16 * 16 + 16) + 16),
        Example(
            dim=24,
            heads=3,
            grid=(2, 4),
            prefix=1,
            params={"expand_k": 1.0, "expand_v": 1.5, "rank": 4, "divisor": 2.0},
            parameters=2 * 24 * 24 + 3 * 24 * 36 + (24 * 4 + 4 * 24 + 24) + 12,
        ),
    ),
)


class GLAState(NamedTuple):
    """S (B, H, D, E), with what each token left in it."""

    sums: Tensor


@register(SPEC)
class GLA(Mixer):
    """Gated linear attention.

    Args:
        site: where it is installed.
        backend: of `gated_linear_attention`.
        expand_k: channels of queries, keys and gates, as a multiple of dim.
        expand_v: channels of values and of the output gate, as a multiple of dim.
        rank: channels that the gates pass through.
        divisor: of the logarithm of the gates.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        rank: int = 16,
        divisor: float = 16.0,
    ) -> None:
        super().__init__(site, backend)
        self.key_size = head_size("expand_k", expand_k, site.dim, site.heads)
        self.value_size = head_size("expand_v", expand_v, site.dim, site.heads)
        keys, values = site.heads * self.key_size, site.heads * self.value_size
        self.q_proj, self.k_proj = (nn.Linear(site.dim, keys, bias=False) for _ in range(2))
        self.v_proj, self.gate_proj = (nn.Linear(site.dim, values, bias=False) for _ in range(2))
        self.decay_proj = LogGates(site.dim, rank, keys, divisor)
        self.norm = nn.RMSNorm(self.value_size, eps=EPS)
        self.out_proj = nn.Linear(values, site.dim, bias=False)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Run the op from an empty state."""
        return self._mix(x_BNC, call.mask.keys, None)[0]

    def _mix(self, x_BNC: Tensor, keep: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if keep is not None:
            x_BNC = x_BNC.masked_fill(~keep.unsqueeze(-1), 0)
        layers = (self.q_proj, self.k_proj, self.v_proj, self.decay_proj)
        q, k, v, g = (roomy(layer(x_BNC)).unflatten(-1, (self.site.heads, -1)).transpose(1, 2) for layer in layers)
        with as_written(x_BNC):
            o, sums = gated_linear_attention(q * self.key_size**-0.5, k, v, g, state, keep, backend=self.backend)
        return self._finish(o.transpose(1, 2), x_BNC), sums

    def _finish(self, o_BNHE: Tensor, x_BNC: Tensor) -> Tensor:
        return self.out_proj(F.silu(self.gate_proj(x_BNC)) * normed_heads(o_BNHE, x_BNC, EPS, self.norm.weight))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Every pair's weight, from the product of the gates between the two tokens."""
        return alone(self._pairs, x_BNC, call.mask.keys)

    def _pairs(self, x_BNC: Tensor) -> Tensor:
        split, tokens = (self.site.heads, -1), x_BNC.shape[1]
        q, k, v = (wide(layer(x_BNC)).unflatten(-1, split) for layer in (self.q_proj, self.k_proj, self.v_proj))
        alpha_BNHD = self.decay_proj.logits(x_BNC).sigmoid().unflatten(-1, split) ** (1 / self.decay_proj.divisor)
        rows = []
        for n in range(tokens):
            row = torch.zeros_like(v[:, n])
            for m in range(n + 1):
                between_BHD = alpha_BNHD[:, m + 1 : n + 1].prod(1)
                row = row + (q[:, n] * k[:, m] * between_BHD).sum(-1, keepdim=True) / self.key_size**0.5 * v[:, m]
            rows.append(row)
        return self._finish(torch.stack(rows, 1), x_BNC)

    def count(self, sizes: Sizes) -> Cost:
        """The projections, and each token into the state and out of it."""
        projections = projection_flops(self, sizes.batch * sizes.queries)
        needed, made = flops(sizes.queries, self.key_size, self.value_size)
        copies = sizes.batch * self.site.heads
        pairs = Mask(causal=True).area(sizes.queries, sizes.keys, sizes.batch, self.site.heads)
        return Cost(projections + copies * needed, projections + copies * made, pairs)

    def start(self, batch: int, like: Tensor) -> GLAState:
        """S before the first token, zero."""
        return GLAState(wide(like.new_zeros(batch, self.site.heads, self.key_size, self.value_size)))

    def advance(self, x_BNC: Tensor, state: GLAState, keep: Tensor | None) -> tuple[Tensor, GLAState]:
        """The recurrence, from the state before the segment."""
        y, sums = self._mix(x_BNC, keep, state.sums)
        return y, GLAState(sums)
