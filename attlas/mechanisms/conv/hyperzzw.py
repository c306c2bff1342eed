"""HyperZ.Z.W: kernels made by slow networks of coordinates, multiplied by the activations that they then act on.

    Z_w = x ∘ W_g                                       global hyper-kernel, as large as the map
    f = std(R₁(Z_w) + R₂(x)),    m = std(W_m x),    h = std(x ∘ σ(K_c ∘ y ∘ y)),    y = mean over positions of x
    o = Z_w f,    o_m = Z_w m,    o_h = Z_w h           products of the maps as H × H matrices, channel by channel
    s = x ∘ σ((K_s ∘ ō ∘ ō) (K_o ∘ ȯ ∘ ȯ))              ō mean over channels, ȯ over positions of o
    l(a, b) = gelu(bstd(W_l (K(a) * b))) + β            local branches: depthwise hyper-kernels of 3, 9, 5, 7
    y = W [o, l(h, x), f, o_m, l(x, h), σ(o) ∘ o, l(m, x), o_h, l(x, m), s]
    R(x) = W_y (gelu(std(W_k x ∘ W_q W_v x)) + B)       recursive gated unit

x (B, N, C) on a square grid of H × H positions, fixed when the layer is built; ∘ is the product of entries, std the
standardisation of a channel over the positions of its image, bstd over the batch as well. A kernel is a slow network on
coordinates c in [-1, 1], at hidden size d:

    g_0 = sin(A_0 c + a_0),    g_i = sin(A_i c + a_i) ∘ (L_i g_{i-1}) + b(c),    K = L g

with one bias b for each point, so that but for b its size depends on neither H nor the size of the kernel. A local one
is multiplied after each layer by a linear map of gelu(W₁ W₀ p), p being the mean over the batch of the input pooled to
k × k points, and before that renormalised: g + 0.1 g / |g|, the first term without a gradient.

The published layer takes p and bstd from the batch at test time as well, so that an image's output depends on the
images beside it. Here they come from the batch in training alone; evaluation uses running means of them (momentum 0.1).
Padding is refused: a matrix product of two maps has no meaning with holes, and means over positions would count them.
Left out are the biases that a standardisation takes away at once, and the maps of earlier blocks, which the published
layer concatenates as well where there are any.

Time O(N^1.5 C + N C (C + 164)) for N = H²; 23 C² weights stand outside the slow networks.

Source: Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", 2024 (arXiv:2401.17948),
official code hyperevolnet/Terminator (older commits). Its configuration does not say the frequency `omega`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.precision import wide

EPSILON = 1e-5
MOMENTUM = 0.1
SMALL = {"global_hidden": 5, "spatial_hidden": 4, "local_hidden": 3, "channel_hidden": 4, "interaction_hidden": 3}


def _slow_size(axes: int, points: int, hidden: int, channels: int, layers: int = 2) -> int:
    waves = (layers + 1) * hidden * (axes + 1)
    return waves + layers * (hidden * hidden + hidden) + hidden * channels + channels + points


def _layer_size(c: int, positions: int, kernels: tuple[int, ...], layers: int = 2) -> int:
    slow = _slow_size(2, positions, 5, c, layers) + _slow_size(2, positions, 4, 1)
    slow += _slow_size(1, c, 4, 1) + _slow_size(1, c, 3, 1)
    local = sum(_slow_size(2, k * k, 3, c) + (c * 3 + 3) + 3 * (3 * 3 + 3) + c * c + 1 for k in kernels)
    gated = 2 * (3 * (c * c + c) + c * c + positions)
    return slow + local + gated + c * c + 10 * c * c + c


SPEC = Spec(
    name="hyperzzw",
    title="HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction",
    year=2024,
    paper="arXiv:2401.17948",
    equation="y = W [(x ∘ W_g) f(x), (x ∘ W_g) m(x), K(x) * x, …],  kernels W_g, K from coordinates",
    complexity="O(N^1.5) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2,),
    prefix=False,
    masks=frozenset(),
    examples=(
        Example(grid=(4, 4), dim=6, params=SMALL, parameters=_layer_size(6, 16, (3, 9, 5, 7))),
        Example(
            grid=(3, 3),
            dim=4,
            params=SMALL | {"global_layers": 3, "kernels": (3, 3, 5, 3)},
            parameters=_layer_size(4, 9, (3, 3, 5, 3), 3),
        ),
    ),
)


def standardised(x_BNC: Tensor) -> Tensor:
    """Every channel of every image with mean 0 and variance 1 over its positions."""
    x = wide(x_BNC)
    centred = x - x.mean(1, keepdim=True)
    return (centred * (centred.square().mean(1, keepdim=True) + EPSILON).rsqrt()).to(x_BNC.dtype)


def coordinates(shape: Sequence[int], like: Tensor) -> Tensor:
    """Points of a grid in [-1, 1] on each axis, (P, axes)."""
    axes = [torch.linspace(-1, 1, size, device=like.device, dtype=wide(like).dtype) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def slow_neural_loss(kernels: Sequence[Tensor]) -> Tensor:
    """How far the global kernels (C_i, H, H) of successive layers are from one another: Σ_{i<j} mean (tile W_i - W_j)².

    A layer with more channels is compared with the tiled kernels of one with fewer. Weigh it and add it to the task's
    loss: `slow_neural_loss([m.global_kernel() for m in model.modules() if isinstance(m, HyperZZW)])`.

    Raises:
        BadInput: channels that are no multiple of those of every layer before.
    """
    terms = []
    for deep, kernel in enumerate(kernels):
        for shallow in kernels[:deep]:
            if kernel.shape[0] % shallow.shape[0] or kernel.shape[1:] != shallow.shape[1:]:
                raise BadInput(
                    "kernels are (channels, height, height), channels a multiple of those before, got "
                    f"{tuple(shallow.shape)} and {tuple(kernel.shape)}"
                )
            tiled = shallow.repeat(kernel.shape[0] // shallow.shape[0], 1, 1)
            terms.append((tiled - kernel).square().mean())
    return torch.stack(terms).sum() if terms else torch.zeros(())


class SlowNet(nn.Module):
    """Coordinates to a kernel, a multiplicative network of waves.

    Args:
        shape: of the kernel's grid.
        hidden: d.
        channels: of the kernel.
        layers: products with a wave.
        omega: frequency of the waves at first.
    """

    def __init__(self, shape: Sequence[int], hidden: int, channels: int, layers: int, omega: float) -> None:
        super().__init__()
        self.shape = tuple(shape)
        axes, points = len(self.shape), math.prod(self.shape)
        drawn = [_gamma(6.0 / (i + 1), (hidden, axes)) for i in range(layers + 1)]
        uniform = torch.empty(layers + 1, hidden, axes).uniform_(-(axes**-0.5), axes**-0.5)
        self.frequencies = nn.Parameter(2 * math.pi * omega * torch.stack(drawn) * uniform)
        self.phases = nn.Parameter(torch.zeros(layers + 1, hidden))
        self.linears: Any = nn.ModuleList(_linear(hidden) for _ in range(layers))
        self.bias = nn.Parameter(torch.zeros(points))
        self.out = nn.Linear(hidden, channels)
        with torch.no_grad():
            nn.init.kaiming_uniform_(self.out.weight, nonlinearity="linear").mul_(points**-0.5)
            self.out.bias.zero_()

    def forward(self, pooled_PC: Tensor | None = None) -> Tensor:
        """The kernel (P, channels)."""
        points = coordinates(self.shape, self.bias)
        # No matrix product: a phase of many turns would not survive half precision.
        angles = (points[:, None] * wide(self.frequencies)[:, None]).sum(-1) + wide(self.phases)[:, None]
        waves = angles.sin()
        hidden = waves[0]
        for index, linear in enumerate(self.linears):
            hidden = waves[index + 1] * linear(hidden.to(self.bias.dtype)) + self.bias[:, None]
            hidden = self.modulated(hidden, index, pooled_PC)
        return self.out(hidden.to(self.bias.dtype))

    def modulated(self, hidden_PD: Tensor, layer: int, pooled_PC: Tensor | None) -> Tensor:
        """What a local network does to a layer; nothing here."""
        return hidden_PD

    def flops(self) -> int:
        """Of one kernel."""
        return 2 * math.prod(self.shape) * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))


class LocalSlowNet(SlowNet):
    """A slow network whose layers are multiplied by what the pooled input says."""

    pooled: Tensor

    def __init__(self, size: int, hidden: int, channels: int, omega: float, layers: int = 2) -> None:
        super().__init__((size, size), hidden, channels, layers, omega)
        self.reduce, self.mix = nn.Linear(channels, hidden), nn.Linear(hidden, hidden)
        self.modulations: Any = nn.ModuleList(_linear(hidden) for _ in range(layers))
        self.register_buffer("pooled", torch.zeros(size * size, channels))

    def forward(self, pooled_PC: Tensor | None = None) -> Tensor:
        """The kernel under the given mean of pooled inputs, or under the running one."""
        pooled_PC = self.pooled if pooled_PC is None else pooled_PC
        return super().forward(F.gelu(self.mix(self.reduce(pooled_PC))))

    def pool(self, x_BCHH: Tensor) -> Tensor | None:
        """In training the batch's mean of pooled inputs (P, C), which the running mean follows."""
        if not self.training:
            return None
        pooled_PC = F.adaptive_avg_pool2d(x_BCHH, self.shape[0]).mean(0).flatten(1).T
        with torch.no_grad():
            self.pooled.lerp_(pooled_PC.to(self.pooled.dtype), MOMENTUM)
        return pooled_PC

    def modulated(self, hidden_PD: Tensor, layer: int, pooled_PC: Tensor | None) -> Tensor:
        """Renormalise, so that a gradient flows through the direction alone, and multiply."""
        return (hidden_PD.detach() + 0.1 * F.normalize(hidden_PD, dim=0)) * self.modulations[layer](pooled_PC)


