"""Cells of a grid, each made one token by a convolution whose steps are as long as its kernel.

    z_c = Σ_t W_t x_{r c + t} + b

A grid that does not divide ends in cells that reach over its border: there, as where there is padding, x is 0.

B batch, N tokens, M cells, C channels in and O channels out, I = C / groups, r places of a cell on each axis.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.ops.dispatch import Backend, Op


def cell_shape(grid: Grid, side: int) -> tuple[int, ...]:
    """Cells on each axis.

    Raises:
        BadInput: prefix tokens, which lie in no cell, or a cell that is larger than the grid.
    """
    if grid.prefix:
        raise BadInput(f"prefix tokens lie in no cell, got a {grid}: take them off and pass grid={grid.shape}")
    if side > min(grid.shape):
        raise BadInput(
            f"cells of {side} places on each axis do not cut a {grid}: take a reduction of at most {min(grid.shape)}"
        )
    return tuple(-(-length // side) for length in grid.shape)


def live_cells(grid: Grid, side: int, keep_BN: Tensor | None) -> Tensor | None:
    """Which cells (B, M) hold a token that is real; None where all do."""
    shape = cell_shape(grid, side)
    if keep_BN is None:
        return None
    real = keep_BN.unflatten(1, grid.shape)
    for axis, (length, cells) in enumerate(zip(grid.shape, shape, strict=True), 1):
        over = [0, 0] * (real.ndim - 1 - axis) + [0, cells * side - length]
        real = F.pad(real, over).unflatten(axis, (cells, side)).any(axis + 1)
    return real.flatten(1)


def cell_flops(grid: Grid, side: int, weights: int) -> tuple[int, int]:
    """FLOPs of one sequence, where one place has so many weights: of places on the grid, and of all."""
    return 2 * grid.positions * weights, 2 * prod(cell_shape(grid, side)) * side**grid.rank * weights


def _oracle(
    x_BNC: Tensor, weight_OIK: Tensor, bias_O: Tensor | None, grid: Grid, keep_BN: Tensor | None = None
) -> Tensor:
    """One token per cell, cells in raster order.

    Args:
        x_BNC: tokens.
        weight_OIK: (O, I, r, ...) as a convolution of torch has it; with I < C it has C / I groups.
        bias_O: added to every cell, also to one without a real token.
        grid: how the tokens lie.
        keep_BN: False where there is no token.

    Returns:
        (B, M, O).
    """
    side, groups = weight_OIK.shape[2], x_BNC.shape[2] // weight_OIK.shape[1]
    cells = Grid(cell_shape(grid, side))
    if keep_BN is not None:
        x_BNC = x_BNC.where(keep_BN.unsqueeze(-1), 0)
    place_NR = grid.places(x_BNC.device)
    tap_N, cell_N = torch.zeros_like(place_NR[:, 0]), torch.zeros_like(place_NR[:, 0])
    for axis, count in enumerate(cells.shape):
        tap_N = tap_N * side + place_NR[:, axis] % side
        cell_N = cell_N * count + place_NR[:, axis] // side
    weight_GOIN = weight_OIK.flatten(2)[..., tap_N].unflatten(0, (groups, -1))
    parts_BNO = torch.einsum("goin,bngi->bngo", weight_GOIN, x_BNC.unflatten(2, (groups, -1))).flatten(2)
    z_BMO = parts_BNO.new_zeros(len(x_BNC), cells.positions, weight_OIK.shape[0]).index_add(1, cell_N, parts_BNO)
    return z_BMO if bias_O is None else z_BMO + bias_O


def _torch(
    x_BNC: Tensor, weight_OIK: Tensor, bias_O: Tensor | None, grid: Grid, keep_BN: Tensor | None = None
) -> Tensor:
    side, groups = weight_OIK.shape[2], x_BNC.shape[2] // weight_OIK.shape[1]
    cells = cell_shape(grid, side)
    if keep_BN is not None:
        x_BNC = x_BNC.where(keep_BN.unsqueeze(-1), 0)
    over = [c * side - length for c, length in zip(cells, grid.shape, strict=True)]
    x_BCS = F.pad(grid.unflatten(x_BNC.mT, -1), [pad for extra in reversed(over) for pad in (0, extra)])
    conv = (F.conv1d, F.conv2d, F.conv3d)[grid.rank - 1]
    return conv(x_BCS.contiguous(), weight_OIK, bias_O, stride=side, groups=groups).flatten(2).mT


cell_convolution = Op("cell_convolution", Backend("torch", _torch), Backend("oracle", _oracle))
