"""A convolutional network as an operator between functions, with the weights that it has.

    operator = attlas.adapt.function_space.convert(model, base_res=64)
    print(operator.report)
    y = operator(x)                     # x (B, C, H, W) on any grid; at 64 x 64 the model itself

A network that was trained on one grid reads its kernels as pixels: on a finer grid they shrink. `convert` replaces
every layer whose parameters or windows count pixels by one that keeps its physical size, and says of each layer what
became of it. With s the ratio of a grid to the one that the model was trained on:

    convolution              k taps become s k − s + 1 by interpolation, divided by how many more there are; padding
                             grows likewise, stride stays, so that grids keep their ratios from layer to layer
    transposed convolution   the input goes to the base grid, the output back from it
    pooling windows          grow by s, stride stays; border and padding are no part of a mean
    tables of a grid         are read as functions of coordinates
    fixed output sizes       of an upsampling grow by s; adaptive pools are left unless they give a single cell
    pointwise layers, norms  stay: means over equal cells are integrals, as softmax over them is

Layers whose class has a `forward` of its own are left, even where it derives from one of these, and so are layers whose
weight is parametrized: nothing tells what they would be on another grid.

H and W may differ, and so may their ratios. On coarser grids than its own a network loses what they cannot hold, first
of all the fine structure of its kernels. Not seen are operations in a `forward` that no module stands for: a
`torch.cat` is harmless, an interpolation to a fixed size or a reshape to one are not.

`InputOutputInterpolate` is the naive way for comparison: to the base grid, through the model, back.

Source: Berner et al., "Principled Approaches for Extending Neural Architectures to Function Spaces for Operator
Learning", 2025 (arXiv:2506.10973), official code neuraloperator/NNs-to-NOs, from which differ: pooling, which it
leaves; circular padding and the like, which it turns into zeros; kernels, paddings and strides that would shift the
output by a part of a cell, or give it another size, which it does not align; and Fourier resampling, which here takes
points for the middles of cells and parts the highest frequency of even grids.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from attlas.blocks.attention import Attention
from attlas.blocks.function_space import (
    CoordinateMap,
    DifferentialConv2d,
    LearnedMap,
    LocalIntegral,
    SampledFunction,
    SpectralConv2d,
)
from attlas.blocks.positions import Position
from attlas.core.errors import BadInput
from attlas.core.mechanism import Mechanism
from attlas.mechanisms.conv.mgno import VCycle
from attlas.ops.quadrature import relative_l2
from attlas.ops.resample import check_mode, resample

__all__ = ["FunctionSpace", "InputOutputInterpolate", "Report", "SampledFunction", "convert", "relative_l2"]

POINTWISE = (
    nn.Identity,
    nn.Linear,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.PReLU,
    nn.Hardswish,
    nn.Dropout,
    nn.Dropout2d,
)
MEANS = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)
CELLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
OPERATORS = (SpectralConv2d, DifferentialConv2d, LocalIntegral, CoordinateMap)
INTEGRAL_ATTENTION = frozenset({"softmax", "function_space", "galerkin"})
"""Mechanisms whose sums over equal cells are integrals."""
KNOWN = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.Upsample,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.MultiheadAttention,
    LearnedMap,
    *POINTWISE,
    *MEANS,
    *CELLS,
    *OPERATORS,
)
"""Layers that are judged by their class."""


class Change(NamedTuple):
    """What became of one layer: its path, its class, "converted", "kept" or "left", and how or why."""

    path: str
    module: str
    verdict: str
    how: str


@dataclass(frozen=True)
class Report:
    """What became of every layer, in order; `print` shows a table."""

    changes: tuple[Change, ...]

    def where(self, verdict: str) -> list[str]:
        """The paths of what was "converted", "kept" or "left"."""
        return [change.path for change in self.changes if change.verdict == verdict]

    def __str__(self) -> str:
        widths = [max((len(change[i]) for change in self.changes), default=0) for i in range(3)]
        lines = []
        for change in self.changes:
            cells = [text.ljust(width) for text, width in zip(change[:3], widths, strict=True)]
            lines.append("  ".join([*cells, change.how]))
        return "\n".join(lines)


class _Ratio:
    """The grid of the call in progress over the base grid, shared by all layers of one operator."""

    def __init__(self) -> None:
        self.value = (1.0, 1.0)


class FunctionSpace(nn.Module):
    """A model as an operator; `convert` makes it.

    All its layers share the ratio of the call in progress, so whatever runs a layer again later must come before a
    call on another grid: with `torch.utils.checkpoint`, go backward through one resolution before the next goes
    forward. Nor may two threads call one operator on different grids.

    Attributes:
        model: the converted network. Its state dict has the names and values that the original's has.
        report: what was converted, kept and left.
    """

    def __init__(self, model: nn.Module, base_res: tuple[int, int], report: Report, ratio: _Ratio) -> None:
        super().__init__()
        self.model = model
        self.base_res = base_res
        self.report = report
        self._ratio = ratio

    def forward(self, x_BCHW: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model on x, whose grid says how fine everything is."""
        _check_function(x_BCHW)
        height, width = x_BCHW.shape[2:]
        self._ratio.value = (height / self.base_res[0], width / self.base_res[1])
        return self.model(x_BCHW, *args, **kwargs)


