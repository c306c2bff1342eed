"""A function on a plane, or a kernel, on a grid of another size over the same domain.

B batch, C channels, H and W the grid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.ops.precision import wide

MODES = ("bilinear", "fourier")
"""Ways to go between points: straight lines between the middles of cells, or the lowest frequencies."""


def check_mode(mode: str) -> str:
    """`mode` itself if there is such a one."""
    if mode not in MODES:
        raise BadInput(f"interpolation is one of {', '.join(map(repr, MODES))}, got {mode!r}")
    return mode


def resample(x_BCHW: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """x on a grid of `size`, as x itself where that is its size.

    "bilinear" holds the border values beyond the middle of the outermost cells. "fourier" takes x as periodic, keeps
    its mean exactly and, going up, its values at all points that both grids have: points lie in the middle of cells,
    so that there are such points where one grid is an odd number of times as fine.
    """
    check_mode(mode)
    if tuple(x_BCHW.shape[2:]) == tuple(size):
        return x_BCHW
    if mode == "bilinear":
        return F.interpolate(x_BCHW, size, mode="bilinear")
    rows = _fourier(wide(x_BCHW).mT, size[0]).mT
    return _fourier(rows, size[1]).to(x_BCHW.dtype)


def _fourier(x: Tensor, size: int) -> Tensor:
    """Along the last axis."""
    length = x.shape[-1]
    if length == size:
        return x
    modes = torch.fft.rfft(x, norm="forward")
    k = torch.arange(modes.shape[-1], dtype=x.dtype, device=x.device)
    # The highest frequency of an even grid stands for both signs: a finer grid parts it, a coarser has none above.
    share = torch.where(2 * k < min(length, size), 1, 0.5 if size > length else 0).to(x)
    # Point 0 lies half a cell from the border, and cells differ.
    turn = torch.polar(share, k * math.pi * (1 / size - 1 / length))
    return torch.fft.irfft(modes * turn, size, norm="forward")
