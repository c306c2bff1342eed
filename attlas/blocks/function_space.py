"""Functions known at points, and layers between functions: none of their parameters belongs to a point.

A domain has one length on all axes. A grid's points lie in the middle of equal cells.

B batch, C and O channels, M points, N output points, R axes of the domain, H and W a grid, K basis functions.

Sources: Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations", 2020 (arXiv:2010.08895);
Liu-Schiaffini et al., "Neural Operators with Localized Integral and Differential Kernels", 2024 (arXiv:2402.16845);
both in Berner et al., 2025 (arXiv:2506.10973), official code neuraloperator/neuraloperator. The basis of
`LocalIntegral` is a reconstruction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.ops.precision import wide
from attlas.ops.quadrature import rule_weights
from attlas.ops.resample import check_mode, resample

PADDING = {"periodic": "circular", "replicate": "replicate", "reflect": "reflect", "zeros": "constant"}
"""How a function goes on beyond its domain, and the padding mode of that name."""


@dataclass(frozen=True, eq=False)
class SampledFunction:
    """A function known at points of its domain, with what each point weighs in an integral.

    Attributes:
        values: (B, C, M) at points, or (B, C, H, W) on a grid.
        coordinates: (M, R).
        weights: (M,), their sum is the measure of the domain.
        length: of the domain on each axis.
    """

    values: Tensor
    coordinates: Tensor
    weights: Tensor
    length: float = 1.0

    def __post_init__(self) -> None:
        points = math.prod(self.values.shape[2:])
        if self.values.ndim < 3 or self.coordinates.ndim != 2 or len(self.coordinates) != points:
            raise BadInput(
                f"a function has values (batch, channels, points or grid) and coordinates (points, axes), got "
                f"{tuple(self.values.shape)} and {tuple(self.coordinates.shape)}"
            )
        if self.weights.shape != (points,):
            raise BadInput(f"there is one weight for each of the {points} points, got {tuple(self.weights.shape)}")

    @classmethod
    def on_grid(cls, values: Tensor, length: float = 1.0) -> SampledFunction:
        """The function of `values` (B, C, grid of one to three axes)."""
        grid = Grid(tuple(values.shape[2:]))
        weights = rule_weights(grid.shape, "midpoint", values) * length**grid.rank
        sizes = weights.new_tensor(grid.shape)
        coordinates = (grid.places(values.device).to(weights) + 0.5) / sizes * length
        return cls(values, coordinates, weights, length)

    def with_values(self, values: Tensor) -> SampledFunction:
        """Another function at the same points."""
        return SampledFunction(values, self.coordinates, self.weights, self.length)

    def integral(self) -> Tensor:
        """∫ f, (B, C)."""
        return (wide(self.values).flatten(2) * self.weights).sum(2)

    def mean(self) -> Tensor:
        """∫ f divided by the measure of the domain, (B, C)."""
        return self.integral() / self.weights.sum()

    def norm(self) -> Tensor:
        """The square root of ∫ |f|², over all channels, (B,)."""
        scaled = wide(self.values).flatten(2) * self.weights.sqrt()
        return torch.linalg.vector_norm(scaled.flatten(1), dim=1)


class SpectralConv2d(nn.Module):
    """A convolution over the whole periodic domain, as a matrix for each of the lowest frequencies.

        y(x) = Σ_{|k| <= modes} (W_k f_k) exp(2πi k.x),    f_k the Fourier coefficient of f

    A grid too coarse for a frequency has none of it. Time O(M log M).

    Args:
        inputs, outputs: C and O.
        modes: the highest frequency on each axis, in periods over the domain.
    """

    def __init__(self, inputs: int, outputs: int, modes: tuple[int, int]) -> None:
        super().__init__()
        if len(modes) != 2 or min(modes) < 0:
            raise BadInput(f"modes are the highest frequencies of two axes, none negative, got {modes}")
        self.modes = (modes[0], modes[1])
        shape = (inputs, outputs, 2 * modes[0] + 1, modes[1] + 1, 2)
        self.weight = nn.Parameter(torch.randn(shape) * (2 / (inputs + outputs)) ** 0.5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, O, H, W)."""
        height, width = x_BCHW.shape[2:]
        high = [min(most, (length - 1) // 2) for most, length in zip(self.modes, (height, width), strict=True)]
        modes = torch.fft.rfft2(wide(x_BCHW), norm="forward")
        rows = torch.arange(-high[0], high[0] + 1, device=x_BCHW.device)
        weight = torch.view_as_complex(wide(self.weight))[:, :, rows + self.modes[0], : high[1] + 1]
        mixed = torch.einsum("bchw,cohw->bohw", modes[:, :, rows % height, : high[1] + 1], weight)
        # Rows from -high to high, brought into the order of a transform of this height.
        low, up = mixed[:, :, : high[0]], mixed[:, :, high[0] :]
        between = mixed.new_zeros(*mixed.shape[:2], height - 2 * high[0] - 1, mixed.shape[3])
        spectrum = F.pad(torch.cat([up, between, low], 2), (0, width // 2 - high[1]))
        return torch.fft.irfft2(spectrum, (height, width), norm="forward").to(x_BCHW.dtype)


class DifferentialConv2d(nn.Module):
    """A finite difference: a convolution whose kernel is without mean, divided by the spacing h.

        y = (conv(f) − f Σ taps) / h

    As the grid is refined it converges to a first derivative of f in a learned direction, a mix over channels.

    Args:
        inputs, outputs: C and O.
        kernel: taps on each axis, odd.
        length: of the domain, on both axes or (rows, columns); cells must be squares, as the spacing is one.
        beyond: "periodic", "replicate", "reflect" or "zeros".
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        length: float | tuple[float, float] = 1.0,
        beyond: str = "periodic",
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise BadInput(f"the kernel is centred, so its taps are odd; got {kernel}")
        self.mode = PADDING[_check_beyond(beyond)]
        self.length = length if isinstance(length, tuple) else (length, length)
        self.weight = nn.Parameter(nn.Conv2d(inputs, outputs, kernel).weight.detach())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, O, H, W)."""
        height, width = x_BCHW.shape[2:]
        rows, columns = height / self.length[0], width / self.length[1]
        if abs(rows - columns) > 1e-6 * columns:
            raise BadInput(
                f"{height} x {width} cells on a domain of {self.length[0]} x {self.length[1]} are no squares: take a "
                "grid whose are, or build it with length=(rows, columns) of another domain"
            )
        reach = self.weight.shape[-1] // 2
        centred = self.weight.clone()
        centred[..., reach, reach] -= self.weight.sum((2, 3))
        padded = F.pad(x_BCHW, (reach,) * 4, self.mode)
        return F.conv2d(padded, centred) * columns


class LocalIntegral(nn.Module):
    """A convolution whose kernel is a function of physical distance and direction, within a radius.

        y(x) = Σ_k W_k ∫ ψ_k(x' − x) f(x') dx' / ∫ ψ_k(x' − x) dx' + b

    ψ_0 is a hat of distance at the centre; the others are products of a hat of distance and a hat of the angle, on
    rings; a single angle is all directions alike. Integrals are sums with quadrature weights, over grids as
    convolutions, over other points pair by pair. The radius should span some cells: a ψ that no point lies under
    gives 0.

    Args:
        inputs, outputs: C and O.
        radius: beyond which the kernel is 0, in units of the domain; on a periodic one at most half its length.
        rings: hats of distance, the one at the centre included.
        angles: hats of the angle on each ring.
        periodic: whether the domain goes on around; else only what lies in it is integrated.
        bias: whether b is there.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        radius: float,
        *,
        rings: int = 2,
        angles: int = 4,
        periodic: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if radius <= 0 or rings < 1 or angles < 1:
            raise BadInput(f"radius is above 0, rings and angles at least 1, got {radius}, {rings}, {angles}")
        self.radius, self.rings, self.angles, self.periodic = radius, rings, angles, periodic
        basis = 1 + (rings - 1) * angles
        self.weight = nn.Parameter(torch.randn(basis, inputs, outputs) / (basis * inputs) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, f: SampledFunction) -> SampledFunction:
        """The integrals at the same points."""
        if f.coordinates.shape[1] != 2:
            raise BadInput(f"a local integral is taken over a plane, got {f.coordinates.shape[1]} axes")
        if self.periodic and 2 * self.radius > f.length:
            raise BadInput(
                f"a radius of {self.radius} meets itself around a periodic domain of length {f.length}: at most half "
                "of the length"
            )
        means_KBCM = self._on_grid(f) if f.values.ndim == 4 else self._at_points(f)
        y = torch.einsum("kbcm,kco->bom", means_KBCM, wide(self.weight))
        if self.bias is not None:
            y = y + wide(self.bias)[:, None]
        return f.with_values(y.to(f.values.dtype).unflatten(2, f.values.shape[2:]))

    def basis(self, offsets: Tensor) -> Tensor:
        """ψ (K, ...) at offsets (..., 2) from the centre."""
        step = self.radius / self.rings
        distance, angle = offsets.square().sum(-1).sqrt(), torch.atan2(offsets[..., 1], offsets[..., 0])
        found = [(1 - distance / step).clamp(min=0)]
        turn = 2 * math.pi / self.angles
        for ring in range(1, self.rings):
            near = (1 - (distance / step - ring).abs()).clamp(min=0)
            for number in range(self.angles):
                between = (angle - number * turn + math.pi).remainder(2 * math.pi) - math.pi
                found.append(near * (1 - between.abs() / turn).clamp(min=0) if self.angles > 1 else near)
        return torch.stack(found)

    def _on_grid(self, f: SampledFunction) -> Tensor:
        height, width = f.values.shape[2:]
        spacing = (f.length / height, f.length / width)
        reach = [int(self.radius / h) for h in spacing]
        x = wide(f.values)
        steps = [torch.arange(-n, n + 1).to(x) * h for n, h in zip(reach, spacing, strict=True)]
        offsets = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1)
        psi_K1HW = self.basis(offsets).unsqueeze(1)
        mode, border = "circular" if self.periodic else "constant", (reach[1], reach[1], reach[0], reach[0])
        w_11HW = f.weights.to(x).view(1, 1, height, width)
        sums = F.conv2d(F.pad(x * w_11HW, border, mode).flatten(0, 1).unsqueeze(1), psi_K1HW)
        total = F.conv2d(F.pad(w_11HW, border, mode), psi_K1HW)
        return (sums / total.where(total > 0, 1)).unflatten(0, x.shape[:2]).movedim(2, 0).flatten(3)

    def _at_points(self, f: SampledFunction) -> Tensor:
        offsets_NMR = f.coordinates - f.coordinates[:, None]
        if self.periodic:
            offsets_NMR = (offsets_NMR + f.length / 2).remainder(f.length) - f.length / 2
        psi_KNM = self.basis(offsets_NMR) * f.weights
        total = psi_KNM.sum(-1, keepdim=True)
        return torch.einsum("knm,bcm->kbcn", psi_KNM / total.where(total > 0, 1), wide(f.values))


class LearnedMap(nn.Module):
    """x + table: a vector for each point of one grid, as position embeddings of images are.

    It belongs to its grid; `CoordinateMap` reads the same table as a function of coordinates.

    Args:
        channels: C.
        shape: H and W.
    """

    def __init__(self, channels: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(channels, *shape) * 0.02)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W)."""
        if x_BCHW.shape[1:] != self.table.shape:
            raise BadInput(
                f"this table is for {tuple(self.table.shape)}, got {tuple(x_BCHW.shape[1:])}; as a function of "
                "coordinates, attlas.blocks.function_space.CoordinateMap, it fits any grid"
            )
        return x_BCHW + self.table


class CoordinateMap(LearnedMap):
    """x + a learned function of the coordinates, known by a table and read in between.

    Args:
        channels: C.
        shape: of the table.
        interpolation: "bilinear" or "fourier".
    """

    def __init__(self, channels: int, shape: tuple[int, int], interpolation: str = "bilinear") -> None:
        super().__init__(channels, shape)
        self.interpolation = check_mode(interpolation)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) on any grid."""
        height, width = x_BCHW.shape[2:]
        return x_BCHW + resample(self.table.unsqueeze(0), (height, width), self.interpolation)


def _check_beyond(beyond: str) -> str:
    if beyond not in PADDING:
        raise BadInput(f"beyond is one of {', '.join(map(repr, PADDING))}, got {beyond!r}")
    return beyond
