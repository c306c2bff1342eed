"""Attention in causal groups against dense attention under its rule, on any part of the sequence."""

import pytest
import torch

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.ops.causal_groups import Keys, causal_groups, causal_groups_cost, every_token_asks, group_size
from attlas.ops.softmax import softmax_attention


def rule(tokens, group, shift, sinks):
    place = torch.arange(tokens)
    number = (place + shift) // group
    return (place <= place[:, None]) & ((place < sinks) | (number == number[:, None]))


@pytest.mark.parametrize(
    ("tokens", "queries", "start", "group", "shift", "sinks"),
    [
        (23, 23, 0, 8, 0, 0),
        (23, 23, 0, 5, 3, 4),
        (23, 5, 16, 8, 0, 3),  # keys from where the group of the first query begins
        (23, 5, 12, 8, 4, 3),
        (23, 5, 9, 8, 0, 3),  # and more than those
        (23, 20, 2, 8, 6, 5),  # sinks inside the first group
        (23, 1, 16, 8, 0, 2),
        (23, 5, 18, 1, 0, 2),
        (4, 4, 0, 2, 1, 10),  # more sinks than there are positions yet
    ],
)
def test_it_is_dense_attention_under_its_rule(tokens, queries, start, group, shift, sinks):
    q, k, v = (torch.randn(2, 3, tokens, 4, dtype=torch.float64) for _ in "qkv")
    q, seen = q[:, :, tokens - queries :], rule(tokens, group, shift, sinks)[tokens - queries :]
    padded = torch.rand(2, tokens) > 0.3
    for keep in (torch.ones(2, tokens, dtype=torch.bool), padded):
        keys = Keys(k.masked_fill(~keep[:, None, :, None], torch.nan), v, keep)
        got = causal_groups(q, keys.part(start, tokens), keys.part(0, sinks), group=group, shift=shift, start=start)
        expected = softmax_attention(q, k, v, Mask.pairs_(seen).with_(keys=keep), backend="oracle")
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert causal_groups_cost(queries, tokens, group, shift, sinks)[0] == seen.sum()


def test_keys_are_cut_and_joined_again():
    keys = Keys(torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 5), torch.rand(2, 7) > 0.5)
    for got, expected in zip(keys.part(0, 3).then(keys.part(3, 9)), keys, strict=True):
        assert torch.equal(got, expected)


def test_sizes_of_groups():
    assert [group_size(length, 0.25) for length in (1, 7, 8, 11)] == [1, 1, 2, 2]
    with pytest.raises(BadInput, match="group_ratio is the share"):
        group_size(8, 1.01)


def test_every_token_asks():
    with pytest.raises(BadInput, match="every token is a query, got 2 queries for 3 keys"):
        every_token_asks(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4))
