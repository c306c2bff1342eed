"""Landmark attention: a landmark behind every F tokens decides how much of a query's attention goes to its block.

    s_ij = q_i · k_j / √D,    c the block of query i

    w   = softmax over { s_ij : j ordinary, j <= i, in block c } and { s_il : l landmark of a block b < c }
    u_b = softmax over { s_ij : j ordinary in block b }                                      for each b < c
    o_i = Σ_{j in c} w_j v_j + Σ_{b < c} w_l(b) Σ_{j in b} u_bj v_j

q (B, H, N, D), k and v (B, G, M, D). A block is `mem_freq` tokens and the landmark behind them: every (F + 1)-th place
of the sequence is a landmark, by its place alone. Landmarks are tokens like others in every layer around (put them in
with `attlas.ops.landmarks.insert_landmarks`, under a number of their own) but carry no value here, and a landmark does
not look at itself: it sees its block and the landmarks before it. Tokens of the block that a query stands in compete
with landmarks as equals; a block that is not full yet has no landmark that could be seen.

Because a block is reached through its landmark alone, a long past can be kept elsewhere, and only blocks whose
landmarks score highest be read: `attlas.adapt.retrieval`.

Padding has no weight. A block whose landmark is padding, or all whose tokens are, is out of reach. `group_dropout`
drops in training whole earlier blocks, for each query and head on its own, and scales the others up; the weights are
not normalised anew.

Time O(N² D), as a softmax; the state is all keys and values. With retrieval O(N / F + top_k F) keys per token.

Source: Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for Transformers", 2023
(arXiv:2305.16300), official code epfml/landmark-attention (there landmarks are called `mem`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput, share
from attlas.core.mechanism import CachedAttend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.landmarks import grouped_softmax, scaled_scores
from attlas.ops.pairs import weighted_values
from attlas.ops.recurrent import keys_ahead
from attlas.ops.softmax import blank_padding, repeat_heads

SPEC = Spec(
    name="landmark",
    title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
    year=2023,
    paper="arXiv:2305.16300",
    equation="o = Σ_own w_j v_j + Σ_blocks w_landmark softmax_block(q kᵀ / √D) v",
    complexity="O(N² D) time, O(N D) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    grids=(1,),
    prefix=False,
    streams=True,
    grouped=True,
    examples=(
        Example(grid=(11,), params={"mem_freq": 2}, parameters=4 * (16 * 16 + 16)),
        Example(
            grid=(9,),
            heads=4,
            kv_heads=2,
            params={"mem_freq": 4},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8),
        ),
    ),
)


@register(SPEC)
class Landmark(CachedAttend):
    """Landmark attention.

    Args:
        site: where it is installed.
        backend: `auto` or `oracle`.
        mem_freq: F, ordinary tokens before each landmark.
        group_dropout: share of the earlier blocks that a query loses in training.
    """

    def __init__(self, site: Site, backend: str = "auto", *, mem_freq: int = 50, group_dropout: float = 0.0) -> None:
        super().__init__(site, backend)
        if mem_freq < 1:
            raise BadInput(f"mem_freq counts the tokens before each landmark, at least 1, got {mem_freq}")
        self.mem_freq = mem_freq
        self.group_dropout = share("group_dropout", group_dropout)

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """One softmax, in which landmarks shift the scores of their blocks."""
        keys_ahead(q_BHND.shape[2], k_BGMD.shape[2])
        keep_BM = call.mask.keys
        (k_BGMD,) = blank_padding(keep_BM, k_BGMD)
        scores_BHNM = scaled_scores(q_BHND, repeat_heads(k_BGMD, q_BHND.shape[1]))
        weights_BHNM = grouped_softmax(scores_BHNM, self.mem_freq, None if keep_BM is None else keep_BM[:, None])
        if self.training and self.group_dropout:
            weights_BHNM = weights_BHNM * self._surviving(weights_BHNM)
        return weighted_values(weights_BHNM.to(v_BGME.dtype), v_BGME, call.mask)

    def _surviving(self, weights_BHNM: Tensor) -> Tensor:
        """The factor of each weight under `group_dropout`: 1 in the query's own block."""
        queries, keys = weights_BHNM.shape[2:]
        block_M = torch.arange(keys, device=weights_BHNM.device) // (self.mem_freq + 1)
        ones = weights_BHNM.new_ones(*weights_BHNM.shape[:3], keys // (self.mem_freq + 1) + 1)
        factor_BHNM = F.dropout(ones, self.group_dropout)[..., block_M]
        return factor_BHNM.where(block_M < block_M[keys - queries :, None], 1)

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Query by query: the group of the query's own block, then one group for each block before."""
        batch, heads, queries, size = q_BHND.shape
        keys, period = k_BGMD.shape[2], self.mem_freq + 1
        first = keys_ahead(queries, keys)
        real = torch.ones(batch, keys, dtype=torch.bool) if call.mask.keys is None else call.mask.keys
        k_BHMD, v_BHME = (repeat_heads(x, heads) for x in (k_BGMD, v_BGME))
        o_BHNE = v_BGME.new_zeros(batch, heads, queries, v_BGME.shape[3])
        for b in range(batch):
            for n in range(queries):
                i = n + first
                current = i // period
                own = [j for j in range(current * period, i + 1) if j % period < self.mem_freq and real[b, j]]
                blocks = []
                for block in range(current):
                    *tokens, mark = range(block * period, (block + 1) * period)
                    tokens = [j for j in tokens if real[b, j]]
                    if tokens and real[b, mark]:
                        blocks.append((mark, tokens))
                if not own and not blocks:
                    continue
                for h in range(heads):

                    def scores(group: list[int], b: int = b, h: int = h, n: int = n) -> Tensor:
                        return k_BHMD[b, h, group] @ q_BHND[b, h, n] * size**-0.5

                    w = scores(own + [mark for mark, _ in blocks]).softmax(0)
                    o = w[: len(own)] @ v_BHME[b, h, own]
                    left = F.dropout(w[len(own) :], self.group_dropout, self.training)
                    for share_of_block, (_, tokens) in zip(left, blocks, strict=True):
                        o = o + share_of_block * (scores(tokens).softmax(0) @ v_BHME[b, h, tokens])
                    o_BHNE[b, h, n] = o
        return o_BHNE

    def count(self, sizes: Sizes) -> Cost:
        """Scores of the tokens that are seen and of the landmarks, and values; both products run over all pairs."""
        heads, size, period = sizes.batch * self.site.heads, self.site.head_dim, self.mem_freq + 1
        first = sizes.keys - sizes.queries
        tokens = marks = 0
        for place in range(first, sizes.keys):
            block, inside = divmod(place, period)
            tokens += block * self.mem_freq + min(inside + 1, self.mem_freq)
            marks += block
        flops = 2 * heads * size * (2 * tokens + marks)
        return Cost(flops, 4 * heads * sizes.queries * sizes.keys * size, heads * tokens)