class InputOutputInterpolate(nn.Module):
    """Any model between two interpolations: x to its grid, the output back to that of x.

    Args:
        model: takes and gives functions (B, C, H, W) at `base_res`.
        base_res: the grid that it was trained on.
        interpolation: "bilinear" or "fourier".
    """

    def __init__(self, model: nn.Module, base_res: int | tuple[int, int], interpolation: str = "bilinear") -> None:
        super().__init__()
        self.model = model
        self.base_res = _pair(base_res)
        self.interpolation = check_mode(interpolation)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, O, H, W)."""
        _check_function(x_BCHW)
        height, width = x_BCHW.shape[2:]
        y = self.model(resample(x_BCHW, self.base_res, self.interpolation))
        return resample(y, (height, width), self.interpolation)


def convert(model: nn.Module, base_res: int | tuple[int, int], *, interpolation: str = "bilinear") -> FunctionSpace:
    """The operator that `model` is on its training grid, for all grids; the model stays as it is.

    Args:
        model: takes a function (B, C, H, W) first. Weights are copied, training or evaluation mode is kept.
        base_res: the grid that it was trained on, one length or (H, W).
        interpolation: of kernels, tables and transposed convolutions, "bilinear" or "fourier".

    Raises:
        BadInput: nothing to convert to, such as a base_res below 1.
    """
    converter = _Converter(check_mode(interpolation))
    base = _pair(base_res)
    converted = converter.convert(copy.deepcopy(model), "")
    operator = FunctionSpace(converted, base, Report(tuple(converter.changes)), converter.ratio)
    operator.training = model.training
    return operator


def _pair(base_res: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (base_res, base_res) if isinstance(base_res, int) else base_res
    if min(height, width) < 1:
        raise BadInput(f"base_res is the grid that the model was trained on, at least 1 x 1, got {base_res}")
    return height, width


def _check_function(x: Tensor) -> None:
    if x.ndim != 4:
        raise BadInput(f"a function on a plane is (batch, channels, height, width), got {tuple(x.shape)}")


class _Converter:
    def __init__(self, interpolation: str) -> None:
        self.ratio = _Ratio()
        self.interpolation = interpolation
        self.changes: list[Change] = []
        self.made: dict[int, nn.Module] = {}

    def convert(self, module: nn.Module, path: str) -> nn.Module:
        """What takes the place of `module`; a layer that stands at two places is one layer afterwards too."""
        if id(module) in self.made:
            return self.made[id(module)]
        verdict, how = self._judge(module)
        if verdict == "converted" and is_parametrized(module):
            verdict, how = "left", "parametrized: convert it when the parametrization has been removed"
        if not verdict and module._parameters:
            own = ", ".join(module._parameters)
            self._note(path, module, "left", f"parameters of its own that its forward alone knows: {own}")
        if verdict:
            self._note(path, module, verdict, how)
        else:
            for name, child in module._modules.items():
                if child is not None:
                    module._modules[name] = self.convert(child, f"{path}.{name}" if path else name)
        self.made[id(module)] = self._replaced(module) if verdict == "converted" else module
        return self.made[id(module)]

    def _note(self, path: str, module: nn.Module, verdict: str, how: str) -> None:
        self.changes.append(Change(path or "(model)", type(module).__name__, verdict, how))

    def _judge(self, module: nn.Module) -> tuple[str, str]:
        """The verdict and how or why; nothing where the layers inside are to be looked at."""
        kind = next((kind for kind in type(module).__mro__ if kind in KNOWN), None)
        if kind is not None and _own_forward(module, kind):
            return "left", f"a {kind.__name__} with a forward of its own"
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride == (1, 1) and not _padded(module):
            return "kept", "pointwise"
        if isinstance(module, nn.Conv2d):
            return "converted", f"kernel of {_by(module.kernel_size)} resampled, with quadrature"
        if isinstance(module, nn.ConvTranspose2d):
            return "converted", "on the base grid, between interpolations"
        if isinstance(module, nn.AvgPool2d | nn.MaxPool2d):
            why = _unusual_pool(module)
            return ("left", why) if why else ("converted", f"window of {_by(module.kernel_size)} base cells")
        if isinstance(module, nn.Upsample):
            if module.size is not None:
                return "converted", "output size in base cells"
            return "kept", "finer by a factor, interpolated"
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            if len(module.normalized_shape) == 1:
                return "kept", "pointwise"
            if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 3:
                return "converted", "means as integrals, weights read by coordinates"
            return "left", f"normalises over {tuple(module.normalized_shape)}, a grid"
        if isinstance(module, OPERATORS):
            return "kept", "an operator"
        if isinstance(module, LearnedMap):
            return "converted", "table read by coordinates"
        if isinstance(module, VCycle):
            return "left", "its strides and steps count cells"
        if isinstance(module, CELLS):
            if set(_two(module.output_size)) <= {1, None}:
                return "kept", "the whole of an axis is the whole of the domain"
            return "left", f"always {_by(module.output_size)} cells, while what follows is taken to become finer"
        if isinstance(module, POINTWISE):
            return "kept", "pointwise"
        if isinstance(module, MEANS):
            return "kept", "means over equal cells are integrals"
        if isinstance(module, nn.MultiheadAttention):
            return "kept", "softmax over equal cells is an integral"
        if isinstance(module, Mechanism):
            return _judge_mechanism(module)
        if next(module.children(), None) is None:
            return "left", "not known to be independent of the grid"
        return "", ""

    def _replaced(self, module: nn.Module) -> nn.Module:
        kinds: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
            (nn.Conv2d, _Conv2d),
            (nn.ConvTranspose2d, _ConvTranspose2d),
            (nn.AvgPool2d, _AvgPool2d),
            (nn.MaxPool2d, _MaxPool2d),
            (nn.Upsample, _Upsample),
            (nn.LayerNorm, _LayerNorm),
            (LearnedMap, CoordinateMap),
        )
        cls = next(new for old, new in kinds if isinstance(module, old))
        # The new layer is the old one, its settings, parameters and hooks, with another forward.
        new = cls.__new__(cls)
        new.__dict__.update(module.__dict__)
        new.ratio, new.interpolation = self.ratio, self.interpolation  # type: ignore[assignment]
        return new


def _own_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer computes something else than the known layer that it derives from."""
    own = type(module)
    return any(
        name in vars(module) or getattr(own, name, None) is not getattr(kind, name, None)
        for name in ("forward", "_conv_forward")
    )


