"""Gated positional self-attention (GPSA): heads that start as the taps of a convolution and may leave it.

    A_h = (1 − σ(λ_h)) softmax_j(q_i · k_j / √D) + σ(λ_h) softmax_j(w_h · r_ij + b_h),    y = W_o concat_h A_h v

r_ij = (Δx, Δy, Δx² + Δy²) with Δ = place of key j − place of query i on a grid of any height and width; w_h are
three numbers and λ_h one, 1 at first, for each of H heads. Because r_ij is a sum of a part of the columns and a
part of the rows, so is its score: what is learned is applied to W² + H² offsets, never to N². Both terms have
rows that sum to one, so their mixture has too. b_h shifts every score of a row alike and so has no influence; it
is there because the published weights have it.

The local start needs H = K² heads: head K a + b gets w = α (2 (a − c), 2 (b − c), −1), a Gaussian around the
offset Δ = (a − c, b − c), c = (K − 1) / 2, that is narrower the larger the strength α is, and W_v starts as the
identity. At α → ∞ and σ(λ) → 1 an odd K makes the layer a K x K convolution whose tap of head h is W_o on the
channels of head h; with an even K the offsets are halves and each head averages the four places around its own.

x (B, N, C) -> (B, N, C), q, k, v (B, H, N, D). A masked pair is absent from both softmaxes; a bias belongs to
the first. Time O(N² C), memory O(N² H): two maps of N x N.

Source: d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases", 2021
(arXiv:2103.10697), official code facebookresearch/convit. Grids that are not square are ours.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput, share
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import EVERY_MASK, Example, Pattern, Spec
from attlas.ops.pairs import dense_mask
from attlas.ops.precision import as_written, wide

SPEC = Spec(
    name="convit",
    title="ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
    year=2021,
    paper="arXiv:2103.10697",
    equation="A = (1 − σ(λ)) softmax(q kᵀ / √D) + σ(λ) softmax(w · r)",
    complexity="O(N² C) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2,),
    prefix=False,
    masks=EVERY_MASK,
    examples=(
        Example(heads=4, grid=(3, 4), parameters=4 * 16 * 16 + 16 + 4 * (3 + 1) + 4),
        Example(
            heads=2,
            grid=(3, 2),
            params={"local_init": False, "bias": True},
            parameters=4 * (16 * 16 + 16) + 2 * (3 + 1) + 2,
        ),
    ),
)


def _softmax(scores_BHNM: Tensor, seen: Tensor | None) -> Tensor:
    """Over the visible keys; the row of a query that sees nothing is 0."""
    if seen is None:
        return scores_BHNM.softmax(-1)
    seeing = seen.any(-1, keepdim=True)
    return scores_BHNM.masked_fill(~seen & seeing, -torch.inf).softmax(-1) * seeing


def _without_padding(x_BNC: Tensor, mask: Mask) -> Tensor:
    """x with zeros for padding, so that not even a NaN there has a way out."""
    return x_BNC if mask.keys is None else x_BNC.masked_fill(~mask.keys.unsqueeze(-1), 0)


@register(SPEC)
class ConViT(Mixer):
    """Gated positional self-attention.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        local_init: start as a convolution, for which the heads are a square number. By default where they are.
        strength: α, how narrow the heads look at the start.
        bias: of the query, key and value projections.
        weight_dropout: share of the attention weights dropped in training.
        dropout: on the output, in training.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        local_init: bool | None = None,
        strength: float = 1.0,
        bias: bool = False,
        weight_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        dim, heads = site.dim, site.heads
        if dim % heads:
            raise BadInput(f"heads must divide dim: {dim} channels do not split into {heads} heads")
        if strength <= 0:
            raise BadInput(f"strength says how narrow the heads look and is positive, got {strength}")
        self.strength = strength
        self.weight_dropout = share("weight_dropout", weight_dropout)
        self.dropout = share("dropout", dropout)
        self.qk_proj = nn.Linear(dim, 2 * dim, bias)
        self.v_proj = nn.Linear(dim, dim, bias)
        self.out_proj = nn.Linear(dim, dim)
        self.position_proj = nn.Linear(3, heads)
        self.gate = nn.Parameter(torch.ones(heads))
        if local_init or (local_init is None and math.isqrt(heads) ** 2 == heads):
            self._start_local()

    def _start_local(self) -> None:
        heads = self.site.heads
        side = math.isqrt(heads)
        if side**2 != heads:
            raise BadInput(
                f"heads that start as the taps of a square convolution are a square number, got {heads}: "
                f"take {side**2} or {(side + 1) ** 2}, or local_init=False"
            )
        dx_H, dy_H = (Grid((side, side)).places(self.gate.device) - (side - 1) / 2).unbind(1)
        w_H3 = torch.stack([2 * dx_H, 2 * dy_H, -torch.ones_like(dx_H)], 1)
        with torch.no_grad():
            self.v_proj.weight.copy_(torch.eye(self.site.dim))
            self.position_proj.weight.copy_(self.strength * w_H3)

    @property
    def gates(self) -> Tensor:
        """σ(λ): how much of each head (H,) is positional."""
        return self.gate.sigmoid()

    def positional_scores(self, grid: Grid) -> Tensor:
        """w · r_ij + b of each head, (H, N, N), in float32 or better."""
        rows, columns = (torch.arange(size, device=self.gate.device) for size in grid.shape)
        dy_YY, dx_XX = (place.unsqueeze(0) - place.unsqueeze(1) for place in (rows, columns))
        weight_H3, bias_H = wide(self.position_proj.weight), wide(self.position_proj.bias)
        zero_YY, zero_XX = torch.zeros_like(dy_YY), torch.zeros_like(dx_XX)
        with as_written(weight_H3):
            y_YYH = F.linear(torch.stack([zero_YY, dy_YY, dy_YY**2], -1).to(weight_H3), weight_H3, bias_H)
            x_XXH = F.linear(torch.stack([dx_XX, zero_XX, dx_XX**2], -1).to(weight_H3), weight_H3)
        scores_YXYXH = y_YYH[:, None, :, None] + x_XXH[None, :, None, :]
        return scores_YXYXH.flatten(2, 3).flatten(0, 1).permute(2, 0, 1)

    def weights(self, x_BNC: Tensor, grid: Grid, mask: Mask) -> Tensor:
        """A, (B, H, N, N)."""
        heads, tokens = self.site.heads, x_BNC.shape[1]
        q_BHND, k_BHND = self.qk_proj(x_BNC).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        scores_BHNN = q_BHND @ k_BHND.transpose(-1, -2) * q_BHND.shape[-1] ** -0.5
        if mask.bias is not None:
            scores_BHNN = scores_BHNN + mask.bias
        seen = mask.pairs(tokens, tokens, x_BNC.device)
        gate_H11 = wide(self.gates)[:, None, None]
        content, position = _softmax(scores_BHNN, seen), _softmax(self.positional_scores(grid).unsqueeze(0), seen)
        return (1 - gate_H11) * content + gate_H11 * position

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Mix the two maps, then the values."""
        x_BNC = _without_padding(x_BNC, call.mask)
        v_BHND = self.v_proj(x_BNC).unflatten(-1, (self.site.heads, -1)).transpose(1, 2)
        weights_BHNN = F.dropout(self.weights(x_BNC, call.grid, call.mask), self.weight_dropout, self.training)
        o_BNC = (weights_BHNN.to(v_BHND.dtype) @ v_BHND).transpose(1, 2).flatten(2)
        return F.dropout(self.out_proj(o_BNC), self.dropout, self.training)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Head by head and query by query, with r written out."""
        x_BNC = _without_padding(x_BNC, call.mask)
        batch, tokens, dim = x_BNC.shape
        heads, size = self.site.heads, dim // self.site.heads
        q_BNC, k_BNC = self.qk_proj(x_BNC).chunk(2, -1)
        v_BNC = self.v_proj(x_BNC)
        places = call.grid.places(x_BNC.device)
        seen, bias = dense_mask(call.mask, (batch, heads, tokens, tokens), x_BNC)
        o_BNC = torch.zeros_like(x_BNC)
        for b in range(batch):
            for h in range(heads):
                own, gate = slice(h * size, (h + 1) * size), self.gate[h].sigmoid()
                for i in range(tokens):
                    js = seen[b, h, i].nonzero()[:, 0]
                    dy, dx = (places[js] - places[i]).to(x_BNC).unbind(1)
                    r = torch.stack([dx, dy, dx**2 + dy**2], 1)
                    content = (k_BNC[b, js, own] @ q_BNC[b, i, own] / math.sqrt(size) + bias[b, h, i, js]).softmax(0)
                    position = (r @ self.position_proj.weight[h] + self.position_proj.bias[h]).softmax(0)
                    o_BNC[b, i, own] = ((1 - gate) * content + gate * position) @ v_BNC[b, js, own]
        return self.out_proj(o_BNC)

    def locality(self, x_BNC: Tensor, grid: Grid | Sequence[int] | None = None) -> Tensor:
        """How far each head looks (H,): the mean over queries of Σ_j A_ij |Δ_ij|, in positions of the grid."""
        mask, grid = self._check(x_BNC.shape[0], x_BNC.shape[1], x_BNC.shape[1], False, None, grid)
        places_N2 = wide(grid.places(x_BNC.device).to(x_BNC))
        return (self.weights(x_BNC, grid, mask) * torch.cdist(places_N2, places_N2)).sum(-1).mean((0, 2))

    def count(self, sizes: Sizes) -> Cost:
        """Projections, two products over all pairs, and the scores of the offsets of rows and of columns."""
        batch, tokens, dim, heads = sizes.batch, sizes.queries, self.site.dim, self.site.heads
        offsets = sum(size**2 for size in sizes.grid.shape)
        pairs = batch * heads * tokens**2
        flops = 8 * batch * tokens * dim**2 + 4 * batch * tokens**2 * dim + 6 * heads * offsets
        return Cost(flops, flops, pairs)
