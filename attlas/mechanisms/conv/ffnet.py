"""FFNified attention (MetaMixer, FFNet): keys and values are large kernels of each channel, as in an MLP over space.

    q = BN(W x)
    y = V(GELU(K(q)))
    K(q), V(q) = BN(DWConv_k q) + BN(DWConv_b q)

Attention weighs values by how queries meet keys; an MLP does the same with keys and values that are learned. Here query
and key meet in a depthwise convolution, GELU takes the place of the softmax, and another depthwise convolution adds up
the values. Channels meet in W alone, no projection follows. Each convolution has a smaller one beside it (k = 7 and
b = 3), which becomes part of it when training is over: `fused` on the parts. With `branch=0` there is one convolution,
with a bias and without BN, as in the stages of FFNet that have k = 3.

x, q, y (B, N, C). Beyond the border and where there is padding the convolutions meet 0, and padding enters no
statistics. Prefix tokens have no surroundings: they give 0 and enter nothing. A position sees 2 k - 1 places of each
axis.

Time O(N C (C + k^axes)), linear in N.

Source: Yun et al., "MetaMixer Is All You Need", 2024 (arXiv:2406.02021), official code ysj9909/FFNet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.batch_norm import TokenBatchNorm, scale_and_shift
from attlas.ops.grid_conv import convolution_flops, depthwise, grid_convolution, positions

PROJECTION = 16 * 16 + 2 * 16

SPEC = Spec(
    name="ffnet",
    title="MetaMixer Is All You Need",
    year=2024,
    paper="arXiv:2406.02021",
    equation="y = V(GELU(K(W x))), K and V depthwise convolutions",
    complexity="O(N C (C + k²)) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    examples=(
        Example(grid=(4, 5), prefix=1, parameters=PROJECTION + 2 * 16 * (49 + 9 + 4)),
        Example(grid=(7,), params={"kernel": 3, "branch": 0}, parameters=PROJECTION + 2 * 16 * (3 + 1)),
        Example(grid=(2, 3, 4), params={"kernel": 3, "branch": 1}, parameters=PROJECTION + 2 * 16 * (27 + 1 + 4)),
    ),
)


class _Query(nn.Module):
    """BN(W x)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim, bias=False)
        self.norm = TokenBatchNorm(dim)

    def forward(self, x_BPC: Tensor, keep: Tensor | None) -> Tensor:
        return self.norm(self.proj(x_BPC), keep)

    def oracle(self, x_BPC: Tensor, keep: Tensor | None) -> Tensor:
        return self.norm.oracle(torch.einsum("bpc,dc->bpd", x_BPC, self.proj.weight), keep)

    @torch.no_grad()
    def fused(self) -> _FusedQuery:
        scale, shift = scale_and_shift(self.norm)
        return _FusedQuery(self.proj.weight * scale.unsqueeze(1), shift)


