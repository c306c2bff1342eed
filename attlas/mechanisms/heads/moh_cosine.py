"""Mixture-of-head attention by angles: the last stage of MoH-ViT.

    o_n,h = g_h(x_n) Σ_m softmax_m(τ_h log N (q_n / |q_n| + e_h) · k_m / |k_m| + b_h(n - m)) v_m

τ is a softplus, 1 / 0.24 at first, e a learned vector for each head, b an MLP of the distance on either axis. The gates
g are those of the mechanism `moh`: shared heads always count, and of the others those that the token picks.

x (B, N, C), q, k, v (B, H, N, D). Time O(N² D) on active heads; the backends compute all.

Source: Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024 (arXiv:2410.11842), official code
SkyworkAI/MoH, on Shi's TransNeXt (arXiv:2311.17132).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.head_gates import HIDDEN, DistanceBias, HeadGates
from attlas.ops.softmax import softmax_attention

START = math.log(math.exp(1 / 0.24) - 1)

SPEC = Spec(
    name="moh_cosine",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    year=2024,
    paper="arXiv:2410.11842",
    equation="o_h = g_h(x) softmax(τ log N (q̂ + e) k̂ᵀ + b) v, most g_h = 0",
    complexity="O(N² D) time on active heads",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2,),
    prefix=False,
    masks=frozenset(),
    examples=(
        Example(
            grid=(3, 4),
            heads=4,
            parameters=4 * (16 * 16 + 16) + 4 + 16 + (3 * HIDDEN + 4 * HIDDEN + 4) + 16 * (3 + 2),
        ),
        Example(
            grid=(2, 3),
            params={"shared_heads": 2},
            parameters=4 * (16 * 16 + 16) + 2 + 16 + (3 * HIDDEN + 2 * HIDDEN + 2) + 16 * 2,
        ),
    ),
)


@register(SPEC)
class MoHCosine(Mixer):
    """Cosine attention whose heads each token picks.

    Args:
        site: where it is installed; it has to know its grid. The balance loss is divided by its number of layers.
        backend: of the softmax attention.
        shared_heads: heads that every token uses; a quarter of all by default.
        active_heads: how many of the other heads a token uses; half of all by default.
        balance: coefficient of the balance loss.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        shared_heads: int | None = None,
        active_heads: int | None = None,
        balance: float = 0.01,
    ) -> None:
        super().__init__(site, backend)
        dim, heads = site.dim, site.heads
        if dim % heads:
            raise BadInput(f"heads must divide dim: {dim} channels do not split into {heads} heads")
        if site.grid is None:
            raise BadInput("moh_cosine measures distances by the grid that it is trained on: pass grid=(height, width)")
        self.qkv_proj, self.out_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), START))
        self.query = nn.Parameter(torch.empty(heads, 1, dim // heads))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.bias = DistanceBias(heads, site.grid.shape)
        self.router = HeadGates(dim, heads, shared_heads, active_heads, balance / site.layers)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """One attention, whose scale is in the queries."""
        q, k, v = (
            part.unflatten(-1, (self.site.heads, -1)).transpose(1, 2) for part in self.qkv_proj(x_BNC).chunk(3, -1)
        )
        sharpness = F.softplus(self.temperature) * math.log(x_BNC.shape[1]) * q.shape[-1] ** 0.5
        q = ((F.normalize(q, dim=-1) + self.query) * sharpness).to(v.dtype)
        bias = self.bias(call.grid.shape, call.grid.shape).to(v.dtype)
        o = softmax_attention(q, F.normalize(k, dim=-1).to(v.dtype), v, Mask(bias=bias[None]), backend=self.backend)
        gates_BNH = self.router(x_BNC)
        self.auxiliary = self.router.auxiliary
        return self.out_proj((o.transpose(1, 2) * gates_BNH.unsqueeze(-1).to(o.dtype)).flatten(2))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Head by head and query by query."""
        size, gates = self.site.dim // self.site.heads, self.router.oracle(x_BNC)
        self.auxiliary = self.router.auxiliary
        projected = torch.einsum("bnc,ec->bne", x_BNC, self.qkv_proj.weight) + self.qkv_proj.bias
        places = call.grid.places().to(x_BNC)
        heads = []
        for h in range(self.site.heads):
            q, k, v = (part[..., h * size : (h + 1) * size] for part in projected.chunk(3, -1))
            q, k = (part / part.norm(dim=-1, keepdim=True).clamp(min=1e-12) for part in (q, k))
            tau = (1 + self.temperature[h].exp()).log() * math.log(x_BNC.shape[1])
            rows = []
            for n, place in enumerate(places):
                scores = torch.einsum("bd,bmd->bm", (q[:, n] + self.query[h]) * tau, k) + self._bias(place - places, h)
                raised = (scores - scores.amax(1, keepdim=True)).exp()
                rows.append(torch.einsum("bm,bmd->bd", raised / raised.sum(1, keepdim=True), v) * gates[:, n, h, None])
            heads.append(torch.stack(rows, 1))
        return torch.cat(heads, -1) @ self.out_proj.weight.T + self.out_proj.bias

    def _bias(self, apart_M2: Tensor, h: int) -> Tensor:
        ruler = apart_M2.new_tensor([max(1, length - 1) for length in self.bias.trained])
        d = 8 * apart_M2 / ruler
        t = d.sign() * (1 + d.abs()).log2() / 3
        hidden = (t @ self.bias.fc1.weight.T + self.bias.fc1.bias).clamp(min=0)
        return hidden @ self.bias.fc2.weight[h] + self.bias.fc2.bias[h]

    def count(self, sizes: Sizes) -> Cost:
        """Projections, the bias, and two products for each pair of an active head; torch multiplies those of all."""
        batch, tokens, dim, heads = sizes.batch, sizes.queries, self.site.dim, self.site.heads
        routing = sum(part.weight.numel() for part in self.router.modules() if isinstance(part, nn.Linear))
        around = 2 * batch * tokens * (4 * dim * dim + routing) + self.bias.flops(sizes.grid.shape, sizes.grid.shape)
        pairs = batch * (self.router.shared + self.router.active) * tokens * tokens
        each = 4 * dim // heads
        return Cost(around + each * pairs, around + each * batch * heads * tokens * tokens, pairs)
