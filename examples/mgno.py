"""Water through rock: what a network of learned multigrid cycles makes of a permeability.

The pressure u of a flow through a medium of permeability a obeys −div(a grad u) = 1 with u = 0 on the border of the
unit square. The medium is of two kinds of rock, 12 and 3, where a random smooth field is above or below 0. A finite
volume method solves some hundreds of such problems; MgNO learns from them to go from a to u at once, beside a plain
convolutional network of four layers and as many parameters.

Three questions. How far off are the two on media that they have not seen? What of MgNO's answer comes from which
grid: how far off is it when all its cycles end at a given level? And what do the same cycles do with the weights of
classical multigrid: by how much does each one lower the residual of Poisson's equation, if they restrict the residual,
as the paper writes, and if they restrict what is given, as its published networks do?

MgNO is about four times closer than the plain network, whose pixels see eight to each side. It needs all its grids:
without the coarsest, of 4 x 4 points, its error is eight times as large, for pressure depends on the whole domain.
Classical weights solve at one rate on all grids, a slower one where the residual is not restricted.

He, Liu and Xu, 2023 (arXiv:2310.19809).
"""

import copy
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.mechanisms.conv.mgno import VCycle
from attlas.models.mgno import MgNO
from attlas.ops.quadrature import relative_l2
from examples.shared import main

ROCKS = (3.0, 12.0)


class Result(NamedTuple):
    """What was found.

    Attributes:
        errors: mean relative L2 error of each network on unseen media, and the number of its parameters.
        by_level: mean error of MgNO when its cycles end at a level, the finest first.
        residuals: relative residuals after 0, 1, ... classical cycles, by interior points and what is restricted.
        medium, exact, found: a, u and MgNO's u for one unseen medium, (H, W).
    """

    errors: dict[str, tuple[float, int]]
    by_level: list[float]
    residuals: dict[tuple[int, str], list[float]]
    medium: Tensor
    exact: Tensor
    found: Tensor


def media(count: int, points: int, seed: int) -> Tensor:
    """Random permeabilities (count, 1, points, points)."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.fft.fftfreq(points, 1 / points)
    decay = (k[:, None] ** 2 + k**2 + 9) ** -1.0
    noise = torch.randn(count, 1, points, points, generator=generator)
    field = torch.fft.ifft2(torch.fft.fft2(noise) * decay).real
    return torch.where(field > 0, ROCKS[1], ROCKS[0])


def pressures(media_BCHW: Tensor) -> Tensor:
    """u in the middle of the cells of each medium, by finite volumes."""
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.linalg import spsolve

    points = media_BCHW.shape[-1]
    cell = np.arange(points * points).reshape(points, points)
    solved = []
    for medium in media_BCHW[:, 0].double().numpy():
        rows, columns, entries = [], [], []
        diagonal = np.zeros((points, points))
        for near, far, a, b in (
            (cell[:-1], cell[1:], medium[:-1], medium[1:]),
            (cell[:, :-1], cell[:, 1:], medium[:, :-1], medium[:, 1:]),
        ):
            through = (2 * a * b / (a + b)).ravel()  # two halves of cells, one behind the other
            rows += [near.ravel(), far.ravel()]
            columns += [far.ravel(), near.ravel()]
            entries += [-through, -through]
            diagonal += np.bincount(near.ravel(), through, points**2).reshape(points, points)
            diagonal += np.bincount(far.ravel(), through, points**2).reshape(points, points)
        for border in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
            diagonal[border] += 2 * medium[border]  # the wall is half a cell away
        rows, columns, entries = (
            np.concatenate([*parts, extra.ravel()])
            for parts, extra in ((rows, cell), (columns, cell), (entries, diagonal))
        )
        matrix = coo_matrix((entries, (rows, columns))).tocsc()
        solved.append(spsolve(matrix, np.full(points**2, points**-2.0)).reshape(1, points, points))
    return torch.tensor(np.stack(solved)).float()


def plain_network(parameters: int) -> nn.Sequential:
    """Four convolutional layers of 5 x 5 with as many parameters as can be without more."""
    width = 1
    while 2 * 25 * (width + 1) ** 2 + 53 * (width + 1) + 1 <= parameters:
        width += 1
    layers: list[nn.Module] = [nn.Conv2d(1, width, 5, padding=2), nn.GELU()]
    for _ in range(2):
        layers += [nn.Conv2d(width, width, 5, padding=2), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 5, padding=2))


def learn(model: nn.Module, a: Tensor, u: Tensor, epochs: int, batch: int) -> nn.Module:
    """Adam on the relative error, with one cycle of the rate."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    steps = epochs * -(-len(a) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(a)).split(batch):
            loss = relative_l2(model(a[chosen]), u[chosen]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def error(model: nn.Module, a: Tensor, u: Tensor) -> float:
    """The mean relative error."""
    return relative_l2(model(a), u).mean().item()


def ending_at(model: MgNO, level: int) -> MgNO:
    """The network without what its cycles bring up from below a level."""
    cut = copy.deepcopy(model)
    for cycle in cut.cycles:
        if level + 1 < len(cycle.levels):
            nn.init.zeros_(cycle.levels[level].prolong.weight)
    return cut


@torch.no_grad()
def classical(interior: int, residual: bool, cycles: int = 8) -> list[float]:
    """Relative residuals of −Δu = f under cycles of damped Jacobi, full weighting and bilinear interpolation.

    The border is on the grid and held at 0 as a hole is, so that it lies at the same place on every level.
    """
    length = interior + 2
    levels = (length - 1).bit_length() - 1
    steps = [(2, 2)] * (levels - 1) + [(2, 0)]
    cycle = VCycle(1, 1, steps=steps, residual=residual, shape=(length, length))
    stencil = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]])
    hat = torch.tensor([0.5, 1, 0.5])
    for name, parameter in cycle.named_parameters():
        parameter.zero_()
        if ".operator" in name:
            parameter[0, 0] = stencil
        elif ".smoother" in name:
            parameter[0, 0, 1, 1] = 0.8 / 4
        elif ".restrict" in name or ".prolong" in name:  # full weighting, times 4 as spacing doubles
            parameter[0, 0, :3, :3] = hat[:, None] * hat
    cycle, stencil = cycle.double(), stencil.double()
    keep = F.pad(torch.ones(1, 1, interior, interior, dtype=torch.bool), (1, 1, 1, 1))
    f = torch.randn(1, 1, length, length, dtype=torch.float64) * keep
    u, norms = torch.zeros_like(f), []
    for _ in range(cycles + 1):
        rest = (f - F.conv2d(u, stencil[None, None], padding=1)) * keep
        norms.append(float(rest.norm() / f.norm()))
        u = u + cycle(rest, keep)
    return norms


