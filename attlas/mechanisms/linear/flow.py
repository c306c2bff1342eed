"""Flow attention: linear attention as a flow from sources (keys) to sinks (queries) that is conserved.

    I_n = phi(q_n) . sum_m phi(k_m)             O_m = phi(k_m) . sum_n phi(q_n)             flow in, flow out
    I'_n = phi(q_n) . sum_m phi(k_m) / O_m      O'_m = phi(k_m) . sum_n phi(q_n) / I_n      after conservation
    o_n = sigmoid(I'_n N / M) phi(q_n) / I_n . sum_m phi(k_m) (c_m v_m)^T,    c = M softmax_m(clamp(O'))

phi is the sigmoid. With every source emitting 1, sources compete for the sinks (c); with every sink taking
in 1, each sink says how much of it reaches the output. sum_n I'_n = M and sum_m O'_m = N. A causal layer
replaces every sum by the sum up to its own position t, each factor frozen when it was first known:

    i_t = t / I_t    o_t = t / O_t    I'_t = phi(q_t) . sum_{j<=t} phi(k_j) o_j / t    O'_t likewise from i
    c_t = t exp(O'_t) / sum_{j<=t} exp(O'_j)

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E); a causal layer has N = M. Both factors of the products that
give I, O, I', O' are raised by 1e-6. There is no 1 / sqrt(D). N and M count real tokens only.

Time O((N + M) D E), memory O(N D); the state is a D x E matrix, four vectors and two numbers per head.

Source: Wu et al., "Flowformer: Linearizing Transformers with Conservation Flows", 2022 (arXiv:2202.06258),
official code thuml/Flowformer.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.linear import feature_product, product_flops
from attlas.ops.precision import wide

EPS = 1e-6
LARGEST_CAUSAL_CLAMP = 40.0  # running sums of exp(40) still fit in float32

SPEC = Spec(
    name="flow",
    title="Flowformer: Linearizing Transformers with Conservation Flows",
    year=2022,
    paper="arXiv:2202.06258",
    equation="o = σ(I′) (φ(q) / I) (φ(k)ᵀ (softmax(O′) v)),  φ = σ",
    complexity="O(N D²) time, O(D²) state",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_CROSS}),
    streams=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(heads=4, grid=(2, 4), prefix=1, params={"clamp": 5.0}, parameters=4 * (16 * 16 + 16)),
    ),
)


class FlowState(NamedTuple):
    """Sums over the real tokens so far.

    Attributes:
        keys, queries: of phi(k) and phi(q), (B, H, D).
        supply, demand: of phi(k) o and phi(q) i, (B, H, D).
        powers: of exp(O'), (B, H).
        values: of phi(k) (c v)^T, (B, H, D, E).
        tokens: how many there were, (B,).
    """

    keys: Tensor
    queries: Tensor
    supply: Tensor
    demand: Tensor
    powers: Tensor
    values: Tensor
    tokens: Tensor


def flow(x_BHND: Tensor, others_BHND: Tensor) -> Tensor:
    """The flow (B, H, N) through each of `x` from or to the sum of the others, both factors raised by EPS."""
    return ((x_BHND + EPS) * (others_BHND + EPS)).sum(-1)


def flows(q_BHND: Tensor, k_BHMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flow into each sink, and flow into each sink and out of each source after conservation: I, I', O'.

    Args:
        q_BHND, k_BHMD: positive features of sinks and sources; 0 where there is none.
    """
    into = flow(q_BHND, k_BHMD.sum(2, keepdim=True))
    out = flow(k_BHMD, q_BHND.sum(2, keepdim=True))
    conserved_into = flow(q_BHND, (k_BHMD / out.unsqueeze(-1)).sum(2, keepdim=True))
    conserved_out = flow(k_BHMD, (q_BHND / into.unsqueeze(-1)).sum(2, keepdim=True))
    return into, conserved_into, conserved_out


def _features(x: Tensor, keep: Tensor | None) -> Tensor:
    x = wide(x).sigmoid()
    return x if keep is None else x.where(keep[:, None, :, None], 0)


@register(SPEC)
class Flow(Attend):
    """Flow attention.

    Args:
        site: where it is installed.
        backend: of `feature_product`.
        clamp: bound of |O'|; 1 as published for images, 5 for WikiText-103.
    """

    def __init__(self, site: Site, backend: str = "auto", *, clamp: float = 1.0) -> None:
        super().__init__(site, backend)
        if not 0 < clamp <= (LARGEST_CAUSAL_CLAMP if site.causal else float("inf")):
            raise BadInput(
                f"clamp bounds a flow: above 0, in a causal layer at most {LARGEST_CAUSAL_CLAMP}, got {clamp}"
            )
        self.clamp = clamp

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Sums over the sequence, or running sums."""
        self._check_lengths(q_BHND, k_BHMD)
        mask = call.mask
        if mask.causal:
            state = _nothing(q_BHND, v_BHME.shape[-1])
            return self._causal(q_BHND, k_BHMD, v_BHME, mask, state)[0]
        q, k, v = _features(q_BHND, mask.queries), _features(k_BHMD, mask.keys), wide(v_BHME)
        sinks, sources = _count(mask.queries, q), _count(mask.keys, k)
        into, conserved_into, conserved_out = flows(q, k)
        conserved_out = conserved_out.clamp(-self.clamp, self.clamp)
        if mask.keys is not None:
            real = mask.keys.unsqueeze(1)
            v = v.where(real.unsqueeze(-1), 0)
            # Where no source is real all compete, and none delivers: their features are 0.
            conserved_out = conserved_out.masked_fill(~(real | ~real.any(-1, keepdim=True)), -torch.inf)
        share = conserved_out.softmax(-1)
        # Sources is a factor of the queries instead of the shares: the sum is a mean, which fits any dtype.
        o, _ = feature_product(q * (sources / into).unsqueeze(-1), k, v * share.unsqueeze(-1), backend=self.backend)
        allocation = (conserved_into * (sinks / sources)).sigmoid()
        return (o * allocation.unsqueeze(-1)).to(q_BHND.dtype)

    def _check_lengths(self, q: Tensor, k: Tensor) -> None:
        if self.site.causal and q.shape[2] != k.shape[2]:
            raise BadInput(
                f"causal flow counts queries and keys together, got {q.shape[2]} queries and {k.shape[2]} "
                "keys: pass as many, or carry a state with extend"
            )

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, state: FlowState) -> tuple[Tensor, FlowState]:
        dtype, keep = q.dtype, mask.keys
        q, k, v = _features(q, mask.queries), _features(k, keep), wide(v)
        real = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if keep is None else keep
        tokens = state.tokens.unsqueeze(1) + real.cumsum(1)
        t = tokens.clamp(min=1).unsqueeze(1).to(q)
        keys, queries = _running(k, state.keys), _running(q, state.queries)
        i, o = t / flow(q, keys), t / flow(k, queries)
        supply = _running(k * o.unsqueeze(-1), state.supply)
        demand = _running(q * i.unsqueeze(-1), state.demand)
        conserved_into = flow(q, supply) / t
        conserved_out = (flow(k, demand) / t).clamp(-self.clamp, self.clamp)
        power = conserved_out.exp() * real.unsqueeze(1)
        powers = _running(power, state.powers)
        v = v.where(real[:, None, :, None], 0) * (t * power / powers.clamp(min=1e-30)).unsqueeze(-1)
        y, values = feature_product(q * (i / t).unsqueeze(-1), k, v, state.values, causal=True, backend=self.backend)
        return (y * conserved_into.sigmoid().unsqueeze(-1)).to(dtype), FlowState(
            keys[:, :, -1],
            queries[:, :, -1],
            supply[:, :, -1],
            demand[:, :, -1],
            powers[:, :, -1],
            values,
            tokens[:, -1],
        )

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Sequence by sequence, on its real tokens alone."""
        self._check_lengths(q_BHND, k_BHMD)
        formula = self._causal_oracle if call.mask.causal else self._noncausal_oracle
        outputs = []
        for b, (q, k, v) in enumerate(zip(q_BHND.sigmoid(), k_BHMD.sigmoid(), v_BHME, strict=True)):
            sinks = slice(None) if call.mask.queries is None else call.mask.queries[b]
            sources = slice(None) if call.mask.keys is None else call.mask.keys[b]
            o = v.new_zeros(q.shape[0], q.shape[1], v.shape[2])
            if k[:, sources].shape[1]:
                o[:, sinks] = formula(q[:, sinks], k[:, sources], v[:, sources])
            outputs.append(o)
        return torch.stack(outputs)

    def _noncausal_oracle(self, q_HND: Tensor, k_HMD: Tensor, v_HME: Tensor) -> Tensor:
        sinks, sources = q_HND.shape[1], k_HMD.shape[1]
        into_HN1 = flow(q_HND, k_HMD.sum(1, keepdim=True)).unsqueeze(-1)
        out_HM1 = flow(k_HMD, q_HND.sum(1, keepdim=True)).unsqueeze(-1)
        conserved_into = flow(q_HND, (k_HMD / out_HM1).sum(1, keepdim=True))
        conserved_out = flow(k_HMD, (q_HND / into_HN1).sum(1, keepdim=True))
        c_H1M = sources * conserved_out.clamp(-self.clamp, self.clamp).softmax(-1).unsqueeze(1)
        allocation = (conserved_into * sinks / sources).sigmoid()
        weights_HNM = q_HND @ k_HMD.transpose(-1, -2) / into_HN1 * c_H1M
        return allocation.unsqueeze(-1) * (weights_HNM @ v_HME)

    def _causal_oracle(self, q_HND: Tensor, k_HND: Tensor, v_HNE: Tensor) -> Tensor:
        i: list[Tensor] = []
        o: list[Tensor] = []
        powers: list[Tensor] = []
        c: list[Tensor] = []
        rows: list[Tensor] = []
        for t in range(1, q_HND.shape[1] + 1):
            q_HtD, k_HtD, v_HtE = q_HND[:, :t], k_HND[:, :t], v_HNE[:, :t]
            q_HD, k_HD = q_HtD[:, -1], k_HtD[:, -1]
            i.append(t / flow(q_HD, k_HtD.sum(1)))
            o.append(t / flow(k_HD, q_HtD.sum(1)))
            conserved_into = flow(q_HD, (k_HtD * torch.stack(o, 1).unsqueeze(-1)).sum(1)) / t
            conserved_out = flow(k_HD, (q_HtD * torch.stack(i, 1).unsqueeze(-1)).sum(1)) / t
            powers.append(conserved_out.clamp(-self.clamp, self.clamp).exp())
            c.append(t * powers[-1] / torch.stack(powers).sum(0))
            weights_Ht = (k_HtD @ q_HD.unsqueeze(-1)).squeeze(-1) * torch.stack(c, 1)
            scale_H1 = (conserved_into.sigmoid() * i[-1] / t).unsqueeze(-1)
            rows.append(scale_H1 * (weights_Ht.unsqueeze(1) @ v_HtE).squeeze(1))
        return torch.stack(rows, 1)

    def count(self, sizes: Sizes) -> Cost:
        """The products with the values; the flows are products of vectors."""
        size = self.site.head_dim
        causal = self.site.causal
        copies = sizes.batch * self.site.heads
        needed, made = product_flops(sizes.queries, sizes.keys, size, size, causal)
        pairs = Mask(causal=causal).area(sizes.queries, sizes.keys, sizes.batch, self.site.heads)
        return Cost(copies * needed, copies * made, pairs)

    def initial_state(self, batch: int, like: Tensor) -> FlowState:
        """Nothing has flowed."""
        heads, size = self.site.heads, self.site.head_dim
        return _nothing(like.new_empty(batch, heads, 0, size), size)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: FlowState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, FlowState]:
        """The causal form, from the sums before the segment."""
        return self._causal(q, k, v, Mask(causal=True, keys=keep, queries=keep), state)


def _nothing(q_BHND: Tensor, value: int) -> FlowState:
    batch, heads, _, size = q_BHND.shape
    vector = wide(q_BHND.new_zeros(batch, heads, size))
    number, matrix = vector.new_zeros(batch, heads), vector.new_zeros(batch, heads, size, value)
    tokens = vector.new_zeros(batch, dtype=torch.int64)
    return FlowState(vector, vector, vector, vector, number, matrix, tokens)


def _count(keep: Tensor | None, x_BHND: Tensor) -> Tensor | int:
    """Real tokens, as (B, 1, 1) where some are padding; 1 where none is real: nothing depends on it then."""
    return x_BHND.shape[2] if keep is None else keep.sum(1)[:, None, None].clamp(min=1).to(x_BHND)


def _running(x: Tensor, before: Tensor) -> Tensor:
    return x.cumsum(2) + before.unsqueeze(2)
