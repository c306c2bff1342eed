"""Orchid: a convolution as long as the sequence, whose kernel is made from the sequence.

    u₁, u₂, u₃ = W_in x,    y = W_out (c(u₁) ∘ h(u₃) ⊛ (c(u₂) ∘ c(u₃)))
    FFT h(u) = σ(c_ω(|FFT c(u)|))               conditioning "magnitude", type I of the paper
    FFT h(u) = σ(conj(FFT c(u)) FFT c'(u))      conditioning "correlation", type II

x (B, N, C). ⊛ is the circular convolution of each channel, ∘ the product of entries, every c a depthwise convolution
of `size` taps of its own, c_ω one along the frequencies. On a grid of two axes all of them run along both. FFT is
orthonormal where h is made, so that the entries of FFT h do not grow with N, but for that of the mean m of c(u), which
is m √N in type I and m m′ N in type II: on long sequences of such channels float16 may not hold y of type II. σ acts
on magnitudes and keeps the phase; the authors found none, "identity", best.

A shift of x shifts y: no transform of c(u) but its magnitude or its correlation with another is used, and these do not
see a shift of both. That is why every convolution here is circular, and why |.| stands before c_ω. h is real, so that
of c_ω's taps only the even part matters.

The operator does not serve causal use: every entry of h is a sum over all tokens, so that y_n would tell what comes
after n, and the circular convolution carries the end of the sequence to its beginning. Neither a lower triangle nor
zeros behind the sequence would mend the first.

A circle has as many places as there are tokens. A padded batch is therefore mixed one sequence at a time, each on the
circle of its real tokens, a loop that `torch.compile(fullgraph=True)` does not take. On a plane u and all short
convolutions are 0 at padded positions.

Time O(N C (log N + C)), memory O(N C). The FLOPs counted are those of projections and short convolutions; transforms
are not among them.

Source: Karami and Ghodsi, "Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling", 2024
(arXiv:2402.18508), official code Karami-m/orchid. The chain of gates is the official block's; that its short
convolutions are circular and linear, without the official zeros at the border, LayerNorm and biases, is a
reconstruction from the paper's equations. The official code squares the magnitude, and adds Hyena's static kernels to h
and around the chain.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput, Unsupported
from attlas.core.grid import Grid
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.precision import wide

PROJECTIONS = 16 * 48 + 48 + 16 * 16 + 16

SPEC = Spec(
    name="orchid",
    title="Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling",
    year=2024,
    paper="arXiv:2402.18508",
    equation="y = W_out (u₁ ∘ h(x) ⊛ (u₂ ∘ u₃)),  FFT h = c_ω(|FFT c(x)|) or conj(FFT c(x)) FFT c′(x)",
    complexity="O(N log N) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(1, 2),
    prefix=False,
    reconstruction=True,
    examples=(
        Example(parameters=PROJECTIONS + 5 * 16 * 3),
        Example(grid=(8,), params={"conditioning": "correlation", "size": 5}, parameters=PROJECTIONS + 5 * 16 * 5),
        Example(grid=(3, 4), params={"activation": "tanh"}, parameters=PROJECTIONS + 5 * 16 * 9),
    ),
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda magnitude: magnitude,
    "tanh": torch.tanh,
    "softshrink": F.softshrink,
}


def _blank(x_BCS: Tensor, real_B1S: Tensor | None) -> Tensor:
    return x_BCS if real_B1S is None else x_BCS.where(real_B1S, 0)


def circular_conv(x_BCS: Tensor, taps_CK: Tensor) -> Tensor:
    """Depthwise convolution on a circle along every axis, y_n = Σ_j w_j x_{n+j-reach}; taps (C, K) or (C, K, K)."""
    for axis in range(2, x_BCS.ndim):
        length, reach = x_BCS.shape[axis], taps_CK.shape[-1] // 2
        around = torch.arange(-reach, length + reach, device=x_BCS.device) % length
        x_BCS = x_BCS.index_select(axis, around)
    convolve = F.conv1d if x_BCS.ndim == 3 else F.conv2d
    return convolve(x_BCS, taps_CK.unsqueeze(1), groups=x_BCS.shape[1])


@register(SPEC)
class Orchid(Mixer):
    """Data-dependent global convolution between two gates.

    Args:
        site: where it is installed; its grid says whether the circle is a line or a plane.
        backend: `auto`, `torch` or `oracle`.
        conditioning: how the kernel is made, "magnitude" or "correlation".
        activation: σ, "identity", "tanh" or "softshrink".
        size: taps of a short convolution on each axis, odd.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        conditioning: str = "magnitude",
        activation: str = "identity",
        size: int = 3,
    ) -> None:
        super().__init__(site, backend)
        if conditioning not in ("magnitude", "correlation"):
            raise BadInput(f"conditioning is 'magnitude' or 'correlation', got {conditioning!r}")
        if activation not in ACTIVATIONS:
            raise BadInput(f"activation is one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
        if size < 1 or size % 2 == 0:
            raise BadInput(f"a short convolution is centred, so its size is odd; got {size}")
        self.conditioning, self.activation, self.size = conditioning, activation, size
        self.axes = 1 if site.grid is None else site.grid.rank
        self.in_proj, self.out_proj = nn.Linear(site.dim, 3 * site.dim), nn.Linear(site.dim, site.dim)
        bound = size ** (-self.axes / 2)
        self.short, self.first, self.second = (
            nn.Parameter(torch.empty(channels, *[size] * self.axes).uniform_(-bound, bound))
            for channels in (3 * site.dim, site.dim, site.dim)
        )

    def _unsupported(self, what: str, **filters: Any) -> Unsupported:
        error = super()._unsupported(what, **filters)
        if what != "causal use":
            return error
        return Unsupported(f"{error}. Every entry of orchid's kernel is a sum over all tokens, later ones among them")

    def spectrum(self, u_BCS: Tensor, real_B1S: Tensor | None = None) -> Tensor:
        """FFT h(u) in the layout of `torch.fft.rfftn` along the axes of the grid, (B, C, S..., S // 2 + 1)."""
        axes = self._axes(u_BCS)
        first_BCS = wide(_blank(circular_conv(u_BCS, self.first), real_B1S))
        if self.conditioning == "correlation":
            second_BCS = wide(_blank(circular_conv(u_BCS, self.second), real_B1S))
            k, q = (torch.fft.rfftn(t, dim=axes, norm="ortho") for t in (first_BCS, second_BCS))
            return self._activated(k.conj() * q)
        even = wide(self.second + _reflected(self.second)) / 2
        magnitude = _magnitude(torch.fft.fftn(first_BCS, dim=axes, norm="ortho"))
        h = circular_conv(magnitude, even)[..., : u_BCS.shape[-1] // 2 + 1]
        return self._activated(torch.complex(wide(h), torch.zeros_like(wide(h))))

    def _activated(self, h: Tensor) -> Tensor:
        if self.activation == "identity":
            return h
        magnitude = _magnitude(h)
        return h * (ACTIVATIONS[self.activation](magnitude) / magnitude)

    def _axes(self, x_BCS: Tensor) -> tuple[int, ...]:
        return tuple(range(2, x_BCS.ndim))

    def convolve(self, u_BCS: Tensor, z_BCS: Tensor, real_B1S: Tensor | None = None) -> Tensor:
        """h(u) ⊛ z along the axes of the grid, in float32 at least."""
        axes, shape = self._axes(z_BCS), z_BCS.shape[2:]
        product = self.spectrum(u_BCS, real_B1S) * torch.fft.rfftn(wide(z_BCS), dim=axes)
        return torch.fft.irfftn(product, s=shape, dim=axes)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Whole batches, or the real tokens of one sequence after another."""
        return self._each(x_BNC, call, self._mix)

    def _each(self, x_BNC: Tensor, call: Call, mix: Callable[[Tensor, Grid, Tensor | None], Tensor]) -> Tensor:
        grid, keep = call.grid, call.mask.keys
        if grid.rank != self.axes:
            cure = "(height, width)" if grid.rank == 2 else "(length,)"
            raise BadInput(f"this orchid was built for {self.axes} axes, got a {grid}; build it with grid={cure}")
        if keep is None:
            return mix(x_BNC, grid, None)
        if grid.rank == 2:
            real = keep.unsqueeze(-1)
            return mix(x_BNC.where(real, 0), grid, real).where(real, 0)
        y = torch.zeros_like(x_BNC)
        for b in range(x_BNC.shape[0]):
            (places,) = keep[b].nonzero(as_tuple=True)
            if len(places):
                mixed = mix(x_BNC[b : b + 1, places], Grid((len(places),)), None)
                y = y.index_put((torch.full_like(places, b), places), mixed[0].to(y.dtype))
        return y

    def _mix(self, x_BNC: Tensor, grid: Grid, real_BN1: Tensor | None) -> Tensor:
        real_B1S = None if real_BN1 is None else grid.unflatten(real_BN1.transpose(1, 2), -1)
        u_BCS = _blank(grid.unflatten(self.in_proj(x_BNC).transpose(1, 2), -1), real_B1S)
        gate, key, value = wide(_blank(circular_conv(u_BCS, self.short), real_B1S)).chunk(3, 1)
        y_BCS = gate * self.convolve(u_BCS.chunk(3, 1)[2], key * value, real_B1S)
        return self.out_proj(y_BCS.flatten(2).transpose(1, 2).to(x_BNC.dtype))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Circles as matrices of differences of places, transforms as sums over places."""
        return self._each(x_BNC, call, self._mix_literally)

    def _mix_literally(self, x_BNC: Tensor, grid: Grid, real_BN1: Tensor | None) -> Tensor:
        places = grid.places()
        shape = torch.tensor(grid.shape)
        strides = torch.tensor([math.prod(grid.shape[a + 1 :]) for a in range(grid.rank)])
        difference_NM = ((places[:, None] - places) % shape * strides).sum(-1)
        phase_NM = 2 * math.pi * (places[:, None] * places / shape.double()).sum(-1)
        wave_NM = torch.polar(torch.ones_like(phase_NM), -phase_NM).to(torch.promote_types(x_BNC.dtype, torch.cfloat))

        def short(u_BNC: Tensor, taps_CK: Tensor) -> Tensor:
            total = torch.zeros_like(u_BNC)
            reach = self.size // 2
            for tap in torch.cartesian_prod(*[torch.arange(self.size)] * grid.rank).reshape(-1, grid.rank):
                source = ((places + tap - reach) % shape * strides).sum(-1)
                total = total + u_BNC[:, source] * taps_CK[(slice(None), *tap)]
            return total

        def transform(u_BNC: Tensor) -> Tensor:
            return torch.einsum("kn,bnc->bkc", wave_NM, u_BNC.to(wave_NM.dtype)) / math.sqrt(len(places))

        there = x_BNC.new_ones(1) if real_BN1 is None else real_BN1.to(x_BNC)
        u_BNC = there * (x_BNC @ self.in_proj.weight.T + self.in_proj.bias)
        gate, key, value = (there * short(u_BNC, self.short)).chunk(3, 2)
        first = transform(there * short(u_BNC.chunk(3, 2)[2], self.first))
        if self.conditioning == "correlation":
            spectrum = first.conj() * transform(there * short(u_BNC.chunk(3, 2)[2], self.second))
        else:
            spectrum = short(first.abs(), (self.second + _reflected(self.second)) / 2)
            spectrum = spectrum.to(wave_NM.dtype)
        size = spectrum.abs()
        spectrum = spectrum * (ACTIVATIONS[self.activation](size) / size.where(size > 0, 1))
        h_BNC = torch.einsum("kn,bkc->bnc", wave_NM.conj(), spectrum).real / len(places)
        y_BNC = gate * torch.einsum("bnmc,bmc->bnc", h_BNC[:, difference_NM], key * value)
        return y_BNC @ self.out_proj.weight.T + self.out_proj.bias

    def count(self, sizes: Sizes) -> Cost:
        """Projections, and five taps' worth of channels of short convolutions."""
        dim = self.site.dim
        flops = 2 * sizes.batch * sizes.queries * dim * (4 * dim + 5 * self.size**self.axes)
        return Cost(flops, flops)


def _reflected(taps_CK: Tensor) -> Tensor:
    """Taps turned round on every axis."""
    return taps_CK.flatten(1).flip(1).view_as(taps_CK)


def _magnitude(z: Tensor) -> Tensor:
    """|z|, not below the smallest float, so that one may divide by it; its gradient at 0 is 0."""
    squared = z.real.square() + z.imag.square()
    return squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()
