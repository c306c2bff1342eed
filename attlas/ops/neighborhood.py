"""Neighborhood attention: softmax over a window of the grid around each position.

    o_n = sum_m softmax_m(scale q_n . k_m + bias_(m - n)) v_m     over the m in the window of n

A window is a product of intervals, one per axis of the grid; `Axis` and `Block` are the rules of one of them.

B batch, H query heads, G key/value heads, R = H / G, N queries, M keys, P tokens without a position, D head size,
E value size, W and V keys of a window, S positions of one axis, X = P + W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from attlas.core.axis import Axis as Axis
from attlas.core.axis import Block as Block
from attlas.core.axis import Windows
from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.kernels.cpu import tiles
from attlas.ops.dispatch import Backend, Op
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import blank_padding, softmax_attention

Axes = Sequence[Axis | Block]


def _check(q: Tensor, k: Tensor, axes: Axes, prefix: int, context: int, bias: Tensor | None) -> None:
    queries, keys = q.shape[2], k.shape[2] - context
    tokens = prefix + prod([axis.length for axis in axes])
    if keys != tokens:
        raise BadInput(
            f"the grid, {prefix} prefix tokens and {context} of context make {tokens + context} keys, "
            f"got {keys + context}"
        )
    if queries != keys and (queries > keys or len(axes) > 1 or prefix):
        raise BadInput(
            f"{queries} queries for {keys} keys: fewer queries are the last positions of a plain sequence, "
            "one axis without prefix tokens"
        )
    table = (q.shape[1], *(2 * axis.reach + 1 for axis in axes))
    if bias is not None and bias.shape != table:
        raise BadInput(f"the bias has one number per head and offset, {table}, got {tuple(bias.shape)}")


def _oracle(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    axes: Axes,
    *,
    prefix: int = 0,
    context: int = 0,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Neighborhood attention on a grid; a query that sees nothing gives 0.

    Args:
        q_BHND, k_BGMD, v_BGME: queries, keys, values in raster order, prefix tokens in front, and in front of those the
            keys and values of the context; H is a multiple of G. On one axis without prefix tokens, queries may be the
            last N of M positions.
        axes: the rule of each axis of the grid.
        prefix: tokens without a position. They see every token and every token sees them, in one softmax;
            where all axes are causal they see the prefix up to themselves.
        context: keys that belong to no query; every query sees them, in the same softmax.
        keep: (B, M) bool, False where a key is padding. What stands there has no part in anything, NaN neither;
            of other keys that a query does not see that is so only for finite numbers.
        bias: (H, 2 reach + 1, ...), of any dtype, added to the scores by the offset key - query in places, on every
            axis; entry `reach` is offset 0. Prefix and context have none.
        scale: of the scores, D ** -0.5 by default.

    Returns:
        (B, H, N, E).
    """
    _check(q_BHND, k_BGMD, axes, prefix, context, bias)
    tokens = k_BGMD.shape[2] - context
    token = torch.arange(tokens, device=q_BHND.device)
    place = torch.unravel_index((token - prefix).clamp(min=0), tuple(axis.length for axis in axes))
    near = torch.ones(tokens, tokens, dtype=torch.bool, device=q_BHND.device)
    entry: list[Tensor] = []
    for axis, x in zip(axes, place, strict=True):
        query, key = x.unsqueeze(1), x.unsqueeze(0)
        near &= axis.sees(query, key)
        entry.append((key // axis.dilation - query // axis.dilation + axis.reach).clamp(0, 2 * axis.reach))
    is_prefix = token < prefix
    either = is_prefix.unsqueeze(1) | is_prefix
    in_reach = token <= token.unsqueeze(1) if _all_causal(axes) else torch.ones_like(near)
    seen = torch.where(either, in_reach, near)[tokens - q_BHND.shape[2] :]
    seen = torch.cat([seen.new_ones(len(seen), context), seen], 1)
    mask = Mask.pairs_(seen).with_(keys=keep)
    if bias is not None:
        tables = bias.to(q_BHND.dtype)
        spread = torch.stack([table[tuple(entry)] for table in tables]).masked_fill(either, 0)
        spread = spread[:, tokens - q_BHND.shape[2] :]
        mask = mask & Mask.biased(torch.cat([spread.new_zeros(*spread.shape[:2], context), spread], 2))
    return softmax_attention(q_BHND, k_BGMD, v_BGME, mask, scale=scale, backend="oracle")


def _torch(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    axes: Axes,
    *,
    prefix: int = 0,
    context: int = 0,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    _check(q_BHND, k_BGMD, axes, prefix, context, bias)
    groups, queries, causal = k_BGMD.shape[1], q_BHND.shape[2] - prefix, _all_causal(axes)
    scale = q_BHND.shape[3] ** -0.5 if scale is None else scale
    k_BGMD, v_BGME = blank_padding(keep, k_BGMD, v_BGME)
    windows = _windows(axes, queries, q_BHND.device)
    shape, common = windows.key.shape, context + prefix
    wide_k_BGMD = wide(k_BGMD)  # float16 cannot hold every score
    k_BGNWD, v_BGNWE = (
        x[:, :, common:].index_select(2, windows.key.flatten()).unflatten(2, shape) for x in (wide_k_BGMD, v_BGME)
    )
    q_BGNRD = wide(q_BHND[:, :, prefix:]).unflatten(1, (groups, -1)).transpose(2, 3) * scale
    with as_written(q_BHND):
        scores_BGNRX = q_BGNRD @ k_BGNWD.mT
        if bias is not None:
            bias_HNW = bias.flatten(1).index_select(1, windows.entry.flatten()).unflatten(1, shape)
            scores_BGNRX = scores_BGNRX + bias_HNW.unflatten(0, (groups, -1)).transpose(1, 2)
        if common:
            to_common = q_BGNRD.flatten(2, 3) @ wide_k_BGMD[:, :, :common].mT
            scores_BGNRX = torch.cat([to_common.unflatten(2, (queries, -1)), scores_BGNRX], -1)
    if keep is None and all(axis.full for axis in axes):
        weights_BGNRX = scores_BGNRX.softmax(-1)
    else:
        seen = _seen(windows, common, keep)
        lowest = torch.finfo(scores_BGNRX.dtype).min
        # Zeroed after the softmax, so that a query that sees nothing gives 0.
        weights_BGNRX = scores_BGNRX.masked_fill(~seen, lowest).softmax(-1) * seen
    weights_BGNRX = weights_BGNRX.to(v_BGME.dtype)
    o_BGNRE = weights_BGNRX[..., common:] @ v_BGNWE
    if not common:
        return o_BGNRE.transpose(2, 3).flatten(1, 2)
    from_common = weights_BGNRX[..., :common].flatten(2, 3) @ v_BGME[:, :, :common]
    o_BHNE = (o_BGNRE + from_common.unflatten(2, (queries, -1))).transpose(2, 3).flatten(1, 2)
    if not prefix:
        return o_BHNE
    reach = common if causal else k_BGMD.shape[2]
    mask = Mask(causal=causal, keys=None if keep is None else keep[:, :reach])
    q, k, v = q_BHND[:, :, :prefix], k_BGMD[:, :, :reach], v_BGME[:, :, :reach]
    return torch.cat([softmax_attention(q, k, v, mask, scale=scale, backend="torch"), o_BHNE], 2)


def _all_causal(axes: Axes) -> bool:
    return all(axis.causal for axis in axes)


def _windows(axes: Axes, queries: int, device: torch.device) -> Windows:
    """The windows of the last `queries` positions of the grid, the first axis slowest."""
    whole = axes[0].windows(queries if len(axes) == 1 else axes[0].length, device)
    for axis in axes[1:]:
        own = axis.windows(axis.length, device)
        whole = Windows(
            _product(whole.key * axis.length, own.key, torch.add),
            _product(whole.seen, own.seen, torch.logical_and),
            _product(whole.entry * (2 * axis.reach + 1), own.entry, torch.add),
        )
    return whole


def _product(first_NW: Tensor, second_SV: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A table over the product of two sets of positions and of two windows: (N S, W V)."""
    joined = combine(first_NW[:, None, :, None], second_SV[None, :, None, :])
    return joined.flatten(2).flatten(0, 1)


def _seen(windows: Windows, common: int, keep: Tensor | None) -> Tensor:
    """What each query sees of the common keys and of its window, (B or 1, 1, N, 1, P + W)."""
    seen, queries = windows.seen.unsqueeze(0), len(windows.seen)
    real = seen.new_ones(1, common)
    if keep is not None:
        seen, real = seen & keep[:, common:][:, windows.key], keep[:, :common]
    return torch.cat([real.unsqueeze(1).expand(-1, queries, -1), seen], -1)[:, None, :, None]


def _cpu(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    axes: Axes,
    *,
    prefix: int = 0,
    context: int = 0,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    _check(q_BHND, k_BGMD, axes, prefix, context, bias)
    scale = q_BHND.shape[3] ** -0.5 if scale is None else scale
    return tiles.neighborhood_attention(
        q_BHND, k_BGMD, v_BGME, axes, keep, bias, prefix=prefix, context=context, scale=scale
    )[0]


neighborhood_attention = Op(
    "neighborhood_attention",
    Backend("cpu", _cpu, lambda q, k, v, *args, **kwargs: tiles.refuses(q, k, v)),
    Backend("torch", _torch),
    Backend("oracle", _oracle),
)
