"""Channel group attention (DaViT): the features of a head attend to one another, summed over all tokens.

    A = softmax_e(Σ_m k_m v_mᵀ / √D),    o_n = A q_n

q (B, H, N, D), k and v (B, H, M, D), A (B, H, D, D): a head is a group of channels, a feature of k is a query
whose vector has one entry per token, a feature of v is a key. So no token sees another, and yet every one depends
on all: the receptive field is the whole image, the cost is linear, and permuting tokens permutes outputs.

The paper writes softmax(QᵀK / √D) Vᵀ; its Q, K, V are the k, v, q here, which is the order of the published
weights. Convolutional position encodings, norms and MLP belong to the block around. Padding adds nothing to the
sum; without one real key the output is 0.

A causal layer, our extension, sums the keys up to each query, so that each has its own A. The same formula serves
keys of another sequence.

Time O(N D²) per head; causal memory O(N D²), state D² numbers.

Source: Ding et al., "DaViT: Dual Attention Vision Transformers", 2022 (arXiv:2204.03645), official code
dingmyu/davit, in classification as ported to timm. Florence-2 has another form, which scales by the number of
tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, Example, Pattern, Spec
from attlas.ops.pairs import dense_mask
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import blank_padding

SELF = frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF})

SPEC = Spec(
    name="davit_channel",
    title="DaViT: Dual Attention Vision Transformers",
    year=2022,
    paper="arXiv:2204.03645",
    equation="o = softmax(kᵀ v / √D) q",
    complexity="O(N D²) time, O(D²) state",
    patterns=ALL_PATTERNS,
    streams=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(grid=(3, 4), prefix=1, heads=4, parameters=4 * (16 * 16 + 16), patterns=SELF),
    ),
)


class ChannelState(NamedTuple):
    """Σ k vᵀ so far (B, H, D, D), in float32 or better, and whether any token of it was real (B,)."""

    total: Tensor
    live: Tensor


@register(SPEC)
class DavitChannel(Attend):
    """Channel group attention.

    Args:
        site: where it is installed; the groups are its heads.
        backend: `auto`, `torch` or `oracle`.
        scale: of the scores; D ** -0.5 by default.
    """

    def __init__(self, site: Site, backend: str = "auto", *, scale: float | None = None) -> None:
        super().__init__(site, backend)
        self.scale = site.head_dim**-0.5 if scale is None else scale

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, call: Call) -> Tensor:
        """Sum, softmax, multiply."""
        self._check_size(q_BHND, v_BHMD)
        if call.mask.causal:
            early = k_BHMD.shape[2] - q_BHND.shape[2]
            q_BHMD = F.pad(q_BHND, (0, 0, early, 0))
            o_BHMD, _ = self.advance(
                q_BHMD, k_BHMD, v_BHMD, self.initial_state(len(q_BHND), k_BHMD), call.mask.keys, None
            )
            return F.pad(o_BHMD, (0, 0, -early, 0))
        k_BHMD, v_BHMD = blank_padding(call.mask.keys, k_BHMD, v_BHMD)
        with as_written(k_BHMD):
            weights_BHDD = (wide(k_BHMD).mT @ wide(v_BHMD) * self.scale).softmax(-1)
            o_BHND = q_BHND @ weights_BHDD.mT.to(q_BHND.dtype)
        return o_BHND if call.mask.keys is None else o_BHND.where(call.mask.keys.any(1)[:, None, None, None], 0)

    def _check_size(self, q: Tensor, v: Tensor) -> None:
        if q.shape[3] != v.shape[3]:
            raise BadInput(
                f"the weights of {self.spec.name} run over the features of v and multiply those of q: they are as "
                f"many, got {v.shape[3]} and {q.shape[3]}"
            )

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, call: Call) -> Tensor:
        """The score of every pair of features, for every query from the keys that it sees."""
        self._check_size(q_BHND, v_BHMD)
        seen_BHNM, _ = dense_mask(call.mask, (*q_BHND.shape[:3], k_BHMD.shape[2]), q_BHND)
        k_BHMD, v_BHMD = blank_padding(call.mask.keys, k_BHMD, v_BHMD)
        scores = torch.einsum("bhnm,bhmd,bhme->bhnde", seen_BHNM.to(q_BHND), k_BHMD, v_BHMD) * self.scale
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        return torch.einsum("bhnde,bhne->bhnd", weights, q_BHND).where(seen_BHNM.any(-1, keepdim=True), 0)

    def count(self, sizes: Sizes) -> Cost:
        """The sum over keys and the product with the queries; no token has a weight on another."""
        heads = sizes.batch * self.site.heads
        flops = 2 * heads * self.site.head_dim**2 * (sizes.keys + sizes.queries)
        return Cost(flops, flops)

    def initial_state(self, batch: int, like: Tensor) -> ChannelState:
        """No token yet."""
        size = self.site.head_dim
        total = wide(like.new_zeros(batch, self.site.heads, size, size))
        return ChannelState(total, total.new_zeros(batch, dtype=torch.bool))

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: ChannelState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, ChannelState]:
        """Every query with the sum up to its token."""
        k, v = blank_padding(keep, k, v)
        real_BN = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
        live_BN = state.live.unsqueeze(1) | (real_BN.cumsum(1) > 0)
        with as_written(k):
            each_BHNDD = wide(k).unsqueeze(-1) @ wide(v).unsqueeze(-2)
            total_BHNDD = state.total.unsqueeze(2) + each_BHNDD.cumsum(2)
            weights_BHNDD = (total_BHNDD * self.scale).softmax(-1)
            o_BHND = (weights_BHNDD.to(q.dtype) @ q.unsqueeze(-1)).squeeze(-1)
        return o_BHND.where(live_BN[:, None, :, None], 0), ChannelState(total_BHNDD[:, :, -1], live_BN[:, -1])
