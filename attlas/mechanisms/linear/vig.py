"""ViG: gated linear attention in both directions over the tokens of an image, and a gate towards their surroundings.

    u = conv(x),    o_n = (S⁺_n + S⁻_n)ᵀ q_n / 2√D
    S⁺_n = diag(α⁺_n) S⁺_{n−1} + k_n v_nᵀ,    S⁻_n = diag(α⁻_n) S⁻_{n+1} + k_n v_nᵀ,    α± = σ(W_2 W_1 u + b)^(1/16)
    y_n = W_o (g_n * norm(o_n) + (1 − g_n) * norm'(u_n)),    g = σ(W_g u + b)

conv is a 3 x 3 convolution of each channel alone on the image, zeros around it; whatever follows reads u, never x. Both
directions share queries, keys and values and differ in their gates, one for each key channel, which go through `rank`
channels. A token sees itself in both, and the sum is halved. Queries and keys have `expand_k` times the channels of
the tokens. The two norms divide each head by its root mean square, with one weight per feature for all heads. ViG-S
and ViG-B have no activations; ViG-T has a SiLU behind conv and one before W_o. (The hierarchical ViG-H does not halve,
which its norm hides.)

Tokens are in the order of the rows of the image. Prefix tokens come first, pass conv unchanged and take part in all
that follows. Padding is 0 to conv and is skipped by the recurrences.

x (B, N, C), q, k, α (B, H, N, D), v (B, H, N, E). Time O(N D E H) beside the projections, memory O(N C).

Source: Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention", 2024
(arXiv:2405.18425), official code hustvl/ViG.
"""

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.gated import bidirectional_gated_attention, flops
from attlas.ops.precision import as_written, wide
from attlas.ops.recurrent import LogGates, head_size, normed_heads, projection_flops, roomy

