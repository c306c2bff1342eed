"""CARE: linear attention on a quarter of the channels, convolutions on two, a memory, and two steps that mix them.

    x = [mem | a | c₁ | c₂], G = C / 4 channels each
    f = [attention(a) | DW₃(c₁) | DW₇(c₂)]
    f ← f + interaction₁(f),    y = [mem | f] + interaction₂([mem | f])
    interaction(z) = W₂ DW₃(GELU(W₁ BN(z)))

with attention(a)_n = φ(q_n) (1/N) Σ_m φ(k_m) a_mᵀ / (φ(q_n) · (1/N) Σ_m φ(k_m) + ε), [q | k] = W a, φ = elu + 1: the
values are the channels themselves, and there is no output projection. Local and global information are worked out
apart, each on few channels; the interactions, wider by the ratios r₁ and r₂, let them meet, first with one another,
then with the memory, which a block hands to the next. There is no norm in front of the attention.

x (B, N, C) on a plane, C a multiple of 4 and heads a divisor of G. Padding is 0 to every convolution and enters neither
attention nor the statistics of the norms. Around it a block adds x + γ ⊙ y, with γ starting at 1e-6.

Time O(N (G² / H + r₁ C² + r₂ C²)), linear in N.

Source: Zhou et al., "CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction",
2024 (arXiv:2411.16170), official code zhouyuan888888/CARE-Transformer: its later two stages, with heads of 16 and
32 channels; the first two have strips of convolution in place of the attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput, share
from attlas.core.grid import Grid
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.batch_norm import TokenBatchNorm
from attlas.ops.elu import elu_plus_one
from attlas.ops.grid_conv import convolution_flops, depthwise, grid_convolution
from attlas.ops.linear import feature_product, product_flops
from attlas.ops.precision import wide
from attlas.ops.softmax import blank_padding

EPS = 1e-6


def _parameters(group: int, first: int, second: int) -> int:
    """Of G = `group` channels and ratios r₁, r₂."""
    mixer = group * (9 + 1) + group * (49 + 1) + group * 2 * group + 2 * group
    interactions = 0
    for dim, hidden in ((3 * group, first * 3 * group), (4 * group, second * 4 * group)):
        interactions += 2 * dim + dim * hidden + hidden + hidden * (9 + 1) + hidden * dim + dim
    return mixer + interactions


SPEC = Spec(
    name="care",
    title="CARE Transformer: Mobile-Friendly Linear Visual Transformer via Decoupled Dual Interaction",
    year=2024,
    paper="arXiv:2411.16170",
    equation="y = mix([mem | mix([φ(q) Σ φ(k) aᵀ / φ(q) Σ φ(k) | DW₃(c₁) | DW₇(c₂)])])",
    complexity="O(N C²) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2,),
    prefix=False,
    examples=(
        Example(grid=(3, 4), params={"ratios": (2, 1)}, parameters=_parameters(4, 2, 1)),
        Example(grid=(2, 3), heads=1, params={"ratios": (1, 2)}, parameters=_parameters(4, 1, 2)),
    ),
)


class Interaction(nn.Module):
    """W₂ DW₃(GELU(W₁ BN(z))) + z."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = TokenBatchNorm(dim)
        self.widen = nn.Linear(dim, hidden)
        self.conv = depthwise(hidden, 3, 2)
        self.dropout = nn.Dropout(dropout)
        self.narrow = nn.Linear(hidden, dim)

    def forward(self, z: Tensor, grid: Grid, keep: Tensor | None = None, backend: str = "auto") -> Tensor:
        """Mix channels, and each hidden one with its neighbourhood."""
        hidden = F.gelu(self.widen(self.norm(z, keep)))
        hidden = grid_convolution(hidden, self.conv.weight, self.conv.bias, grid, keep, backend=backend)
        return z + self.narrow(self.dropout(hidden))

    def oracle(self, z: Tensor, grid: Grid, keep: Tensor | None) -> Tensor:
        """The same, from the formulas."""
        hidden = self.norm.oracle(z, keep) @ self.widen.weight.T + self.widen.bias
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        hidden = grid_convolution(hidden, self.conv.weight, self.conv.bias, grid, keep, backend="oracle")
        return z + self.dropout(hidden) @ self.narrow.weight.T + self.narrow.bias

    def flops(self, grid: Grid) -> tuple[int, int]:
        """Of one sequence: what is needed, and what torch multiplies."""
        linear = 4 * grid.positions * self.widen.weight.numel()
        on_grid, multiplied = convolution_flops(grid, 3)
        return linear + self.widen.out_features * on_grid, linear + self.widen.out_features * multiplied


