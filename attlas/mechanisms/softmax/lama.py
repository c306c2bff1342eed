"""LAMA: heads that look at a text through a rank-one bilinear form with a context vector.

    f_h(t) = tanh(Σ_r (p_hrᵀ c)(q_hrᵀ x_t)),   a_ht = softmax_t(f_h(t) / ‖f(t)‖₂),   e_h = Σ_t a_ht x_t

Head h scores word x_t by cᵀ W_h x_t with W_h = Σ_{r<R} p_hr q_hrᵀ: 2 C R numbers in place of C². The norm is over the
heads of one word, as in factorised bilinear pooling; the heads' vectors e_h are laid side by side.

`LamaPool` is the published use, a text to H vectors: its context c is learned, or given for each text. As a layer on
tokens, tokens are the contexts: each x_n asks the other sequence, or in self-attention its own, as c does in the
pool, and W_o brings the H C numbers of its answer back to C. That is the pool once per token; the layer, its causal
use and its stream are ours.

x (B, N, C), context (B, M, C), P, Q (C, H R). Time O(N M H (C + R)) as a layer, O(M H (C + R)) as a pool; the pool has
2 C H R + C parameters, the layer 2 C H R + H C². The state is the words: C + H R numbers each.

Source: Mehta et al., "Low Rank Factorization for Compact Multi-Head Self-Attention", 2019 (arXiv:1912.00835). A
reconstruction without official code; JohnGiorgi/compact-multi-head-self-attention-pytorch is another, with the mean
word as the context.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Spec
from attlas.core.state import KVCache
from attlas.ops.precision import wide

EPSILON = 1e-6

SPEC = Spec(
    name="lama",
    title="Low Rank Factorization for Compact Multi-Head Self-Attention",
    year=2019,
    paper="arXiv:1912.00835",
    equation="o_h = softmax(norm_h tanh((Pᵀ x_n)_h (Qᵀ x_m)_h)) x_m",
    complexity="O(N² D) time, O(N D) state",
    patterns=ALL_PATTERNS,
    masks=EVERY_MASK,
    streams=True,
    examples=(
        Example(heads=3, parameters=2 * 16 * 3 + 3 * 16 * 16),
        Example(
            heads=2,
            grid=(2, 4),
            prefix=1,
            params={"rank": 3, "normalise": False},
            parameters=2 * 16 * 6 + 2 * 16 * 16,
        ),
    ),
    reconstruction=True,
)


def _factor(dim: int, heads: int, rank: int) -> nn.Parameter:
    if rank < 1:
        raise BadInput(f"rank is the number of products in a head's score, at least 1, got {rank}")
    if heads < 1:
        raise BadInput(f"heads must be at least 1, got {heads}")
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, heads * rank)))


def _weights(asked_BHNR: Tensor, words_BHMR: Tensor, mask: Mask, normalise: bool) -> Tensor:
    """a (B, H, N, M); the row of a context that sees nothing is 0."""
    f_BHNM = wide(asked_BHNR @ words_BHMR.mT).tanh()
    if normalise:
        f_BHNM = F.normalize(f_BHNM, dim=1, eps=EPSILON)
    if mask.bias is not None:
        f_BHNM = f_BHNM + mask.bias
    seen = mask.pairs(f_BHNM.shape[2], f_BHNM.shape[3], f_BHNM.device)
    if seen is not None:
        seeing = seen.any(-1, keepdim=True)
        f_BHNM = f_BHNM.masked_fill(~seen & seeing, -torch.inf)
        return (f_BHNM.softmax(-1) * seeing).to(words_BHMR.dtype)
    return f_BHNM.softmax(-1).to(words_BHMR.dtype)


@register(SPEC)
class Lama(Mixer):
    """Factorised bilinear pooling of a sequence, once for each token as its context.

    Args:
        site: where it is installed; a head is one distribution over the words, whatever dim is.
        backend: `auto`, `torch` or `oracle`.
        rank: R, products in a head's score.
        normalise: divide a word's scores by their norm over the heads.
    """

    def __init__(self, site: Site, backend: str = "auto", *, rank: int = 1, normalise: bool = True) -> None:
        super().__init__(site, backend)
        self.rank, self.normalise = rank, normalise
        self.p, self.q = (_factor(site.dim, site.heads, rank) for _ in range(2))
        self.out_proj = nn.Linear(site.heads * site.dim, site.dim, bias=False)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """All heads' scores as products of H x R features, their weights on the words themselves."""
        source = self._source(x_BNC if context_BMC is None else context_BMC, call.mask.keys)
        return self._pool(source if context_BMC is None else x_BNC, source, self._split(source @ self.q), call.mask)

    def _source(self, source_BMC: Tensor, keep_BM: Tensor | None) -> Tensor:
        self._check_tokens("context", source_BMC, self.site.dim)
        return source_BMC if keep_BM is None else source_BMC.where(keep_BM.unsqueeze(-1), 0)

    def _split(self, features: Tensor) -> Tensor:
        return features.unflatten(-1, (self.site.heads, self.rank)).transpose(1, 2)

    def _pool(self, x_BNC: Tensor, source_BMC: Tensor, words_BHMR: Tensor, mask: Mask) -> Tensor:
        weights_BHNM = _weights(self._split(x_BNC @ self.p), words_BHMR, mask, self.normalise)
        pooled_BLC = weights_BHNM.flatten(1, 2) @ source_BMC.to(weights_BHNM.dtype)
        return self.out_proj(pooled_BLC.unflatten(1, weights_BHNM.shape[1:3]).transpose(1, 2).flatten(2))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Head by head with its C x C matrix."""
        source = self._source(x_BNC if context_BMC is None else context_BMC, call.mask.keys)
        x = source if context_BMC is None else x_BNC
        queries, keys = x.shape[1], source.shape[1]
        scores = []
        for p_CR, q_CR in zip(self.p.split(self.rank, 1), self.q.split(self.rank, 1), strict=True):
            bilinear_CC = torch.einsum("cr,dr->cd", p_CR, q_CR)
            scores.append(torch.einsum("bnc,cd,bmd->bnm", x, bilinear_CC, source).tanh())
        f = torch.stack(scores, 1)
        if self.normalise:
            f = f / f.pow(2).sum(1, keepdim=True).clamp(min=EPSILON**2).sqrt()
        if call.mask.bias is not None:
            f = f + call.mask.bias
        seen = call.mask.pairs(queries, keys)
        e = f.exp() if seen is None else f.exp() * seen
        total = e.sum(-1, keepdim=True)
        pooled = torch.einsum("bhnm,bmc->bnhc", e / total.where(total > 0, 1), source)
        return pooled.flatten(2) @ self.out_proj.weight.T

    def count(self, sizes: Sizes) -> Cost:
        """Features of contexts and words, their products and the pooling per visible pair, the output."""
        batch, dim, heads = sizes.batch, self.site.dim, self.site.heads
        queries, keys = sizes.queries, sizes.keys
        fixed = 2 * batch * dim * heads * ((queries + keys) * self.rank + queries * dim)
        pairs = Mask(causal=self.site.causal and not sizes.cross).area(queries, keys, batch, heads)
        per_pair = 2 * (self.rank + dim)
        return Cost(fixed + per_pair * pairs, fixed + per_pair * batch * heads * queries * keys, pairs)

    def start(self, batch: int, like: Tensor) -> KVCache:
        """No words yet: as keys all heads' features of a word, as values the word."""
        return KVCache.empty(batch, 1, self.site.heads * self.rank, self.site.dim, like)

    def advance(self, x_BNC: Tensor, state: KVCache, keep: Tensor | None) -> tuple[Tensor, KVCache]:
        """Pool the words so far and the segment's own."""
        x = self._source(x_BNC, keep)
        state = state.append((x @ self.q).unsqueeze(1), x.unsqueeze(1), keep)
        mask = Mask(causal=True, keys=state.keys, queries=keep)
        return self._pool(x, state.v.rows[:, 0], self._split(state.k.rows[:, 0]), mask), state