EPS = 1e-6
ACTIVATIONS = {None: nn.Identity, "silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}

SPEC = Spec(
    name="vig",
    title="ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
    year=2024,
    paper="arXiv:2405.18425",
    equation="y = W (g norm(o) + (1 − g) norm(conv(x))),  o = gated linear attention, both ways",
    complexity="O(N D²) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2,),
    examples=(
        Example(
            dim=32,
            grid=(3, 4),
            parameters=9 * 32 + 2 * 32**2 + (32 * 16 + 16 * 32 + 32) + 2 * 16 + (32**2 + 32) + 32**2,
        ),
        Example(
            dim=24,
            heads=3,
            grid=(2, 3),
            prefix=1,
            params={"expand_k": 1.0, "rank": 4, "local_activation": "silu", "output_activation": "silu"},
            parameters=9 * 24 + 3 * 24**2 + (24 * 4 + 4 * 48 + 48) + 2 * 8 + (24**2 + 24) + 24**2,
        ),
    ),
)


@register(SPEC)
class ViG(Mixer):
    """Bidirectional gated linear attention with a local branch.

    Args:
        site: where it is installed.
        backend: of `bidirectional_gated_attention`.
        expand_k: channels of queries, keys and gates, as a multiple of dim.
        rank: channels that the gates pass through.
        divisor: of the logarithm of the gates.
        local_activation: behind the convolution: None, "silu" (ViG-T), "gelu" or "relu".
        output_activation: before the last projection, likewise.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        expand_k: float = 0.5,
        rank: int = 16,
        divisor: float = 16.0,
        local_activation: str | None = None,
        output_activation: str | None = None,
    ) -> None:
        super().__init__(site, backend)
        if site.dim % site.heads:
            raise BadInput(f"heads must divide dim: {site.dim} channels do not split into {site.heads} heads")
        self.value_size = site.dim // site.heads
        self.key_size = head_size("expand_k", expand_k, site.dim, site.heads)
        for name, kind in (("local_activation", local_activation), ("output_activation", output_activation)):
            if kind not in ACTIVATIONS:
                raise BadInput(f"{name} is one of {', '.join(map(repr, ACTIVATIONS))}, got {kind!r}")
        dim, self.keys = site.dim, site.heads * self.key_size
        self.convolution = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.local_activation = ACTIVATIONS[local_activation]()
        self.qkv_proj = nn.Linear(dim, 2 * self.keys + dim, bias=False)
        self.decay_proj = LogGates(dim, rank, 2 * self.keys, divisor)
        self.norm, self.local_norm = (nn.RMSNorm(self.value_size, eps=EPS) for _ in range(2))
        self.gate_proj = nn.Linear(dim, dim)
        self.output_activation = ACTIVATIONS[output_activation]()
        self.out_proj = nn.Linear(dim, dim, bias=False)
        for layer in (self.convolution, self.qkv_proj, *self.decay_proj, self.gate_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Convolve, run the op, gate."""
        u_BNC = self._local(_without_padding(x_BNC, call), call.grid)
        q, k, v = self._heads(roomy(self.qkv_proj(u_BNC)).split([self.keys, self.keys, self.site.dim], -1))
        gates = self._heads(self.decay_proj(u_BNC).chunk(2, -1))
        q = q * self.key_size**-0.5
        with as_written(x_BNC):
            o = bidirectional_gated_attention(q, k, v, *gates, call.mask.keys, backend=self.backend) / 2
        return self._finish(o.transpose(1, 2), u_BNC)

    def _heads(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.unflatten(-1, (self.site.heads, -1)).transpose(1, 2) for x in parts)

    def _local(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """u."""
        prefix, x = grid.split(x_BNC)
        u_BCS = self.convolution(grid.unflatten(x).permute(0, 3, 1, 2))
        return torch.cat([prefix, self.local_activation(u_BCS).flatten(2).transpose(1, 2)], 1)

    def _finish(self, o_BNHE: Tensor, u_BNC: Tensor) -> Tensor:
        local_BNC = normed_heads(u_BNC.unflatten(-1, (self.site.heads, -1)), u_BNC, EPS, self.local_norm.weight)
        gate_BNC = self.gate_proj(u_BNC).sigmoid()
        y_BNC = gate_BNC * normed_heads(o_BNHE, u_BNC, EPS, self.norm.weight) + (1 - gate_BNC) * local_BNC
        return self.out_proj(self.output_activation(y_BNC))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """The convolution tap by tap, then every pair with the gates between the two."""
        grid, heads, x_BNC = call.grid, self.site.heads, _without_padding(x_BNC, call)
        prefix, x = grid.split(x_BNC)
        places = [tuple(place) for place in grid.places().tolist()]
        taps = self.convolution.weight[:, 0]
        u = []
        for row, column in places:
            near = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (row + dy, column + dx) in places]
            terms = (taps[:, 1 + dy, 1 + dx] * x[:, places.index((row + dy, column + dx))] for dy, dx in near)
            u.append(sum(terms, torch.zeros_like(x[:, 0])))
        u_BNC = torch.cat([prefix, self.local_activation(torch.stack(u, 1))], 1)

        split = [self.keys, self.keys, self.site.dim]
        q, k, v = (wide(part).unflatten(-1, (heads, -1)) for part in self.qkv_proj(u_BNC).split(split, -1))
        gates = self.decay_proj.logits(u_BNC).sigmoid().unflatten(-1, (2, heads, -1)) ** (1 / self.decay_proj.divisor)
        if call.mask.keys is not None:
            real_BN11 = call.mask.keys[..., None, None]
            k, gates = k.where(real_BN11, 0), gates.where(real_BN11.unsqueeze(-1), 1)
        ahead, back = gates.unbind(2)
        rows = []
        for n in range(grid.tokens):
            row = torch.zeros_like(v[:, n])
            for m in range(grid.tokens):
                fade = 2 if m == n else (ahead[:, m + 1 : n + 1] if m < n else back[:, n:m]).prod(1)
                row = row + (q[:, n] * k[:, m] * fade).sum(-1, keepdim=True) / (2 * self.key_size**0.5) * v[:, m]
            rows.append(row)
        return self._finish(torch.stack(rows, 1), u_BNC)

    def count(self, sizes: Sizes) -> Cost:
        """Projections, taps, each token into two states and out of them; the torch backend also multiplies zeros."""
        dim, heads, grid = self.site.dim, self.site.heads, sizes.grid
        projections = projection_flops(self, sizes.batch * sizes.queries)
        on_image = 1
        for length in grid.shape:
            on_image *= 3 * length - 2
        needed, made = flops(sizes.queries, self.key_size, self.value_size)
        copies, per_tap = 2 * sizes.batch * heads, 2 * sizes.batch * dim
        return Cost(
            projections + per_tap * on_image + copies * needed,
            projections + per_tap * 9 * grid.positions + copies * made,
            sizes.batch * heads * sizes.queries**2,
        )


def _without_padding(x_BNC: Tensor, call: Call) -> Tensor:
    """x with zeros for padding, so that not even a NaN there has a way out."""
    return x_BNC if call.mask.keys is None else x_BNC.masked_fill(~call.mask.keys.unsqueeze(-1), 0)
