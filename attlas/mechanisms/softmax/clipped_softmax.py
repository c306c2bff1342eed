"""Clipped softmax: a stretched softmax, so that a head can give exactly nothing with small scores.

    P_nm = clip((ζ - γ) softmax_m(q_n·k_m / √D + bias_nm) + γ, 0, 1),    o_n = Σ_m P_nm v_m

q (B, H, N, D), k (B, G, M, D), v (B, G, M, E); query heads are a multiple of key/value heads. γ ≤ 0 makes every
probability below -γ / (ζ - γ) an exact zero, without a gradient; ζ ≥ 1 makes exact ones. Rows are not
normalised again. Softmax comes near zero only by scores that keep growing in training, which is where the
outliers of attention models come from. γ = -α / T, with T the length that the model is trained on (`length` of
the layer; 128, the published one, where that is not known), a constant at every length and in decoding. The bare
`attlas.attend` takes the number of keys for T.

Time O(N M D H), memory O(N M H); the state is a key/value cache of 2 N D G numbers.

Source: Bondarenko et al., "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",
2023 (arXiv:2306.12929), official code Qualcomm-AI-research/outlier-free-transformers. By default BERT's γ = -0.025
at T = 128, that is α = 3.2; OPT-125m has α = 12 at T = 512. The paper's other cure is `gated_attention`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput, share
from attlas.core.mechanism import CachedAttend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Spec
from attlas.ops.pairs import dense_mask, pair_cost, weighted_values
from attlas.ops.softmax import attention_weights

PUBLISHED_LENGTH = 128

SPEC = Spec(
    name="clipped_softmax",
    title="Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",
    year=2023,
    paper="arXiv:2306.12929",
    equation="o = clip((ζ − γ) softmax(q kᵀ / √D + bias) + γ, 0, 1) v",
    complexity="O(N² D) time, O(N D) state",
    patterns=ALL_PATTERNS,
    masks=EVERY_MASK,
    streams=True,
    grouped=True,
    examples=(  # so slight a stretch that all visible pairs count
        Example(params={"alpha": 0.001}, parameters=4 * (16 * 16 + 16)),
        Example(
            heads=4,
            kv_heads=2,
            grid=(9,),
            params={"gamma": -0.0002, "zeta": 1.2},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8),
        ),
    ),
)


@register(SPEC)
class ClippedSoftmax(CachedAttend):
    """Clipped softmax attention.

    Args:
        site: where it is installed; its length is T.
        backend: `auto`, `torch` or `oracle`.
        alpha: sets γ = -α / T.
        gamma: γ itself, at most 0; `alpha` is not read then.
        zeta: ζ, at least 1.
        weight_dropout: share of the clipped weights dropped in training.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        alpha: float = 3.2,
        gamma: float | None = None,
        zeta: float = 1.0,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        if not 0 <= alpha < math.inf:
            raise BadInput(f"alpha sets gamma = -alpha / length and is at least 0, got {alpha}")
        if gamma is not None and not -math.inf < gamma <= 0:
            raise BadInput(f"gamma is the lower end of the stretched softmax and at most 0, got {gamma}")
        if not 1 <= zeta < math.inf:
            raise BadInput(f"zeta is the upper end of the stretched softmax and at least 1, got {zeta}")
        self.gamma = -alpha / (site.length or PUBLISHED_LENGTH) if gamma is None else gamma
        self.zeta = zeta
        self.weight_dropout = share("weight_dropout", weight_dropout)

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """The weights as one matrix, and their product with the values."""
        softmax = attention_weights(q_BHND, k_BGMD, call.mask)
        # What is masked has probability 0 and so stays 0.
        weights = ((self.zeta - self.gamma) * softmax + self.gamma).clamp(0, 1).to(v_BGME.dtype)
        weights = F.dropout(weights, self.weight_dropout, self.training)
        return weighted_values(weights, v_BGME, call.mask)

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Row by row over its visible keys."""
        batch, heads, queries, size = q_BHND.shape
        seen, bias = dense_mask(call.mask, (batch, heads, queries, k_BGMD.shape[2]), q_BHND)
        o_BHNE = v_BGME.new_zeros(batch, heads, queries, v_BGME.shape[3])
        for b, h, n in seen.any(-1).nonzero().tolist():
            g, m = h // (heads // k_BGMD.shape[1]), seen[b, h, n]
            scores = k_BGMD[b, g, m] @ q_BHND[b, h, n] / math.sqrt(size) + bias[b, h, n, m]
            odds = (scores - scores.max()).exp()
            stretched = (self.zeta - self.gamma) * odds / odds.sum() + self.gamma
            weights = torch.where(stretched > 0, stretched, 0).minimum(torch.ones_like(stretched))
            o_BHNE[b, h, n] = F.dropout(weights, self.weight_dropout, self.training) @ v_BGME[b, g, m]
        return o_BHNE

    def count(self, sizes: Sizes) -> Cost:
        """That of softmax attention: weights of 0 are multiplied too."""
        return pair_cost(self.site, sizes)
