"""Attention written out pair by pair."""

import pytest
import torch

import attlas
from attlas.core.mechanism import Sizes
from attlas.ops.pairs import dense_mask, pair_cost, weighted_values

SHAPE = (2, 4, 3, 5)


def test_without_a_mask_everything_is_visible_and_nothing_is_added():
    seen, bias = dense_mask(attlas.Mask(), SHAPE, torch.empty(1, dtype=torch.float16))
    assert seen.shape == bias.shape == SHAPE
    assert seen.all()
    assert not bias.any()
    assert (seen.dtype, bias.dtype) == (torch.bool, torch.float16)


def test_a_mask_is_spread_over_sequences_and_heads():
    keep, added = torch.tensor([[True] * 5, [True, False, True, True, False]]), torch.randn(4, 3, 5)
    seen, bias = dense_mask(attlas.Mask(causal=True, keys=keep) & attlas.Mask.biased(added), SHAPE, added)
    causal = torch.ones(3, 5, dtype=torch.bool).tril(2)  # queries are the last 3 of 5 positions
    assert torch.equal(seen, (causal & keep[:, None, None, :]).expand(SHAPE))
    assert torch.equal(bias, added.expand(SHAPE))


def test_what_padding_holds_does_not_count():
    weights, v = torch.rand(2, 4, 3, 5), torch.randn(2, 2, 5, 6)
    keep = torch.tensor([[True] * 5, [True, False, True, True, False]])
    v[1, :, [1, 4]] = torch.nan
    o = weighted_values(weights, v, attlas.Mask(keys=keep))
    expected = weights @ v.nan_to_num().repeat_interleave(2, 1)
    assert torch.equal(o, expected)


@pytest.mark.parametrize(("causal", "cross", "pairs"), [(False, False, 48), (True, False, 42), (True, True, 48)])
def test_two_products_per_visible_pair(causal, cross, pairs):
    site = attlas.make_attend("softmax", 3, 8, causal=causal).site
    cost = pair_cost(site, Sizes(2, 2, 4, attlas.Grid((2,)), cross))
    assert (cost.pairs, cost.flops, cost.executed) == (pairs, 4 * 8 * pairs, 4 * 8 * 48)
