"""Attention written out pair by pair: a mask as tensors, given weights on values, and what two products cost.

B batch, H query heads, G key/value heads, N queries, M keys, E value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.core.mask import Mask
from attlas.core.mechanism import Cost, Site, Sizes
from attlas.ops.softmax import blank_padding, repeat_heads


def dense_mask(mask: Mask, shape: tuple[int, int, int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs are visible, bool, and what is added to their scores, both of `shape` (B, H, N, M).

    The bias has the dtype of `like` where the mask brings none; both are on its device.
    """
    pairs = mask.pairs(shape[2], shape[3], like.device)
    seen = like.new_ones(shape, dtype=torch.bool) if pairs is None else pairs.expand(shape)
    bias = like.new_zeros(shape) if mask.bias is None else mask.bias.expand(shape)
    return seen, bias


def weighted_values(weights_BHNM: Tensor, v_BGME: Tensor, mask: Mask) -> Tensor:
    """Σ_m w_nm v_m (B, H, N, E); padding, which may hold anything, even NaN, counts as 0."""
    (v_BGME,) = blank_padding(mask.keys, v_BGME)
    return weights_BHNM @ repeat_heads(v_BGME, weights_BHNM.shape[1])


def pair_cost(site: Site, sizes: Sizes) -> Cost:
    """Scores and values: two products per visible pair; the torch backend is counted over all pairs."""
    batch, heads, size = sizes.batch, site.heads, site.head_dim
    pairs = Mask(causal=site.causal and not sizes.cross).area(sizes.queries, sizes.keys, batch, heads)
    return Cost(4 * pairs * size, 4 * batch * heads * sizes.queries * sizes.keys * size, pairs)