class LocalBranch(nn.Module):
    """Depthwise convolution with a local hyper-kernel, a channel mixer, standardisation over the batch, GELU."""

    def __init__(self, size: int, hidden: int, channels: int, omega: float) -> None:
        super().__init__()
        self.slow = LocalSlowNet(size, hidden, channels, omega)
        self.mix = nn.Linear(channels, channels, bias=False)
        nn.init.kaiming_normal_(self.mix.weight)
        self.norm = nn.BatchNorm1d(channels, EPSILON, MOMENTUM, affine=False)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, says_BCHH: Tensor, x_BCHH: Tensor) -> Tensor:
        """The branch (B, N, C): a kernel made from the first map acts on the second."""
        size = self.slow.shape[0]
        kernel_PC = self.slow(self.slow.pool(says_BCHH))
        kernel = kernel_PC.T.view(-1, 1, size, size).to(x_BCHH.dtype)
        seen = F.conv2d(x_BCHH, kernel, padding=size // 2, groups=x_BCHH.shape[1])
        mixed_BNC = self.mix(seen.flatten(2).transpose(1, 2))
        return F.gelu(self.norm(mixed_BNC.flatten(0, 1))).view(mixed_BNC.shape) + self.bias


class GatedUnit(nn.Module):
    """The recursive gated unit on C channels with a bias for each position."""

    def __init__(self, dim: int, positions: int) -> None:
        super().__init__()
        self.k, self.v, self.q, self.y = (nn.Linear(dim, dim, bias=index < 3) for index in range(4))
        for linear in (self.k, self.v, self.q, self.y):
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="linear")
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.bias = nn.Parameter(torch.zeros(positions))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        product = standardised(wide(self.k(x_BNC)) * wide(self.q(self.v(x_BNC)))).to(x_BNC.dtype)
        return self.y(F.gelu(product) + self.bias[:, None])


