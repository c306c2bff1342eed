"""Sparsifiner: a low-rank guess of the attention says which keys each query attends to.

    Â = softmax_m(q′ (k′ᵀ P) / √H) |Bᵀ|              q′ = W_q q + b_q, k′ = W_k k + b_k, of D / 2 features
    kept_n = {the b keys with the largest Â_n·},     b = ⌈keep N⌉
    o_n = Σ_m softmax_m(q_n · k_m / √D) v_m          over the m in kept_n

P and B (N, M) are learned: P sums keys into M = N // 8 of them, and the rows of Bᵀ are M maps over the keys of which
every query mixes its own. So they fit one number of tokens. W_q and W_k are one for all heads. Prefix tokens (the
class token) see everything and are not in Â as queries; as keys they are like others. With a `threshold` a query
keeps the keys with Â above it, however many; one that keeps none gives 0. Maps and mixtures can be sparse
themselves: entries of |B| up to `basis_threshold` are 0, and so is what is not among the `coefficients` largest of a
mixture, or is up to `coefficient_threshold`. Of equal entries the first is better.

The choice carries no gradient, so the guess learns from losses of its own alone. In training `auxiliary` is the
published self-distillation towards the attention without a mask, which costs all pairs,

    distill Σ (Â - softmax(q kᵀ / √D))² / layers

over real tokens, prefix queries left out; `approximate` gives Â for the stage before, in which it is fitted to the
attention of a teacher, with B as it is and nothing cut.

q, k, v (B, H, N, D). Time O(N (D c + c M + n N) H) for the guess, c = D / 2 features and n entries of a mixture, and
O(N b D H) for the pairs.

Padding is 0 to P, is never kept, and leaves places for others: of fewer than b real keys all are kept.

Source: Wei et al., "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
2023 (arXiv:2303.13755), official code lim142857/Sparsifiner. The scale 1 / √H, by the
number of heads, is what its code has; one by the size of q′ may have been meant. Its pruning of tokens belongs to a
model and is not here.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.block_sparse import block_sparse_attention
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import attention_weights, blank_padding
from attlas.ops.topk import largest

PROJECTIONS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="sparsifiner",
    title="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
    year=2023,
    paper="arXiv:2303.13755",
    equation="o = softmax(q kᵀ / √D over the b largest of softmax(q′ k′ᵀ P / √H) |Bᵀ|) v",
    complexity="O(N b D + N M n) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    # At these sizes no entry of the guess is near the edge, so that half precision keeps the same keys.
    examples=(
        Example(
            grid=(7,),
            prefix=1,
            params={"reduce_tokens": 4},
            parameters=PROJECTIONS + 2 * (8 * 4 + 4) + 2 * 8 * 2,
        ),
        Example(
            grid=(3, 4),
            heads=4,
            params={"keep": 0.5, "reduce_tokens": 3, "coefficients": 2, "tied": True},
            parameters=PROJECTIONS + 2 * (4 * 2 + 2) + 12 * 4,
        ),
        Example(
            grid=(3, 3),
            prefix=1,
            params={"threshold": 0.1, "reduce_tokens": 5, "reduce_features": 4, "basis_threshold": 0.05},
            parameters=PROJECTIONS + 2 * (8 * 2 + 2) + 2 * 10 * 2,
        ),
    ),
)


@register(SPEC)
class Sparsifiner(Attend):
    """Softmax attention to the keys that a low-rank guess of it picks.

    Args:
        site: where it is installed; its grid or length is the number of tokens.
        backend: of `block_sparse_attention`.
        keep: share of the tokens that a query attends to, rounded up.
        threshold: of the guess, above which keys are kept, instead of a share.
        reduce_tokens: how many times fewer maps than tokens there are.
        reduce_features: how many times fewer features the guess reads than a head has.
        tied: P and B are one.
        basis_threshold: entries of the maps up to here are 0.
        coefficients: how many maps a query mixes; all by default.
        coefficient_threshold: shares of a mixture up to here are 0.
        distill: coefficient of the auxiliary loss.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        keep: float = 0.25,
        threshold: float | None = None,
        reduce_tokens: int = 8,
        reduce_features: int = 2,
        tied: bool = False,
        basis_threshold: float = 0.0,
        coefficients: int | None = None,
        coefficient_threshold: float = 0.0,
        distill: float = 0.05,
    ) -> None:
        super().__init__(site, backend)
        tokens = site.length if site.grid is None else site.grid.tokens
        if tokens is None:
            raise BadInput("sparsifiner learns maps over one number of tokens: pass grid=(height, width), or length=")
        if not 0 < keep <= 1:
            raise BadInput(f"keep is a share of the tokens, more than 0 and at most 1, got {keep}")
        for name, value, most in (("tokens", reduce_tokens, tokens), ("features", reduce_features, site.head_dim)):
            if not 1 <= value <= most:
                raise BadInput(f"reduce_{name} leaves {name} // reduce_{name}: 1 to {most}, got {value}")
        for name, least in (("basis_threshold", basis_threshold), ("coefficient_threshold", coefficient_threshold)):
            if least < 0:
                raise BadInput(f"{name} is compared with numbers that are not negative, got {least}")
        if distill < 0:
            raise BadInput(f"distill is a coefficient and cannot be negative, got {distill}")
        self.tokens, self.maps, self.features = tokens, tokens // reduce_tokens, site.head_dim // reduce_features
        if coefficients is not None and not 1 <= coefficients <= self.maps:
            raise BadInput(f"coefficients is 1 to {self.maps}, the maps there are, got {coefficients}")
        self.budget, self.threshold = math.ceil(keep * tokens), threshold
        self.basis_threshold, self.coefficient_threshold = basis_threshold, coefficient_threshold
        self.coefficients = coefficients
        self.distill = distill
        self.q_reduce = nn.Linear(site.head_dim, self.features)
        self.k_reduce = nn.Linear(site.head_dim, self.features)
        self.down = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, self.maps), std=0.02))
        self.up = self.down if tied else nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, self.maps), std=0.02))

    def compute(self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, call: Call) -> Tensor:
        """Guess, pick, attend."""
        self._check_tokens(q_BHND, k_BHND)
        prefix, keep_BN = call.grid.prefix, call.mask.keys
        q, k = blank_padding(keep_BN, q_BHND, k_BHND)
        wants_loss = self.training and self.distill > 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and wants_loss):
            guess_BHRN = self.approximate(q, k, prefix=prefix, keep=keep_BN, cut=True)
        if wants_loss:
            self._distil(guess_BHRN, q, k, call)
        o: Tensor = block_sparse_attention(
            q,
            k,
            v_BHND,
            F.pad(self._pick(guess_BHRN.detach(), keep_BN), (0, 0, prefix, 0), value=True),
            rows=1,
            columns=1,
            keep=keep_BN,
            backend=self.backend,
        )
        return o

    def _check_tokens(self, q: Tensor, k: Tensor) -> None:
        if not q.shape[2] == k.shape[2] == self.tokens:
            raise BadInput(
                f"sparsifiner was built for {self.tokens} tokens, got {q.shape[2]} queries and {k.shape[2]} keys; "
                "build it with the grid or length that it is called on"
            )

    def approximate(
        self, q_BHND: Tensor, k_BHND: Tensor, *, prefix: int = 0, keep: Tensor | None = None, cut: bool = False
    ) -> Tensor:
        """Â (B, H, N - prefix, N), in float32 or better.

        Args:
            q_BHND, k_BHND: queries and keys, finite at padding, too.
            prefix: how many of the first queries are left out.
            keep: (B, N) False for padding, which has no part in it.
            cut: small entries of B and of the mixtures are cut, and B is taken without its sign, as in attention;
                else B is as it is, as in fitting.
        """
        with as_written(q_BHND):
            q_BHRF, k_BHNF = (
                F.linear(wide(x), wide(proj.weight), wide(proj.bias))
                for x, proj in ((q_BHND[:, :, prefix:], self.q_reduce), (k_BHND, self.k_reduce))
            )
            if keep is not None:
                k_BHNF = k_BHNF.where(keep[:, None, :, None], 0)
            low_BHFM = k_BHNF.mT @ wide(self.down)
            mixture_BHRM = (q_BHRF @ low_BHFM * self.site.heads**-0.5).softmax(-1)
            maps_NM = wide(self.up)
            if cut:
                maps_NM = F.threshold(maps_NM.abs(), self.basis_threshold, 0)
                mixture_BHRM = self._cut(mixture_BHRM)
            return mixture_BHRM @ maps_NM.mT

    def _cut(self, mixture_BHRM: Tensor) -> Tensor:
        """The large shares of each mixture."""
        if self.coefficients is not None:
            mixture_BHRM = mixture_BHRM.where(largest(mixture_BHRM.detach(), self.coefficients), 0)
        return F.threshold(mixture_BHRM, self.coefficient_threshold, 0)

    def _pick(self, guess_BHRN: Tensor, keep_BN: Tensor | None) -> Tensor:
        """Which keys each query attends to, (B, H, N - prefix, N)."""
        real = guess_BHRN.new_ones((), dtype=torch.bool) if keep_BN is None else keep_BN[:, None, None]
        if self.threshold is not None:
            return (guess_BHRN > self.threshold) & real
        return largest(guess_BHRN.masked_fill(~real, -torch.inf), self.budget) & real

    def _distil(self, guess_BHRN: Tensor, q_BHND: Tensor, k_BHND: Tensor, call: Call) -> None:
        """Set the auxiliary loss."""
        with as_written(q_BHND):
            weights_BHNN = attention_weights(wide(q_BHND), wide(k_BHND), Mask(keys=call.mask.keys))
            error_BHRN = (guess_BHRN - weights_BHNN[:, :, call.grid.prefix :]).square()
        if call.mask.keys is not None:
            real_BN = call.mask.keys
            real_BRN = real_BN[:, call.grid.prefix :].unsqueeze(-1) & real_BN.unsqueeze(1)
            error_BHRN = error_BHRN.where(real_BRN.unsqueeze(1), 0)
        self.auxiliary = self.distill / self.site.layers * error_BHRN.sum()

    def oracle(self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, call: Call) -> Tensor:
        """Query by query over the keys that it keeps."""
        self._check_tokens(q_BHND, k_BHND)
        batch, heads, tokens, size = q_BHND.shape
        q, k, v = blank_padding(call.mask.keys, q_BHND, k_BHND, v_BHND)
        o_BHND = torch.zeros_like(v)
        loss = wide(q).new_zeros(())
        for b, h, n in torch.cartesian_prod(*map(torch.arange, (batch, heads, tokens))).tolist():
            real = [m for m in range(tokens) if call.mask.keys is None or call.mask.keys[b, m]]
            attention = wide(k[b, h, real] @ q[b, h, n] * size**-0.5).softmax(0)
            kept = list(range(len(real)))
            if n >= call.grid.prefix:
                guess = self._guess(q[b, h, n], k[b, h], real)
                if n in real:
                    loss = loss + (guess - attention).square().sum()
                ranked = sorted(kept, key=lambda i: (-float(guess[i].detach()), i))
                kept = ranked[: self.budget]
                if self.threshold is not None:
                    kept = [i for i in ranked if guess[i] > self.threshold]
            if kept:
                keys = [real[i] for i in kept]
                weights = (k[b, h, keys] @ q[b, h, n] * size**-0.5).softmax(0)
                o_BHND[b, h, n] = weights @ v[b, h, keys]
        if self.training and self.distill > 0:
            self.auxiliary = self.distill / self.site.layers * loss
        return o_BHND

    def _guess(self, q_D: Tensor, k_ND: Tensor, real: list[int]) -> Tensor:
        """One row of Â at the real keys."""
        q_F, sums = self.q_reduce(q_D), []
        for column in range(self.maps):
            weighed = sum(self.down[m, column] * self.k_reduce(k_ND[m]) for m in real)
            sums.append(q_F @ weighed / math.sqrt(self.site.heads) if real else q_F.sum() * 0)
        shares = torch.stack(sums).softmax(0)
        best = sorted(range(self.maps), key=lambda i: (-float(shares[i].detach()), i))[: self.coefficients]
        guess = wide(q_D).new_zeros(len(real))
        for i in best:
            if shares[i] > self.coefficient_threshold:
                height = self.up[real, i].abs()
                guess = guess + shares[i] * height * (height > self.basis_threshold)
        return guess

    def count(self, sizes: Sizes) -> Cost:
        """The guess, and two products per pair; the torch backend multiplies all entries and all pairs.

        With a threshold what tokens say decides how many pairs there are: all are counted as useful.
        """
        queries = sizes.queries - sizes.grid.prefix
        groups, size, tokens = sizes.batch * self.site.heads, self.site.head_dim, sizes.keys
        reducing = self.features * (size + self.maps) * (tokens + queries)
        pairs = sizes.grid.prefix * tokens + queries * (self.budget if self.threshold is None else tokens)
        mixed = self.maps if self.coefficients is None else self.coefficients
        flops = 2 * groups * (reducing + queries * mixed * tokens + 2 * size * pairs)
        executed = 2 * groups * (reducing + queries * self.maps * tokens + 2 * size * sizes.queries * tokens)
        return Cost(flops, executed, groups * pairs if self.threshold is None else 0)
