"""ULSAM: each group of channels has one map of attention over the places, and is amplified where it is high.

    a = relu(BN(w ⊙ x + b)),    s = relu(BN(v · maxpool₃(a) + c))
    y = x + x softmax_{places}(s)

Channels fall into g groups of C / g, each with its own weights: w, b and the first BN have a number per channel, v
makes of a group's channels one number per place, and the softmax runs over all places, so that a map sums to 1 and the
module begins close to the identity. The pooling takes the maximum over 3 places of every axis around a place. The
residual path is part of the module, which stands behind a convolution or in place of one.

Padding is no place: it is left out of the statistics, the maximum and the softmax. Prefix tokens have no place and stay
as they are.

tokens (B, N, C). Time O(N C), 5 C + 3 g weights; no N² matrix.

Source: Saini et al., "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
2020 (arXiv:2006.15102), official code Nandan91/ULSAM, whose norms, biases and ReLUs the paper's equation leaves out.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.batch_norm import TokenBatchNorm
from attlas.ops.grid_conv import positions
from attlas.ops.precision import as_written, wide

WINDOW = 3
MOMENTUM = 0.9

SPEC = Spec(
    name="ulsam",
    title="ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
    year=2020,
    paper="arXiv:2006.15102",
    equation="y = x + x softmax over places of (v · maxpool(w ⊙ x)), per group of channels",
    complexity="O(N C) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    examples=(
        Example(grid=(3, 4), parameters=5 * 16 + 3 * 4),
        Example(grid=(7,), prefix=1, params={"groups": 1}, parameters=5 * 16 + 3),
        Example(grid=(2, 3, 2), params={"groups": 16}, parameters=5 * 16 + 3 * 16),
    ),
)


@register(SPEC)
class ULSAM(Mixer):
    """Subspace attention.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        groups: g, a divisor of the channels.
    """

    def __init__(self, site: Site, backend: str = "auto", *, groups: int = 4) -> None:
        super().__init__(site, backend)
        if groups < 1 or site.dim % groups:
            raise BadInput(f"groups divide the channels evenly, got {groups} for {site.dim} channels")
        self.groups = groups
        self.scale = nn.Parameter(torch.empty(site.dim))
        self.shift = nn.Parameter(torch.zeros(site.dim))
        self.scale_norm = TokenBatchNorm(site.dim, momentum=MOMENTUM)
        self.point = nn.Parameter(torch.empty(groups, site.dim // groups))
        self.point_shift = nn.Parameter(torch.zeros(groups))
        self.point_norm = TokenBatchNorm(groups, momentum=MOMENTUM)
        nn.init.uniform_(self.scale, -1, 1)
        nn.init.kaiming_uniform_(self.point, a=5**0.5)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Amplify every place by its group's attention."""
        prefix, x_BPC = call.grid.split(x_BNC)
        weights_BPG = self.attention(x_BNC, call.grid, call.mask.keys).repeat_interleave(
            x_BPC.shape[2] // self.groups, 2
        )
        return torch.cat([prefix, x_BPC + x_BPC * weights_BPG], 1)

    def attention(self, x_BNC: Tensor, grid: Grid, keep_BN: Tensor | None = None) -> Tensor:
        """The map of each group over the places (B, P, g); each sums to 1."""
        x_BPC, real_BP1 = positions(x_BNC, grid, keep_BN)
        keep_BP = None if keep_BN is None else real_BP1.squeeze(-1)
        a_BPC = self.scale_norm(x_BPC * self.scale + self.shift, keep_BP).relu()
        a_BPC = _highest(a_BPC.where(real_BP1, 0), grid)
        s_BPG = (a_BPC.unflatten(-1, self.point.shape) * self.point).sum(-1) + self.point_shift
        s_BPG = self.point_norm(s_BPG, keep_BP).relu()
        with as_written(s_BPG):
            weights = wide(s_BPG).masked_fill(~real_BP1, torch.finfo(torch.float32).min).softmax(1)
        return weights.where(real_BP1, 0).to(x_BNC.dtype)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Group by group, place by place."""
        grid = call.grid
        keep = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool) if call.mask.keys is None else call.mask.keys
        prefix, x_BPC = grid.split(x_BNC)
        real_BP = keep[:, grid.prefix :]
        x_BPC = torch.where(real_BP[..., None], x_BPC, 0)
        a_BPC = self.scale_norm.oracle(x_BPC * self.scale + self.shift, real_BP).relu() * real_BP[..., None]
        places, size = grid.places(), self.point.shape[1]
        around = [((places - place).abs() <= WINDOW // 2).all(1) for place in places]
        a_BPC = torch.stack([a_BPC[:, near].amax(1) for near in around], 1)
        s_BPG = torch.stack(
            [a_BPC[..., g * size : (g + 1) * size] @ self.point[g] + self.point_shift[g] for g in range(self.groups)],
            -1,
        )
        raised = self.point_norm.oracle(s_BPG, real_BP).relu().exp() * real_BP[..., None]
        weights = raised / raised.sum(1, keepdim=True).clamp(min=torch.finfo(raised.dtype).tiny)
        gated = [x_BPC[..., c] * (1 + weights[..., c // size]) for c in range(x_BPC.shape[2])]
        return torch.cat([prefix, torch.stack(gated, -1)], 1)

    def count(self, sizes: Sizes) -> Cost:
        """A product and a sum of every channel at every place, element by element."""
        return Cost(2 * sizes.batch * sizes.grid.positions * self.site.dim, 0)


def _highest(a_BPC: Tensor, grid: Grid) -> Tensor:
    """The maximum of numbers that are not negative over the places around each; borders and padding are 0."""
    a_BSC = grid.unflatten(a_BPC)
    for axis in range(1, 1 + grid.rank):
        border = [0] * (2 * a_BSC.ndim)
        border[2 * (a_BSC.ndim - 1 - axis)] = border[2 * (a_BSC.ndim - 1 - axis) + 1] = WINDOW // 2
        padded, length = F.pad(a_BSC, border), a_BSC.shape[axis]
        parts = [padded.narrow(axis, start, length) for start in range(WINDOW)]
        for left, right in itertools.pairwise(parts):
            a_BSC = torch.maximum(a_BSC, torch.maximum(left, right))
    return a_BSC.flatten(1, -2)
