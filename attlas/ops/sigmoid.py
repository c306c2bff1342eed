"""Sigmoid attention: o_n = sum_m sigmoid(q_n.k_m / sqrt(D) + bias_nm + shift) v_m over the visible m.

B batch, H query heads, G key/value heads, N queries, M keys, D head size, E value size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.mask import Mask
from attlas.kernels.cpu import attention
from attlas.ops.dispatch import Backend, Op
from attlas.ops.precision import wide
from attlas.ops.softmax import FEW_QUERIES, blank_padding, repeat_heads

TILE = 128


def tiles(queries: int, keys: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """Rows of scores that the torch backend makes at once: (first query, last + 1, keys they may see)."""
    for start in range(0, queries, TILE):
        stop = min(start + TILE, queries)
        yield start, stop, max(keys - queries + stop, 0) if causal else keys


def _oracle(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Mask | None = None,
    *,
    shift: float = 0.0,
    dropout: float = 0.0,
) -> Tensor:
    """Sigmoid attention; nothing is normalised, so a query that sees nothing gives 0.

    Args:
        q_BHND, k_BGMD, v_BGME: queries, keys, values; H is a multiple of G.
        mask: what may be seen, and the bias. What is not seen has weight 0 whatever the shift.
        shift: constant added to every score; -log n makes n weights sum to about 1.
        dropout: share of the weights that is dropped.

    Returns:
        (B, H, N, E).
    """
    heads, queries, keys = q_BHND.shape[1], q_BHND.shape[2], k_BGMD.shape[2]
    k_BGMD, v_BGME = blank_padding(mask.keys if mask else None, k_BGMD, v_BGME)
    k_BHMD, v_BHME = repeat_heads(k_BGMD, heads), repeat_heads(v_BGME, heads)
    scores = (q_BHND * q_BHND.shape[-1] ** -0.5) @ k_BHMD.transpose(-1, -2)
    mask = mask or Mask()
    if mask.bias is not None:
        scores = scores + mask.bias
    weights = (scores + shift).sigmoid()
    seen = mask.pairs(queries, keys, q_BHND.device)
    if seen is not None:
        weights = torch.where(seen, weights, 0)
    return F.dropout(weights, dropout) @ v_BHME


def _torch(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Mask | None = None,
    *,
    shift: float = 0.0,
    dropout: float = 0.0,
) -> Tensor:
    batch, heads, queries, size = q_BHND.shape
    groups, keys = k_BGMD.shape[1:3]
    shared = heads // groups  # query heads of a group become rows of one product: no key is copied
    mask = mask or Mask()
    seen = mask.pairs(queries, keys, q_BHND.device)
    k_BGMD, v_BGME = blank_padding(mask.keys, k_BGMD, v_BGME)
    q_BHND = q_BHND * size**-0.5
    outputs = []
    for start, stop, reach in tiles(queries, keys, mask.causal):
        rows = shared * (stop - start)
        q = q_BHND[:, :, start:stop].reshape(batch, groups, rows, size)
        # The shift takes the scores to where bfloat16 has steps of 3 %: they are added up in float32.
        scores = wide(q @ k_BGMD[:, :, :reach].transpose(-1, -2)).reshape(batch, heads, stop - start, reach)
        if mask.bias is not None:
            scores = scores + _rows(mask.bias, start, stop, reach)
        scores = scores + shift
        if seen is not None:
            scores = scores.masked_fill(~_rows(seen, start, stop, reach), -torch.inf)
        weights = F.dropout(scores.sigmoid().to(v_BGME.dtype), dropout).reshape(batch, groups, rows, reach)
        o = weights @ v_BGME[:, :, :reach]
        outputs.append(o.reshape(batch, heads, stop - start, v_BGME.shape[-1]))
    return torch.cat(outputs, 2)


def _rows(x: Tensor, start: int, stop: int, reach: int) -> Tensor:
    return x[:, :, start:stop, :reach]


def _cpu(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Mask | None = None,
    *,
    shift: float = 0.0,
    dropout: float = 0.0,
) -> Tensor:
    mask = mask or Mask()
    scale = q_BHND.shape[-1] ** -0.5
    return attention.sigmoid_attention(q_BHND, k_BGMD, v_BGME, mask.keys, scale=scale, shift=shift, causal=mask.causal)


def _cpu_refuses(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Mask | None = None,
    *,
    shift: float = 0.0,
    dropout: float = 0.0,
) -> str | None:
    if dropout:
        return "it drops no weights"
    return attention.refuses(q_BHND, k_BGMD, v_BGME, mask)


def _cpu_yields(q_BHND: Tensor, *args: Any, **kwargs: Any) -> str | None:
    if q_BHND.shape[2] < FEW_QUERIES:
        return "its tiles are made of more queries than these"
    return None


sigmoid_attention = Op(
    "sigmoid_attention",
    Backend("cpu", _cpu, _cpu_refuses, _cpu_yields),
    Backend("torch", _torch),
    Backend("oracle", _oracle),
)
