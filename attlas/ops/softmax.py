"""Softmax attention: o_n = sum_m softmax_m(scale q_n.k_m + bias_nm) v_m over the visible m.

B batch, H query heads, G key/value heads, N queries, M keys, D head size, E value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.mask import Mask
from attlas.ops.dispatch import Backend, Op


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def repeat_heads(x_BGMD: Tensor, heads: int) -> Tensor:
    """Give each of `heads` query heads its own copy of the key/value head that it shares."""
    groups = x_BGMD.shape[1]
    return x_BGMD if groups == heads else x_BGMD.repeat_interleave(heads // groups, 1)


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
    heads, queries, keys = q_BHND.shape[1], q_BHND.shape[2], k_BGMD.shape[2]
    k_BHMD, v_BHME = repeat_heads(k_BGMD, heads), repeat_heads(v_BGME, heads)
    scores = q_BHND @ k_BHMD.transpose(-1, -2) * _scale(q_BHND, scale)
    mask = mask or Mask()
    if mask.bias is not None:
        scores = scores + mask.bias
    seen = mask.pairs(queries, keys, q_BHND.device)
    if seen is None:
        weights = scores.softmax(-1)
    else:
        highest = scores.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
        powers = torch.where(seen, (scores - highest.clamp(min=-1e30)).clamp(max=0), -torch.inf).exp()
        weights = powers / powers.sum(-1, keepdim=True).clamp(min=1e-30)
    return F.dropout(weights, dropout) @ v_BHME


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
    if mask.bias is None:
        attn_mask = seen
    else:
        attn_mask = mask.bias.to(q_BHND.dtype).masked_fill(~seen, -torch.inf)
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


softmax_attention = Op("softmax_attention", Backend("torch", _torch), Backend("oracle", _oracle))