class _FusedQuery(nn.Module):
    """The same as one matrix with a bias."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.proj = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
        self.proj.weight, self.proj.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x_BPC: Tensor, keep: Tensor | None) -> Tensor:
        return self.proj(x_BPC)

    def oracle(self, x_BPC: Tensor, keep: Tensor | None) -> Tensor:
        return torch.einsum("bpc,dc->bpd", x_BPC, self.proj.weight) + self.proj.bias


class _Kernel(nn.Module):
    """One depthwise convolution with a bias."""

    def __init__(self, dim: int, kernel: int, axes: int) -> None:
        super().__init__()
        self.kernels = (kernel,)
        self.conv = depthwise(dim, kernel, axes)

    def forward(self, x_BPC: Tensor, grid: Grid, keep: Tensor | None, backend: str) -> Tensor:
        return grid_convolution(x_BPC, self.conv.weight, self.conv.bias, grid, keep, backend=backend)


class _TwoKernels(nn.Module):
    """A large and a small depthwise convolution, each with a normalisation behind it."""

    def __init__(self, dim: int, kernel: int, branch: int, axes: int) -> None:
        super().__init__()
        self.axes, self.kernels = axes, (kernel, branch)
        self.weights = nn.ParameterList(depthwise(dim, size, axes).weight for size in self.kernels)
        self.norms = nn.ModuleList(TokenBatchNorm(dim) for _ in self.kernels)

    def forward(self, x_BPC: Tensor, grid: Grid, keep: Tensor | None, backend: str) -> Tensor:
        y = torch.zeros_like(x_BPC)
        for weight, norm in zip(self.weights, self.norms, strict=True):
            assert isinstance(norm, TokenBatchNorm)
            z = grid_convolution(x_BPC, weight, None, grid, keep, backend=backend)
            y = y + (norm.oracle(z, keep) if backend == "oracle" else norm(z, keep))
        return y

    @torch.no_grad()
    def fused(self) -> _Kernel:
        kernel, branch = self.kernels
        one = _Kernel(len(self.weights[0]), kernel, self.axes).to(self.weights[0])
        border = [(kernel - branch) // 2] * (2 * self.axes)
        one.conv.weight.zero_()
        assert one.conv.bias is not None
        one.conv.bias.zero_()
        for weight, norm, around in zip(self.weights, self.norms, ([0] * len(border), border), strict=True):
            scale, shift = scale_and_shift(norm)
            one.conv.weight += F.pad(weight * scale.view(-1, *[1] * (weight.ndim - 1)), around)
            one.conv.bias += shift
        return one


@register(SPEC)
class FFNet(Mixer):
    """FFNified attention.

    Args:
        site: where it is installed; the convolutions need the axes of its grid.
        backend: of `grid_convolution`.
        kernel: k, taps on each axis, odd.
        branch: b, taps of the convolutions beside these, odd and smaller; 0 for none.
    """

    def __init__(self, site: Site, backend: str = "auto", *, kernel: int = 7, branch: int = 3) -> None:
        super().__init__(site, backend)
        if site.grid is None:
            raise BadInput(
                "ffnet convolves over the axes of the grid that it is trained on: pass grid=(height, width) when "
                "building it"
            )
        if branch and not 0 < branch < kernel:
            raise BadInput(f"the convolution beside one of {kernel} taps is smaller, got branch={branch}; 0 for none")
        self.axes = axes = site.grid.rank
        self.query = _Query(site.dim)
        self.keys, self.values = (
            _TwoKernels(site.dim, kernel, branch, axes) if branch else _Kernel(site.dim, kernel, axes) for _ in "kv"
        )

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Project, convolve, GELU, convolve."""
        self._check_grid(call.grid)
        x_BPC, real_BP1 = positions(x_BNC, call.grid, call.mask.keys)
        grid, keep = Grid(call.grid.shape), None if call.mask.keys is None else real_BP1[..., 0]
        hidden = F.gelu(self.keys(self.query(x_BPC, keep), grid, keep, self.backend))
        y_BPC = self.values(hidden, grid, keep, self.backend)
        return F.pad(y_BPC, (0, 0, call.grid.prefix, 0))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Tap by tap, statistics of the real tokens alone, the GELU by its formula."""
        self._check_grid(call.grid)
        x_BPC, real_BP1 = positions(x_BNC, call.grid, call.mask.keys)
        grid, keep = Grid(call.grid.shape), real_BP1[..., 0].expand(x_BPC.shape[:2])
        h = self.keys(self.query.oracle(x_BPC, keep), grid, keep, "oracle")
        h = h * (1 + torch.erf(h / 2**0.5)) / 2
        return F.pad(self.values(h, grid, keep, "oracle"), (0, 0, call.grid.prefix, 0))

    def _check_grid(self, grid: Grid) -> None:
        if grid.rank != self.axes:
            raise BadInput(f"this layer was built for {self.axes} axes, got a {grid}; only lengths may differ")

    def count(self, sizes: Sizes) -> Cost:
        """The projection, and the taps on the grid; the torch backend also multiplies the others."""
        grid, dim = sizes.grid, self.site.dim
        self._check_grid(grid)
        flops = executed = 2 * grid.positions * dim * dim
        for kernel in (*self.keys.kernels, *self.values.kernels):
            on_grid, multiplied = convolution_flops(grid, kernel)
            flops, executed = flops + dim * on_grid, executed + dim * multiplied
        return Cost(sizes.batch * flops, sizes.batch * executed)