@register(SPEC)
class CARE(Mixer):
    """Decoupled dual interaction.

    Args:
        site: where it is installed; its heads are those of the attention on a quarter of the channels.
        backend: of `feature_product` and `grid_convolution`.
        ratios: how much wider the first and the second interaction are inside; (4, 4) in all stages of CARE-S2.
        dropout: inside the interactions, in training.
    """

    def __init__(
        self, site: Site, backend: str = "auto", *, ratios: tuple[int, int] = (4, 4), dropout: float = 0.0
    ) -> None:
        super().__init__(site, backend)
        if site.dim % 4 or (site.dim // 4) % site.heads:
            raise BadInput(
                "care splits its channels into four groups and one of them into heads: dim must be a multiple of "
                f"4 * heads = {4 * site.heads}, got {site.dim}"
            )
        if len(ratios) != 2 or min(ratios) < 1:
            raise BadInput(f"ratios are two widths, of the first and second interaction, at least 1, got {ratios}")
        dropout = share("dropout", dropout)
        self.group = group = site.dim // 4
        self.qk_proj = nn.Linear(group, 2 * group)
        self.small, self.large = depthwise(group, 3, 2), depthwise(group, 7, 2)
        self.local_global = Interaction(3 * group, ratios[0] * 3 * group, dropout)
        self.memory = Interaction(4 * group, ratios[1] * 4 * group, dropout)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Four groups, two interactions."""
        keep, grid = call.mask.keys, call.grid
        memory, attended, *convolved = self._groups(x_BNC, keep)
        features = [self._attend(attended, keep)]
        for z, conv in zip(convolved, (self.small, self.large), strict=True):
            features.append(grid_convolution(z, conv.weight, conv.bias, grid, keep, backend=self.backend))
        mixed = self.local_global(torch.cat(features, -1), grid, keep, self.backend)
        return self.memory(torch.cat([memory, mixed], -1), grid, keep, self.backend)

    def _groups(self, x_BNC: Tensor, keep: Tensor | None) -> tuple[Tensor, ...]:
        """Memory, what attends, what is convolved with the small and the large kernel; 0 for padding."""
        return (x_BNC if keep is None else x_BNC.where(keep.unsqueeze(-1), 0)).split(self.group, -1)

    def _attend(self, a_BNG: Tensor, keep: Tensor | None) -> Tensor:
        q, k, v = (
            z.unflatten(-1, (self.site.heads, -1)).transpose(1, 2)
            for z in (*self.qk_proj(a_BNG).split(self.group, -1), a_BNG)
        )
        q, v = elu_plus_one(q), wide(v)
        (k,) = blank_padding(keep, elu_plus_one(k))
        count = k.shape[2] if keep is None else keep.sum(1)[:, None, None, None].clamp(min=1)
        total = (q * (k.sum(2, keepdim=True) / count)).sum(-1, keepdim=True) + EPS
        o, _ = feature_product(q, k, v / count, backend=self.backend)
        return (o / total).transpose(1, 2).flatten(2).to(a_BNG.dtype)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Every pair's weight, head by head; convolutions tap by tap; norms of the real tokens alone."""
        keep, grid = call.mask.keys, call.grid
        real_B1M = torch.ones_like(x_BNC[:, None, :, 0]) if keep is None else keep.unsqueeze(1).to(x_BNC)
        memory, attended, small, large = self._groups(x_BNC, keep)
        features, size = [], self.group // self.site.heads
        for h in range(self.site.heads):
            rows = slice(h * size, (h + 1) * size)
            q, k = (
                F.elu(attended @ weight[rows].T + bias[rows]) + 1
                for weight, bias in zip(self.qk_proj.weight.chunk(2), self.qk_proj.bias.chunk(2), strict=True)
            )
            weights_BNM = q @ k.mT * real_B1M / real_B1M.sum(-1, keepdim=True).clamp(min=1)
            features.append(weights_BNM @ attended[..., rows] / (weights_BNM.sum(-1, keepdim=True) + EPS))
        for z, conv in ((small, self.small), (large, self.large)):
            features.append(grid_convolution(z, conv.weight, conv.bias, grid, keep, backend="oracle"))
        mixed = self.local_global.oracle(torch.cat(features, -1), grid, keep)
        return self.memory.oracle(torch.cat([memory, mixed], -1), grid, keep)

    def count(self, sizes: Sizes) -> Cost:
        """Projection, attention, convolutions and interactions; torch multiplies taps off the grid as well."""
        tokens, heads, group = sizes.queries, self.site.heads, self.group
        size = group // heads
        product, _ = product_flops(tokens, tokens, size, size, causal=False)
        needed = made = 2 * tokens * group * 2 * group + heads * product
        parts = [tuple(group * flops for flops in convolution_flops(sizes.grid, kernel)) for kernel in (3, 7)]
        for least, most in (*parts, self.local_global.flops(sizes.grid), self.memory.flops(sizes.grid)):
            needed, made = needed + least, made + most
        return Cost(sizes.batch * needed, sizes.batch * made, sizes.batch * heads * tokens * tokens)
