"""Sums over a sequence or a grid whose weights depend on the offset from here to there.

    toeplitz_product      y_i = Σ_j c_{j−i} x_j
    toeplitz_attention    o_i = Σ_j c_{j−i} (q_i · k_j) v_j, over j ≤ i where it is causal

The first is what any mechanism whose weights belong to offsets can call; the second is made of it. Tokens lie on one
axis of S positions or on a grid of two, row by row; c has 2 S − 1 entries per axis and head, for the offsets 1 − S to
S − 1. As a matrix the weights are Toeplitz (blocks of Toeplitz matrices that are Toeplitz themselves, on two axes),
and a product with one is a correlation, so Fourier transforms do it in O(N log N). They round relative to the largest
sum of a head: an entry of c that is zero leaves some 1e-7 of it in float32, 1e-16 in float64, where the dense backend
leaves nothing.

So causal sums are not transformed whole, or each would hold a rounding of what follows it. The sequence is halved
again and again: dense blocks lie on the diagonal, and what is left below them is, for each halving, one product of
the first halves' keys with the second halves' queries, O(N log² N) together. Nothing later, as long as it is finite,
changes a sum by a bit.

B batch, H heads, N tokens, S sizes of axes, F features of x, R of queries and keys, E value size, T offsets,
L transformed lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.ops.dispatch import Backend, Op
from attlas.ops.precision import wide

NUMBERS = 2**22
"""About how many numbers are transformed at a time."""

BLOCK = 512
"""Tokens that a dense block on the diagonal of causal sums has at most, or one row of a grid."""

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


def toeplitz_flops(grid: Sequence[int], size: int, value: int, pairs: int, causal: bool = False) -> int:
    """FLOPs of `toeplitz_attention` for one head: over the visible pairs or by transforms, whichever takes less."""
    return min(2 * pairs * (size + value), transform_flops(grid, size, value, causal))


def transform_flops(grid: Sequence[int], size: int, value: int, causal: bool = False) -> int:
    """FLOPs of the transforms, and of dense blocks on the diagonal where they are causal."""
    if not causal:
        length = math.prod([fast_length(2 * axis - 1) for axis in grid])
        return size * value * (5 * length * max(1, length.bit_length() - 1) + 3 * length + 3 * math.prod(grid))
    rows, blocks = _blocks(grid)
    flops = blocks * 2 * Mask(causal=True).area(block := rows * math.prod(grid[1:]), block) * (size + value)
    while blocks > 1:
        blocks //= 2
        flops += blocks * transform_flops((rows, *grid[1:]), size, value)
        rows *= 2
    return flops


def _blocks(grid: Sequence[int]) -> tuple[int, int]:
    """Rows of a block on the diagonal, tokens on a single axis, and how many of them, a power of 2."""
    blocks = 1
    while 2 * blocks <= grid[0] and math.prod(grid) > BLOCK * blocks:
        blocks *= 2
    return -(-grid[0] // blocks), blocks


def _check(c_HT: Tensor, x: Tensor, queries: int = 0) -> None:
    axes, (heads, tokens) = axes_of(c_HT), x.shape[1:3]
    if c_HT.shape != (heads, *(2 * size - 1 for size in axes)) or math.prod(axes) != tokens:
        raise BadInput(
            f"c needs a weight for every head and offset, 2 S - 1 along an axis of S positions; its shape is "
            f"{tuple(c_HT.shape)} for {heads} heads and {tokens} tokens"
        )
    if queries > tokens:
        raise BadInput(f"queries are the last of the tokens that the keys are of, got {queries} and {tokens}")


def _product_oracle(x_BHNF: Tensor, c_HT: Tensor) -> Tensor:
    """Every token's sum of all tokens, weighted by the offset.

    Args:
        x_BHNF: tokens of a sequence, or of a grid row by row.
        c_HT: weights (H, 2 S − 1), or (H, 2 S₁ − 1, 2 S₂ − 1) for a grid; the first is of the offset 1 − S.

    Returns:
        (B, H, N, F) in the dtype of `x_BHNF`; sums are kept in float32 at least.
    """
    _check(c_HT, x_BHNF)
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
    _check(c_HT, x_BHNF)
    return (toeplitz_matrix(c_HT.to(wide(x_BHNF))) @ wide(x_BHNF)).to(x_BHNF.dtype)


def _product_fft(x_BHNF: Tensor, c_HT: Tensor) -> Tensor:
    _check(c_HT, x_BHNF)
    x_BHFN, c_HT = wide(x_BHNF).mT, c_HT.to(wide(x_BHNF))
    spectrum_HL = _spectrum(c_HT)
    parts = x_BHFN.split(_features_at_once(x_BHNF, c_HT), 2)
    return torch.cat([_correlate(part, spectrum_HL, c_HT) for part in parts], 2).mT.to(x_BHNF.dtype)


def _features_at_once(x_BHNF: Tensor, c_HT: Tensor) -> int:
    return max(1, NUMBERS // max(1, x_BHNF.shape[0] * x_BHNF.shape[1] * math.prod(_lengths(c_HT))))


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


def _oracle(q_BHNR: Tensor, k_BHMR: Tensor, v_BHME: Tensor, c_HT: Tensor, *, causal: bool = False) -> Tensor:
    """Sum of all values, each weighted by the product q.k and by the offset.

    Linear in q, in k, in v and in c; a column of ones in v gives the sum of the weights. Computed in the dtype of
    the inputs: widen half precision first.

    Args:
        q_BHNR, k_BHMR: features of queries and keys. Queries are the last N of M.
        v_BHME: values.
        c_HT: weights (H, 2 S − 1), or (H, 2 S₁ − 1, 2 S₂ − 1) for a grid; the first is of the offset 1 − S.
        causal: a query sees no later key, on a grid none that follows row by row; c of those does not matter.

    Returns:
        (B, H, N, E).
    """
    _check(c_HT, k_BHMR, q_BHNR.shape[2])
    (heads, queries), keys = q_BHNR.shape[1:3], k_BHMR.shape[2]
    rows = []
    for n in range(queries):
        row = torch.zeros_like(v_BHME[:, :, 0])
        for m in range(n + keys - queries + 1 if causal else keys):
            weight_BH1 = (q_BHNR[:, :, n] * k_BHMR[:, :, m]).sum(-1, keepdim=True)
            row = row + _entry(c_HT, n + keys - queries, m).view(heads, 1) * weight_BH1 * v_BHME[:, :, m]
        rows.append(row)
    return torch.stack(rows, 2)


def _torch(q_BHNR: Tensor, k_BHMR: Tensor, v_BHME: Tensor, c_HT: Tensor, *, causal: bool = False) -> Tensor:
    queries, keys = q_BHNR.shape[2], k_BHMR.shape[2]
    _check(c_HT, k_BHMR, queries)
    weights = q_BHNR @ k_BHMR.mT * toeplitz_matrix(c_HT, queries)
    if causal:
        weights = weights.tril(keys - queries)
    return (weights.to(v_BHME.dtype) @ v_BHME).to(q_BHNR.dtype)  # autocast multiplies in half precision


def _fft(q_BHNR: Tensor, k_BHNR: Tensor, v_BHNE: Tensor, c_HT: Tensor, *, causal: bool = False) -> Tensor:
    _check(c_HT, k_BHNR)
    run = _halved if causal else _ByTransforms.apply
    o: Tensor = run(q_BHNR, k_BHNR, v_BHNE, c_HT)
    return o


def _halved(q_BHNR: Tensor, k_BHNR: Tensor, v_BHNE: Tensor, c_HT: Tensor) -> Tensor:
    """Causal sums: blocks on the diagonal, then from the first to the second of every two, which are one block then."""
    axes, tokens = axes_of(c_HT), q_BHNR.shape[2]
    rows, blocks = _blocks(axes)
    more = rows * blocks - axes[0]  # rows of nothing behind the last, so that all halves are alike
    size = tokens // axes[0]
    q, k, v = (F.pad(x, (0, 0, 0, more * size)) for x in (q_BHNR, k_BHNR, v_BHNE))
    c_HT = F.pad(c_HT, [0, 0] * (len(axes) - 1) + [more, more])

    q1, k1, v1 = (_fold(x.unflatten(2, (blocks, -1))) for x in (q, k, v))
    within = c_HT.narrow(1, rows * (blocks - 1), 2 * rows - 1)
    o = _unfold(_torch(q1, k1, v1, within, causal=True), blocks).flatten(2, 3)
    while blocks > 1:
        blocks //= 2
        (_, q2), (k1, _), (v1, _) = (x.unflatten(2, (blocks, 2, -1)).unbind(3) for x in (q, k, v))
        between = c_HT.narrow(1, 2 * rows * (blocks - 1), 2 * rows - 1)  # the offsets 1 − 2 rows to −1
        sums = _unfold(_ByTransforms.apply(_fold(q2), _fold(k1), _fold(v1), between), blocks)
        o = o + torch.stack([torch.zeros_like(sums), sums], 3).flatten(2, 4)
        rows *= 2
    return o[:, :, :tokens]


def _fold(x_BHSNF: Tensor) -> Tensor:
    """Blocks as sequences of a larger batch."""
    return x_BHSNF.transpose(1, 2).flatten(0, 1)


def _unfold(x_BHNF: Tensor, blocks: int) -> Tensor:
    return x_BHNF.unflatten(0, (len(x_BHNF) // blocks, blocks)).transpose(1, 2)


class _ByTransforms(torch.autograd.Function):
    """Its gradients are sums of the same form: nothing of size N R E is kept for them."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
        return _summed(q, k, v, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

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
    o_BHNE = torch.zeros_like(v_BHNE)
    some = max(1, _features_at_once(v_BHNE, c_HT) // v_BHNE.shape[3])
    for q, k in zip(q_BHNR.split(some, 3), k_BHNR.split(some, 3), strict=True):
        products_BHNrE = k.unsqueeze(4) * v_BHNE.unsqueeze(3)
        sums = _product_fft(products_BHNrE.flatten(3), c_HT).view_as(products_BHNrE)
        o_BHNE = o_BHNE + (q.unsqueeze(4) * sums).sum(3)
    return o_BHNE


def _by_offset(q_BHNR: Tensor, g_BHNE: Tensor, k_BHNR: Tensor, v_BHNE: Tensor, c_HT: Tensor) -> Tensor:
    """Σ over all pairs at an offset of (q_i · k_j)(g_i · v_j), as large as c."""
    g_BHEN, v_BHEN = g_BHNE.mT, v_BHNE.mT
    total_HL: Tensor | None = None
    some = max(1, _features_at_once(v_BHNE, c_HT) // v_BHNE.shape[3])
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


def _refuses(q: Tensor, k: Tensor, v: Tensor, c: Tensor, *, causal: bool = False) -> str | None:
    if q.shape[2] != k.shape[2]:
        return f"it takes as many queries as keys, not {q.shape[2]} and {k.shape[2]}"
    return None


def _yields(q: Tensor, k: Tensor, v: Tensor, c: Tensor, *, causal: bool = False) -> str | None:
    (tokens, size), value = q.shape[2:], v.shape[3]
    if 2 * tokens * tokens * (size + value) < DENSE * transform_flops(axes_of(c), size, value, causal):
        return f"up to some thousand tokens (here {tokens}) the dense product is faster"
    return None


toeplitz_attention = Op(
    "toeplitz_attention", Backend("fft", _fft, _refuses, _yields), Backend("torch", _torch), Backend("oracle", _oracle)
)
