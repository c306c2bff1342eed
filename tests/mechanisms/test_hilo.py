"""What only HiLo attention holds: its published counts, its limits, who sees whom, and which frequencies pass."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput


def build(dim=16, heads=4, **settings):
    torch.manual_seed(0)
    return attlas.mixer("hilo", dim, heads, **settings).double()


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def test_parameters_and_multiplications_are_the_published_ones():
    layer = attlas.mixer("hilo", 384, 12, window=2, alpha=0.5, bias=False, grid=(14, 14))
    assert sum(p.numel() for p in layer.parameters()) == 516_480
    assert layer.cost(1, 196).flops == 2 * 83_467_776


@pytest.mark.parametrize(
    ("alpha", "heads", "low"), [(0.9, 12, 10), (0.9, 24, 21), (0.5, 3, 1), (0.0, 4, 0), (1.0, 4, 4)]
)
def test_low_heads_are_rounded_down(alpha, heads, low):
    layer = build(2 * heads, heads, alpha=alpha)
    assert (layer.low_heads, layer.high_heads) == (low, heads - low)


def test_a_window_of_one_is_plain_attention():
    layer, x = build(window=1), torch.randn(2, 12, 16, dtype=torch.float64)
    k, v = layer.low_kv(x).chunk(2, -1)
    o = attlas.attend(split(layer.low_q(x), 4), split(k, 4), split(v, 4))
    expected = layer.low_out(o.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, grid=(3, 4)), expected, rtol=0, atol=1e-12)


def test_no_low_heads_is_attention_in_windows():
    layer, x = build(alpha=0.0), torch.randn(2, 24, 16, dtype=torch.float64)
    windows = x.view(2, 2, 2, 3, 2, 16).transpose(2, 3).reshape(12, 4, 16)
    q, k, v = (split(part, 4) for part in layer.high_qkv(windows).chunk(3, -1))
    o = layer.high_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    expected = o.view(2, 2, 3, 2, 2, 16).transpose(2, 3).reshape(2, 24, 16)
    torch.testing.assert_close(layer(x, grid=(4, 6)), expected, rtol=0, atol=1e-12)


def test_only_low_heads_is_attention_to_pooled_keys():
    layer, x = build(alpha=1.0), torch.randn(2, 24, 16, dtype=torch.float64)
    pooled = F.avg_pool2d(x.mT.unflatten(-1, (4, 6)), 2).flatten(2).mT
    k, v = layer.low_kv(pooled).chunk(2, -1)
    o = F.scaled_dot_product_attention(split(layer.low_q(x), 4), split(k, 4), split(v, 4))
    expected = layer.low_out(o.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, grid=(4, 6)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_high_channels_depend_on_their_window_and_low_ones_on_all(grid):
    layer, tokens = build(alpha=0.5), grid[0] * grid[1]
    x = torch.randn(1, tokens, 16, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: layer(t, grid=grid), x)[0, :, :, 0]  # (N, C, M, C)
    place = attlas.Grid(grid).places() // 2
    together = (place.unsqueeze(1) == place).all(-1)
    high, low = jacobian[:, :8], jacobian[:, 8:]
    assert torch.equal(high.abs().amax((1, 3)) > 0, together)
    assert (low.abs().amax((1, 3)) > 0).all()


def test_a_checkerboard_is_seen_by_high_channels_alone():
    layer = build(alpha=0.5)
    sign = (-1.0) ** attlas.Grid((4, 4)).places().sum(1).double()
    x = sign[None, :, None] * torch.randn(16, dtype=torch.float64)
    y = layer(x, grid=(4, 4))
    assert y[..., 8:].std(1).max() < 1e-12
    assert y[..., :8].std(1).max() > 1e-3
    assert layer(torch.ones_like(x), grid=(4, 4)).std(1).max() < 1e-12


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_padding_below_and_to_the_right_is_a_smaller_grid(alpha):
    """Windows at the border are smaller and their means are of what is there: zeros would enter them."""
    layer, whole = build(alpha=alpha), torch.randn(2, 4, 6, 16, dtype=torch.float64)
    keep = torch.zeros(2, 4, 6, dtype=torch.bool)
    keep[:, :3, :5] = True
    padded = layer(whole.flatten(1, 2), mask=keep.flatten(1), grid=(4, 6)).unflatten(1, (4, 6))
    small = layer(whole[:, :3, :5].flatten(1, 2), grid=(3, 5)).unflatten(1, (3, 5))
    torch.testing.assert_close(padded[:, :3, :5], small, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heads": 3}, "heads must divide dim: 16 channels"),
        ({"window": 0}, "window counts positions"),
        ({"alpha": 1.1}, "alpha is the share of low heads, 0 to 1, got 1.1"),
        ({"window": 5, "grid": (4, 8)}, "window 5 is larger than the axis; take one of at most 4"),
    ],
)
def test_what_has_no_meaning_is_refused_at_construction(settings, words):
    with pytest.raises(BadInput, match=words):
        build(**settings)


def test_a_window_larger_than_the_grid_is_refused_at_the_call():
    with pytest.raises(BadInput, match="window 3 is larger than the axis"):
        build(window=3)(torch.randn(1, 8, 16, dtype=torch.float64), grid=(2, 4))
