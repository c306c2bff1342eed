"""Forward cross-attention: a layer also sees a few tokens that earlier layers handed on.

    y = W_o concat_h softmax([q kᵀ / √D + b_|Δ| ; q k_sᵀ / √D + b_s]) [v ; v_s]

q, k, v of the tokens x, and k_s, v_s, through the same projections, of LN(λ ⊙ s), where s are the tokens that earlier
layers handed on, all in one sequence: the context of cross-attention. One softmax runs over both. λ is a number for
each handed token (1 at first), b_s one for each head and handed token, b_|Δ| one for each head and pair of distances on
the axes of the grid (both 0 at first), whatever their signs. In self-attention, the first layer of a stage, there is
no s. λ = 0 does not silence a token, since LN's own bias is left; b_s = -∞ does. Prefix tokens, ours, have no b_|Δ|.

x is normalised by the block around, s here. `attlas.blocks.fcaformer` makes the tokens that are handed on and hands
them on: `FcaBlock`, `FcaStage`.

x (B, N, C), s (B, M, C) -> (B, N, C); q (B, H, N, D). A layer has its number M of handed tokens, and a grid not larger
than that which it was built for. Time O(N (N + M) C), of which M = 80 at most beside N = 196 are handed in the paper.

Source: Zhang et al., "FcaFormer: Forward Cross Attention in Hybrid Vision Transformer", 2022 (arXiv:2211.07198),
official code hkzhang-git/FcaFormer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.softmax import softmax_attention

SELF = frozenset({Pattern.NONCAUSAL_SELF})
CROSS = frozenset({Pattern.NONCAUSAL_CROSS})
PROJECTIONS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="fcaformer",
    title="FcaFormer: Forward Cross Attention in Hybrid Vision Transformer",
    year=2022,
    paper="arXiv:2211.07198",
    equation="y = softmax([q kᵀ / √D + b ; q k_sᵀ / √D + b_s]) [v ; v_s]",
    complexity="O(N (N + M) C) time",
    patterns=SELF | CROSS,
    examples=(
        Example(grid=(3, 4), parameters=PROJECTIONS + 2 * 12, patterns=SELF),
        Example(grid=(2, 3), params={"handed": 9}, parameters=PROJECTIONS + 2 * 6 + 2 * 16 + 9 + 2 * 9, patterns=CROSS),
        Example(
            grid=(2, 2),
            prefix=1,
            heads=4,
            params={"handed": 8, "bias": False},
            parameters=4 * 16 * 16 + 16 + 4 * 4 + 2 * 16 + 8 + 4 * 8,
            patterns=CROSS,
        ),
    ),
)


@register(SPEC)
class FcaFormer(Mixer):
    """Forward cross-attention.

    Args:
        site: where it is installed; the bias needs its grid.
        backend: of the softmax attention.
        handed: how many tokens earlier layers hand on; 0 for the first layer, which is self-attention.
        bias: of the query, key and value projections.
    """

    def __init__(self, site: Site, backend: str = "auto", *, handed: int = 0, bias: bool = True) -> None:
        super().__init__(site, backend)
        dim, heads = site.dim, site.heads
        if dim % heads:
            raise BadInput(f"heads must divide dim: {dim} channels do not split into {heads} heads")
        if handed < 0:
            raise BadInput(f"handed counts the tokens of earlier layers, 0 for none, got {handed}")
        if site.grid is None:
            raise BadInput(
                "fcaformer has a bias for every pair of distances on the grid that it is trained on: pass "
                "grid=(height, width) when building it"
            )
        self.handed, self.shape = handed, site.grid.shape
        self.q_proj, self.kv_proj = nn.Linear(dim, dim, bias), nn.Linear(dim, 2 * dim, bias)
        self.out_proj = nn.Linear(dim, dim)
        self.position_bias = nn.Parameter(torch.zeros(heads, *self.shape))
        if handed:
            self.handed_scale = nn.Parameter(torch.ones(handed))
            self.handed_norm = nn.LayerNorm(dim)
            self.handed_bias = nn.Parameter(torch.zeros(heads, handed))

    def _seen(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> tuple[Tensor, Tensor | None, Tensor]:
        """Tokens whose keys are seen, which of them are real, and the bias (1, H, N, N + M); padding is 0."""
        self._check_call(context_BMC, call.grid)
        own = call.mask.keys if context_BMC is None else call.mask.queries
        bias = self._position_bias(call.grid)
        x_BNC = _blank(x_BNC, own)
        if context_BMC is None:
            return x_BNC, own, bias
        keep = call.mask.keys
        context_BMC = _blank(context_BMC, keep)
        if own is not None or keep is not None:
            own, keep = (
                tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if real is None else real
                for tokens, real in ((x_BNC, own), (context_BMC, keep))
            )
            own = torch.cat([own, keep], 1)
        handed_BMC = self.handed_norm(context_BMC * self.handed_scale.unsqueeze(-1)).to(x_BNC.dtype)
        handed_bias = self.handed_bias[None, :, None].expand(-1, -1, bias.shape[2], -1)
        return torch.cat([x_BNC, handed_BMC], 1), own, torch.cat([bias, handed_bias], -1)

    def _check_call(self, context_BMC: Tensor | None, grid: Grid) -> None:
        given = 0 if context_BMC is None else context_BMC.shape[1]
        if context_BMC is not None:
            self._check_tokens("context", context_BMC, self.site.dim)
        if given != self.handed:
            raise BadInput(
                f"this layer was built for {self.handed} tokens of earlier layers and called with {given}; "
                f"build it with handed={given}"
            )
        if grid.rank != len(self.shape):
            raise BadInput(f"this layer has biases for distances on {len(self.shape)} axes, got a {grid}")
        if any(a > b for a, b in zip(grid.shape, self.shape, strict=True)):
            raise BadInput(f"this layer has biases for distances on a {Grid(self.shape)}, got a larger {grid}")

    def _position_bias(self, grid: Grid) -> Tensor:
        """b of every pair of tokens, (1, H, N, N)."""
        places_NR = grid.places(self.position_bias.device)
        entry_NN, *others = (places_NR.unsqueeze(1) - places_NR).abs().unbind(-1)
        for length, apart_NN in zip(self.shape[1:], others, strict=True):
            entry_NN = entry_NN * length + apart_NN
        bias_HNN = self.position_bias.flatten(1)[:, entry_NN]
        return F.pad(bias_HNN, (grid.prefix, 0, grid.prefix, 0)).unsqueeze(0)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """One attention over the tokens and those handed on."""
        seen_BMC, keep, bias = self._seen(x_BNC, context_BMC, call)
        heads = self.site.heads
        q = self.q_proj(_blank(x_BNC, call.mask.queries)).unflatten(-1, (heads, -1)).transpose(1, 2)
        k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in self.kv_proj(seen_BMC).chunk(2, -1))
        o = softmax_attention(q, k, v, Mask(keys=keep, bias=bias.to(q.dtype)), backend=self.backend)
        return self.out_proj(o.transpose(1, 2).flatten(2))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Head by head and query by query, the scores of both kinds of keys side by side."""
        self._check_call(context_BMC, call.grid)
        real_BN = call.mask.keys if context_BMC is None else call.mask.queries
        asking_BNC = x_BNC if call.mask.queries is None else x_BNC.where(call.mask.queries.unsqueeze(-1), 0)
        batch, tokens, dim = x_BNC.shape
        prefix, size = call.grid.prefix, dim // self.site.heads
        places = call.grid.places().tolist()
        y_BNC = []
        for b in range(batch):
            own = [n for n in range(tokens) if real_BN is None or real_BN[b, n]]
            sources, names = [x_BNC[b, n] for n in own], [("own", n) for n in own]
            for m in range(self.handed):
                if context_BMC is not None and (call.mask.keys is None or call.mask.keys[b, m]):
                    sources.append(self.handed_norm(self.handed_scale[m] * context_BMC[b, m]))
                    names.append(("handed", m))
            k_MC, v_MC = self.kv_proj(torch.stack(sources)).chunk(2, -1) if sources else x_BNC[b].new_zeros(2, 0, dim)
            rows = []
            for n in range(tokens):
                q_C, heads = self.q_proj(asking_BNC[b, n]), []
                for h in range(self.site.heads):
                    part, bias = slice(h * size, (h + 1) * size), []
                    for kind, m in names:
                        if kind == "handed":
                            bias.append(self.handed_bias[h, m])
                        elif min(n, m) < prefix:
                            bias.append(q_C.new_zeros(()))
                        else:
                            bias_S = self.position_bias[h]
                            for i, j in zip(places[n - prefix], places[m - prefix], strict=True):
                                bias_S = bias_S[abs(i - j)]
                            bias.append(bias_S)
                    scores = k_MC[:, part] @ q_C[part] / math.sqrt(size)
                    weights = (scores + torch.stack(bias)).softmax(0) if bias else scores
                    heads.append(weights @ v_MC[:, part])
                rows.append(self.out_proj(torch.cat(heads)))
            y_BNC.append(torch.stack(rows))
        return torch.stack(y_BNC)

    def count(self, sizes: Sizes) -> Cost:
        """Projections, and two products for every pair of a token and a token that it sees."""
        dim, batch, queries = self.site.dim, sizes.batch, sizes.queries
        keys = queries + (sizes.keys if sizes.cross else 0)
        flops = batch * (4 * queries * dim**2 + 4 * keys * dim**2 + 4 * queries * keys * dim)
        return Cost(flops, flops, batch * self.site.heads * queries * keys)


def _blank(x_BNC: Tensor, keep_BN: Tensor | None) -> Tensor:
    return x_BNC if keep_BN is None else x_BNC.masked_fill(~keep_BN.unsqueeze(-1), 0)
