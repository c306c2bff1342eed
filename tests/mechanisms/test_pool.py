"""The identities of `poolformer`'s mixer."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput


def test_a_constant_map_gives_zero_at_the_border_too():
    x = torch.full((1, 20, 3), 2.5)
    assert not attlas.mixer("pool", 3)(x, grid=(4, 5)).any()


def test_an_impulse_gives_a_ninth_around_and_a_ninth_less_one_at_the_centre():
    x = torch.zeros(1, 25, 1)
    x[0, 12] = 1
    y = attlas.mixer("pool", 1)(x, grid=(5, 5)).view(5, 5)
    expected = torch.zeros(5, 5)
    expected[1:4, 1:4] = 1 / 9
    expected[2, 2] -= 1
    assert torch.allclose(y, expected)


def test_equals_average_pooling_without_counting_the_border():
    x = torch.randn(2, 63, 16)
    plane = x.transpose(1, 2).view(2, 16, 7, 9)
    expected = F.avg_pool2d(plane, 3, 1, 1, count_include_pad=False) - plane
    y = attlas.mixer("pool", 16)(x, grid=(7, 9))
    assert torch.allclose(y, expected.flatten(2).transpose(1, 2), atol=1e-6)


def test_causal_pooling_averages_the_last_three():
    x = torch.tensor([1.0, 2.0, 6.0, 4.0]).view(1, 4, 1)
    y = attlas.mixer("pool", 1, causal=True)(x)
    assert torch.allclose(y.flatten(), torch.tensor([0.0, 1.5 - 2, 3 - 6, 4 - 4]))


def test_padding_may_hold_nan():
    x = torch.randn(1, 6, 2)
    keep = torch.tensor([[True] * 4 + [False] * 2])
    expected = attlas.mixer("pool", 2)(x[:, :4])
    x[:, 4:] = torch.nan
    assert torch.allclose(attlas.mixer("pool", 2)(x, mask=keep)[:, :4], expected)


def test_bad_sizes():
    with pytest.raises(BadInput, match="size is odd; got 4"):
        attlas.mixer("pool", 8, size=4)
    with pytest.raises(BadInput, match="one axis, got a grid 2x3"):
        attlas.mixer("pool", 8, causal=True)(torch.randn(1, 6, 8), grid=(2, 3))
