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

from torch import Tensor

from attlas.core.mechanism import Site
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.decay import decayed_linear_attention, flops
from attlas.ops.recurrent import RecurrentAttend
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


@register(SPEC)
class Lightning(RecurrentAttend):
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

    oracle = RecurrentAttend.compute  # the op has the oracle

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the op."""
        slopes = self.slopes.to(q.device)
        return decayed_linear_attention(q, k, v, slopes, state, keep, backend=self.backend)

    def head_flops(self, tokens: int, size: int) -> tuple[int, int]:
        """Those of the op."""
        return flops(tokens, size, size)
