"""Convolutions with a batch normalisation behind, which become one convolution when training is over.

B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.ops.batch_norm import scale_and_shift


class ConvNorm(nn.Module):
    """BN(conv(x)), the convolution without a bias.

    Args:
        dim, out: channels in and out.
        kernel: places on each axis, one number or two.
        stride: of the convolution; its padding keeps the size where that is 1.
        groups: of channels that do not meet; `dim` is a depthwise convolution.
        start: weight of the normalisation; 0 lets a residual branch begin as nothing.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        start: float = 1.0,
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2)
        self.conv = nn.Conv2d(dim, out, (height, width), stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out)
        nn.init.constant_(self.norm.weight, start)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Convolve and normalise."""
        return self.norm(self.conv(x_BCHW))

    @torch.no_grad()
    def fused(self) -> nn.Conv2d:
        """One convolution with a bias that does what this does in evaluation."""
        scale, shift = scale_and_shift(self.norm)
        return convolution_like(self.conv, self.conv.weight * scale[:, None, None, None], shift)


def convolution_like(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Another convolution of the same stride, padding and groups."""
    out, dim, height, width = weight.shape
    new = nn.Conv2d(dim * conv.groups, out, (height, width), groups=conv.groups).to(weight)
    new.stride, new.padding = conv.stride, (height // 2, width // 2)
    new.weight, new.bias = nn.Parameter(weight), nn.Parameter(bias)
    return new.train(conv.training)


class Residual(nn.Module):
    """x + module(x)."""

    def __init__(self, module: nn.Module, drop: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.module = module
        self.drop = nn.Identity() if drop is None else drop

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        return x + self.drop(self.module(x))


class TwoKernels(nn.Module):
    """BN(conv(x)) + BN(conv(x)), depthwise, the second convolution with a smaller kernel.

    Source: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", 2021 (arXiv:2101.03697).

    Args:
        dim, out: channels in and out; out is a multiple of dim.
        kernel, branch: places on each axis of the large and of the small one.
        stride: of both.
    """

    def __init__(self, dim: int, out: int, kernel: int = 7, branch: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.large = ConvNorm(dim, out, kernel, stride, groups=dim)
        self.small = ConvNorm(dim, out, branch, stride, groups=dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The sum of both."""
        return self.large(x_BCHW) + self.small(x_BCHW)

    @torch.no_grad()
    def fused(self) -> nn.Conv2d:
        """One convolution with a bias that does what this does in evaluation."""
        large, small = self.large.fused(), self.small.fused()
        assert large.bias is not None
        assert small.bias is not None
        border = (large.kernel_size[0] - small.kernel_size[0]) // 2
        return convolution_like(large, large.weight + F.pad(small.weight, [border] * 4), large.bias + small.bias)


def fuse(model: nn.Module) -> nn.Module:
    """Every part of a model that says how replaced by what it is the same as in evaluation, in place.

    Such parts have a method `fused`: convolutions and projections with a batch normalisation behind them.

    Raises:
        BadInput: a model in training, whose statistics still move.
    """
    if any(part.training and callable(getattr(part, "fused", None)) for part in model.modules()):
        raise BadInput("in training a batch norm is no part of a convolution: call model.eval() first")
    fused = getattr(model, "fused", None)
    return fused() if callable(fused) else _fuse_inside(model)


def _fuse_inside(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        fused = getattr(child, "fused", None)
        if callable(fused):
            setattr(model, name, fused())
        else:
            _fuse_inside(child)
    return model
