"""The identities of `hat`, overlapping cross-attention."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput, Unsupported


def build(grid, heads=2, size=4, **settings):
    layer = attlas.mixer("hat", heads * size, heads, grid=grid, **settings).attend.double()
    torch.nn.init.normal_(layer.relative_bias)
    return layer


def tensors(grid, heads=2, size=4):
    return [torch.randn(2, heads, grid[0] * grid[1], size, dtype=torch.float64, requires_grad=True) for _ in "qkv"]


def published(q, k, v, bias, grid, window, halo):
    """Window by window on a map padded with zeros that are not masked; offsets key - query."""
    q, k, v = (x.unflatten(2, grid) for x in (q, k, v))
    k, v = (F.pad(x, (0, 0, halo, halo, halo, halo)) for x in (k, v))
    query, key = torch.arange(window), torch.arange(window + 2 * halo)
    entry = key - query[:, None] + window - 1  # key - halo - query + (window + halo - 1)
    table = bias[:, entry[:, None, :, None], entry[None, :, None, :]].flatten(3).flatten(1, 2)
    rows = []
    for top in range(0, grid[0], window):
        row = []
        for left in range(0, grid[1], window):
            reach = window + 2 * halo
            queries = q[:, :, top : top + window, left : left + window].flatten(2, 3)
            keys, values = (x[:, :, top : top + reach, left : left + reach].flatten(2, 3) for x in (k, v))
            scores = queries @ keys.mT * q.shape[-1] ** -0.5 + table
            row.append((scores.softmax(-1) @ values).unflatten(2, (window, window)))
        rows.append(torch.cat(row, 3))
    return torch.cat(rows, 2).flatten(2, 3)


def test_it_is_the_published_procedure():
    grid, inputs = (8, 12), tensors((8, 12))
    layer = build(grid, window=4)
    got, expected = layer(*inputs, grid=grid), published(*inputs, layer.relative_bias, grid, 4, 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    wanted, weight = [*inputs, layer.relative_bias], torch.randn_like(got)
    pairs = zip(torch.autograd.grad(got, wanted, weight), torch.autograd.grad(expected, wanted, weight), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_without_overlap_it_is_window_attention():
    grid, inputs = (8, 4), tensors((8, 4))
    layer = build(grid, window=4, overlap=0.0)
    windows = attlas.mixer("swin", 8, 2, grid=grid, window=4, shift=0).attend.double()
    with torch.no_grad():
        windows.relative_bias.copy_(layer.relative_bias)
    torch.testing.assert_close(layer(*inputs, grid=grid), windows(*inputs, grid=grid), rtol=0, atol=1e-12)


def test_places_beyond_the_border_take_their_share_and_bring_nothing():
    layer = build((6, 6), heads=1, window=2, overlap=1.0)
    with torch.no_grad():
        layer.relative_bias.zero_()
    q, k, v = torch.zeros(1, 1, 36, 4), torch.zeros(1, 1, 36, 4), torch.ones(1, 1, 36, 4)
    o = layer.float()(q, k, v, grid=(6, 6))[0, 0, :, 0].view(6, 6)
    torch.testing.assert_close(o[2:4, 2:4], torch.ones(2, 2))
    torch.testing.assert_close(o[0, 2:4], torch.full((2,), 3 / 4))  # 3 of 4 rows lie on the map
    torch.testing.assert_close(o[0, 0], torch.tensor(9 / 16))


def test_a_map_that_windows_do_not_fill_is_as_if_zeros_followed():
    small, large = (5, 7), (8, 8)
    layer, inputs = build(large, window=4), tensors(small)
    filled = [F.pad(x.unflatten(2, small), (0, 0, 0, 1, 0, 3)).flatten(2, 3) for x in inputs]
    got = layer(*inputs, grid=small).unflatten(2, small)
    expected = layer(*filled, grid=large).unflatten(2, large)[:, :, :5, :7]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_keys_come_from_beyond_the_window():
    layer, (q, k, v) = build((12, 12), window=4), tensors((12, 12))
    for share, width in ((0.5, 6), (0.0, 4)):
        layer = build((12, 12), window=4, overlap=share)
        (grad,) = torch.autograd.grad(layer(q, k, v, grid=(12, 12)).unflatten(2, (12, 12))[0, :, 4, 7].sum(), v)
        assert (grad[0].abs().sum((0, 2)) > 0).sum() == width**2


def test_bad_input():
    with pytest.raises(BadInput, match="even number of places"):
        build((8, 8), window=3)
    with pytest.raises(BadInput, match="a place at least"):
        build((8, 8), window=0)
    with pytest.raises(BadInput, match="built for 2 axes"):
        build((8, 8), window=4)(*tensors((8, 8)), grid=(64,))
    with pytest.raises(Unsupported, match="prefix"):
        attlas.mixer("hat", 8, 2, grid=(4, 4), window=4)(torch.randn(1, 17, 8), grid=attlas.Grid((4, 4), prefix=1))
