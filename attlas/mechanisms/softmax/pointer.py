"""Pointer attention: additive scores, read as a choice among the keys or as weights of their mean.

    u_nm = vᵀ tanh(W₁ e_m + W₂ d_n)                   (with clip c:  u = c tanh(u))
    pointing   p(m | n) = softmax_m(u_nm)             a distribution over the inputs themselves
    glimpsing  y_n = Σ_m softmax_m(u_nm) e_m          the blend of them that content-based attention gives

d (queries) are x, e (keys) are the context. `point` is the pointer network's step: there is no value and nothing
is blended, what is chosen is a position, so that the dictionary of outputs grows with the input. Calling the layer
glimpses, as the decoders before pointer networks did and as neural combinatorial optimisation does before it points.
The three matrices have no bias; there are no heads and no scale.

x (B, N, C), context (B, M, C). Time O(N M C), memory O(N M C) in training; the state keeps W₁ e and e.
`attlas.models.pointer` is the network around it.

Source: Vinyals et al., "Pointer Networks", 2015 (arXiv:1506.03134); the clip is that of Bello et al., "Neural
Combinatorial Optimization with Reinforcement Learning", 2016 (arXiv:1611.09940), with c = 10. Neither has public
code of its authors.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Spec
from attlas.core.state import KVCache
from attlas.ops.pairs import dense_mask
from attlas.ops.precision import wide

SPEC = Spec(
    name="pointer",
    title="Pointer Networks",
    year=2015,
    paper="arXiv:1506.03134",
    equation="p = softmax(vᵀ tanh(W₁ e + W₂ d)),  y = p e",
    complexity="O(N² C) time, O(N C) state",
    patterns=ALL_PATTERNS,
    masks=EVERY_MASK,
    streams=True,
    examples=(
        Example(parameters=2 * 16 * 16 + 16),
        Example(grid=(2, 3), prefix=1, params={"clip": 10.0}, parameters=2 * 16 * 16 + 16),
    ),
    reconstruction=True,
)


@register(SPEC)
class Pointer(Mixer):
    """Additive attention that points and glimpses.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        clip: c, the largest score; None for scores as they are.
    """

    def __init__(self, site: Site, backend: str = "auto", *, clip: float | None = None) -> None:
        super().__init__(site, backend)
        if clip is not None and clip <= 0:
            raise BadInput(f"clip is the largest score, a positive number or None, got {clip}")
        self.clip = clip
        self.key = nn.Linear(site.dim, site.dim, bias=False)
        self.query = nn.Linear(site.dim, site.dim, bias=False)
        self.score = nn.Linear(site.dim, 1, bias=False)

    def point(self, x_BNC: Tensor, context_BMC: Tensor, mask: Mask | Tensor | None = None) -> Tensor:
        """log p(m | n), (B, N, M): -inf, a probability of exactly 0, where m is not visible to n.

        Args:
            x_BNC: the queries, such as the states of a decoder.
            context_BMC: what is pointed to.
            mask: a `Mask`, or a tensor that `Mask.of` understands, such as bool (B, M) for padding.
        """
        self._check_tokens("x", x_BNC, self.site.dim)
        self._check_tokens("context", context_BMC, self.site.dim)
        mask, _ = self._check(x_BNC.shape[0], x_BNC.shape[1], context_BMC.shape[1], True, mask, (x_BNC.shape[1],))
        u_BNM, seen = self._scores(x_BNC, self.key(_real(context_BMC, mask)), mask)
        log_p = _softmax(u_BNM, seen, torch.log_softmax)
        return log_p if seen is None else log_p.masked_fill(~seen, -torch.inf)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Glimpse at the context, or at the tokens themselves."""
        source = _real(x_BNC if context_BMC is None else context_BMC, call.mask)
        x_BNC = source if context_BMC is None else x_BNC
        return self._glimpse(x_BNC, self.key(source), source, call.mask)

    def _glimpse(self, x_BNC: Tensor, key_BMC: Tensor, source_BMC: Tensor, mask: Mask) -> Tensor:
        u_BNM, seen = self._scores(x_BNC, key_BMC, mask)
        weights_BNM = _softmax(u_BNM, seen, torch.softmax)
        if seen is not None:
            weights_BNM = weights_BNM.masked_fill(~seen, 0)
        return weights_BNM.to(source_BMC.dtype) @ source_BMC

    def _scores(self, x_BNC: Tensor, key_BMC: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
        """u (B, N, M) and which pairs are visible, (B or 1, N, M) or None for all."""
        hidden_BNMC = (self.query(x_BNC).unsqueeze(2) + key_BMC.unsqueeze(1)).tanh()
        u_BNM = wide(self.score(hidden_BNMC).squeeze(-1))
        if self.clip is not None:
            u_BNM = self.clip * u_BNM.tanh()
        if mask.bias is not None:
            u_BNM = u_BNM + _one_head(mask.bias, "bias")
        pairs = mask.pairs(u_BNM.shape[1], u_BNM.shape[2], u_BNM.device)
        return u_BNM, None if pairs is None else _one_head(pairs, "mask")

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Query by query, key by key."""
        source = _real(x_BNC if context_BMC is None else context_BMC, call.mask)
        x_BNC = source if context_BMC is None else x_BNC
        batch, queries = x_BNC.shape[:2]
        seen, bias = dense_mask(call.mask, (batch, 1, queries, source.shape[1]), x_BNC)
        w1, w2, v = self.key.weight, self.query.weight, self.score.weight[0]
        rows = []
        for b in range(batch):
            for n in range(queries):
                u, visible = [], seen[b, 0, n].nonzero().flatten().tolist()
                for m in visible:
                    u_nm = v @ torch.tanh(w1 @ source[b, m] + w2 @ x_BNC[b, n])
                    u.append((u_nm if self.clip is None else self.clip * torch.tanh(u_nm)) + bias[b, 0, n, m])
                y_C = torch.zeros_like(x_BNC[b, n])
                if visible:
                    y_C = torch.stack(u).softmax(0) @ source[b, visible]
                rows.append(y_C)
        return torch.stack(rows).view_as(x_BNC)

    def count(self, sizes: Sizes) -> Cost:
        """W₁ and W₂ for each token, the score and the mean for each pair."""
        dim, batch = self.site.dim, sizes.batch
        pairs = Mask(causal=self.site.causal and not sizes.cross).area(sizes.queries, sizes.keys, batch)
        projections = 2 * batch * (sizes.queries + sizes.keys) * dim * dim
        executed = projections + 4 * batch * sizes.queries * sizes.keys * dim
        return Cost(projections + 4 * pairs * dim, executed, pairs)

    def start(self, batch: int, like: Tensor) -> KVCache:
        """No token yet."""
        return KVCache.empty(batch, 1, self.site.dim, self.site.dim, like)

    def advance(self, x_BNC: Tensor, state: KVCache, keep: Tensor | None) -> tuple[Tensor, KVCache]:
        """Glimpse at the tokens so far and the segment's own."""
        x = x_BNC if keep is None else x_BNC.masked_fill(~keep.unsqueeze(-1), 0)
        state = state.append(self.key(x).unsqueeze(1), x.unsqueeze(1), keep)
        mask = Mask(causal=True, keys=state.keys, queries=keep)
        return self._glimpse(x, state.k.rows[:, 0], state.v.rows[:, 0], mask), state


def _real(context_BMC: Tensor, mask: Mask) -> Tensor:
    """The context with 0 as padding, which may hold anything, even NaN."""
    return context_BMC if mask.keys is None else context_BMC.masked_fill(~mask.keys.unsqueeze(-1), 0)


def _one_head(x: Tensor, what: str) -> Tensor:
    if x.shape[1] != 1:
        raise BadInput(f"pointer has one head, the {what} is for {x.shape[1]}")
    return x[:, 0]


def _softmax(u_BNM: Tensor, seen: Tensor | None, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Over the visible keys; over all where there are none, so that no NaN can enter a gradient."""
    if seen is not None:
        u_BNM = u_BNM.masked_fill(~seen & seen.any(-1, keepdim=True), -torch.inf)
    return function(u_BNM, -1)
