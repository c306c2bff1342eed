"""Context-mixing dynamic convolution (OverLoCK): a kernel for every place, made from what the place has to do with
regions of the whole picture.

    f = GRN(W gelu(BN(DWConv_3 x)))
    A = q kᵀ,    q = BN(W_q a) / √D,    k = BN(W_k pool(c))                 one number for each place and region
    [S, L] = W_s A                                                          one number for each tap of two kernels
    m = [Σ_t softmax(S + b)_t f¹_{n + t}, Σ_t softmax(L + b')_t f²_{n + t}]
    y = W BN(gate ⊙ SE(BN(W_m m) + BN(conv_K f))),    gate = silu(BN(W_g f))

a are the channels of x but for the last `context` ones, c these, which OverLoCK fills with features of its overview;
without context both are all of x. pool makes 7 x 7 regions of the map. Kernels are shared by the channels of a group,
two groups for each head; f¹ and f², the halves of f, meet a small and a K x K kernel. Where a kernel would reach over
the border its place is shifted inwards, as in neighborhood attention, and b and b' are its relative biases, (2 K - 1)²
numbers per group, entry K - 1 being offset 0. conv_K is a large depthwise convolution with dilated ones beside it,
which `attlas.blocks.conv_norm.fuse` makes one. A map with a side below K is enlarged for m, which is averaged
back.

The plug-and-play block of the same code has no context, f = x and a linear map before the kernels instead.

x (B, N, O), f, m (B, N, C) with O = C + context, G groups, D = C / G, R = 49 regions, T taps of both kernels. BN takes
statistics of the batch in training, running ones in evaluation. Padding is refused: regions and kernels have no holes.

Time O(N (C² + R C + G R T + T C)).

Source: Lou and Yu, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", 2025
(arXiv:2502.20087), official code LMMMEng/OverLoCK.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.axis import Axis
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.batch_norm import TokenBatchNorm
from attlas.ops.channel_attention import ChannelAttention
from attlas.ops.dilated_reparam import BRANCHES, DilatedReparam
from attlas.ops.global_response_norm import GlobalResponseNorm
from attlas.ops.grid_conv import convolution_flops, depthwise, grid_convolution
from attlas.ops.maps import to_map, to_tokens
from attlas.ops.precision import wide

REGIONS = 7


def _size(c: int, context: int, groups: int, kernel: int, small: int) -> int:
    o, taps = c + context, kernel * kernel + small * small
    fusion = 9 * o + o + 2 * o + o * c + c + 2 * c
    kernels = c * c // 2 + c + (context or c) * c // 2 + c + 50 * taps
    biases = groups * ((2 * kernel - 1) ** 2 + (2 * small - 1) ** 2)
    convs = sum(c * k * k + 2 * c for k, _ in ((kernel, 1), *BRANCHES[kernel])) + 2 * c
    squeezed = max(16, c // 8)
    rest = 2 * (c * c + 2 * c) + 2 * c * squeezed + squeezed + c + 2 * c + c * o + o
    return fusion + kernels + biases + convs + rest


SPEC = Spec(
    name="overlock",
    title="OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels",
    year=2025,
    paper="arXiv:2502.20087",
    equation="y = Σ_t softmax(W q kᵀ + b)_t f_{n + t},  k of 7 x 7 regions of the picture",
    complexity="O(N (C² + R C + G R T + T C)) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2,),
    prefix=False,
    masks=frozenset(),
    examples=(
        Example(
            grid=(8, 7),
            dim=12,
            heads=1,
            params={"context": 4, "kernel": 5, "small": 3},
            parameters=_size(8, 4, 2, 5, 3),
        ),
        Example(grid=(4, 6), dim=8, heads=1, params={"kernel": 5, "small": 3}, parameters=_size(8, 0, 2, 5, 3)),
    ),
)


@register(SPEC)
class OverLoCK(Mixer):
    """Dynamic convolution with kernels from regions of the whole map.

    Args:
        site: where it is installed; there are two groups for each of its heads.
        backend: `auto`, `torch` or `oracle`.
        context: how many channels, the last ones, are the context that keys are made of; 0 for no such.
        kernel: K, odd, from 5 to 17.
        small: side of the small kernel, odd, at most K.
    """

    def __init__(self, site: Site, backend: str = "auto", *, context: int = 0, kernel: int = 7, small: int = 5) -> None:
        super().__init__(site, backend)
        out, groups = site.dim, 2 * site.heads
        dim = out - context
        if context < 0 or dim < 1 or dim % (2 * groups):
            raise BadInput(
                f"channels without the context are cut into two halves and {groups} groups, two for each head: take a "
                f"multiple of {2 * groups}, got {out} - {context}"
            )
        if small < 1 or small % 2 == 0 or small > kernel:
            raise BadInput(f"small is odd and at most the kernel's {kernel}, got {small}")
        self.context, self.kernel, self.small, self.groups, self.dim = context, kernel, small, groups, dim
        self.fuse_conv, self.fuse_bn = depthwise(out, 3, 2), TokenBatchNorm(out)
        self.fuse_proj, self.fuse_norm = nn.Linear(out, dim), GlobalResponseNorm(dim)
        self.q_proj, self.q_bn = nn.Linear(dim, dim // 2, bias=False), TokenBatchNorm(dim // 2)
        self.k_proj, self.k_bn = nn.Linear(context or dim, dim // 2, bias=False), TokenBatchNorm(dim // 2)
        self.taps_proj = nn.Linear(REGIONS**2, small**2 + kernel**2)
        self.small_bias = nn.Parameter(torch.zeros(groups, 2 * small - 1, 2 * small - 1))
        self.large_bias = nn.Parameter(torch.zeros(groups, 2 * kernel - 1, 2 * kernel - 1))
        self.mixed_proj, self.mixed_bn = nn.Linear(dim, dim, bias=False), TokenBatchNorm(dim)
        self.local: Any = DilatedReparam(dim, kernel)
        self.local_bn = TokenBatchNorm(dim)
        self.attention = ChannelAttention(dim, max(16, dim // 8), nn.GELU)
        self.gate_proj, self.gate_bn = nn.Linear(dim, dim, bias=False), TokenBatchNorm(dim)
        self.out_bn, self.out_proj = TokenBatchNorm(dim), nn.Linear(dim, out)

    def _enlarged(self, grid: Grid) -> tuple[int, int]:
        """The size of the map that kernels run over."""
        height, width = grid.shape
        if min(height, width) >= self.kernel:
            return height, width
        if height < width:
            return self.kernel, self.kernel * width // height
        return self.kernel * height // width, self.kernel

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Kernels of all places at once, applied to gathered neighbourhoods."""
        grid = call.grid
        size = self._enlarged(grid)
        fused = grid_convolution(x_BNC, self.fuse_conv.weight, self.fuse_conv.bias, grid)
        f_BNC = self.fuse_norm(self.fuse_proj(F.gelu(self.fuse_bn(fused))))
        local_BNC = self.local_bn(self.local(f_BNC, grid))
        source_BNC, value_BNC = x_BNC, f_BNC
        if size != grid.shape:
            source_BNC, value_BNC = (self._resized(each, grid, size) for each in (x_BNC, f_BNC))
        m_BNC = self._mixed(source_BNC, value_BNC, Grid(size))
        if size != grid.shape:
            pooled = F.adaptive_avg_pool2d(wide(to_map(m_BNC, Grid(size))), (grid.shape[0], grid.shape[1]))
            m_BNC = to_tokens(pooled)[0].to(m_BNC.dtype)
        y_BNC = self.attention(self.mixed_bn(self.mixed_proj(m_BNC)) + local_BNC)
        gate_BNC = F.silu(self.gate_bn(self.gate_proj(f_BNC)))
        return self.out_proj(self.out_bn(gate_BNC * y_BNC))

    def _resized(self, x_BNC: Tensor, grid: Grid, size: tuple[int, ...]) -> Tensor:
        larger = F.interpolate(wide(to_map(x_BNC, grid)), size, mode="bilinear")
        return to_tokens(larger)[0].to(x_BNC.dtype)

    def _keyed(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Queries of all places and keys of all regions, (B, G, N or R, D / 2)."""
        own_BNC, context_BNC = (x_BNC, x_BNC) if not self.context else x_BNC.split((self.dim, self.context), -1)
        pooled = F.adaptive_avg_pool2d(wide(to_map(context_BNC, grid)), REGIONS).to(x_BNC.dtype)
        q_BNC = self.q_bn(self.q_proj(own_BNC)) * (self.dim // self.groups) ** -0.5
        k_BRC = self.k_bn(self.k_proj(to_tokens(pooled)[0]))
        q, k = (each.unflatten(-1, (self.groups, -1)).transpose(1, 2) for each in (q_BNC, k_BRC))
        return q, k

    def _mixed(self, x_BNC: Tensor, f_BNC: Tensor, grid: Grid) -> Tensor:
        q_BGND, k_BGRD = self._keyed(x_BNC, grid)
        taps_BGNT = self.taps_proj(q_BGND @ k_BGRD.mT)
        parts = []
        kernels = ((self.small, self.small_bias), (self.kernel, self.large_bias))
        logits = taps_BGNT.split([self.small**2, self.kernel**2], -1)
        for (side, bias), logits_BGNT, half_BNC in zip(kernels, logits, f_BNC.chunk(2, -1), strict=True):
            key_NT, entry_NT = self._windows(grid, side, f_BNC.device)
            bias_GNT = bias.flatten(1)[:, entry_NT]
            weights_BGNT = (wide(logits_BGNT) + bias_GNT).softmax(-1).to(f_BNC.dtype)
            v_BGND = half_BNC.unflatten(-1, (self.groups, -1)).transpose(1, 2)
            near_BGNTD = v_BGND.index_select(2, key_NT.flatten()).unflatten(2, key_NT.shape)
            parts.append((weights_BGNT.unsqueeze(-2) @ near_BGNTD).squeeze(-2).transpose(1, 2).flatten(2))
        return torch.cat(parts, -1)

    def _windows(self, grid: Grid, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each place the places of its taps, and their entries of the bias, both (N, T)."""
        rows, columns = (Axis(length, side).windows(length, device) for length in grid.shape)
        tables = []
        for row_SK, column_SK, width in (
            (rows.key, columns.key, grid.shape[1]),
            (rows.entry, columns.entry, 2 * side - 1),
        ):
            table = row_SK[:, None, :, None] * width + column_SK[None, :, None, :]
            tables.append(table.flatten(2).flatten(0, 1))
        return tables[0], tables[1]

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """The kernel of one place after the other, laid out as a row of a matrix over the whole map."""
        grid = call.grid
        height, width = size = self._enlarged(grid)
        fused = grid_convolution(x_BNC, self.fuse_conv.weight, self.fuse_conv.bias, grid, backend="oracle")
        f = self.fuse_proj(F.gelu(self.fuse_bn.oracle(fused)))
        strength = f.square().sum(1, keepdim=True).sqrt()
        strength = strength / (strength.mean(-1, keepdim=True) + self.fuse_norm.eps)
        f = f + self.fuse_norm.weight * strength * f + self.fuse_norm.bias
        local = torch.zeros_like(f)
        for conv, norm in zip(self.local.convs, self.local.norms, strict=True):
            local = local + norm.oracle(to_tokens(conv(to_map(f, grid)))[0])
        if self.local.merged is not None:
            local = to_tokens(self.local.merged(to_map(f, grid)))[0]
        source, value = x_BNC, f
        if size != grid.shape:
            source, value = (self._resized(each, grid, size) for each in (x_BNC, f))
        half = self.dim // (2 * self.groups)
        q, k = self._keyed(source, Grid(size))
        logits = torch.einsum("bgnd,bgrd,tr->bgnt", q, k, self.taps_proj.weight) + self.taps_proj.bias
        columns, start = [], 0
        for kind, (side, bias) in enumerate(((self.small, self.small_bias), (self.kernel, self.large_bias))):
            for group in range(self.groups):
                first = kind * self.dim // 2 + group * half
                channels, picked = value[..., first : first + half], []
                for place in range(height * width):
                    row, column = divmod(place, width)
                    top = min(max(row - side // 2, 0), height - side)
                    left = min(max(column - side // 2, 0), width - side)
                    taps = [(top + i, left + j) for i in range(side) for j in range(side)]
                    offsets = [bias[group, i - row + side - 1, j - column + side - 1] for i, j in taps]
                    scores = logits[:, group, place, start : start + side * side] + torch.stack(offsets)
                    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                    near = torch.stack([channels[:, i * width + j] for i, j in taps], 1)
                    picked.append(torch.einsum("bt,btd->bd", weights, near))
                columns.append(torch.stack(picked, 1))
            start += side * side
        m = torch.cat(columns, -1)
        if size != grid.shape:
            m = to_tokens(F.adaptive_avg_pool2d(to_map(m, Grid(size)), (grid.shape[0], grid.shape[1])))[0]
        y = self.mixed_bn.oracle(m @ self.mixed_proj.weight.T) + self.local_bn.oracle(local)
        squeezed = F.gelu(self.attention.squeeze(y.mean(1)))
        y = y * torch.sigmoid(self.attention.excite(squeezed)).unsqueeze(1)
        gate = self.gate_bn.oracle(f @ self.gate_proj.weight.T)
        return self.out_proj(self.out_bn.oracle(gate * torch.sigmoid(gate) * y))

    def count(self, sizes: Sizes) -> Cost:
        """Projections and convolutions on the map, kernels and their sums on the enlarged one."""
        grid, dim, out = sizes.grid, self.dim, self.site.dim
        tokens, places = grid.positions, math.prod(self._enlarged(grid))
        taps, regions = self.taps_proj.out_features, REGIONS**2
        macs = tokens * (2 * out * dim + 2 * dim * dim) + regions * (self.context or dim) * dim // 2
        macs += places * (dim * dim // 2 + regions * dim // 2 + self.groups * regions * taps + taps * dim // 2)
        macs += 2 * dim * self.attention.squeeze.out_features
        flops = executed = 2 * macs
        for on_grid, multiplied in (
            tuple(out * each for each in convolution_flops(grid, 3)),
            self.local.flops(grid),
        ):
            flops, executed = flops + on_grid, executed + multiplied
        return Cost(sizes.batch * flops, sizes.batch * executed)
