"""Lightning attention: linear attention that forgets at a fixed rate per head, without a normaliser.

    o_t = sum_{j<=t} lambda^(t - j) (q_t . k_j) v_j,    lambda = exp(-slope_h)
    S_t = lambda S_{t-1} + k_t v_t^T,    o_t = q_t S_t

q, k (B, H, N, D), v (B, H, N, E). The slopes are those of ALiBi, 2^(-8 (h+1) / H), times 1 - l / (L - 1) + 1e-5 in
layer l of L: the last layer hardly forgets. Inside a block of tokens pairs are weighed directly, what came before the
block is in S: time per token does not depend on the length. There is no 1 / sqrt(D). Around it, as in TransNormerLLM,
queries and keys pass a SiLU, the output is divided by its root mean square over all channels and multiplied by a
linear gate, and no projection has a bias. A padded token neither enters the state nor lets it decay.

Time O(N D E), memory O(N D); the state is S, D E numbers per head, kept in float32 at least.

Sources: Qin et al., "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention", 2024
(arXiv:2405.17381), and "Lightning Attention-2", 2024 (arXiv:2401.04658), official code OpenNLPLab/lightning-attention.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.decay import decayed_linear_attention, flops
from attlas.ops.precision import wide
from attlas.ops.recurrent import keys_ahead
from attlas.ops.slopes import alibi_slopes

SPEC = Spec(
    name="lightning",
    title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    year=2024,
    paper="arXiv:2405.17381",
    equation="o_t = q_t S_t,  S_t = λ S_{t−1} + k_t v_tᵀ",
    complexity="O(N D²) time, O(D²) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    streams=True,
    shell={
        "qk_activation": "silu",
        "output_norm": "simple_rms",
        "gate": "linear",
        "bias": False,
        "out_bias": False,
    },
    examples=(
        Example(parameters=5 * 16 * 16),
        Example(dim=24, heads=3, grid=(2, 4), prefix=1, parameters=5 * 24 * 24),
    ),
)


class LightningState(NamedTuple):
    """S (B, H, D, E), with what each token left in it."""

    sums: Tensor


@register(SPEC)
class Lightning(Attend):
    """Linear attention with a constant decay.

    Args:
        site: where it is installed; its heads, layer and layers give the slopes.
        backend: of `decayed_linear_attention`.
    """

    def __init__(self, site: Site, backend: str = "auto") -> None:
        super().__init__(site, backend)
        # No buffer: a model in bfloat16 forgets at the same rate.
        self.slopes = alibi_slopes(site.heads)
        if site.layers > 1:
            self.slopes *= 1 - site.layer / (site.layers - 1) + 1e-5

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Run the op."""
        queries, keys = q_BHND.shape[2], k_BGMD.shape[2]
        q = F.pad(q_BHND, (0, 0, keys_ahead(queries, keys), 0))  # the first keys go into the state alone
        return self._attend(q, k_BGMD, v_BGME, None, call.mask.keys)[0][:, :, keys - queries :]

    oracle = compute  # the op's own oracle backend

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        slopes = self.slopes.to(q.device)
        return decayed_linear_attention(q, k, v, slopes, state, keep, backend=self.backend)

    def count(self, sizes: Sizes) -> Cost:
        """Each token into the state and out of it; the torch backend weighs the pairs of a block besides."""
        size = self.site.head_dim
        copies = sizes.batch * self.site.heads
        needed, made = flops(sizes.queries, size, size)
        pairs = Mask(causal=True).area(sizes.queries, sizes.keys, sizes.batch, self.site.heads)
        return Cost(copies * needed, copies * made, pairs)

    def initial_state(self, batch: int, like: Tensor) -> LightningState:
        """S before the first token, zero."""
        size = self.site.head_dim
        return LightningState(wide(like.new_zeros(batch, self.site.heads, size, size)))

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: LightningState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, LightningState]:
        """The recurrence, from the state before the segment."""
        # Positions may give keys more features than the state was made for: nothing is in their rows yet.
        sums = F.pad(state.sums, (0, 0, 0, k.shape[3] - state.sums.shape[2]))
        o, sums = self._attend(q, k, v, sums, keep)
        return o, LightningState(sums)
