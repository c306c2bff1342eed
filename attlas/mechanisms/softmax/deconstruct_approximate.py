"""Softmax attention with the exponential cut off behind its square: linear attention by another name.

    o_n = Σ_m w_nm v_m / Σ_m w_nm,    w = 1 + s + s² / 2,    s_nm = q_n · k_m / √D

w is at least 1/2, so that the weights are a distribution as those of softmax are. Since s² = (q ⊗ q)·(k ⊗ k) / D,
what the past amounts to are three sums, one for each order:

    S_0 = Σ_m [v_m, 1],   S_1 = Σ_m k_m [v_m, 1]ᵀ,   S_2 = Σ_m (k_m ⊗ k_m) [v_m, 1]ᵀ,

the 1 giving the denominators. Training uses the pairs, which are fewer products up to N = D² tokens, streaming
the sums; both are exact. The paper's appendix divides each order by its own denominator and adds the three
quotients, o = o_0 + o_1 + o_2, whose second denominator, Σ_m s_nm, may be as small as it likes; the Taylor
attention that it cites divides once, which is the default. An order whose denominator is 0 gives 0.

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E); time O(N M D), one streamed token O(D² E); the state is
(1 + D + D²) (E + 1) numbers per head, in float32 at least.

Source: Xue et al., "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
2025 (arXiv:2510.11602), after Arora et al., "Simple linear attention language models balance the recall-throughput
tradeoff", 2024 (arXiv:2402.18668); no official code was found.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, Example, Spec, Takes
from attlas.ops.pairs import pair_cost
from attlas.ops.precision import wide
from attlas.ops.softmax import blank_padding

SPEC = Spec(
    name="deconstruct_approximate",
    title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    year=2025,
    paper="arXiv:2510.11602",
    equation="o = w v / w 1,  w = 1 + s + s²/2,  s = q kᵀ / √D",
    complexity="O(N² D) or O(N D³) time, O(D³) state",
    patterns=ALL_PATTERNS,
    masks=frozenset({Takes.PADDING, Takes.PAIRS}),
    streams=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(heads=4, grid=(2, 4), prefix=1, parameters=4 * (16 * 16 + 16)),
    ),
    reconstruction=True,
)


class TaylorState(NamedTuple):
    """Sums over the keys so far, of [v, 1] times 1 (B, H, 1, E + 1), k (B, H, D, E + 1), k ⊗ k (B, H, D², E + 1)."""

    zeroth: Tensor
    first: Tensor
    second: Tensor


def _orders(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones_like(s), s, s * s / 2


def _powers(x_BHND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the scores of an order are products of, but for the 1/2 of the second."""
    return torch.ones_like(x_BHND[..., :1]), x_BHND, (x_BHND.unsqueeze(-1) * x_BHND.unsqueeze(-2)).flatten(-2)


def _divided(x: Tensor, total: Tensor) -> Tensor:
    """x / total, 0 where total is."""
    return x / total.where(total != 0, 1) * (total != 0)


@register(SPEC)
class DeconstructApproximate(Attend):
    """Attention with the second-order Taylor polynomial of the exponential.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        normalisation: "joint" divides the sum of the orders once; "order" each by its own sum of weights.
    """

    def __init__(self, site: Site, backend: str = "auto", *, normalisation: str = "joint") -> None:
        super().__init__(site, backend)
        if normalisation not in ("joint", "order"):
            raise BadInput(f"normalisation is 'joint' or 'order', got {normalisation!r}")
        self.normalisation = normalisation

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """The weights of all pairs, normalised, times the values."""
        k, v = blank_padding(call.mask.keys, k_BHMD, v_BHME)
        orders = self._pairs(q_BHND, k, call.mask)
        if self.normalisation == "joint":
            orders = (orders[0] + orders[1] + orders[2],)
        weights = torch.stack([_divided(w, w.sum(-1, keepdim=True)) for w in orders]).sum(0)
        return (weights.to(v.dtype) @ v).to(v.dtype)

    def _pairs(self, q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, ...]:
        """The orders of the weights (B, H, N, M), 0 where a pair is not seen."""
        orders = _orders(wide(q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5)
        seen = mask.pairs(q.shape[2], k.shape[2], q.device)
        return orders if seen is None else tuple(order.where(seen, 0) for order in orders)

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Query by query, the terms of the polynomial one after the other."""
        queries, keys = q_BHND.shape[2], k_BHMD.shape[2]
        pairs = call.mask.pairs(queries, keys, q_BHND.device)
        rows = []
        for n in range(queries):
            s_BHM = torch.einsum("bhd,bhmd->bhm", q_BHND[:, :, n], k_BHMD) / q_BHND.shape[3] ** 0.5
            seen = torch.ones_like(s_BHM) if pairs is None else pairs[:, :, n].expand_as(s_BHM).to(s_BHM)
            terms = [seen, seen * s_BHM, seen * s_BHM**2 / 2]
            if self.normalisation == "joint":
                terms = [torch.stack(terms).sum(0)]
            row = torch.zeros_like(v_BHME[:, :, 0])
            for term in terms:
                total = term.sum(-1, keepdim=True)
                row = row + torch.einsum("bhm,bhme->bhe", term, v_BHME) / torch.where(total == 0, torch.inf, total)
            rows.append(row)
        return torch.stack(rows, 2)

    def count(self, sizes: Sizes) -> Cost:
        """Two products for each pair; the backend makes all of them."""
        return pair_cost(self.site, sizes)

    def initial_state(self, batch: int, like: Tensor) -> TaylorState:
        """Empty sums."""
        size = self.site.head_dim
        sums = (wide(like.new_zeros(batch, self.site.heads, rows, size + 1)) for rows in (1, size, size * size))
        return TaylorState(*sums)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: TaylorState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, TaylorState]:
        """The pairs within the segment and the sums before it."""
        q = wide(q) * q.shape[-1] ** -0.5
        k, v1 = blank_padding(keep, wide(k), F.pad(wide(v), (0, 1), value=1.0))
        seen = Mask(causal=True).pairs(q.shape[2], k.shape[2], q.device)
        assert seen is not None
        orders, after = [], []
        inside = _orders(q @ k.transpose(-1, -2))
        factors = (1, 1, 0.5)
        for sums, w, phi_q, phi_k, factor in zip(state, inside, _powers(q), _powers(k), factors, strict=True):
            orders.append(w.where(seen, 0) @ v1 + factor * phi_q @ sums)
            after.append(sums + phi_k.transpose(-1, -2) @ v1)
        if self.normalisation == "joint":
            orders = [orders[0] + orders[1] + orders[2]]
        o = torch.stack([_divided(x[..., :-1], x[..., -1:]) for x in orders]).sum(0)
        return o.to(v.dtype), TaylorState(*after)