def _padded(conv: nn.Conv2d) -> bool:
    return not isinstance(conv.padding, str) and any(conv.padding)


def _judge_mechanism(module: Mechanism) -> tuple[str, str]:
    name = module.spec.name
    if not isinstance(module, Attention) or name not in INTEGRAL_ATTENTION:
        return "left", f"{name} is not known to be independent of the grid"
    if type(module.position) is not Position:
        return "left", f"{type(module.position).__name__} positions count tokens"
    return "kept", f"{name} over equal cells is an integral"


def _by(size: Any) -> str:
    height, width = _two(size)
    return f"{height} x {width}"


def _two(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, list | tuple) else (value, value)


def _floor(x: float) -> int:
    return math.floor(x + 1e-9)  # a ratio such as 4 / 3 may leave an integer a little short


def _taps(base: int, ratio: float) -> int:
    """Taps of a resampled kernel; where rounding would take one off its centre, one more."""
    taps = max(1, _floor(ratio * (base - 1) + 1))
    return taps + (base % 2 and 1 - taps % 2)


def _unusual_pool(pool: nn.AvgPool2d | nn.MaxPool2d) -> str:
    if pool.ceil_mode:
        return "ceil_mode rounds in pixels"
    if isinstance(pool, nn.MaxPool2d):
        if pool.return_indices or _two(pool.dilation) != (1, 1):
            return "indices and dilation are pixels"
    elif pool.divisor_override is not None or (pool.count_include_pad and any(_two(pool.padding))):
        return "divides by a number of pixels that are not on the domain"
    return ""


class _Span(NamedTuple):
    """A window along one axis on the grid of a call: its taps, and what is padded before and behind."""

    taps: int
    before: int
    behind: int


def _span(
    length: int, ratio: float, taps: int, base: int, stride: int, dilation: int, padding: tuple[int, int]
) -> _Span:
    """The window such that outputs keep their ratio to inputs, and their places.

    Args:
        length: of the input now.
        ratio: s, of the grid now to the base.
        taps, base: of the window now, and at the base.
        stride, dilation: of both.
        padding: before and behind, at the base.
    """
    outputs = (round(length / ratio) + sum(padding) - dilation * (base - 1) - 1) // stride + 1
    total = (max(1, round(ratio * outputs)) - 1) * stride + dilation * (taps - 1) + 1 - length
    # Output n stands at the middle of its taps; in units of the base that place is the same for every s.
    middle = dilation * (base - 1) / 2 + 0.5 - stride / 2 - padding[0]
    before = _floor(dilation * (taps - 1) / 2 + 0.5 - stride / 2 - ratio * middle)
    return _Span(taps, before, total - before)


