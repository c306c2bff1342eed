"""Mixture of attention experts: every token asks all of them, and a router says how much each counts.

    y_n = Σ_e g_e(x_n) W_o^e o_n^e,     g = softmax(W_r x),     o^e = softmax((W_q^e x)(W_k^e s)ᵀ / √D) W_v^e s

The E experts are whole softmax attentions with queries and outputs of their own; s is x itself or the context. With
`kv="expert"` each has its own keys and values, and a cache; with `kv="shared"` one W_k and W_v serve all, and one
cache. Routing is soft: no expert is left out and nothing has to be balanced. Gates multiply behind each
expert's output projection. Queries and keys of self-attention turn with the position, no projection has a bias.

The experts are meant to be dense layers trained on different data, see `attlas.adapt.upcycle`: gates sum to 1, so
that a mixture of copies is the dense layer whatever the router says.

x (B, N, C), q (B, H, N, D), k, v (B, G, M, D) per expert. Time E times that of one attention; the state is a
key/value cache of 2 G D numbers per token, E times that with own keys and values.

Source: Zhang et al., "BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts", 2024
(arXiv:2408.08274). A reconstruction without official code, that reproduces the published parameter counts.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Spec
from attlas.core.state import KVCache
from attlas.ops.precision import wide
from attlas.ops.rotary import rotate
from attlas.ops.softmax import attention_weights, repeat_heads, softmax_attention

SPEC = Spec(
    name="bam",
    title="BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts",
    year=2024,
    paper="arXiv:2408.08274",
    equation="y = Σ_e softmax(W_r x)_e W_oᵉ softmax(qᵉ kᵉᵀ / √D) vᵉ",
    complexity="O(N² D) time per expert, O(N D) state",
    patterns=ALL_PATTERNS,
    grids=(1,),
    prefix=False,
    masks=EVERY_MASK,
    streams=True,
    examples=(
        Example(parameters=4 * 4 * 16 * 16 + 16 * 4),
        Example(
            heads=4,
            grid=(9,),
            params={"experts": 3, "kv": "shared", "heads_per_kv": 2},
            parameters=3 * 2 * 16 * 16 + 2 * 16 * 8 + 16 * 3,
        ),
        Example(params={"experts": 2, "base": None}, parameters=2 * 4 * 16 * 16 + 16 * 2),
    ),
    reconstruction=True,
)


class BAMState(NamedTuple):
    """One cache per expert, or a single one, and how many tokens came before."""

    caches: tuple[KVCache, ...]
    position: int


def _projections(count: int, dim: int, width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(dim, width, bias=False) for _ in range(count))


@register(SPEC)
class BAM(Mixer):
    """Mixture of attention experts.

    Args:
        site: where it is installed; heads divide dim, and are those of each expert.
        backend: of `softmax_attention`.
        experts: how many; the seed and its three specialists in the paper.
        kv: "expert" for keys and values of each expert's own, "shared" for one set.
        heads_per_kv: query heads that share a key/value head.
        base: of the rotary positions; None for none.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        experts: int = 4,
        kv: str = "expert",
        heads_per_kv: int = 1,
        base: float | None = 10000.0,
    ) -> None:
        super().__init__(site, backend)
        dim, heads = site.dim, site.heads
        if dim % heads:
            raise BadInput(f"heads must divide dim: {dim} channels do not split into {heads} heads")
        if heads_per_kv < 1 or heads % heads_per_kv:
            raise BadInput(f"heads_per_kv divides the {heads} heads, got {heads_per_kv}")
        if experts < 1:
            raise BadInput(f"a mixture has at least one expert, got {experts}")
        if kv not in ("expert", "shared"):
            raise BadInput(f"kv is 'expert' or 'shared', got {kv!r}")
        self.size, self.kv_heads = dim // heads, heads // heads_per_kv
        if base is not None and self.size % 2:
            raise BadInput(
                f"rotary positions turn pairs of features and the head size {self.size} is odd: take base=None"
            )
        self.base = base
        sets = experts if kv == "expert" else 1
        self.router = nn.Linear(dim, experts, bias=False)
        self.q_proj, self.out_proj = _projections(experts, dim, dim), _projections(experts, dim, dim)
        shared = self.kv_heads * self.size
        self.k_proj, self.v_proj = _projections(sets, dim, shared), _projections(sets, dim, shared)

    def gates(self, x_BNC: Tensor) -> Tensor:
        """How much each expert counts for each token, (B, N, E)."""
        return wide(self.router(x_BNC)).softmax(-1)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """One fused attention per expert, added up under the gates."""
        x, source = self._tokens(x_BNC, context_BMC, call.mask)
        start = None if call.cross else 0
        return self._mix(x, list(self._keys(source, start)), start, call.mask)

    def _tokens(self, x_BNC: Tensor, context_BMC: Tensor | None, mask: Mask) -> tuple[Tensor, Tensor]:
        """Queries and what they look at, with nothing where there is padding."""
        source = x_BNC if context_BMC is None else context_BMC
        self._check_tokens("context", source, self.site.dim)
        if mask.keys is not None:
            source = source.where(mask.keys.unsqueeze(-1), 0)
        return source if context_BMC is None else x_BNC, source

    def _keys(self, source_BMC: Tensor, start: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values (B, G, M, D) of each set."""
        for k_proj, v_proj in zip(self.k_proj, self.v_proj, strict=True):
            yield self._turned(k_proj(source_BMC), start), self._split(v_proj(source_BMC))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size)).transpose(1, 2)

    def _turned(self, x: Tensor, start: int | None) -> Tensor:
        x_BHND = self._split(x)
        return x_BHND if start is None or self.base is None else rotate(x_BHND, start, base=self.base)

    def _mix(self, x_BNC: Tensor, keys: list[tuple[Tensor, Tensor]], start: int | None, mask: Mask) -> Tensor:
        gates_BNE = self.gates(x_BNC)
        y_BNC = x_BNC.new_zeros(())
        for expert, (q_proj, out_proj) in enumerate(zip(self.q_proj, self.out_proj, strict=True)):
            k, v = keys[expert % len(keys)]
            o = softmax_attention(self._turned(q_proj(x_BNC), start), k, v, mask, backend=self.backend)
            y_BNC = y_BNC + gates_BNE[..., expert, None] * out_proj(o.transpose(1, 2).flatten(2))
        return y_BNC.to(x_BNC.dtype)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """All experts as one stack of matrices, shared keys and values written out for each."""
        x, source = self._tokens(x_BNC, context_BMC, call.mask)
        heads, experts = self.site.heads, len(self.q_proj)
        w_q, w_k, w_v, w_o = (
            torch.stack(list(proj.parameters())) for proj in (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        )
        q_EBHND = torch.einsum("bnc,ehdc->ebhnd", x, w_q.unflatten(1, (heads, -1)))
        k_EBGMD, v_EBGMD = (
            torch.einsum("bmc,egdc->ebgmd", source, w.expand(experts, -1, -1).unflatten(1, (self.kv_heads, -1)))
            for w in (w_k, w_v)
        )
        if not call.cross and self.base is not None:
            q_EBHND, k_EBGMD = self._turned_as_complex(q_EBHND), self._turned_as_complex(k_EBGMD)
        o_EBHND = torch.stack(
            [
                attention_weights(q, k, call.mask) @ repeat_heads(v, heads)
                for q, k, v in zip(q_EBHND, k_EBGMD, v_EBGMD, strict=True)
            ]
        )
        answers_EBNC = torch.einsum("ebhnd,echd->ebnc", o_EBHND, w_o.unflatten(2, (heads, -1)))
        scores_BNE = torch.einsum("bnc,ec->bne", x, self.router.weight).exp()
        return torch.einsum("bne,ebnc->bnc", scores_BNE / scores_BNE.sum(-1, keepdim=True), answers_EBNC)

    def _turned_as_complex(self, x_EBHND: Tensor) -> Tensor:
        assert self.base is not None
        pairs = self.size // 2
        place, pair = (torch.arange(size, device=x_EBHND.device).to(x_EBHND) for size in (x_EBHND.shape[3], pairs))
        angle = place[:, None] * self.base ** (-pair / pairs)
        turned = torch.complex(x_EBHND[..., :pairs], x_EBHND[..., pairs:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    def count(self, sizes: Sizes) -> Cost:
        """Every expert's projections and attention, and the router."""
        batch, dim, queries, keys = sizes.batch, self.site.dim, sizes.queries, sizes.keys
        experts, sets = len(self.q_proj), len(self.k_proj)
        per_query = dim * experts * (2 * dim + 1)
        per_key = dim * sets * 2 * self.kv_heads * self.size
        fixed = 2 * batch * (queries * per_query + keys * per_key)
        mask = Mask(causal=self.site.causal and not sizes.cross)
        pairs = mask.area(queries, keys, batch, experts * self.site.heads)
        return Cost(fixed + 4 * pairs * self.size, fixed + 4 * batch * experts * queries * keys * dim, pairs)

    def start(self, batch: int, like: Tensor) -> BAMState:
        """Empty caches."""
        return BAMState(tuple(KVCache.empty(batch, self.kv_heads, self.size, self.size, like) for _ in self.k_proj), 0)

    def advance(self, x_BNC: Tensor, state: BAMState, keep: Tensor | None) -> tuple[Tensor, BAMState]:
        """Every expert attends to its cache and the segment itself."""
        x, _ = self._tokens(x_BNC, None, Mask(keys=keep))
        new = self._keys(x, state.position)
        caches = tuple(cache.append(k, v, keep) for cache, (k, v) in zip(state.caches, new, strict=True))
        real = caches[0].keep
        mask = Mask(causal=True, keys=None if real is None else real.rows[:, 0], queries=keep)
        y = self._mix(x, [(cache.k.rows, cache.v.rows) for cache in caches], state.position, mask)
        return y, BAMState(caches, state.position + x_BNC.shape[1])
