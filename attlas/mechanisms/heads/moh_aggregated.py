"""Mixture-of-head aggregated attention: a fine look around, a coarse one everywhere, and each token picks its heads.

    s_n = [ τ L_n (q̂_n + e) · k̂_{n+t} + c_t ; τ L_n (q̂_n + e) · k̂'_j + b(n - j) ],    w = softmax(s_n)
    o_n = g(x_n) (Σ_t (w_t + q̂_n · u_t + d_t) v_{n+t} + Σ_j w_j v'_j)

for every head, with q̂ = q / |q| and k̂ likewise. t runs over a window around the place as far as it is on the grid, j
over the places of a coarse map, LN(pool(GELU(W x))), r times smaller on either axis, which goes through the same key
and value projections; one softmax runs over both. L_n is the logarithm of the number of keys that n sees, τ a
softplus, 1 / 0.24 at first; e, c, u and d are learned, b an MLP of the distance. The gates g are those of the
mechanism `moh`. The terms of u and d stand outside of the softmax; they reach values that are 0 off the grid.

x (B, N, C), q (B, H, N, D). Time O(N (w² + N / r²) C) on active heads; the backends compute all.

Source: Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024 (arXiv:2410.11842), official code
SkyworkAI/MoH: the first three stages of MoH-ViT, on Shi's TransNeXt (arXiv:2311.17132).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.head_gates import HIDDEN, DistanceBias, HeadGates

START = math.log(math.exp(1 / 0.24) - 1)


def _parameters(heads: int, taps: int, routing: int) -> int:
    """At 16 channels: five projections, the coarse map's norm, what each head learns, the bias, the routers."""
    return (
        5 * (16 * 16 + 16)
        + 2 * 16
        + (heads + 16 + heads * taps + 16 * taps + heads * taps)
        + (3 * HIDDEN + heads * HIDDEN + heads)
        + 16 * routing
    )


SPEC = Spec(
    name="moh_aggregated",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    year=2024,
    paper="arXiv:2410.11842",
    equation="o_h = g_h(x) (softmax([q̂ k̂_windowᵀ ; q̂ k̂_coarseᵀ]) + [u ; 0]) [v_window ; v_coarse]",
    complexity="O(N (w² + N / r²) D) time on active heads",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2,),
    prefix=False,
    masks=frozenset(),
    examples=(
        Example(grid=(4, 5), heads=4, parameters=_parameters(4, 9, 3 + 2)),
        Example(grid=(3, 4), params={"shared_heads": 2, "reduction": 3, "window": 5}, parameters=_parameters(2, 25, 2)),
    ),
)


