"""Trained on one grid, asked on four: networks as they are, converted, and between interpolations.

Given is a periodic function f on the unit square, wanted the solution u of u − Δu / 200 = f², a nonlinear problem in
which a point depends on its neighbourhood, about a tenth of the domain around it. Both are sums of waves and known
exactly on every grid. A small convolutional network with pooling and transposed convolutions and a Fourier neural
operator learn it on 32 x 32 points and are then asked on 16, 32, 64 and 128 a side: as they are; with
`attlas.adapt.function_space.convert`, which keeps the physical size of kernels and windows; and between
interpolations of input and output to the grid of the training. Errors are relative L2.

As it is, the convolutional network errs ten times as much on grids half or twice as fine as its own, and twenty times
on the finest: windows of as many pixels cover another part of the domain. Converted it holds on finer grids, at a
loss that does not grow with them; on the coarser one its kernels no longer fit and it is worse than before. The
Fourier operator, whose parameters are waves, needs no conversion. Interpolation does best here, because 16 points
hold all waves of f and 32 all of f²: it would lose whatever they could not.

Berner et al., 2025 (arXiv:2506.10973).
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.adapt.function_space import InputOutputInterpolate, convert, relative_l2
from attlas.blocks.function_space import SpectralConv2d
from examples.shared import main

SCREENING = 1 / 200
WAVES = 5
"""The highest frequency of f, so that f² has twice that, which 32 points hold."""


class Result(NamedTuple):
    """Mean relative errors by name and points a side, what was converted, and one problem on the finest grid."""

    errors: dict[str, dict[int, float]]
    report: str
    trained_on: int
    exact: Tensor
    found: dict[str, Tensor]


class Waves(NamedTuple):
    """Fourier coefficients (B, 2K + 1, 2K + 1) of functions, frequencies from −K to K on both axes."""

    coefficients: Tensor

    def on(self, points: int) -> Tensor:
        """Values (B, 1, points, points) in the middle of cells."""
        reach = self.coefficients.shape[-1] // 2
        x = (torch.arange(points, dtype=torch.float64) + 0.5) / points
        waves = torch.exp(2j * math.pi * x[:, None] * torch.arange(-reach, reach + 1))
        return torch.einsum("xk,bkl,yl->bxy", waves, self.coefficients, waves).real.float().unsqueeze(1)


def problems(count: int, seed: int) -> tuple[Waves, Waves]:
    """Random f, and the solutions u."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.arange(-WAVES, WAVES + 1)
    square = k[:, None] ** 2 + k**2
    shape = (count, *square.shape)
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    f = torch.complex(*parts) * (square + 4) ** -0.75
    f = (f + f.flip(1, 2).conj()) / 2  # a real function
    size = 4 * WAVES + 1
    padded = F.pad(f, (WAVES,) * 4)
    values = torch.fft.ifft2(torch.fft.ifftshift(padded, (1, 2)), norm="forward")
    squared = torch.fft.fftshift(torch.fft.fft2(values.real**2, norm="forward"), (1, 2))
    k = torch.arange(-(size // 2), size // 2 + 1)
    return Waves(f), Waves(squared / (1 + SCREENING * 4 * math.pi**2 * (k[:, None] ** 2 + k**2)))


def convolutional(width: int) -> nn.Sequential:
    """Down once and up again, around three convolutions."""

    def conv(inputs: int, outputs: int) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, 5, padding=2, padding_mode="circular")

    return nn.Sequential(
        conv(1, width),
        nn.GELU(),
        nn.AvgPool2d(2),
        conv(width, width),
        nn.GELU(),
        conv(width, width),
        nn.GELU(),
        nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
        nn.GELU(),
        conv(width, 1),
    )


class FourierLayer(nn.Module):
    """A spectral convolution beside a pointwise map."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.spectral = SpectralConv2d(width, width, (modes, modes))
        self.pointwise = nn.Conv2d(width, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W)."""
        return F.gelu(self.spectral(x_BCHW) + self.pointwise(x_BCHW))


def fourier(width: int) -> nn.Sequential:
    """A Fourier neural operator of three layers."""
    layers = [FourierLayer(width, WAVES + 1) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(1, width, 1), *layers, nn.Conv2d(width, 1, 1))


def learn(model: nn.Module, f: Tensor, u: Tensor, steps: int, batch: int) -> nn.Module:
    """Adam on the relative error, with one cycle of the rate."""
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(f), (batch,))
        loss = relative_l2(model(f[chosen]), u[chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def run(
    base: int = 32,
    grids: tuple[int, ...] = (16, 32, 64, 128),
    train: int = 400,
    test: int = 20,
    steps: int = 500,
    batch: int = 16,
    width: int = 16,
) -> Result:
    """Train both networks, ask them on all grids, print the table."""
    (f, u), (f_new, u_new) = problems(train, seed=0), problems(test, seed=1)
    ways: dict[str, nn.Module] = {}
    report = ""
    for name, build in (("convolutions", convolutional), ("Fourier operator", fourier)):
        torch.manual_seed(0)
        with torch.enable_grad():
            model = learn(build(width), f.on(base), u.on(base), steps, batch)
        ways[f"{name}, as they are" if name == "convolutions" else f"{name}, as it is"] = model
        if name == "convolutions":
            operator = convert(model, base)
            report = str(operator.report)
            ways[f"{name}, converted"] = operator
            ways[f"{name}, interpolated"] = InputOutputInterpolate(model, base, "fourier")
    errors: dict[str, dict[int, float]] = {name: {} for name in ways}
    found = {}
    for points in grids:
        given, wanted = f_new.on(points), u_new.on(points)
        for name, way in ways.items():
            y = way(given)
            errors[name][points] = relative_l2(y, wanted).mean().item()
            found[name] = y[0, 0]
    print(report)
    print(f"\n{'relative L2 error':30}" + "".join(f"{points:>9}²" for points in grids))
    for name, by_grid in errors.items():
        print(f"{name:30}" + "".join(f"{value:10.1%}" for value in by_grid.values()))
    return Result(errors, report, base, u_new.on(grids[-1])[0, 0], found)


def draw(result: Result, path: Path) -> None:
    """Errors by grid, and one solution on the finest."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 3, figsize=(11, 7.4), layout="constrained")
    axes = grid.flatten()
    for name, by_grid in result.errors.items():
        axes[0].plot(list(by_grid), [100 * value for value in by_grid.values()], marker="o", label=name)
    axes[0].axvline(result.trained_on, color="black", linestyle=":", linewidth=0.8)
    axes[0].set(xscale="log", yscale="log", xlabel="points a side (dotted: training)", title="relative L2 error, %")
    grids = list(next(iter(result.errors.values())))
    axes[0].set_xticks(grids, [str(points) for points in grids])
    axes[0].minorticks_off()
    axes[0].set_yticks([2, 5, 10, 20, 50], [2, 5, 10, 20, 50])
    axes[0].legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    low, high = float(result.exact.min()), float(result.exact.max())
    images = {"solution": result.exact} | result.found
    for axis, (name, image) in zip(axes[1:], images.items(), strict=True):
        axis.imshow(image.numpy(), vmin=low, vmax=high)
        axis.set(title=f"{name}, {grids[-1]}²", xticks=[], yticks=[])
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
