"""Softmax attention: o_n = sum_m softmax_m(scale q_n.k_m + bias_nm) v_m over the visible m.

B batch, H query heads, G key/value heads, N queries, M keys, D head size, E value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.mask import Mask
from attlas.kernels.cpu import attention, decode
from attlas.ops import flash
from attlas.ops.dispatch import Backend, Op


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def repeat_heads(x_BGMD: Tensor, heads: int) -> Tensor:
    """Give each of `heads` query heads its own copy of the key/value head that it shares."""
    groups = x_BGMD.shape[1]
    return x_BGMD if groups == heads else x_BGMD.repeat_interleave(heads // groups, 1)


def blank_padding(keep_BM: Tensor | None, *arrays: Tensor) -> tuple[Tensor, ...]:
    """(B, H, M, D) each, with 0 where a token is padding: a weight of 0 would not silence a NaN there."""
    if keep_BM is None:
        return arrays
    padding = ~keep_BM[:, None, :, None].to(arrays[0].device)
    return tuple(x.masked_fill(padding, 0) for x in arrays)


def attention_weights(q_BHND: Tensor, k_BGMD: Tensor, mask: Mask | None = None, scale: float | None = None) -> Tensor:
    """The weights (B, H, N, M) of softmax attention; the row of a query that sees nothing is 0."""
    heads, queries, keys = q_BHND.shape[1], q_BHND.shape[2], k_BGMD.shape[2]
    scores = q_BHND @ repeat_heads(k_BGMD, heads).transpose(-1, -2) * _scale(q_BHND, scale)
    mask = mask or Mask()
    if mask.bias is not None:
        scores = scores + mask.bias
    seen = mask.pairs(queries, keys, q_BHND.device)
    if seen is None:
        return scores.softmax(-1)
    seeing = seen.any(-1, keepdim=True)
    return scores.masked_fill(~seen & seeing, -torch.inf).softmax(-1) * seeing


def _oracle(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention; a query that sees nothing gives 0.

    Args:
        q_BHND, k_BGMD, v_BGME: queries, keys, values; H is a multiple of G.
        mask: what may be seen, and the bias.
        scale: of the scores, D ** -0.5 by default.
        dropout: share of the weights that is dropped.

    Returns:
        (B, H, N, E).
    """
    k_BGMD, v_BGME = blank_padding(mask.keys if mask else None, k_BGMD, v_BGME)
    weights = attention_weights(q_BHND, k_BGMD, mask, scale)
    return F.dropout(weights, dropout) @ repeat_heads(v_BGME, q_BHND.shape[1])


def _torch(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    queries, keys = q_BHND.shape[2], k_BGMD.shape[2]
    mask = mask or Mask()
    k_BGMD, v_BGME = blank_padding(mask.keys, k_BGMD, v_BGME)
    if mask.causal and mask.rule is None and mask.keys is None and mask.bias is None:
        # The aligned triangle has a fast path; a single last query sees everything.
        if queries == keys and queries > 1:
            return _sdpa(q_BHND, k_BGMD, v_BGME, None, scale, dropout, causal=True)
        if queries == 1:
            return _sdpa(q_BHND, k_BGMD, v_BGME, None, scale, dropout)
    seen = mask.pairs(queries, keys, q_BHND.device)
    if seen is None:
        return _sdpa(q_BHND, k_BGMD, v_BGME, mask.bias, scale, dropout)
    # A query that sees nothing looks at everything and is zeroed after: no NaN can enter a gradient.
    seeing = seen.any(-1, keepdim=True)
    seen = seen | ~seeing
    attn_mask = seen if mask.bias is None else mask.bias.masked_fill(~seen, -torch.inf)
    return _sdpa(q_BHND, k_BGMD, v_BGME, attn_mask, scale, dropout) * seeing


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
    dropout: float,
    causal: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(q.dtype)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


FEW_QUERIES = 8
"""Up to so many the processor's memory sets the pace, not its arithmetic."""

STARTING = 1 << 21
"""Multiplications in float32 in the time that it takes to get to the C++ kernel, and eight times those in bfloat16."""


def _cpu(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    mask = mask or Mask()
    scale = _scale(q_BHND, scale)
    if q_BHND.shape[2] <= FEW_QUERIES and decode.refuses(q_BHND, k_BGMD, v_BGME) is None:
        lengths = q_BHND.new_full((q_BHND.shape[0],), k_BGMD.shape[2], dtype=torch.int64)
        return decode.softmax_decode(q_BHND, k_BGMD, v_BGME, lengths, mask.keys, scale=scale, causal=mask.causal)[0]
    return attention.softmax_attention(q_BHND, k_BGMD, v_BGME, mask.keys, scale=scale, causal=mask.causal)[0]


def _cpu_refuses(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> str | None:
    if dropout:
        return "it drops no weights"
    return attention.refuses(q_BHND, k_BGMD, v_BGME, mask)


def _cpu_yields(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> str | None:
    batch, heads, queries, size = q_BHND.shape
    products = batch * heads * queries * k_BGMD.shape[2] * (size + v_BGME.shape[3])
    if products < (STARTING if q_BHND.dtype == torch.float32 else STARTING // 8):
        return "for so little work scaled_dot_product_attention starts faster"
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHND, k_BGMD, v_BGME))
    if wants_gradient and queries <= FEW_QUERIES and q_BHND.dtype == torch.float32:
        return "its tiles are made of more queries than there are to train"
    return None


softmax_attention = Op(
    "softmax_attention",
    Backend("cpu", _cpu, _cpu_refuses, _cpu_yields),
    Backend("torch", _torch),
    Backend("flash", flash.run, flash.refuses),
    Backend("oracle", _oracle),
)
