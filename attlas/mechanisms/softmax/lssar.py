"""Length-scaled softplus attention with re-weighting: normalise, then sharpen, then normalise again.

    A_nm = φ(s_nm) / Σ_m φ(s_nm),    φ(s) = log(1 + eˢ),    s_nm = log D · log L_n · cos(q_n, k_m) + bias_nm
    R_nm = relu(L_n A_nm - offset) ^ power,    o_n = Σ_m R_nm v_m / Σ_m R_nm    over the visible m

q (B, H, N, D), k (B, G, M, D), v (B, G, M, E); query heads are a multiple of key/value heads. L_n is the number
of keys that row n sees, padding not counted. L_n A_n has the mean 1, whatever the length: the offset drops the
keys below a share of that mean and the power sharpens what is left, so that a longer row is not a flatter one.
A row that the offset empties keeps A, and one of three keys or fewer has no offset. With offset 0 and power 1 this is
the first stage alone, `lssa`. No weights are learned, so that the second stage can be put on a trained first one.

Time O(N M D H), memory O(N M H): the threshold needs whole rows. The state is a key/value cache of 2 N D G numbers.

Source: Gao et al., "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
2025 (arXiv:2501.13428). A reconstruction: the official code was not found, and the cosine, its scale and the defaults
of `offset` and `power` are those of the paper's last version as others re-implement it. There a power of 3 is best at
the training length and one of 15 at eight times as much. That an emptied row keeps A is ours.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput, share
from attlas.core.mechanism import CachedAttend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Spec
from attlas.ops.pairs import dense_mask, pair_cost, weighted_values
from attlas.ops.softplus import row_lengths, sharpen, softplus_weights

SPEC = Spec(
    name="lssar",
    title="Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models",
    year=2025,
    paper="arXiv:2501.13428",
    equation="o = relu(L A − offset)^power v, rows normalised to 1, A the weights of lssa",
    complexity="O(N² D) time, O(N D) state",
    patterns=ALL_PATTERNS,
    masks=EVERY_MASK,
    streams=True,
    grouped=True,
    examples=(  # no offset: all visible pairs count
        Example(params={"offset": 0.0, "power": 3.0}, parameters=4 * (16 * 16 + 16)),
        Example(
            heads=4,
            kv_heads=2,
            grid=(9,),
            params={"offset": 0.0, "power": 1.5},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8),
        ),
    ),
    reconstruction=True,
)


@register(SPEC)
class LSSAR(CachedAttend):
    """Length-scaled softplus attention with re-weighting.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        scale: of the cosines, beside log L_n; log D by default.
        offset: share of a row's mean weight below which a key is dropped; at least 0.
        power: that sharpens the kept weights; at least 1.
        weight_dropout: share of the attention weights dropped in training.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        scale: float | None = None,
        offset: float = 1.0,
        power: float = 15.0,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        if scale is not None and not 0 < scale < math.inf:
            raise BadInput(f"scale multiplies the cosines and is positive, got {scale}")
        if not 0 <= offset < math.inf:
            raise BadInput(f"offset is a share of the mean weight, at least 0, got {offset}")
        if not 1 <= power < math.inf:
            raise BadInput(f"power sharpens and is at least 1, got {power}")
        self.scale = math.log(site.head_dim) if scale is None else scale
        self.offset, self.power = offset, power
        self.weight_dropout = share("weight_dropout", weight_dropout)

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Both stages on the weights as one matrix, and their product with the values."""
        weights = softplus_weights(q_BHND, k_BGMD, call.mask, self.scale)
        lengths = row_lengths(call.mask, weights.shape[2], weights.shape[3], weights)
        weights = sharpen(weights, lengths, self.offset, self.power).to(v_BGME.dtype)
        weights = F.dropout(weights, self.weight_dropout, self.training)
        return weighted_values(weights, v_BGME, call.mask)

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Row by row over its visible keys."""
        mask, (batch, heads, queries, _), keys = call.mask, q_BHND.shape, k_BGMD.shape[2]
        seen, bias = dense_mask(mask, (batch, heads, queries, keys), q_BHND)
        o_BHNE = v_BGME.new_zeros(batch, heads, queries, v_BGME.shape[3])
        for b, h, n in seen.any(-1).nonzero().tolist():
            g, m = h // (heads // k_BGMD.shape[1]), seen[b, h, n]
            length = int(m.sum())
            cosines = F.cosine_similarity(k_BGMD[b, g, m], q_BHND[b, h, n], -1, eps=1e-12)
            scores = self.scale * math.log(length) * cosines + bias[b, h, n, m]
            phi = F.softplus(scores, threshold=100)
            weights = phi / phi.sum()
            offset = self.offset if length > 3 else 0.0
            raised = (length * weights - offset).relu() ** self.power
            weights = raised / raised.sum() if raised.any() else weights
            o_BHNE[b, h, n] = F.dropout(weights, self.weight_dropout, self.training) @ v_BGME[b, g, m]
        return o_BHNE

    def count(self, sizes: Sizes) -> Cost:
        """Two products per visible pair; the torch backend is counted over all pairs."""
        return pair_cost(self.site, sizes)