class _Conv2d(nn.Conv2d):
    """A convolution whose kernel covers what it covers on the base grid."""

    ratio: _Ratio
    interpolation: str

    def forward(self, x: Tensor) -> Tensor:
        if self.ratio.value == (1.0, 1.0):
            return super().forward(x)
        spans = []
        for axis, s in enumerate(self.ratio.value):
            k = self.kernel_size[axis]
            taps = _taps(k, s)
            stride, dilation = self.stride[axis], self.dilation[axis]
            spans.append(_span(x.shape[2 + axis], s, taps, k, stride, dilation, self._padded(axis)))
        rows, columns = spans
        weight = resample(self.weight, (rows.taps, columns.taps), self.interpolation)
        weight = weight * (self.weight[0, 0].numel() / weight[0, 0].numel())
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = F.pad(x, (columns.before, columns.behind, rows.before, rows.behind), mode)
        return F.conv2d(x, weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def _padded(self, axis: int) -> tuple[int, int]:
        if isinstance(self.padding, str):
            total = self.dilation[axis] * (self.kernel_size[axis] - 1) if self.padding == "same" else 0
            return total // 2, total - total // 2
        return self.padding[axis], self.padding[axis]


class _ConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution on the base grid."""

    ratio: _Ratio
    interpolation: str

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        if self.ratio.value == (1.0, 1.0):
            return super().forward(x, output_size)
        s = self.ratio.value
        height, width = (max(1, round(length / r)) for length, r in zip(x.shape[2:], s, strict=True))
        wanted = None if output_size is None else [round(n / r) for n, r in zip(output_size[-2:], s, strict=True)]
        y = super().forward(resample(x, (height, width), self.interpolation), wanted)
        height, width = (round(length * r) for length, r in zip(y.shape[2:], s, strict=True))
        return resample(y, (height, width), self.interpolation)


def _windows(pool: nn.AvgPool2d | nn.MaxPool2d, x: Tensor, ratio: tuple[float, float]) -> list[_Span]:
    kernel, stride, padding = _two(pool.kernel_size), _two(pool.stride), _two(pool.padding)
    spans = []
    for i, s in enumerate(ratio):
        taps = max(round(s * kernel[i]), min(kernel[i], stride[i]))  # on coarser grids it leaves nothing out
        span = _span(x.shape[2 + i], s, taps, kernel[i], stride[i], 1, (padding[i], padding[i]))
        # Every window holds a point of the domain: where rounding leaves one outside, all shift, and grow if they must.
        total = span.before + span.behind
        more = max(0, total - 2 * (taps - 1))
        taps, total = taps + more, total + more
        before = min(max(span.before, total - (taps - 1)), taps - 1)
        spans.append(_Span(taps, before, total - before))
    return spans


class _AvgPool2d(nn.AvgPool2d):
    """The mean over what lies on the domain of a window of base cells."""

    ratio: _Ratio

    def forward(self, x: Tensor) -> Tensor:
        if self.ratio.value == (1.0, 1.0):
            return super().forward(x)
        rows, columns = _windows(self, x, self.ratio.value)
        border, taps = (columns.before, columns.behind, rows.before, rows.behind), (rows.taps, columns.taps)
        real = F.avg_pool2d(F.pad(x.new_ones(1, 1, *x.shape[2:]), border), taps, self.stride)
        return F.avg_pool2d(F.pad(x, border), taps, self.stride) / real


class _MaxPool2d(nn.MaxPool2d):
    """The maximum over a window of base cells."""

    ratio: _Ratio

    def forward(self, x: Tensor) -> Tensor:
        if self.ratio.value == (1.0, 1.0):
            return super().forward(x)
        rows, columns = _windows(self, x, self.ratio.value)
        border = (columns.before, columns.behind, rows.before, rows.behind)
        return F.max_pool2d(F.pad(x, border, value=-math.inf), (rows.taps, columns.taps), self.stride)


class _Upsample(nn.Upsample):
    """Interpolation to a size that is given in base cells."""

    ratio: _Ratio

    def forward(self, x: Tensor) -> Tensor:
        size = [round(n * r) for n, r in zip(_two(self.size), self.ratio.value, strict=True)]
        return F.interpolate(x, size, mode=self.mode, align_corners=self.align_corners)


class _LayerNorm(nn.LayerNorm):
    """A layer norm over channels and grid, its weight and bias functions of the coordinates."""

    interpolation: str

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-3:], self._on(x, self.weight), self._on(x, self.bias), self.eps)

    def _on(self, x: Tensor, table_CHW: Tensor | None) -> Tensor | None:
        if table_CHW is None:
            return None
        return resample(table_CHW.unsqueeze(0), (x.shape[-2], x.shape[-1]), self.interpolation)[0]
