"""ZeroTuning: softmax attention with the weight of the first token scaled, at inference, without training.

    a'_n0 = γ a_n0 / D_n,   a'_nm = a_nm / D_n (m > 0),   D_n = 1 + (γ - 1) a_n0,   a = softmax(q kᵀ / √D + bias)

The first token is where heads leave the attention that they do not need. γ > 1 gives it more and flattens the
rest, γ < 1 gives it less and sharpens the rest; ratios among other tokens stay, and a row changes the more, the
stronger its sink is. Since a' is the softmax of the same scores with ln γ added to those of key 0, the weights
need not be made: here it is a bias of one row, which every backend of softmax attention takes.

Key 0 is the first token that is real: padding on the left moves it. Where a query may not see it, as behind a
window that has passed, its row stays as it is.

q (B, H, N, D), k (B, G, M, D), v (B, G, M, E); time O(N M D H), as softmax attention; the state is a key/value
cache. γ and the heads are chosen for a model and a task on held-out data, so that there is no published value
to start from: γ = 1, the default, changes nothing.

Source: Han et al., "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without
Training", 2025 (arXiv:2505.11739), official code FeijiangHan/ZeroTuning.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput, share
from attlas.core.mask import Mask
from attlas.core.mechanism import CachedAttend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Spec
from attlas.ops.pairs import pair_cost
from attlas.ops.softmax import attention_weights, repeat_heads, softmax_attention

SPEC = Spec(
    name="zerotuning",
    title="ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training",
    year=2025,
    paper="arXiv:2505.11739",
    equation="o = softmax(q kᵀ / √D + bias + ln γ at key 0) v",
    complexity="O(N² D) time, O(N D) state",
    patterns=ALL_PATTERNS,
    masks=EVERY_MASK,
    streams=True,
    grouped=True,
    examples=(
        Example(params={"gamma": 1.6}, parameters=4 * (16 * 16 + 16)),
        Example(
            heads=4,
            kv_heads=2,
            grid=(9,),
            params={"gamma": 0.4, "tuned": (0, 3)},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8),
        ),
    ),
)


@register(SPEC)
class ZeroTuning(CachedAttend):
    """Softmax attention with the first token's weight scaled.

    Args:
        site: where it is installed.
        backend: of `softmax_attention`.
        gamma: γ, the factor of the first token's weight before the row is normalised again.
        tuned: the query heads that it is for; None for all.
        scale: of the scores; D ** -0.5 by default.
        weight_dropout: share of the attention weights dropped in training.
    """

    tuned: Tensor

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        gamma: float = 1.0,
        tuned: Sequence[int] | None = None,
        scale: float | None = None,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        if not 0 < gamma < math.inf:
            raise BadInput(f"gamma is a positive factor (1 changes nothing), got {gamma}")
        chosen = list(range(site.heads) if tuned is None else tuned)
        if not all(0 <= head < site.heads for head in chosen):
            raise BadInput(
                f"tuned names heads by numbers from 0 to {site.heads - 1}, the heads there are, got {chosen}"
            )
        self.gamma, self.chosen = gamma, chosen
        self.scale = scale
        self.weight_dropout = share("weight_dropout", weight_dropout)
        self.register_buffer("tuned", torch.tensor([h in chosen for h in range(site.heads)]), persistent=False)

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Softmax attention with a bias on one key."""
        first_BM = self._first(call, k_BGMD)
        if call.mask.keys is not None:  # a bias cannot hide what is not a number
            k_BGMD, v_BGME = (x.where(call.mask.keys[:, None, :, None], 0) for x in (k_BGMD, v_BGME))
        shifted_BH1M = self.tuned[:, None, None] & first_BM[:, None, None]
        bias_BH1M = q_BHND.new_zeros(shifted_BH1M.shape).masked_fill(shifted_BH1M, math.log(self.gamma))
        dropout = self.weight_dropout if self.training else 0.0
        mask = call.mask & Mask.biased(bias_BH1M.expand(-1, -1, q_BHND.shape[2], -1))
        return softmax_attention(q_BHND, k_BGMD, v_BGME, mask, scale=self.scale, dropout=dropout, backend=self.backend)

    def _first(self, call: Call, k_BGMD: Tensor) -> Tensor:
        """Which key is the first real one, (B or 1, M)."""
        keys_BM = call.mask.keys
        if keys_BM is None:
            return torch.arange(k_BGMD.shape[2], device=k_BGMD.device)[None] == 0
        return keys_BM & (keys_BM.cumsum(-1) == 1)

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """The weights, their first column scaled sequence by sequence and head by head, and the rows normalised."""
        a_BHNM = attention_weights(q_BHND, k_BGMD, call.mask, self.scale)
        scaled_BHNM = a_BHNM.clone()
        for b in range(a_BHNM.shape[0]):
            real = range(a_BHNM.shape[3]) if call.mask.keys is None else call.mask.keys[b].nonzero().flatten().tolist()
            for h in self.chosen if len(real) else []:
                a_N = a_BHNM[b, h, :, real[0]]
                d_N = 1 + (self.gamma - 1) * a_N
                scaled_BHNM[b, h] = a_BHNM[b, h] / d_N[:, None]
                scaled_BHNM[b, h, :, real[0]] = self.gamma * a_N / d_N
        weights = F.dropout(scaled_BHNM, self.weight_dropout, self.training)
        return weights @ repeat_heads(v_BGME, q_BHND.shape[1])

    def count(self, sizes: Sizes) -> Cost:
        """Two products per visible pair; the torch backend is counted over all pairs."""
        return pair_cost(self.site, sizes)
