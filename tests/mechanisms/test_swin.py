"""The identities of `swin`."""

from itertools import product

import pytest
import torch

import attlas
from attlas import Grid
from attlas.core.errors import BadInput


def build(heads=2, size=4, grid=(8, 12), **settings):
    return attlas.mixer("swin", heads * size, heads, grid=grid, **settings).attend.double()


def tensors(grid, heads=2, size=4):
    return [torch.randn(2, heads, Grid(grid).tokens, size, dtype=torch.float64, requires_grad=True) for _ in "qkv"]


def windows_of(x, grid, window):
    """(B, H, N, D) of a rolled map as windows, (B, windows, H, w w, D)."""
    x = x.unflatten(2, (grid[0] // window, window, grid[1] // window, window))
    return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(1, 2)


def rolled(q, k, v, table, grid, window, shift):
    """The published procedure: roll the map, cut it, mask what came round, put it back."""
    q, k, v = (x.unflatten(2, grid).roll((-shift, -shift), (2, 3)).flatten(2, 3) for x in (q, k, v))
    region = torch.zeros(grid, dtype=torch.long)
    for number, (rows, columns) in enumerate(
        product((slice(0, -window), slice(-window, -shift), slice(-shift, None)), repeat=2)
    ):
        region[rows, columns] = number if shift else 0
    region = windows_of(region.view(1, 1, -1, 1), grid, window)[0, :, 0, :, 0]
    place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    dy, dx = (place.unsqueeze(0) - place.unsqueeze(1) + window - 1).unbind(-1)
    q, k, v = (windows_of(x, grid, window) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5 + table[:, dy, dx]
    apart = region.unsqueeze(1) != region.unsqueeze(2)
    o = scores.masked_fill(apart.unsqueeze(1), -torch.inf).softmax(-1) @ v
    o = o.unflatten(3, (window, window)).unflatten(1, (grid[0] // window, -1)).permute(0, 3, 1, 4, 2, 5, 6)
    return o.flatten(4, 5).flatten(2, 3).roll((shift, shift), (2, 3)).flatten(2, 3)


@pytest.mark.parametrize(
    ("grid", "window", "shift"), [((8, 12), 4, 2), ((8, 12), 4, 0), ((6, 9), 3, 1), ((4, 6), 2, 1)]
)
def test_equals_rolling_cutting_and_masking(grid, window, shift):
    layer, inputs = build(grid=grid, window=window, shift=shift), tensors(grid)
    layer.relative_bias.data.normal_()
    got = layer(*inputs, grid=grid)
    expected = rolled(*inputs, layer.relative_bias, grid, window, shift)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight, wanted = torch.randn_like(got), [*inputs, layer.relative_bias]
    pairs = zip(torch.autograd.grad(got, wanted, weight), torch.autograd.grad(expected, wanted, weight), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def seen(layer, grid):
    """Which pairs gradients see, (N, N)."""
    q, k, v = (x[:1] for x in tensors(grid))

    def run(values):
        return layer(q, k, values, grid=grid).sum((0, 1, 3))

    return torch.autograd.functional.jacobian(run, v.detach()).abs().sum((1, 2, 4)) > 0


@pytest.mark.parametrize(
    ("grid", "window", "shift"), [((7, 5), (3, 2), (1, 1)), ((5, 8), (4, 3), 0), ((4, 9), (9, 4), (5, 3))]
)
def test_a_query_sees_its_window_and_windows_need_not_divide(grid, window, shift):
    layer = build(grid=grid, window=window, shift=shift)
    shifts = [0 if w >= length else s for s, w, length in zip(layer.shift, layer.window, grid, strict=True)]
    places = Grid(grid).places()
    axes = zip(places.T, shifts, layer.window, strict=True)
    number = torch.stack([(x - s).div(w, rounding_mode="floor") for x, s, w in axes], 1)
    expected = (number.unsqueeze(0) == number.unsqueeze(1)).all(-1)
    assert torch.equal(seen(layer, grid), expected)
    assert layer.cost(3, len(places), grid=grid).pairs == 3 * 2 * expected.sum()


def test_odd_layers_are_shifted_by_half_a_window():
    shifts = [attlas.mixer("swin", 16, 2, grid=(14, 14), layer=n).attend.shift for n in range(4)]
    assert shifts == [(0, 0), (3, 3), (0, 0), (3, 3)]


def test_an_axis_of_the_call_that_is_shorter_than_a_window_is_one_with_the_offsets_that_it_has():
    layer, expected = build(grid=(14, 14), layer=1), build(grid=(4, 9), window=(4, 7), shift=(0, 3))
    with torch.no_grad():
        expected.relative_bias.copy_(layer.relative_bias[:, 3:10])
    inputs = tensors((4, 9))
    torch.testing.assert_close(layer(*inputs, grid=(4, 9)), expected(*inputs, grid=(4, 9)), rtol=0, atol=1e-12)


def test_an_axis_of_one_window_takes_its_shift_on_a_larger_grid_from_that_window():
    layer = build(grid=(3, 9), layer=1)
    assert layer.shift == (1, 3)
    assert [(axis.window, axis.shift) for axis in layer._axes(Grid((3, 9)))] == [(3, 0), (7, 3)]
    assert [(axis.window, axis.shift) for axis in layer._axes(Grid((8, 8)))] == [(3, 1), (7, 3)]
    inputs = tensors((8, 8))
    expected = build(grid=(8, 8), window=(3, 7), shift=(1, 3))
    expected.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(*inputs, grid=(8, 8)), expected(*inputs, grid=(8, 8)))


def test_two_layers_connect_what_no_window_holds_together():
    grid = (8, 8)
    straight, shifted = (seen(build(grid=grid, window=4, layer=n), grid) for n in (0, 1))
    through = (straight.double() @ shifted.double()) > 0
    corner = 0  # one pixel: its window, then every shifted window that meets it
    assert straight[corner].view(grid)[:4, :4].all()
    assert straight[corner].sum() == 16
    assert through[corner].view(grid)[:6, :6].all()
    assert through[corner].sum() == 36


def test_an_axis_of_one_window_is_not_shifted_and_its_table_is_as_large():
    layer = build(grid=(7, 3), layer=1)
    assert layer.relative_bias.shape == (2, 13, 5)
    q, k, v = tensors((7, 3))
    place = Grid((7, 3)).places()
    dy, dx = (place.unsqueeze(0) - place.unsqueeze(1) + torch.tensor([6, 2])).unbind(-1)
    mask = attlas.Mask.biased(layer.relative_bias[:, dy, dx])
    torch.testing.assert_close(layer(q, k, v, grid=(7, 3)), attlas.attend(q, k, v, mask=mask), rtol=0, atol=1e-12)


def test_the_bias_counts_from_the_query_to_the_key():
    layer, (q, k, v) = build(grid=(6, 6), window=3), tensors((6, 6))
    with torch.no_grad():
        layer.relative_bias.zero_()[:, 2 + 1, 2 - 2] = 1e4  # one row down, two places to the left
    got = layer(q, k, v, grid=(6, 6)).unflatten(2, (6, 6))
    v = v.unflatten(2, (6, 6))
    torch.testing.assert_close(got[:, :, 3:5, 5], v[:, :, 4:6, 3], rtol=0, atol=1e-12)


def test_published_sizes():
    layer = attlas.mixer("swin", 96, 3, grid=(56, 56))
    assert sum(p.numel() for p in layer.parameters()) == 4 * 96 * 97 + 169 * 3
    bias = layer.attend.relative_bias
    assert 0.015 < bias.std() < 0.025
    assert layer.attend.cost(1, 3136, grid=(56, 56)).pairs == 3 * 3136 * 49
    shifted = attlas.mixer("swin", 96, 3, grid=(56, 56), layer=1).attend.cost(1, 3136, grid=(56, 56))
    assert shifted.pairs == 3 * (7 * 49 + 9 + 16) ** 2


def test_prefix_tokens_see_all_and_are_seen_by_all():
    q, k, v = (x.detach() for x in tensors((26,)))
    layer, grid = build(grid=(5, 5), window=3, shift=1), Grid((5, 5), prefix=1)
    layer.relative_bias.data.zero_()
    number = torch.stack([(x - 1).div(3, rounding_mode="floor") for x in Grid((5, 5)).places().T], 1)
    same = (number.unsqueeze(0) == number.unsqueeze(1)).all(-1)
    pairs = torch.nn.functional.pad(same, (1, 0, 1, 0), value=True)
    expected = attlas.attend(q, k, v, mask=attlas.Mask.pairs_(pairs))
    torch.testing.assert_close(layer(q, k, v, grid=grid), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 0}, "a window holds a place at least, got window 0"),
        ({"window": 4, "shift": 4}, "shift 4 is not in 0 to window - 1; with window 4 take it modulo 4"),
        ({"shift": -1}, "shift -1 is not in 0"),
        ({"window": (3, 3, 3)}, r"window \(3, 3, 3\) is for 3 axes, the grid has 2"),
        ({"shift": (1,)}, "shift .* is for 1 axes"),
    ],
)
def test_what_has_no_meaning_is_refused_at_construction(settings, words):
    with pytest.raises(BadInput, match=words):
        attlas.mixer("swin", 16, 2, **settings)


def test_what_has_no_meaning_is_refused_at_the_call():
    layer, x = attlas.mixer("swin", 16, 2), torch.randn(1, 24, 16)
    with pytest.raises(BadInput, match="built for 2 axes"):
        layer(x)