def run(
    points: int = 32,
    train: int = 400,
    test: int = 100,
    epochs: int = 24,
    channels: int = 16,
    layers: int = 3,
    batch: int = 20,
    interiors: tuple[int, ...] = (31, 63, 127),
) -> Result:
    """Solve, train, print the tables."""
    a = media(train + test, points, seed=0)
    u = pressures(a)
    size = u[:train].std()
    given, wanted = (a - a[:train].mean()) / a[:train].std(), u / size
    steps = [(1, 0)] * (points.bit_length() - 3) + [(2, 0)]
    torch.manual_seed(0)
    mgno = MgNO(1, channels, layers, steps=steps)
    count = sum(p.numel() for p in mgno.parameters())
    models: dict[str, nn.Module] = {"MgNO": mgno, "plain convolutions": plain_network(count)}
    errors = {}
    print(f"{'':20}{'parameters':>12}{'error, unseen':>15}")
    for name, model in models.items():
        learn(model, given[:train], wanted[:train], epochs, batch)
        errors[name] = (
            error(model, given[train:], wanted[train:]),
            sum(p.numel() for p in model.parameters()),
        )
        print(f"{name:20}{errors[name][1]:12,}{errors[name][0]:15.1%}")
    by_level = [error(ending_at(mgno, level), given[train:], wanted[train:]) for level in range(len(steps))]
    for level, value in enumerate(by_level):
        print(f"cycles end at level {level}, {points >> level:3} x {points >> level:<3} error {value:8.1%}")
    residuals = {}
    for interior in interiors:
        for what, residual in (("the residual", True), ("what is given", False)):
            norms = classical(interior, residual)
            residuals[interior, what] = norms
            rate = (norms[-1] / norms[0]) ** (1 / (len(norms) - 1))
            print(f"classical weights, {interior:3} points a side, restricting {what:14} {rate:.3f} per cycle")
    with torch.no_grad():
        found = mgno(given[train : train + 1])[0, 0] * size
    return Result(errors, by_level, residuals, a[train, 0], u[train, 0], found)


def draw(result: Result, path: Path) -> None:
    """The medium, the two pressures and their difference; errors by level; residuals by cycle."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12.5, 7), layout="constrained")
    top = float(result.exact.max())
    difference = result.found - result.exact
    reach = float(difference.abs().max())
    images = (
        (axes[0, 0], result.medium, "permeability a", {"cmap": "cividis"}),
        (axes[0, 1], result.exact, "pressure u, finite volumes", {"vmin": 0, "vmax": top}),
        (axes[0, 2], result.found, "pressure u, MgNO", {"vmin": 0, "vmax": top}),
        (axes[1, 0], difference, "MgNO − finite volumes", {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach}),
    )
    for axis, image, title, settings in images:
        drawn = axis.imshow(image.numpy(), **settings)
        axis.set(title=title, xticks=[], yticks=[])
        figure.colorbar(drawn, ax=axis, shrink=0.8)
    levels = range(len(result.by_level))
    axes[1, 1].bar(levels, [100 * value for value in result.by_level])
    plain, _ = result.errors["plain convolutions"]
    axes[1, 1].axhline(100 * plain, color="black", linestyle=":", label="plain convolutions")
    axes[1, 1].set(title="error if cycles end at a level", xlabel="level (0: finest grid)", ylabel="%", yscale="log")
    axes[1, 1].set_xticks(levels)
    axes[1, 1].legend()
    for (interior, what), norms in result.residuals.items():
        style = "-" if what == "the residual" else "--"
        color = f"C{sorted({size for size, _ in result.residuals}).index(interior)}"
        axes[1, 2].semilogy(norms, style, color=color, label=f"{interior}², {what}")
    axes[1, 2].set(title="classical weights: residual", xlabel="V-cycles")
    axes[1, 2].legend(title="grid, restricting", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