def _gamma(shape: float, size: tuple[int, ...]) -> Tensor:
    """Draws of a gamma distribution of rate 1; unchecked, so that it also serves a device without numbers."""
    return torch.distributions.Gamma(shape, 1.0, validate_args=False).sample(size)


def _linear(hidden: int) -> nn.Linear:
    linear = nn.Linear(hidden, hidden)
    nn.init.kaiming_uniform_(linear.weight, nonlinearity="linear")
    nn.init.ones_(linear.bias)
    return linear


@register(SPEC)
class HyperZZW(Mixer):
    """The multi-branch layer around the HyperZ.Z.W operator.

    Args:
        site: where it is installed; its grid is the square map.
        backend: `auto`, `torch` or `oracle`.
        kernels: sizes of the four local hyper-kernels, odd, at least 3.
        global_layers: layers of the slow network of W_g; 3 in the first published block, 2 in the others.
        global_hidden, spatial_hidden, local_hidden, channel_hidden, interaction_hidden: hidden sizes of the slow
            networks of W_g, K_s, the local kernels, K_c and K_o.
        omega: frequency of the slow networks' waves at first.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        kernels: tuple[int, ...] = (3, 9, 5, 7),
        global_layers: int = 2,
        global_hidden: int = 64,
        spatial_hidden: int = 64,
        local_hidden: int = 32,
        channel_hidden: int = 32,
        interaction_hidden: int = 16,
        omega: float = 1.0,
    ) -> None:
        super().__init__(site, backend)
        grid, dim = site.grid, site.dim
        if grid is not None and grid.rank != 2:
            raise self._unsupported(f"a {grid}", grid=grid.rank)
        if grid is None or grid.shape[0] != grid.shape[1] or grid.shape[0] < 2 or grid.prefix:
            raise BadInput(
                f"hyperzzw multiplies maps as matrices: build it with grid=(side, side), side at least 2, got {grid}"
            )
        if len(kernels) != 4 or any(size < 3 or size % 2 == 0 for size in kernels):
            raise BadInput(f"kernels are four odd sizes of at least 3, got {kernels}")
        sizes = (global_layers, global_hidden, spatial_hidden, local_hidden, channel_hidden, interaction_hidden)
        if min(sizes) < 1:
            raise BadInput(f"global_layers and the hidden sizes are at least 1, got {sizes}")
        self.kernels, plane = tuple(kernels), grid.shape
        self.slow_global = SlowNet(plane, global_hidden, dim, global_layers, omega)
        self.slow_channel = SlowNet((dim,), channel_hidden, 1, 2, omega)
        self.slow_interaction = SlowNet((dim,), interaction_hidden, 1, 2, omega)
        self.slow_spatial = SlowNet(plane, spatial_hidden, 1, 2, omega)
        self.local: Any = nn.ModuleList(LocalBranch(size, local_hidden, dim, omega) for size in self.kernels)
        self.gated_global, self.gated = GatedUnit(dim, grid.positions), GatedUnit(dim, grid.positions)
        self.mix = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(10 * dim, dim)
        nn.init.kaiming_normal_(self.mix.weight)
        nn.init.kaiming_normal_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def global_kernel(self) -> Tensor:
        """W_g, (C, H, H)."""
        return self._plane(self.slow_global().unsqueeze(0)).squeeze(0)

    def _plane(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.transpose(1, 2).unflatten(-1, self.slow_global.shape)

    def _check_side(self, grid: Grid) -> None:
        if grid.shape != self.slow_global.shape:
            raise BadInput(f"this hyperzzw has kernels for a {Grid(self.slow_global.shape)}, got a {grid}")

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """All branches on whole maps."""
        self._check_side(call.grid)
        z_BNC = x_BNC * self.slow_global().to(x_BNC.dtype)
        fast = standardised(self.gated_global(z_BNC) + self.gated(x_BNC))
        mixed = standardised(self.mix(x_BNC))
        mean_BC = x_BNC.mean(1)
        chosen = (wide(self.slow_channel().squeeze(1)) * mean_BC * mean_BC).sigmoid()
        hyper = standardised(x_BNC * chosen.unsqueeze(1).to(x_BNC.dtype))
        x, fast_map, mixed_map, hyper_map = (self._plane(t) for t in (x_BNC, fast, mixed, hyper))
        products = torch.stack([fast_map, mixed_map, hyper_map])
        whole, whole_mixed, whole_hyper = (self._plane(z_BNC) @ products).flatten(3).transpose(2, 3)
        by_channel, by_place = wide(whole).mean(1, keepdim=True), wide(whole).mean(2, keepdim=True)
        score = wide(self.slow_interaction().T) * by_channel.square()
        score = score * (wide(self.slow_spatial()) * by_place.square())
        first, second, third, fourth = self.local
        branches = (
            whole,
            second(hyper_map, x),
            fast,
            whole_mixed,
            first(x, hyper_map),
            whole.sigmoid() * whole,
            third(mixed_map, x),
            whole_hyper,
            fourth(x, mixed_map),
            x_BNC * score.sigmoid().to(x_BNC.dtype),
        )
        return self.out_proj(torch.cat([branch.to(x_BNC.dtype) for branch in branches], -1))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """On maps (B, C, H, H): kernels point by point, products row by column, convolutions tap by tap."""
        self._check_side(call.grid)
        side = call.grid.shape[0]
        x = x_BNC.reshape(-1, side, side, self.site.dim).permute(0, 3, 1, 2)

        def linear(layer: nn.Linear, t: Tensor) -> Tensor:
            y = torch.einsum("dc,bchw->bdhw", layer.weight, t)
            return y if layer.bias is None else y + layer.bias[:, None, None]

        def std(t: Tensor, over: tuple[int, ...] = (2, 3)) -> Tensor:
            return (t - t.mean(over, True)) / (t.var(over, unbiased=False, keepdim=True) + EPSILON).sqrt()

        def gated(unit: GatedUnit, t: Tensor) -> Tensor:
            inner = F.gelu(std(linear(unit.k, t) * linear(unit.q, linear(unit.v, t))))
            return linear(unit.y, inner + unit.bias.view(side, side))

        def product(a: Tensor, b: Tensor) -> Tensor:
            columns = [(a * b[:, :, None, :, j]).sum(-1) for j in range(side)]
            return torch.stack(columns, -1)

        def local(branch: LocalBranch, says: Tensor, t: Tensor) -> Tensor:
            size = branch.slow.shape[0]
            pooled = branch.slow.pooled
            if self.training:
                pooled = F.adaptive_avg_pool2d(says, size).mean(0).flatten(1).T
            kernel = _kernel_literally(branch.slow, pooled).view(size, size, -1)
            total = torch.zeros_like(t)
            for row in range(size):
                for column in range(size):
                    up, left = row - size // 2, column - size // 2
                    rows, columns = (range(max(0, -d), min(side, side - d)) for d in (up, left))
                    if rows and columns:
                        taken = t[:, :, rows[0] + up : rows[-1] + 1 + up, columns[0] + left : columns[-1] + 1 + left]
                        border = (columns[0], side - 1 - columns[-1], rows[0], side - 1 - rows[-1])
                        total = total + F.pad(taken * kernel[row, column, :, None, None], border)
            mixed = linear(branch.mix, total)
            if self.training:
                return F.gelu(std(mixed, (0, 2, 3))) + branch.bias
            statistics = branch.norm.state_dict()
            mean, var = (statistics[name][:, None, None] for name in ("running_mean", "running_var"))
            return F.gelu((mixed - mean) / (var + EPSILON).sqrt()) + branch.bias

        z = x * _kernel_literally(self.slow_global).view(side, side, -1).permute(2, 0, 1)
        fast = std(gated(self.gated_global, z) + gated(self.gated, x))
        mixed = std(linear(self.mix, x))
        mean = x.mean((2, 3), True)
        hyper = std(x * (mean * _kernel_literally(self.slow_channel)[:, :, None] * mean).sigmoid())
        whole, whole_mixed, whole_hyper = product(z, fast), product(z, mixed), product(z, hyper)
        by_channel, by_place = whole.mean((2, 3), True), whole.mean(1, True)
        score = by_channel * _kernel_literally(self.slow_interaction)[:, :, None] * by_channel
        score = score * (by_place * _kernel_literally(self.slow_spatial).view(side, side) * by_place)
        branches = [
            whole,
            local(self.local[1], hyper, x),
            fast,
            whole_mixed,
            local(self.local[0], x, hyper),
            whole.sigmoid() * whole,
            local(self.local[2], mixed, x),
            whole_hyper,
            local(self.local[3], x, mixed),
            x * score.sigmoid(),
        ]
        return linear(self.out_proj, torch.cat(branches, 1)).flatten(2).transpose(1, 2)

    def count(self, sizes: Sizes) -> Cost:
        """Kernels once for the batch; per image projections, products of maps, convolutions."""
        dim, positions = self.site.dim, sizes.grid.positions
        kernels = sum(m.flops() for m in self.modules() if isinstance(m, SlowNet))
        per_position = 8 * dim * dim + dim * dim + 10 * dim * dim + 3 * dim * sizes.grid.shape[0]
        per_position += sum(dim * size**2 + dim * dim for size in self.kernels)
        flops = kernels + 2 * sizes.batch * positions * per_position
        return Cost(flops, flops)


def _kernel_literally(net: SlowNet, pooled_PC: Tensor | None = None) -> Tensor:
    """The kernel of one point after another (P, channels)."""
    points = coordinates(net.shape, net.bias)
    rows = [torch.sin(net.frequencies[0] @ point + net.phases[0]) for point in points]
    for index, linear in enumerate(net.linears):
        for p, point in enumerate(points):
            wave = torch.sin(net.frequencies[index + 1] @ point + net.phases[index + 1])
            rows[p] = wave * (linear.weight @ rows[p] + linear.bias) + net.bias[p]
        if isinstance(net, LocalSlowNet):
            assert pooled_PC is not None
            norm = torch.stack(rows).square().sum(0).sqrt()
            modulation = net.modulations[index]
            for p, row in enumerate(rows):
                said = F.gelu(net.mix.weight @ (net.reduce.weight @ pooled_PC[p] + net.reduce.bias) + net.mix.bias)
                rows[p] = (row.detach() + 0.1 * row / norm) * (modulation.weight @ said + modulation.bias)
    return torch.stack([net.out.weight @ row + net.out.bias for row in rows])