@register(SPEC)
class MoHAggregated(Mixer):
    """Aggregated attention whose heads each token picks.

    Args:
        site: where it is installed; it has to know its grid. The balance loss is divided by its number of layers.
        backend: `auto`, `torch` or `oracle`.
        reduction: r.
        window: places of the window on either axis, odd.
        shared_heads: heads that every token uses; a quarter of all by default.
        active_heads: how many of the other heads a token uses; half of all by default.
        balance: coefficient of the balance loss.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        reduction: int = 2,
        window: int = 3,
        shared_heads: int | None = None,
        active_heads: int | None = None,
        balance: float = 0.01,
    ) -> None:
        super().__init__(site, backend)
        dim, heads = site.dim, site.heads
        if dim % heads:
            raise BadInput(f"heads must divide dim: {dim} channels do not split into {heads} heads")
        if site.grid is None:
            raise BadInput(
                "moh_aggregated measures distances by the grid that it is trained on: pass grid=(height, width)"
            )
        if reduction < 1:
            raise BadInput(f"reduction says how many times smaller the coarse map is, at least 1, got {reduction}")
        if window < 1 or window % 2 == 0:
            raise BadInput(f"the window is centred, so its size is odd; got {window}")
        self.reduction, self.window, taps, size = reduction, window, window**2, dim // heads
        self.q_proj, self.kv_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.coarse_proj, self.coarse_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), START))
        self.query = nn.Parameter(torch.empty(heads, 1, size))
        self.window_bias = nn.Parameter(torch.empty(heads, taps))
        self.taps = nn.Parameter(torch.empty(heads, size, taps))
        self.tap_bias = nn.Parameter(torch.zeros(heads, 1, taps))
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.trunc_normal_(self.taps, std=0.02)
        nn.init.trunc_normal_(self.window_bias, std=0.0004)
        self.bias = DistanceBias(heads, site.grid.shape)
        self.router = HeadGates(dim, heads, shared_heads, active_heads, balance / site.layers)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Windows by unfolding, the coarse map by products, one softmax."""
        grid, coarse = call.grid, self._coarse_shape(call.grid)
        q_BHND = F.normalize(self._heads(self.q_proj(x_BNC)), dim=-1)
        seen_N1 = self._seen(grid, x_BNC)
        lengths_N1 = (seen_N1 + math.prod(coarse)).log()
        sharp_BHND = (q_BHND + self.query) * F.softplus(self.temperature) * lengths_N1
        k_BNC, v_BNC = self.kv_proj(x_BNC).chunk(2, -1)
        k_BHND = F.normalize(self._heads(k_BNC), dim=-1)
        k_BHNDT = self._windows(k_BHND.transpose(1, 2).flatten(2), grid)
        near = torch.einsum("bhnd,bhndt->bhnt", sharp_BHND, k_BHNDT.to(sharp_BHND.dtype))
        near = (near + self.window_bias.unsqueeze(1)).masked_fill(~self._on_grid(grid, x_BNC), -torch.inf)

        map_BCS = grid.unflatten(F.gelu(self.coarse_proj(x_BNC)).transpose(1, 2), -1)
        coarse_BMC = self.coarse_norm(F.adaptive_avg_pool2d(map_BCS, coarse).flatten(2).transpose(1, 2))
        k_BHMD, v_BHMD = (self._heads(part) for part in self.kv_proj(coarse_BMC).chunk(2, -1))
        far = sharp_BHND @ F.normalize(k_BHMD, dim=-1).to(sharp_BHND.dtype).mT + self.bias(grid.shape, coarse)
        weights = torch.cat([near, far], -1).softmax(-1).to(v_BNC.dtype)
        near, far = weights.split([near.shape[-1], far.shape[-1]], -1)
        near = near + (q_BHND.to(self.taps.dtype) @ self.taps + self.tap_bias).to(near.dtype)
        o_BHND = torch.einsum("bhnt,bhndt->bhnd", near, self._windows(v_BNC, grid)) + far @ v_BHMD
        gates_BNH = self.router(x_BNC)
        self.auxiliary = self.router.auxiliary
        return self.out_proj((o_BHND.transpose(1, 2) * gates_BNH.unsqueeze(-1).to(o_BHND.dtype)).flatten(2))

    def _heads(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(-1, (self.site.heads, -1)).transpose(1, 2)

    def _windows(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """The window of every place (B, H, N, D, taps), 0 off the grid."""
        x_BCS = grid.unflatten(x_BNC.transpose(1, 2), -1)
        x_BCTN = F.unfold(x_BCS, self.window, padding=self.window // 2).unflatten(1, (x_BNC.shape[2], -1))
        return x_BCTN.unflatten(1, (self.site.heads, -1)).permute(0, 1, 4, 2, 3)

    def _on_grid(self, grid: Grid, like: Tensor) -> Tensor:
        """Which taps of every place are on the grid (N, taps)."""
        reach = torch.arange(self.window, device=like.device) - self.window // 2
        height, width = grid.shape
        rows, columns = (
            (torch.arange(length, device=like.device)[:, None] + reach).clamp(-1, length) for length in (height, width)
        )
        inside_row, inside_column = ((rows >= 0) & (rows < height)), ((columns >= 0) & (columns < width))
        return (inside_row[:, None, :, None] & inside_column[None, :, None, :]).flatten(2).flatten(0, 1)

    def _seen(self, grid: Grid, like: Tensor) -> Tensor:
        """How many taps of every place are on the grid (N, 1)."""
        return self._on_grid(grid, like).sum(-1, keepdim=True).to(torch.promote_types(like.dtype, torch.float32))

    def _coarse_shape(self, grid: Grid) -> tuple[int, int]:
        height, width = (max(1, length // self.reduction) for length in grid.shape)
        return height, width

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Head by head and place by place."""
        grid, size, gates = call.grid, self.site.dim // self.site.heads, self.router.oracle(x_BNC)
        self.auxiliary = self.router.auxiliary
        places = [tuple(place) for place in grid.places().tolist()]
        around = range(-(self.window // 2), self.window // 2 + 1)
        shape = self._coarse_shape(grid)
        smooth = x_BNC @ self.coarse_proj.weight.T + self.coarse_proj.bias
        smooth = smooth * (1 + torch.erf(smooth / 2**0.5)) / 2
        blocks = [
            [(j * length // parts, -(-(j + 1) * length // parts)) for j in range(parts)]
            for length, parts in zip(grid.shape, shape, strict=True)
        ]
        coarse, middles = [], []
        for top, bottom in blocks[0]:
            for left, right in blocks[1]:
                inside = [n for n, (y, x) in enumerate(places) if top <= y < bottom and left <= x < right]
                coarse.append(smooth[:, inside].mean(1))
                middles.append(((top + bottom - 1) / 2, (left + right - 1) / 2))
        coarse_BMC = F.layer_norm(
            torch.stack(coarse, 1), (self.site.dim,), self.coarse_norm.weight, self.coarse_norm.bias
        )
        heads = []
        for h in range(self.site.heads):
            rows = slice(h * size, (h + 1) * size)
            q = _unit(x_BNC @ self.q_proj.weight[rows].T + self.q_proj.bias[rows])
            weights, biases = (part.chunk(2) for part in (self.kv_proj.weight, self.kv_proj.bias))
            k, far_k = (_unit(x @ weights[0][rows].T + biases[0][rows]) for x in (x_BNC, coarse_BMC))
            v, far_v = (x @ weights[1][rows].T + biases[1][rows] for x in (x_BNC, coarse_BMC))
            outputs = []
            for n, (y, x) in enumerate(places):
                near = [
                    (t, places.index(place))
                    for t, place in enumerate((y + dy, x + dx) for dy in around for dx in around)
                    if place in places
                ]
                tau = (1 + self.temperature[h].exp()).log() * math.log(len(near) + len(middles))
                asking = (q[:, n] + self.query[h]) * tau
                scores = [(asking * k[:, m]).sum(-1) + self.window_bias[h, t] for t, m in near]
                scores += [
                    (asking * far_k[:, j]).sum(-1) + self._bias(y - a, x - b, h) for j, (a, b) in enumerate(middles)
                ]
                w = torch.stack(scores, -1).softmax(-1)
                extra = [(q[:, n] * self.taps[h, :, t]).sum(-1) + self.tap_bias[h, 0, t] for t, _ in near]
                o = sum((w[:, i] + extra[i]).unsqueeze(-1) * v[:, m] for i, (_, m) in enumerate(near))
                o = o + torch.einsum("bm,bmd->bd", w[:, len(near) :], far_v)
                outputs.append(o * gates[:, n, h, None])
            heads.append(torch.stack(outputs, 1))
        return torch.cat(heads, -1) @ self.out_proj.weight.T + self.out_proj.bias

    def _bias(self, down: float, right: float, h: int) -> Tensor:
        apart = self.taps.new_tensor(
            [8 * d / max(1, length - 1) for d, length in zip((down, right), self.bias.trained, strict=True)]
        )
        t = apart.sign() * (1 + apart.abs()).log2() / 3
        hidden = (self.bias.fc1.weight @ t + self.bias.fc1.bias).clamp(min=0)
        return hidden @ self.bias.fc2.weight[h] + self.bias.fc2.bias[h]

    def count(self, sizes: Sizes) -> Cost:
        """Projections and the bias; the products of active heads, where torch multiplies those of all, and all taps."""
        batch, tokens, dim, heads = sizes.batch, sizes.queries, self.site.dim, self.site.heads
        coarse = self._coarse_shape(sizes.grid)
        keys, size, taps = math.prod(coarse), dim // heads, self.window**2
        routing = sum(part.weight.numel() for part in self.router.modules() if isinstance(part, nn.Linear))
        around = 2 * batch * (tokens * (5 * dim * dim + routing) + keys * 2 * dim * dim)
        around += self.bias.flops(sizes.grid.shape, coarse)
        near = 1
        for length in sizes.grid.shape:
            near *= sum(min(n + self.window // 2, length - 1) - max(n - self.window // 2, 0) + 1 for n in range(length))
        active = batch * (self.router.shared + self.router.active)
        needed = active * size * (6 * near + 4 * tokens * keys)
        made = batch * heads * size * tokens * (6 * taps + 4 * keys)
        return Cost(around + needed, around + made, active * (near + tokens * keys))


def _unit(x: Tensor) -> Tensor:
    """x / |x|."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
