"""Softplus attention weights, and the second stage that sharpens normalised weights.

    A_nm = φ(s_nm) / Σ_m φ(s_nm),    φ(s) = log(1 + eˢ),    s_nm = scale · log L_n · cos(q_n, k_m) + bias_nm

over the visible m, L_n of them in row n. B batch, H query heads, G key/value heads, N queries, M keys, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.mask import Mask
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import repeat_heads

LOW = -30.0
"""Below it softplus(s) is eˢ to every digit of a float64, and log softplus(s) is s."""

FREE = 3
"""A row of so many keys or fewer has no offset, as published; one of keys that weigh the same would lose them all."""


def log_softplus(s: Tensor) -> Tensor:
    """log(log(1 + eˢ)), finite with finite gradients where softplus itself underflows."""
    safe = s.clamp(min=LOW)
    return torch.where(s > LOW, torch.logaddexp(safe, torch.zeros_like(safe)).log(), s)


def row_lengths(mask: Mask, queries: int, keys: int, like: Tensor) -> Tensor:
    """How many keys each query sees, (B or 1, H or 1, N, 1), as numbers of the dtype of `like`."""
    seen = mask.pairs(queries, keys, like.device)
    if seen is None:
        return like.new_full((1, 1, queries, 1), keys)
    return seen.sum(-1, keepdim=True).to(like.dtype)


def softplus_weights(q_BHND: Tensor, k_BGMD: Tensor, mask: Mask, scale: float) -> Tensor:
    """The weights A (B, H, N, M), in float32 or better; the row of a query that sees nothing is 0.

    The l1 norm of φ(s) is the softmax of log φ(s). So it neither overflows nor vanishes, whatever the scores.

    Args:
        q_BHND, k_BGMD: queries and keys; H is a multiple of G.
        mask: what may be seen, and the bias, added to the scaled scores.
        scale: of the cosines, beside log L_n.
    """
    heads, queries, keys = q_BHND.shape[1], q_BHND.shape[2], k_BGMD.shape[2]
    q, k = (F.normalize(wide(x), dim=-1) for x in (q_BHND, repeat_heads(k_BGMD, heads)))
    with as_written(q):  # what is sharpened afterwards must not be rounded before
        cosines = q @ k.mT
    lengths_N1 = row_lengths(mask, queries, keys, cosines)
    scores = cosines * (scale * lengths_N1.clamp(min=1).log())
    if mask.bias is not None:
        scores = scores + mask.bias
    seen = mask.pairs(queries, keys, q_BHND.device)
    if seen is None:
        return log_softplus(scores).softmax(-1)
    # A row without keys looks at everything and is zeroed after: no NaN can enter a gradient.
    weights = log_softplus(scores).masked_fill(~seen & (lengths_N1 > 0), -torch.inf).softmax(-1)
    return weights.masked_fill(lengths_N1 == 0, 0)


def sharpen(weights_BHNM: Tensor, lengths_N1: Tensor, offset: float, power: float) -> Tensor:
    """relu(L_n A_nm - offset) ** power, normalised to rows that sum to 1 again.

    The offset is 0 in rows of `FREE` keys or fewer, and a row that it empties stays as it was. L_n A has the mean 1
    over the visible keys of a row.
    """
    kept = (lengths_N1 * weights_BHNM - offset * (lengths_N1 > FREE)).relu()
    # What multiplies a whole row cancels in the norm: with the largest at 1 no power overflows.
    largest = kept.amax(-1, keepdim=True).detach()
    empty = largest == 0
    raised = (kept / largest.masked_fill(empty, 1)) ** power
    total = raised.sum(-1, keepdim=True).masked_fill(empty, 1)
    return torch.where(empty, weights_BHNM, raised / total)