class LamaPool(nn.Module):
    """A sequence to one vector per head, (B, M, C) -> (B, H, C), or to (B, `output_dim`).

    Args:
        dim: C.
        heads: H, distributions over the words.
        rank: R, products in a head's score.
        normalise: divide a word's scores by their norm over the heads.
        output_dim: project the heads' vectors, side by side, to so many channels.
    """

    def __init__(
        self, dim: int, heads: int = 8, *, rank: int = 1, normalise: bool = True, output_dim: int | None = None
    ) -> None:
        super().__init__()
        self.heads, self.rank, self.normalise = heads, rank, normalise
        self.p, self.q = (_factor(dim, heads, rank) for _ in range(2))
        self.context = nn.Parameter(nn.init.xavier_uniform_(torch.empty(dim, 1)))
        self.out_proj = None if output_dim is None else nn.Linear(heads * dim, output_dim)

    def weights(self, x_BMC: Tensor, keep: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """a (B, H, M); the rows sum to 1, or to 0 where nothing is real.

        Args:
            x_BMC: the words.
            keep: which words are real, (B, M) bool.
            context: (B, C) in place of the learned one.

        Raises:
            BadInput: shapes that do not fit.
        """
        dim = self.p.shape[0]
        if x_BMC.ndim != 3 or x_BMC.shape[2] != dim:
            raise BadInput(f"words are (batch, words, {dim} channels), got {tuple(x_BMC.shape)}")
        if keep is not None and (keep.dtype != torch.bool or keep.shape != x_BMC.shape[:2]):
            raise BadInput(f"keep is a bool tensor {tuple(x_BMC.shape[:2])}, got {keep.dtype} {tuple(keep.shape)}")
        if context is not None and context.shape != (x_BMC.shape[0], dim):
            raise BadInput(f"context is one vector per text, ({x_BMC.shape[0]}, {dim}), got {tuple(context.shape)}")
        c_BC = self.context.T if context is None else context
        if keep is not None:
            x_BMC = x_BMC.where(keep.unsqueeze(-1), 0)
        asked_BHR, words_BMHR = ((t @ m).unflatten(-1, (-1, self.rank)) for t, m in ((c_BC, self.p), (x_BMC, self.q)))
        return _weights(asked_BHR.unsqueeze(2), words_BMHR.transpose(1, 2), Mask(keys=keep), self.normalise).squeeze(2)

    def forward(self, x_BMC: Tensor, keep: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Pool the words; arguments as in `weights`."""
        a_BHM = self.weights(x_BMC, keep, context)
        if keep is not None:
            x_BMC = x_BMC.where(keep.unsqueeze(-1), 0)
        e_BHC = a_BHM @ x_BMC.to(a_BHM.dtype)
        return e_BHC if self.out_proj is None else self.out_proj(e_BHC.flatten(1))
