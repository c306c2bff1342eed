"""Heavy-hitter oracle (H2O): a cache of fixed size that keeps the newest tokens and those most attended to.

    a_t = softmax over j in S_(t-1) and t of (q_t · k_j / √D),    o_t = Σ_j a_tj v_j
    m_j = Σ_(n <= t) a_nj                                          attention that j has received
    S_t = S_(t-1) and t, without the j of smallest m_j among those that are not of the `recent` newest
          once there are more than `recent + heavy`

q, k and v (B, H, N, D). Every head has a cache of its own. What is evicted is gone for all later queries; a query sees
at most recent + heavy + 1 keys. The full pass is the decoding loop, token by token, so that prompt and answer are
treated alike. (The official code lets a prompt attend in full and evicts after it.) Eviction is greedy and carries no
gradient; of equal m the oldest goes. m is not divided by the number of queries that could see a token, as published.

Padding enters neither caches nor sums, as key or as query, and does not count as recent.

Time O(N (recent + heavy) D), one step after the other; the state is the cache and m. Training keeps the cache of every
step: memory, too, is O(N (recent + heavy) D).

Source: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", 2023
(arXiv:2306.14048), official code FMInference/H2O.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.causal_groups import every_token_asks
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import blank_padding

SPEC = Spec(
    name="h2o",
    title="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    year=2023,
    paper="arXiv:2306.14048",
    equation="o_t = softmax over the newest and the most attended keys of (q kᵀ / √D) v",
    complexity="O(N (recent + heavy) D) time, O((recent + heavy) D) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    grids=(1,),
    prefix=False,
    streams=True,
    examples=(
        Example(grid=(9,), params={"recent": 2, "heavy": 2}, parameters=4 * (16 * 16 + 16)),
        Example(grid=(7,), heads=4, params={"recent": 3, "heavy": 0}, parameters=4 * (16 * 16 + 16)),
    ),
)


class HeavyState(NamedTuple):
    """The slots of the caches, S = recent + heavy + 1 for each head, of which one is always free.

    Keys (B, H, S, D), values (B, H, S, D), attention received (B, H, S), which token of the sequence each is
    (B, H, S), -1 where a slot is free, and how many real tokens there were (B).
    """

    k: Tensor
    v: Tensor
    mass: Tensor
    token: Tensor
    taken: Tensor


@register(SPEC)
class H2O(Attend):
    """Attention with heavy-hitter eviction.

    Args:
        site: where it is installed.
        backend: `auto` or `oracle`.
        recent: newest tokens that are never evicted.
        heavy: older tokens that are kept, those with the most attention.
    """

    def __init__(self, site: Site, backend: str = "auto", *, recent: int = 512, heavy: int = 512) -> None:
        super().__init__(site, backend)
        if min(recent, heavy) < 0 or recent + heavy < 1:
            raise BadInput(f"recent and heavy make up a cache of at least one token, got {recent} and {heavy}")
        self.recent, self.heavy = recent, heavy

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """The decoding loop from an empty cache."""
        every_token_asks(q_BHND, k_BGMD)
        state = self._empty(k_BGMD, v_BGME.shape[3])
        return self._run(q_BHND, k_BGMD, v_BGME, state, call.mask.keys, call.mask.queries)[0]

    def _empty(self, like: Tensor, value_size: int) -> HeavyState:
        batch, heads, _, size = like.shape
        slots = self.recent + self.heavy + 1
        k, v = like.new_zeros(batch, heads, slots, size), like.new_zeros(batch, heads, slots, value_size)
        token = like.new_full((batch, heads, slots), -1, dtype=torch.int64)
        return HeavyState(k, v, wide(k[..., 0]), token, like.new_zeros(batch, dtype=torch.int64))

    def initial_state(self, batch: int, like: Tensor) -> HeavyState:
        """Empty caches."""
        size = self.site.head_dim
        return self._empty(like.new_empty(batch, self.site.heads, 0, size), size)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: HeavyState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, HeavyState]:
        """Token by token."""
        return self._run(q, k, v, state, keep, keep)

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, state: HeavyState, keys: Tensor | None, queries: Tensor | None
    ) -> tuple[Tensor, HeavyState]:
        everyone = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
        real, asks = (everyone if keep is None else keep for keep in (keys, queries))
        (q,) = blank_padding(asks, q)
        outputs = []
        for t in range(q.shape[2]):
            o, state = self._step(q[:, :, t], k[:, :, t], v[:, :, t], state, real[:, t], asks[:, t])
            outputs.append(o)
        return torch.stack(outputs, 2), state

    def _step(
        self, q_BHD: Tensor, k_BHD: Tensor, v_BHE: Tensor, state: HeavyState, real_B: Tensor, asks_B: Tensor
    ) -> tuple[Tensor, HeavyState]:
        """Take the token in if its key is real, attend if its query is, evict."""
        real_B11, asks_B11 = real_B[:, None, None], asks_B[:, None, None]
        slot_S = torch.arange(state.token.shape[2], device=q_BHD.device)
        free_BH1 = (state.token < 0).int().argmax(-1, keepdim=True)
        new_BHS = (slot_S == free_BH1) & real_B11
        newest_B11 = state.taken[:, None, None]
        k_BHSD = k_BHD.unsqueeze(2).where(new_BHS.unsqueeze(3), state.k)
        v_BHSE = v_BHE.unsqueeze(2).where(new_BHS.unsqueeze(3), state.v)
        token_BHS = newest_B11.where(new_BHS, state.token)
        seen_BHS = (token_BHS >= 0) & asks_B11
        with as_written(q_BHD):  # half precision would overflow, and round what decides who goes
            scores_BHS = (wide(k_BHSD) @ (wide(q_BHD) * q_BHD.shape[2] ** -0.5).unsqueeze(3)).squeeze(3)
        seeing = seen_BHS.any(-1, keepdim=True)
        weights_BHS = scores_BHS.masked_fill(~seen_BHS & seeing, -torch.inf).softmax(-1).where(seen_BHS, 0)
        o_BHE = (weights_BHS.to(v_BHSE.dtype).unsqueeze(2) @ v_BHSE).squeeze(2)
        mass_BHS = state.mass.masked_fill(new_BHS, 0) + weights_BHS.detach()
        token_BHS = token_BHS.masked_fill(self._evicted(mass_BHS, token_BHS, newest_B11), -1)
        return o_BHE, HeavyState(k_BHSD, v_BHSE, mass_BHS, token_BHS, state.taken + real_B)

    def _evicted(self, mass_BHS: Tensor, token_BHS: Tensor, newest_B11: Tensor) -> Tensor:
        """Which slot makes room, if all are taken: of the least attention, then of the oldest token."""
        may_go = (token_BHS >= 0) & (token_BHS <= newest_B11 - self.recent)
        left = mass_BHS.masked_fill(~may_go, torch.inf)
        least = may_go & (left == left.amin(-1, keepdim=True))
        token = token_BHS.masked_fill(~least, torch.iinfo(torch.int64).max)
        full = (token_BHS >= 0).all(-1, keepdim=True)
        return least & (token == token.amin(-1, keepdim=True)) & full

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """The set S of each sequence and head, written out."""
        every_token_asks(q_BHND, k_BGMD)
        batch, heads, tokens, size = q_BHND.shape
        o_BHNE = torch.zeros_like(v_BGME)
        everyone = torch.ones(batch, tokens, dtype=torch.bool)
        real, asks = (everyone if keep is None else keep for keep in (call.mask.keys, call.mask.queries))
        for b in range(batch):
            for h in range(heads):
                cached: list[int] = []
                mass = [0.0] * tokens
                for t in range(tokens):
                    if real[b, t]:
                        cached.append(t)
                    if asks[b, t] and cached:
                        weights = (k_BGMD[b, h, cached] @ q_BHND[b, h, t] / size**0.5).softmax(0)
                        o_BHNE[b, h, t] = weights @ v_BGME[b, h, cached]
                        for j, weight in zip(cached, weights.tolist(), strict=True):
                            mass[j] += weight
                    if len(cached) > self.recent + self.heavy:
                        cached.remove(min(cached[: len(cached) - self.recent], key=lambda j: (mass[j], j)))
        return o_BHNE

    def count(self, sizes: Sizes) -> Cost:
        """Two products per key in the cache; every slot is multiplied."""
        heads, size, slots = sizes.batch * self.site.heads, self.site.head_dim, self.recent + self.heavy + 1
        pairs = sum(min(t + 1, slots) for t in range(sizes.queries))
        return Cost(4 * heads * pairs * size, 4 * heads * sizes.queries * slots * size, heads * pairs)
