"""How tensors are handed to the kernels, and what kernels cannot."""

import ctypes
from typing import Any

from torch import Tensor

from attlas.core.errors import BackendUnavailable


def dense_rows(x: Tensor) -> Tensor:
    """`x` itself where its features lie side by side in memory, else a copy."""
    return x if x.ndim < 4 or x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def places(*arrays: Tensor | None) -> Any:
    """Of each array its address and its strides of batch, head and token, as the kernels' `Array`; 0 for None.

    The caller keeps the tensors alive.
    """
    numbers: list[int] = []
    for x in arrays:
        numbers += (0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:3])
    return (ctypes.c_int64 * len(numbers))(*numbers)


def once_only(ctx: Any, *grads: Tensor) -> None:
    """The derivative of a kernel's derivative, which no kernel has."""
    raise BackendUnavailable("a C++ kernel is differentiated once; for second derivatives pass backend='torch'")
