"""Sums over a sequence or a grid whose weights depend on the offset from here to there.

    toeplitz_product      y_i = Σ_j c_{j−i} x_j
    toeplitz_attention    o_i = Σ_j c_{j−i} (q_i · k_j) v_j

Tokens lie on one axis of S positions or on a grid of two, row by row; c has 2 S − 1 entries per axis and head, for
the offsets 1 − S to S − 1. As a matrix the weights are Toeplitz (blocks of Toeplitz matrices that are Toeplitz
themselves, on two axes), and a product with one is a correlation, so Fourier transforms do it in O(N log N). They
round relative to the largest sum of a head: an entry of c that is zero leaves some 1e-7 of it in float32, 1e-16 in
float64, where the dense backend leaves nothing.

B batch, H heads, N tokens, F features of x, R of queries and keys, E value size, T offsets, L transformed lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.grid import Grid
from attlas.ops.dispatch import Backend, Op
from attlas.ops.precision import wide

NUMBERS = 2**22
"""About how many numbers are transformed at a time."""

DENSE = 2.0
"""How many times the arithmetic of the transforms a dense product does in the same time, measured on a CPU."""


def fast_length(least: int) -> int:
    """The smallest number from `least` on without a prime factor above 5.

    >>> fast_length(2 * 257 - 1)
    540
    """
    length = least
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1


def axes_of(c_HT: Tensor) -> tuple[int, ...]:
    """The sizes S of the grid that these offsets belong to."""
    return tuple((offsets + 1) // 2 for offsets in c_HT.shape[1:])


def toeplitz_matrix(c_HT: Tensor, rows: int | None = None) -> Tensor:
    """The weights c_{j−i} themselves, (H, N, N), or only their last `rows` rows."""
    axes = axes_of(c_HT)
    rows = math.prod(axes) if rows is None else rows
    for axis, size in enumerate(axes, 1):
        c_HT = c_HT.unfold(axis, size, 1)  # windows along c are rows, the last one first
    if len(axes) == 1:
        return c_HT[:, :rows].flip(1)
    return c_HT.flip(1, 2).flatten(3, 4).flatten(1, 2)[:, math.prod(axes) - rows :]


def toeplitz_flops(grid: Sequence[int], size: int, value: int, pairs: int) -> int:
    """FLOPs of `toeplitz_attention` for one head: over the visible pairs or by transforms, whichever takes less."""
    length = math.prod([fast_length(2 * axis - 1) for axis in grid])
    transforms = size * value * (5 * length * max(1, length.bit_length() - 1) + 3 * length + 3 * math.prod(grid))
    return min(2 * pairs * (size + value), transforms)


def _product_oracle(x_BHNF: Tensor, c_HT: Tensor) -> Tensor:
    """Every token's sum of all tokens, weighted by the offset.

    Args:
        x_BHNF: tokens of a sequence, or of a grid row by row.
        c_HT: weights (H, 2 S − 1), or (H, 2 S₁ − 1, 2 S₂ − 1) for a grid; the first is of the offset 1 − S.

    Returns:
        (B, H, N, F) in the dtype of `x_BHNF`; sums are kept in float32 at least.
    """
    heads, tokens = x_BHNF.shape[1:3]
    rows = []
    for i in range(tokens):
        terms = (wide(x_BHNF[:, :, j]) * _entry(c_HT, i, j).view(heads, 1) for j in range(tokens))
        rows.append(sum(terms, wide(torch.zeros_like(x_BHNF[:, :, i]))))
    return torch.stack(rows, 2).to(x_BHNF.dtype)


def _entry(c_HT: Tensor, i: int, j: int) -> Tensor:
    """c_{j−i} of every head, (H,)."""
    places = Grid(axes_of(c_HT)).places()
    offset = (places[j] - places[i]).tolist()
    return c_HT[(slice(None), *(t + size - 1 for t, size in zip(offset, axes_of(c_HT), strict=True)))]


def _product_torch(x_BHNF: Tensor, c_HT: Tensor) -> Tensor:
    return (toeplitz_matrix(c_HT.to(wide(x_BHNF))) @ wide(x_BHNF)).to(x_BHNF.dtype)


def _product_fft(x_BHNF: Tensor, c_HT: Tensor) -> Tensor:
    x_BHFN, c_HT = wide(x_BHNF).mT, c_HT.to(wide(x_BHNF))
    spectrum_HL = _spectrum(c_HT)
    parts = x_BHFN.split(_features_at_once(x_BHFN, c_HT), 2)
    return torch.cat([_correlate(part, spectrum_HL, c_HT) for part in parts], 2).mT.to(x_BHNF.dtype)


def _features_at_once(x_BHFN: Tensor, c_HT: Tensor) -> int:
    return max(1, NUMBERS // max(1, x_BHFN.shape[0] * x_BHFN.shape[1] * math.prod(_lengths(c_HT))))


def _lengths(c_HT: Tensor) -> tuple[int, ...]:
    """At least all offsets, so that nothing wraps round."""
    return tuple(fast_length(offsets) for offsets in c_HT.shape[1:])


def _spectrum(c_HT: Tensor) -> Tensor:
    """What a correlation with c multiplies a transform by."""
    lengths = _lengths(c_HT)
    padding = [p for length, size in zip(lengths, c_HT.shape[1:], strict=True) for p in (length - size, 0)]
    axes = tuple(range(1, c_HT.ndim))
    zero_first = F.pad(c_HT, padding[::-1]).roll([1 - size for size in axes_of(c_HT)], axes)
    return torch.fft.rfftn(zero_first, dim=axes).conj()


def _transform(x_BHFN: Tensor, c_HT: Tensor) -> Tensor:
    axes = tuple(range(1 - c_HT.ndim, 0))
    return torch.fft.rfftn(x_BHFN.unflatten(-1, axes_of(c_HT)), s=_lengths(c_HT), dim=axes)


def _correlate(x_BHFN: Tensor, spectrum_HL: Tensor, c_HT: Tensor) -> Tensor:
    axes = tuple(range(1 - c_HT.ndim, 0))
    product = _transform(x_BHFN, c_HT) * spectrum_HL.unsqueeze(1)
    y = torch.fft.irfftn(product, s=_lengths(c_HT), dim=axes)
    for axis, size in zip(axes, axes_of(c_HT), strict=True):
        y = y.narrow(axis, 0, size)
    return y.flatten(1 - c_HT.ndim)


toeplitz_product = Op(
    "toeplitz_product",
    Backend("fft", _product_fft),
    Backend("torch", _product_torch),
    Backend("oracle", _product_oracle),
)


def _oracle(q_BHNR: Tensor, k_BHMR: Tensor, v_BHME: Tensor, c_HT: Tensor) -> Tensor:
    """Sum of all values, each weighted by the product q.k and by the offset.

    Linear in q, in k, in v and in c; a column of ones in v gives the sum of the weights. Computed in the dtype of
    the inputs: widen half precision first.

    Args:
        q_BHNR, k_BHMR: features of queries and keys. Queries are the last N of M.
        v_BHME: values.
        c_HT: weights (H, 2 S − 1), or (H, 2 S₁ − 1, 2 S₂ − 1) for a grid; the first is of the offset 1 − S.

    Returns:
        (B, H, N, E).
    """
    (heads, queries), keys = q_BHNR.shape[1:3], k_BHMR.shape[2]
    rows = []
    for n in range(queries):
        row = torch.zeros_like(v_BHME[:, :, 0])
        for m in range(keys):
            weight_BH1 = (q_BHNR[:, :, n] * k_BHMR[:, :, m]).sum(-1, keepdim=True)
            row = row + _entry(c_HT, n + keys - queries, m).view(heads, 1) * weight_BH1 * v_BHME[:, :, m]
        rows.append(row)
    return torch.stack(rows, 2)


def _torch(q_BHNR: Tensor, k_BHMR: Tensor, v_BHME: Tensor, c_HT: Tensor) -> Tensor:
    weights = q_BHNR @ k_BHMR.mT * toeplitz_matrix(c_HT, q_BHNR.shape[2])
    return (weights.to(v_BHME.dtype) @ v_BHME).to(q_BHNR.dtype)  # autocast multiplies in half precision


def _fft(q_BHNR: Tensor, k_BHNR: Tensor, v_BHNE: Tensor, c_HT: Tensor) -> Tensor:
    o: Tensor = _ByTransforms.apply(q_BHNR, k_BHNR, v_BHNE, c_HT)
    return o


class _ByTransforms(torch.autograd.Function):
    """Its gradients are sums of the same form: nothing of size N R E is kept for them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, c)
        return _summed(q, k, v, c)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, c = ctx.saved_tensors
        turned = c.flip(tuple(range(1, c.ndim)))
        wanted = ctx.needs_input_grad
        return (
            _summed(g, v, k, c) if wanted[0] else None,
            _summed(v, g, q, turned) if wanted[1] else None,
            _summed(k, q, g, turned) if wanted[2] else None,
            _by_offset(q, g, k, v, c) if wanted[3] else None,
        )


