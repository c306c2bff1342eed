"""The C++ kernel of a few rows times a weight matrix.

R rows, I inputs, O outputs.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from attlas.kernels.cpu import build

FEW = 8
"""Rows up to which reading the weights is most of the work."""


def few_rows(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, without gradients, of at most `FEW` rows; `refuses` says what else it needs.

    No torch operator: at this size, what torch does around one would cost as much as the product.

    Args:
        x: (..., I), float32 or bfloat16 on the CPU.
        weight_OI, bias_O: of the same dtype, contiguous.

    Returns:
        (..., O).
    """
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], weight_OI.shape[0])
    outputs, inputs = weight_OI.shape
    problem = _Problem(
        x.numel() // inputs,
        inputs,
        outputs,
        x.data_ptr(),
        weight_OI.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(),
        y.data_ptr(),
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    _function()(ctypes.byref(problem))
    return y


def refuses(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> str | None:
    """Why the kernel cannot take these, or None."""
    if torch.compiler.is_compiling():
        return "a compiled program has its own products"
    if torch.is_grad_enabled():
        return "it has no gradient"
    rows = x.numel() // max(1, weight_OI.shape[1])
    if not 1 <= rows <= FEW:
        return f"it takes 1 to {FEW} rows, not {rows}"
    if not x.is_cpu or not weight_OI.is_cpu:
        return f"it runs on the CPU, and the rows are on {x.device}"
    if x.dtype not in _DTYPES or weight_OI.dtype != x.dtype:
        return f"it computes in float32 or bfloat16, not {x.dtype} by {weight_OI.dtype}"
    if not weight_OI.is_contiguous() or (bias_O is not None and bias_O.dtype != x.dtype):
        return "it takes contiguous weights and a bias of their dtype"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses another dtype"
    usable, detail = _status()
    return None if usable else detail


_DTYPES = (torch.float32, torch.bfloat16)
_status = functools.cache(functools.partial(build.status, "rows"))  # asked at every layer of every token


class _Problem(ctypes.Structure):
    """`Problem`: sizes and addresses."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs")),
        *((name, ctypes.c_void_p) for name in ("x", "weights", "bias", "y")),
        *((name, ctypes.c_int32) for name in ("is_bf16", "threads")),
    )


@functools.cache
def _function() -> Any:
    function = build.load("rows").attlas_rows
    function.argtypes = [ctypes.POINTER(_Problem)]
    function.restype = None
    return function
