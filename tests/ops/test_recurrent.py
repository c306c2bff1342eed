"""Heads, gaps and the short convolution of recurrent mixers."""

import pytest
import torch
import torch.nn.functional as F

from attlas.core.errors import BadInput
from attlas.ops.recurrent import alone, head_size, keys_ahead, normed_heads, short_convolution

DOUBLE = {"dtype": torch.float64}


def test_heads_share_a_multiple_of_the_channels():
    assert head_size("expand_k", 0.5, 48, 3) == 8
    assert head_size("expand_v", 0.1, 30, 3) == 1  # 0.1 x 30 is 3.0000000000000004
    for share in (0.3, 0.0, -1.0, 1 / 48):
        with pytest.raises(BadInput, match="expand_k times dim splits into heads"):
            head_size("expand_k", share, 48, 3)


def test_queries_are_the_last_positions():
    assert [keys_ahead(queries, 5) for queries in (5, 2, 1)] == [0, 3, 4]
    with pytest.raises(BadInput, match="queries are the last of the keys' positions, got 6 queries and 5 keys"):
        keys_ahead(6, 5)


def test_heads_are_normed_beyond_the_range_of_float16():
    o = 1e6 * torch.randn(2, 3, 4, 8)
    y = normed_heads(o, torch.empty(0, dtype=torch.float16), 1e-5, torch.full((8,), 2.0, dtype=torch.float16))
    assert y.dtype == torch.float16
    assert torch.allclose(y.float(), (2 * o / o.square().mean(-1, keepdim=True).sqrt()).flatten(2), rtol=1e-3)


@pytest.mark.parametrize("lags", [1, 4])
def test_a_short_convolution_sees_the_last_tokens(lags):
    x, w = torch.randn(2, 9, 5, **DOUBLE), torch.randn(lags, 5, **DOUBLE)
    y, tail = short_convolution(x, w, x.new_zeros(2, lags - 1, 5))
    kernel = w.flip(0).T.unsqueeze(1)  # a convolution's last tap is the token itself
    expected = F.conv1d(F.pad(x.mT, (lags - 1, 0)), kernel, groups=5).mT
    assert torch.allclose(y, expected, atol=1e-12)
    assert torch.equal(tail, x[:, 9 - (lags - 1) :])


def test_a_short_convolution_skips_padding_and_goes_on():
    keep = torch.rand(3, 12) > 0.5
    keep[0], keep[1] = False, torch.arange(12) == 11
    x, w, nothing = torch.randn(3, 12, 5, **DOUBLE), torch.randn(4, 5, **DOUBLE), torch.zeros(3, 3, 5, **DOUBLE)
    whole, tail = short_convolution(x.masked_fill(~keep.unsqueeze(-1), torch.nan), w, nothing, keep)
    assert not whole[~keep].any()
    assert not tail[0].any()
    for b in (1, 2):
        real = x[b : b + 1, keep[b]]
        expected, last = short_convolution(real, w, nothing[:1])
        assert torch.allclose(whole[b, keep[b]], expected[0], atol=1e-12)
        assert torch.equal(tail[b], last[0])
    state, parts = nothing, []
    for piece in (slice(0, 2), slice(2, 3), slice(3, 12)):
        y, state = short_convolution(x[:, piece], w, state, keep[:, piece])
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-12)
    assert torch.equal(state, tail)


def test_each_sequence_runs_alone():
    x, keep = torch.randn(3, 6, 2, requires_grad=True), torch.rand(3, 6) > 0.4
    keep[2] = False
    y = alone(lambda one: one.cumsum(1), x, keep)
    assert torch.allclose(y, (x * keep.unsqueeze(-1)).cumsum(1) * keep.unsqueeze(-1))
    assert torch.allclose(alone(lambda one: one.cumsum(1), x, None), x.cumsum(1))