def _summed(q_BHNR: Tensor, k_BHNR: Tensor, v_BHNE: Tensor, c_HT: Tensor) -> Tensor:
    """Σ_r q_r ∘ C (k_r ∘ v), some features r at a time."""
    q_BHRN, k_BHRN, v_BHEN = q_BHNR.mT, k_BHNR.mT, v_BHNE.mT
    spectrum_HL = _spectrum(c_HT)
    o_BHEN = torch.zeros_like(v_BHEN)
    some = max(1, _features_at_once(v_BHEN, c_HT) // v_BHEN.shape[2])
    for q, k in zip(q_BHRN.split(some, 2), k_BHRN.split(some, 2), strict=True):
        products_BHrEN = k.unsqueeze(3) * v_BHEN.unsqueeze(2)
        sums = _correlate(products_BHrEN.flatten(2, 3), spectrum_HL, c_HT).view_as(products_BHrEN)
        o_BHEN = o_BHEN + (q.unsqueeze(3) * sums).sum(2)
    return o_BHEN.mT


def _by_offset(q_BHNR: Tensor, g_BHNE: Tensor, k_BHNR: Tensor, v_BHNE: Tensor, c_HT: Tensor) -> Tensor:
    """Σ over all pairs at an offset of (q_i · k_j)(g_i · v_j), as large as c."""
    g_BHEN, v_BHEN = g_BHNE.mT, v_BHNE.mT
    total_HL: Tensor | None = None
    some = max(1, _features_at_once(v_BHEN, c_HT) // v_BHEN.shape[2])
    for q, k in zip(q_BHNR.mT.split(some, 2), k_BHNR.mT.split(some, 2), strict=True):
        here, there = (
            _transform((x.unsqueeze(3) * y.unsqueeze(2)).flatten(2, 3), c_HT) for x, y in ((q, g_BHEN), (k, v_BHEN))
        )
        part = (here.conj() * there).sum((0, 2))
        total_HL = part if total_HL is None else total_HL + part
    axes = tuple(range(1, c_HT.ndim))
    sums = torch.fft.irfftn(total_HL, s=_lengths(c_HT), dim=axes).roll([size - 1 for size in axes_of(c_HT)], axes)
    for axis in axes:
        sums = sums.narrow(axis, 0, c_HT.shape[axis])
    return sums


def _refuses(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> str | None:
    if q.shape[2] != k.shape[2]:
        return f"it takes as many queries as keys, not {q.shape[2]} and {k.shape[2]}"
    return None


def _yields(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> str | None:
    (tokens, size), value = q.shape[2:], v.shape[3]
    if 2 * tokens * tokens * (size + value) < DENSE * toeplitz_flops(axes_of(c), size, value, tokens**3):
        return f"up to some thousand tokens (here {tokens}) the dense product is faster"
    return None


toeplitz_attention = Op(
    "toeplitz_attention", Backend("fft", _fft, _refuses, _yields), Backend("torch", _torch), Backend("oracle", _oracle)
)
