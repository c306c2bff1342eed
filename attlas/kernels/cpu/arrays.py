"""How tensors are handed to the kernels, and what kernels cannot."""

import math
import struct
from typing import Any

import torch
from torch import Tensor

from attlas.core.errors import BackendUnavailable, BadInput

LN_2 = math.log(2)
"""Kernels take their logarithms to base 2."""


def dense_rows(x: Tensor) -> Tensor:
    """`x` itself where its features lie side by side in memory, else a copy."""
    return x if x.ndim < 4 or x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def places(*arrays: Tensor | None) -> bytes:
    """Of each array its address and its strides of batch, head and token, as the kernels' `Array`; 0 for None.

    The caller keeps the tensors alive.
    """
    numbers: list[int] = []
    for x in arrays:
        numbers += (0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:3])
    return struct.pack(f"{len(numbers)}q", *numbers)


def once_only(ctx: Any, *grads: Tensor) -> None:
    """The derivative of a kernel's derivative, which no kernel has."""
    raise BackendUnavailable("a C++ kernel is differentiated once; for second derivatives pass backend='torch'")


def check_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> None:
    """Whether these are arguments of a kernel of attention; `BadInput` if not."""
    shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise BadInput(f"q is (B, H, N, D), k (B, G, M, D) and v (B, G, M, E), got {shapes}")
    if q.shape[3] != k.shape[3] or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise BadInput(f"q and k need one size, and query heads a multiple of key/value heads, got {shapes}")
    if q.dtype not in (torch.float32, torch.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise BadInput(f"q, k, v are all float32 or all bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}")
    if keep is not None and (keep.dtype != torch.bool or keep.shape != (q.shape[0], k.shape[2])):
        raise BadInput(f"keep is bool (B, M), got {keep.dtype} {tuple(keep.shape)} beside {shapes}")


def like_queries(x_BHND: Tensor, heads: int, tokens: int, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised; (B, N, H, D) in memory where x is, so that merging the heads needs no copy."""
    batch, dtype = x_BHND.shape[0], dtype or x_BHND.dtype
    if x_BHND.transpose(1, 2).is_contiguous() and not x_BHND.is_contiguous():
        return x_BHND.new_empty(batch, tokens, heads, size, dtype=dtype).transpose(1, 2)
    return x_BHND.new_empty(batch, heads, tokens, size, dtype=dtype)
