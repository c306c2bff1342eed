"""A function on a plane, or a kernel, on a grid of another size over the same domain.

B batch, C channels, H and W the grid.
"""

from __future__ import annotations

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
    its mean exactly and, going up, its values at all points that both grids have.
    """
    check_mode(mode)
    if tuple(x_BCHW.shape[2:]) == tuple(size):
        return x_BCHW
    if mode == "bilinear":
        return F.interpolate(x_BCHW, size, mode="bilinear")
    x = wide(x_BCHW)
    for dim, length in zip((2, 3), size, strict=True):
        x = _fourier(x, length, dim)
    return x.to(x_BCHW.dtype)


def _fourier(x: Tensor, size: int, dim: int) -> Tensor:
    length = x.shape[dim]
    if length == size:
        return x
    modes = torch.fft.fft(x, dim=dim, norm="forward")
    paired = (min(length, size) - 1) // 2
    positive, negative = modes.narrow(dim, 0, paired + 1), modes.narrow(dim, length - paired, paired)
    shape = list(x.shape)
    if length % 2 == 0 and size > length:
        # The highest frequency of an even grid stands for both signs; on a finer grid they part.
        highest = modes.narrow(dim, length // 2, 1) / 2
        shape[dim] = size - length - 1
        parts = [positive, highest, modes.new_zeros(shape), highest, negative]
    else:
        shape[dim] = size - 2 * paired - 1
        parts = [positive, modes.new_zeros(shape), negative]
    return torch.fft.ifft(torch.cat(parts, dim), dim=dim, norm="forward").real
