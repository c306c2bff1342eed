"""The Transformer reduced to a minimum: one similarity matrix, and the tokens themselves as values.

    y_n = Σ_m softmax_m(x_n W x_m / √C) x_m U

A head's scores see W_Q and W_K only through their product, and its output sees W_V and W_O only through theirs. One
head therefore needs one matrix W in place of W_Q W_Kᵀ and one matrix U in place of W_V W_O. Two independent
switches go on from there. `similarity`: W is any matrix ("collapsed", C² numbers), a symmetric one ("symmetric",
the C (C + 1) / 2 numbers of its lower triangle) or T Tᵀ with T lower triangular ("definite", as many numbers), under
which no token is dissimilar to itself. `values`: "collapsed" keeps U, "none" leaves it out, and every output is then
a convex combination of the tokens that came in. The default is the paper's minimum layer, symmetric and
without U: C (C + 1) / 2 parameters where attention with its MLP has 12 C². A symmetric W makes the scores symmetric,
not the weights behind the softmax. Between different sequences W compares as it does within one.

There is one head, whatever `heads` says. With several, W_Q W_Kᵀ of a head has rank C / H, and a full matrix per
head would be H C² numbers where 2 C² do: collapsing saves with one head alone.

x (B, N, C), context (B, M, C). Time O(N M C + N C²); the state is the tokens, kept once: C numbers each.

Source: Bermeitinger et al., "Reducing the Transformer Architecture to a Minimum", 2024 (arXiv:2410.13732). A
reconstruction without official code; the initial scales are ours.
"""

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Spec
from attlas.core.state import KVCache
from attlas.ops.softmax import attention_weights, softmax_attention

SPEC = Spec(
    name="minimal",
    title="Reducing the Transformer Architecture to a Minimum",
    year=2024,
    paper="arXiv:2410.13732",
    equation="y = softmax(x W xᵀ / √C) x,  W = Wᵀ",
    complexity="O(N² C) time, O(N C) state",
    patterns=ALL_PATTERNS,
    masks=EVERY_MASK,
    streams=True,
    examples=(
        Example(heads=1, parameters=16 * 17 // 2),
        Example(
            heads=1,
            grid=(9,),
            params={"similarity": "collapsed", "values": "collapsed"},
            parameters=2 * 16 * 16,
        ),
        Example(heads=1, grid=(2, 3), prefix=1, params={"similarity": "definite"}, parameters=16 * 17 // 2),
    ),
    reconstruction=True,
)


@register(SPEC)
class Minimal(Mixer):
    """One head of softmax attention with collapsed matrices.

    Args:
        site: where it is installed.
        backend: of `softmax_attention`.
        similarity: "collapsed" for any matrix W, "symmetric" for W = Wᵀ, "definite" for W = T Tᵀ.
        values: "collapsed" for one matrix behind the weights, "none" for the tokens themselves.
    """

    triangle: Tensor

    def __init__(
        self, site: Site, backend: str = "auto", *, similarity: str = "symmetric", values: str = "none"
    ) -> None:
        super().__init__(site, backend)
        for name, value, known in (
            ("similarity", similarity, ("collapsed", "symmetric", "definite")),
            ("values", values, ("collapsed", "none")),
        ):
            if value not in known:
                raise BadInput(f"{name} is one of {', '.join(map(repr, known))}, got {value!r}")
        dim = site.dim
        self.similarity = similarity
        shape = (dim, dim) if similarity == "collapsed" else (dim * (dim + 1) // 2,)
        self.weight = nn.Parameter(torch.randn(shape) * dim**-0.5)
        if similarity != "collapsed":
            triangle = torch.zeros(dim, dim, dtype=torch.long)
            row, column = torch.tril_indices(dim, dim)
            triangle[row, column] = torch.arange(len(row))
            self.register_buffer("triangle", triangle.maximum(triangle.T), persistent=False)
        self.value = nn.Linear(dim, dim, bias=False) if values == "collapsed" else nn.Identity()

    def matrix(self) -> Tensor:
        """W (C, C)."""
        if self.similarity == "collapsed":
            return self.weight
        symmetric = self.weight[self.triangle]
        if self.similarity == "symmetric":
            return symmetric
        lower = symmetric.tril()
        return lower @ lower.T

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Softmax attention of one head: queries x W, keys and values the tokens."""
        x, source = self._tokens(x_BNC, context_BMC, call.mask)
        return self._attend(x, source, call.mask)

    def _tokens(self, x_BNC: Tensor, context_BMC: Tensor | None, mask: Mask) -> tuple[Tensor, Tensor]:
        """Queries and what they look at, with nothing where there is padding."""
        source = x_BNC if context_BMC is None else context_BMC
        self._check_tokens("context", source, self.site.dim)
        if mask.keys is not None:
            source = source.where(mask.keys.unsqueeze(-1), 0)
        return source if context_BMC is None else x_BNC, source

    def _attend(self, x_BNC: Tensor, source_BMC: Tensor, mask: Mask) -> Tensor:
        q, source = (x_BNC @ self.matrix()).unsqueeze(1), source_BMC.unsqueeze(1)
        o = softmax_attention(q, source.to(q.dtype), source.to(q.dtype), mask, backend=self.backend)
        return self.value(o.squeeze(1))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Similarities entry by entry of the triangle, one query matrix in between."""
        x, source = self._tokens(x_BNC, context_BMC, call.mask)
        dim = self.site.dim
        if self.similarity == "collapsed":
            matrix: Tensor = self.weight
        else:
            rows = torch.split(self.weight, list(range(1, dim + 1)))
            lower = torch.stack([torch.cat([row, row.new_zeros(dim - len(row))]) for row in rows])
            matrix = lower @ lower.T if self.similarity == "definite" else lower + lower.tril(-1).T
        projected = torch.einsum("bnc,cd->bnd", x, matrix)
        o = (attention_weights(projected[:, None], source[:, None], call.mask) @ source[:, None])[:, 0]
        return o if isinstance(self.value, nn.Identity) else torch.einsum("bnc,dc->bnd", o, self.value.weight)

    def count(self, sizes: Sizes) -> Cost:
        """One or two matrices per query, T Tᵀ once, two products per visible pair."""
        batch, dim, queries, keys = sizes.batch, self.site.dim, sizes.queries, sizes.keys
        matrices = 1 if isinstance(self.value, nn.Identity) else 2
        fixed = 2 * batch * queries * dim * dim * matrices
        if self.similarity == "definite":
            fixed += 2 * dim**3
        pairs = Mask(causal=self.site.causal and not sizes.cross).area(queries, keys, batch)
        return Cost(fixed + 4 * pairs * dim, fixed + 4 * batch * queries * keys * dim, pairs)

    def start(self, batch: int, like: Tensor) -> KVCache:
        """No tokens yet; the values of the cache have no features, since they are the keys."""
        return KVCache.empty(batch, 1, self.site.dim, 0, like)

    def advance(self, x_BNC: Tensor, state: KVCache, keep: Tensor | None) -> tuple[Tensor, KVCache]:
        """Attend to the tokens so far and the segment itself."""
        x, _ = self._tokens(x_BNC, None, Mask(keys=keep))
        state = state.append(x.unsqueeze(1), x.new_empty(x.shape[0], 1, x.shape[1], 0), keep)
        return self._attend(x, state.k.rows[:, 0], Mask(causal=True, keys=state.keys, queries=keep)), state
