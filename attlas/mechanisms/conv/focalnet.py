"""Focal modulation: a token is multiplied by what it gathers from ever wider surroundings.

    [q, z_0, g] = W_f x                                  g: one gate for each level and the global one
    z_l = GELU(DWConv_{k_l}(z_{l-1})),  l = 1..L,        k_l = window + step (l - 1)
    m = Σ_{l=1..L} g_l z_l + g_{L+1} GELU(mean(z_L))     the mean over all positions
    y = W_o (q * (W_h m))

No token attends to another: interaction comes first, in m, the query last. Gates are not normalised and shared by the
channels; the depthwise convolutions have no bias. A position sees 1 + Σ_l (k_l - 1) places of each axis through the
levels and everything through the mean. `normalize` divides m by L + 1; `norm` is a LayerNorm of q * (W_h m), which the
largest published models have.

x (B, N, C), g (B, N, L + 1), everything else (B, N, C). Beyond the border the z are 0, as in the official code; so
they are where there is padding, and the mean is over real tokens. Prefix tokens have no surroundings: they give 0 and
enter nothing. A causal layer, our extension, runs along one axis without prefix tokens: convolutions of the last k_l
places, and the mean of what came so far. Its state is the last k_l - 1 of each z_{l-1}, a sum and a count.

Time O(N C (4 C + L + Σ k_l^axes)), linear in N.

Source: Yang et al., "Focal Modulation Networks", 2022 (arXiv:2203.11926), official code microsoft/FocalNet.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput, share
from attlas.core.grid import Grid
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.grid_conv import convolution_flops, depthwise, grid_convolution, positions
from attlas.ops.precision import wide

PLANE = frozenset({Pattern.NONCAUSAL_SELF})
CAUSAL = frozenset({Pattern.CAUSAL_SELF})
PROJECTIONS = 4 * 16 * 16 + 4 * 16

SPEC = Spec(
    name="focalnet",
    title="Focal Modulation Networks",
    year=2022,
    paper="arXiv:2203.11926",
    equation="y = W (q ∗ h(Σ_l g_l z_l + g mean(z))), z_l = GELU(DWConv(z_{l-1}))",
    complexity="O(N C (C + Σ k²)) time, O(Σ k C) state",
    patterns=PLANE | CAUSAL,
    streams=True,
    examples=(
        Example(grid=(4, 5), prefix=1, parameters=PROJECTIONS + 17 * 3 + 16 * (9 + 25), patterns=PLANE),
        Example(
            grid=(6, 3),
            params={"levels": 1, "window": 5, "normalize": True, "norm": True},
            parameters=PROJECTIONS + 17 * 2 + 16 * 25 + 2 * 16,
            patterns=PLANE,
        ),
        Example(grid=(2, 3, 4), params={"levels": 1}, parameters=PROJECTIONS + 17 * 2 + 16 * 27, patterns=PLANE),
        Example(grid=(7,), params={"levels": 3, "window": 1}, parameters=PROJECTIONS + 17 * 4 + 16 * (1 + 3 + 5)),
    ),
)


class FocalState(NamedTuple):
    """What the next tokens of a causal layer need.

    Attributes:
        tails: the last k_l - 1 of z_{l-1} (B, k_l - 1, C), 0 where there was padding.
        total: the sum of the z_L (B, 1, C).
        tokens: how many there were (B, 1, 1), int64.
    """

    tails: tuple[Tensor, ...]
    total: Tensor
    tokens: Tensor


@register(SPEC)
class FocalNet(Mixer):
    """Focal modulation.

    Args:
        site: where it is installed; the convolutions need the axes of its grid, and a causal layer has one.
        backend: of `grid_convolution`.
        levels: L, depthwise convolutions on top of one another.
        window: taps of the first one on each axis, odd.
        step: how many more each one has than the one before, even.
        normalize: divide the sum of the levels by their number.
        norm: a LayerNorm before the output projection.
        dropout: on the output, in training.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        levels: int = 2,
        window: int = 3,
        step: int = 2,
        normalize: bool = False,
        norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        if levels < 1 or step < 0 or step % 2:
            raise BadInput(f"levels is at least 1 and step even, so that kernels stay odd, got {levels} and {step}")
        if site.grid is None and not site.causal:
            raise BadInput(
                "focalnet convolves over the axes of the grid that it is trained on: pass grid=(height, width) when "
                "building it"
            )
        if window < 1 or window % 2 == 0:
            odd = max(1, window - 1)
            raise BadInput(f"window counts taps around a position, so it is odd: take {odd} or {odd + 2}, got {window}")
        dim, self.axes = site.dim, 1 if site.grid is None else site.grid.rank
        if site.grid is not None:
            self._check_grid(site.grid)
        self.normalize = normalize
        self.dropout = share("dropout", dropout)
        self.in_proj = nn.Linear(dim, 2 * dim + levels + 1)
        self.kernels = [window + step * level for level in range(levels)]
        self.convs = nn.ParameterList(depthwise(dim, kernel, self.axes).weight for kernel in self.kernels)
        self.context_proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.out_proj = nn.Linear(dim, dim)

    def _check_grid(self, grid: Grid) -> None:
        if self.site.causal and (grid.rank > 1 or grid.prefix):
            raise BadInput(
                f"causal focal modulation runs along one axis without prefix tokens, got a {grid}: build it with "
                "causal=False, or pass the tokens as one line"
            )
        if grid.rank != self.axes:
            raise BadInput(f"this layer was built for {self.axes} axes, got a {grid}; only lengths may differ")

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Levels one on the other, gated and summed, times the query."""
        self._check_grid(call.grid)
        if self.site.causal:
            return self._causal(x_BNC, self.start(len(x_BNC), x_BNC), call.mask.keys)[0]
        x_BPC, real_BP1 = positions(x_BNC, call.grid, call.mask.keys)
        q, z, gates = self._split(x_BPC)
        grid, keep = Grid(call.grid.shape), real_BP1[..., 0] if call.mask.keys is not None else None
        z, modulator = z.where(real_BP1, 0), torch.zeros_like(q)
        for weight, gate in zip(self.convs, gates, strict=False):
            z = F.gelu(grid_convolution(z, weight, None, grid, keep, backend=self.backend))
            modulator = modulator + z * gate
        mean = wide(z).sum(1, keepdim=True) / real_BP1.expand_as(z[..., :1]).sum(1, keepdim=True).clamp(min=1)
        y_BPC = self._modulate(q, modulator + F.gelu(mean).to(z.dtype) * gates[-1])
        return F.pad(y_BPC, (0, 0, call.grid.prefix, 0))

    def _split(self, x_BPC: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Query, z_0 and the gates of all levels."""
        dim = self.site.dim
        q, z, gates = self.in_proj(x_BPC).split((dim, dim, len(self.convs) + 1), -1)
        return q, z, gates.split(1, -1)

    def _modulate(self, q: Tensor, modulator: Tensor) -> Tensor:
        if self.normalize:
            modulator = modulator / (len(self.convs) + 1)
        y_BPC = self.out_proj(self.norm(q * self.context_proj(modulator)))
        return F.dropout(y_BPC, self.dropout, self.training)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Each convolution as a matrix of positions by positions, each mean as a row of it."""
        self._check_grid(call.grid)
        x_BPC, real_BP1 = positions(x_BNC, call.grid, call.mask.keys)
        real_BP1, dim, levels = real_BP1.to(x_BPC), self.site.dim, len(self.kernels)
        projected = self.in_proj(x_BPC)
        q, z, gates = projected[..., :dim], projected[..., dim : 2 * dim], projected[..., 2 * dim :]
        z, modulator = z * real_BP1, torch.zeros_like(q)
        places_PR = call.grid.places(x_BPC.device)
        for level, (kernel, weight) in enumerate(zip(self.kernels, self.convs, strict=True)):
            before = kernel - 1 if self.site.causal else kernel // 2
            tap_NMR = places_PR[None] - places_PR[:, None] + before
            inside_NM = ((tap_NMR >= 0) & (tap_NMR < kernel)).all(-1)
            matrix_CNM = weight[:, 0][:, *tap_NMR.clamp(0, kernel - 1).unbind(-1)] * inside_NM
            z = F.gelu(torch.einsum("cnm,bmc->bnc", matrix_CNM, z)) * real_BP1
            modulator = modulator + gates[..., level, None] * z
        counted_NM = torch.ones(len(places_PR), len(places_PR), dtype=z.dtype, device=z.device)
        if self.site.causal:
            counted_NM = counted_NM.tril()
        mean = (counted_NM @ z) / (counted_NM @ real_BP1).clamp(min=1)
        modulator = (modulator + gates[..., levels, None] * F.gelu(mean)) / (levels + 1 if self.normalize else 1)
        return F.pad(self.out_proj(self.norm(q * self.context_proj(modulator))), (0, 0, call.grid.prefix, 0))

    def count(self, sizes: Sizes) -> Cost:
        """Projections, and the taps on the grid; the torch backend also multiplies the others."""
        grid, dim = sizes.grid, self.site.dim
        self._check_grid(grid)
        flops = executed = 2 * grid.positions * dim * (4 * dim + len(self.convs) + 1)
        for kernel in self.kernels:
            on_grid, multiplied = convolution_flops(grid, kernel)
            if self.site.causal:
                on_grid = 2 * sum(min(n + 1, kernel) for n in range(grid.positions))
            flops, executed = flops + dim * on_grid, executed + dim * multiplied
        return Cost(sizes.batch * flops, sizes.batch * executed)

    def start(self, batch: int, like: Tensor) -> FocalState:
        """Nothing before the first token."""
        dim = self.site.dim
        tails = tuple(like.new_zeros(batch, kernel - 1, dim) for kernel in self.kernels)
        total = wide(like.new_zeros(batch, 1, dim))
        return FocalState(tails, total, like.new_zeros(batch, 1, 1, dtype=torch.int64))

    def advance(self, x_BNC: Tensor, state: FocalState, keep: Tensor | None) -> tuple[Tensor, FocalState]:
        """Convolve the segment behind the tails; the mean goes on from the sum."""
        return self._causal(x_BNC, state, keep)

    def _causal(self, x_BNC: Tensor, state: FocalState, keep: Tensor | None) -> tuple[Tensor, FocalState]:
        x_BNC, real_BN1 = positions(x_BNC, Grid((x_BNC.shape[1],)), keep)
        q, z, gates = self._split(x_BNC)
        z, modulator = z.where(real_BN1, 0), torch.zeros_like(q)
        tails: list[Tensor] = []
        for weight, gate, tail in zip(self.convs, gates, state.tails, strict=False):
            z = torch.cat([tail, z], 1)
            tails.append(z[:, x_BNC.shape[1] :].clone())  # a view would keep the whole segment
            z = F.conv1d(z.mT, weight, groups=self.site.dim).mT
            z = F.gelu(z).where(real_BN1, 0)
            modulator = modulator + z * gate
        totals = state.total + wide(z).cumsum(1)
        counts = state.tokens + real_BN1.cumsum(1)
        modulator = modulator + F.gelu(totals / counts.clamp(min=1)).to(z.dtype) * gates[-1]
        state = FocalState(tuple(tails), totals[:, -1:].clone(), counts[:, -1:].clone())
        return self._modulate(q, modulator), state
