"""From pictures to maps and tokens: stems, patches, downsampling, learned places.

B batch, N tokens, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid

MapNorm = Callable[[int], nn.Module]


class Downsample(nn.Module):
    """norm(conv(norm(x))): a strided convolution of a map, with the norms that are asked for.

    Args:
        dim, out: channels in and out.
        kernel, stride: of the convolution.
        padding: places of zeros around the map; kernel // 2 by default, 0 for patches that do not overlap.
        before, after: make norms over the channels of a map.
        bias: of the convolution.
        fill: whether zeros follow the last row and column until the stride divides the map.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        kernel: int,
        stride: int,
        *,
        padding: int | None = None,
        before: MapNorm | None = None,
        after: MapNorm | None = None,
        bias: bool = True,
        fill: bool = False,
    ) -> None:
        super().__init__()
        if padding is None:
            padding = 0 if kernel == stride else kernel // 2
        self.multiple = stride if fill else 1
        self.before = nn.Identity() if before is None else before(dim)
        self.conv = nn.Conv2d(dim, out, kernel, stride, padding, bias=bias)
        self.after = nn.Identity() if after is None else after(out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A smaller map.

        Raises:
            BadInput: a map on which the kernel finds no place.
        """
        x_BCHW = filled(self.before(x_BCHW), self.multiple)
        check_room(x_BCHW, self.conv.kernel_size[0], int(self.conv.padding[0]))
        return self.after(self.conv(x_BCHW))


def check_room(x_BCHW: Tensor, kernel: int, padding: int) -> None:
    """Refuse a map that is smaller than the kernel of a convolution."""
    height, width = x_BCHW.shape[2:]
    if height + 2 * padding < kernel or width + 2 * padding < kernel:
        raise BadInput(
            f"the picture is too small: a convolution of {kernel} x {kernel} finds no place on a map of "
            f"{height} x {width}"
        )


def filled(x_BCHW: Tensor, multiple: int) -> Tensor:
    """A map with zeros after its last row and column until both sides are multiples."""
    bottom, right = (-size % multiple for size in x_BCHW.shape[2:])
    return F.pad(x_BCHW, (0, right, 0, bottom)) if bottom or right else x_BCHW


class PatchMerging(nn.Module):
    """Four neighbouring places become one: W norm([x₀₀; x₁₀; x₀₁; x₁₁]), at odd borders with zeros.

    Source: Liu et al., "Swin Transformer", 2021 (arXiv:2103.14030).

    Args:
        dim, out: channels in and out.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A map of half the sides."""
        x_BCHhWw = filled(x_BCHW, 2).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        x_BHWC = x_BCHhWw.permute(0, 2, 4, 5, 3, 1).flatten(3)
        return self.reduction(self.norm(x_BHWC)).permute(0, 3, 1, 2)


class Patches(nn.Module):
    """Pictures cut into patches that do not overlap, each projected to a token.

    Args:
        in_chans: channels of the pictures.
        dim: C.
        size: of a patch, in pixels.
        bias: of the projection.
    """

    def __init__(self, in_chans: int, dim: int, size: int, bias: bool = True) -> None:
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(in_chans, dim, size, size, bias=bias)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """A map (B, C, H / size, W / size).

        Raises:
            BadInput: a picture that does not divide into patches.
        """
        check_patches(image_BCHW, self.size)
        return self.conv(image_BCHW)


def check_patches(image_BCHW: Tensor, size: int) -> None:
    """Refuse a picture that does not divide into patches of `size` x `size` pixels."""
    height, width = image_BCHW.shape[2:]
    if height % size or width % size:
        raise BadInput(
            f"pictures are cut into patches of {size} x {size}, which {height} x {width} does not divide into; resize "
            f"or pad them to {-height % size + height} x {-width % size + width}"
        )


def prefix_tokens(count: int, dim: int) -> nn.Parameter:
    """Learned tokens that stand in front of a sequence, (P, C)."""
    tokens = nn.Parameter(torch.empty(count, dim))
    nn.init.trunc_normal_(tokens, std=0.02)
    return tokens


def with_prefix(prefix_PC: Tensor, x_BNC: Tensor) -> Tensor:
    """Prefix tokens in front of each sequence of a batch, (B, P + N, C)."""
    return torch.cat([prefix_PC.expand(len(x_BNC), -1, -1), x_BNC], 1)


class Places(nn.Module):
    """One learned vector for every place of a grid (and every prefix token), added to the tokens.

    On another grid than the trained one the vectors of the places are resampled, bicubic and without aliasing.

    Args:
        dim: C.
        grid: that it is trained on, its prefix tokens included.
    """

    def __init__(self, dim: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(torch.empty(grid.tokens, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Tokens that know where they stand."""
        weight: Tensor = self.weight
        if grid.prefix != self.grid.prefix:
            raise BadInput(f"places were made for {self.grid.prefix} prefix tokens, got a {grid}")
        if grid.shape != self.grid.shape:
            prefix, places = self.grid.split(weight)
            table_1CHW = self.grid.unflatten(places).permute(2, 0, 1).unsqueeze(0)
            table_1CHW = F.interpolate(table_1CHW.float(), grid.shape, mode="bicubic", antialias=True)
            weight = torch.cat([prefix, table_1CHW[0].flatten(1).T.to(weight.dtype)])
        return x_BNC + weight
