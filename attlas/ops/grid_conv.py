"""Depthwise convolution of tokens that lie on a grid: y_u = Σ_t w_t ⊙ x_{u + t - K // 2} + b.

B batch, H heads, N tokens, P of them with a position, C channels, E value size, S... axes of the grid, K taps on each
axis.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Site
from attlas.ops.dispatch import Backend, Op

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def depthwise(channels: int, kernel: int, axes: int) -> Convolution:
    """The weights of a centred depthwise convolution over so many axes.

    Raises:
        BadInput: an even kernel, which has no centre.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise BadInput(f"the convolution is centred, so its kernel is odd, got {kernel}")
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    return conv(channels, channels, kernel, padding=kernel // 2, groups=channels)


def value_convolution(site: Site, kernel: int, name: str) -> Convolution | None:
    """The weights of the convolution of all heads' values that mechanism `name` adds to its output (LePE).

    Returns:
        None where the kernel is 0.

    Raises:
        BadInput: a site without a grid, or an even kernel.
    """
    if kernel == 0:
        return None
    if site.grid is None:
        raise BadInput(
            f"{name} convolves its values over the axes of the grid that it is trained on: pass grid=(height, width) "
            "when building it, or kernel=0 to go without"
        )
    return depthwise(site.heads * site.head_dim, kernel, site.grid.rank)


def convolve_values(
    conv: Convolution, v_BHNE: Tensor, grid: Grid, keep_BN: Tensor | None, backend: str = "auto"
) -> Tensor:
    """`grid_convolution` of all heads' values (B, H, N, E).

    Raises:
        BadInput: values of another size, or a grid of other axes, than the weights were built for.
    """
    heads, size = v_BHNE.shape[1], v_BHNE.shape[3]
    if heads * size != conv.in_channels:
        raise BadInput(f"the convolution was built for values of {conv.in_channels // heads} features, got {size}")
    v_BNC = v_BHNE.transpose(1, 2).flatten(2)
    y_BNC = grid_convolution(v_BNC, conv.weight, conv.bias, grid, keep_BN, backend=backend)
    return y_BNC.unflatten(-1, (heads, size)).transpose(1, 2)


def positions(x_BNC: Tensor, grid: Grid, keep_BN: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens that have a position, 0 where there is padding, and which of them (B or 1, P, 1) are real."""
    x_BPC = grid.split(x_BNC)[1]
    if keep_BN is None:
        return x_BPC, x_BPC.new_ones(1, x_BPC.shape[1], 1, dtype=torch.bool)
    real_BP1 = keep_BN[:, grid.prefix :].unsqueeze(-1)
    return x_BPC.where(real_BP1, 0), real_BP1


def convolution_flops(grid: Grid, kernel: int) -> tuple[int, int]:
    """FLOPs of one channel of one sequence: taps that fall on the grid, and all that torch multiplies."""
    reach, on_grid, multiplied = kernel // 2, 1, 1
    for length in grid.shape:
        on_grid *= sum(min(n + reach, length - 1) - max(n - reach, 0) + 1 for n in range(length))
        multiplied *= length * kernel
    return 2 * on_grid, 2 * multiplied


def _oracle(
    x_BNC: Tensor, weight_C1K: Tensor, bias_C: Tensor | None, grid: Grid, keep_BN: Tensor | None = None
) -> Tensor:
    """Convolve each channel with its own weights; there are zeros off the grid and where there is padding.

    Args:
        x_BNC: tokens.
        weight_C1K: (C, 1, K...), as a depthwise convolution of torch has it.
        bias_C: added to every position.
        grid: how the tokens lie.
        keep_BN: False where there is no token.

    Returns:
        (B, N, C), 0 for prefix tokens and padding.

    Raises:
        BadInput: a grid of other axes than the weights.
    """
    _check(weight_C1K, grid)
    x_BPC, real_BP1 = positions(x_BNC, grid, keep_BN)
    sizes = weight_C1K.shape[2:]
    border = [reach for size in reversed(sizes) for reach in (size // 2, size // 2)]
    padded_BSC = F.pad(grid.unflatten(x_BPC), (0, 0, *border))
    y_BSC = torch.zeros_like(grid.unflatten(x_BPC))
    for tap, weight_C in zip(itertools.product(*map(range, sizes)), weight_C1K.flatten(1).unbind(1), strict=True):
        place = tuple(slice(t, t + length) for t, length in zip(tap, grid.shape, strict=True))
        y_BSC = y_BSC + padded_BSC[(slice(None), *place)] * weight_C
    if bias_C is not None:
        y_BSC = y_BSC + bias_C
    return _tokens(y_BSC.flatten(1, -2), grid, None if keep_BN is None else real_BP1)


def _torch(
    x_BNC: Tensor, weight_C1K: Tensor, bias_C: Tensor | None, grid: Grid, keep_BN: Tensor | None = None
) -> Tensor:
    _check(weight_C1K, grid)
    x_BPC, real_BP1 = positions(x_BNC, grid, keep_BN)
    x_BCS = grid.unflatten(x_BPC.transpose(1, 2), -1)
    if grid.rank == 3:
        # oneDNN's weight gradient of a channels-last depthwise bfloat16 Conv3d of depth 2 is wrong.
        x_BCS = x_BCS.contiguous()
    conv = (F.conv1d, F.conv2d, F.conv3d)[grid.rank - 1]
    reach = [size // 2 for size in weight_C1K.shape[2:]]
    y_BCS = conv(x_BCS, weight_C1K, bias_C, padding=reach, groups=x_BNC.shape[2])
    return _tokens(y_BCS.flatten(2).transpose(1, 2), grid, None if keep_BN is None else real_BP1)


def _check(weight_C1K: Tensor, grid: Grid) -> None:
    if weight_C1K.ndim != 2 + grid.rank:
        raise BadInput(
            f"the convolution was built for {weight_C1K.ndim - 2} axes and called on a {grid}: axes must be as "
            "many, only lengths may differ"
        )


def _tokens(y: Tensor, grid: Grid, real: Tensor | None) -> Tensor:
    return F.pad(y if real is None else y.where(real, 0), (0, 0, grid.prefix, 0))


grid_convolution = Op("grid_convolution", Backend("torch", _torch), Backend("oracle", _oracle))
