"""Softmax attention, with full, grouped, single and fewer heads (MHA, GQA, MQA, SQA).

    o_n = sum_m softmax_m(q_n . k_m / sqrt(D) + bias_nm) v_m

q (B, H, N, D), k (B, G, M, D), v (B, G, M, E); query heads H are a multiple of key/value heads G, and
head h reads key/value head h // (H / G). Head counts are settings of the shell: MHA has G = H, GQA has
1 < G < H, MQA has G = 1, and sparse query attention (SQA) builds fewer query heads than the model's
nominal number while the head size stays dim / nominal heads, so that scores cost H / nominal of MHA's.

Time O(N M D H), memory O(N D) on fused backends; the state is a key/value cache of 2 N D G numbers.

Sources: Vaswani et al., "Attention Is All You Need", 2017 (arXiv:1706.03762); Filipek, "Sparse Query
Attention", 2025 (arXiv:2510.01817), official code RxAI-dev/RxNN.
"""

from torch import Tensor

from attlas.core.errors import share
from attlas.core.mechanism import CachedAttend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Spec
from attlas.ops.pairs import pair_cost
from attlas.ops.softmax import softmax_attention

SPEC = Spec(
    name="softmax",
    title="Attention Is All You Need",
    year=2017,
    paper="arXiv:1706.03762",
    equation="o = softmax(q kᵀ / √D + bias) v",
    complexity="O(N² D) time, O(N D) state",
    patterns=ALL_PATTERNS,
    masks=EVERY_MASK,
    streams=True,
    grouped=True,
    variants={
        "gqa": {"kv_heads": 1 / 4},
        "mqa": {"kv_heads": 0},
        "sqa": {"query_heads": 1 / 2, "kv_heads": 1 / 4},
        "ssqa": {"query_heads": 1 / 2, "kv_heads": 1 / 2},
        "xsqa": {"query_heads": 1 / 4, "kv_heads": 1 / 4},
        "xsmqa": {"query_heads": 1 / 4, "kv_heads": 0},
    },
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(heads=4, kv_heads=2, grid=(9,), parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8)),
    ),
)


@register(SPEC)
class Softmax(CachedAttend):
    """Softmax attention.

    Args:
        site: where it is installed.
        backend: of `softmax_attention`.
        scale: of the scores; D ** -0.5 by default.
        weight_dropout: share of the attention weights dropped in training.
    """

    def __init__(
        self, site: Site, backend: str = "auto", *, scale: float | None = None, weight_dropout: float = 0.0
    ) -> None:
        super().__init__(site, backend)
        self.scale = scale
        self.weight_dropout = share("weight_dropout", weight_dropout)

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Run the op."""
        dropout = self.weight_dropout if self.training else 0.0
        return softmax_attention(
            q_BHND, k_BGMD, v_BGME, call.mask, scale=self.scale, dropout=dropout, backend=self.backend
        )

    oracle = compute  # the op's own oracle backend

    def count(self, sizes: Sizes) -> Cost:
        """Two products per visible pair; the torch backend is counted over all pairs."""
        return pair_cost(self.site, sizes)
