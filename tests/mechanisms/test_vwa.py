"""The identities of `vwa`."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas import Grid
from attlas.core.errors import BadInput


def build(dim=16, heads=2, **settings):
    """The layer in eval mode with a norm that passes on all it gets, and no dead rectifier."""
    layer = attlas.mixer("vwa", dim, heads, **settings).double().eval()
    for norm in (layer.rescale_norm, layer.out_norm):
        torch.nn.init.constant_(norm.weight, (1 + norm.eps) ** 0.5)
    torch.nn.init.constant_(layer.rescale_norm.bias, 9)
    return layer


def reached(layer, grid, row, column):
    """The places that the output at one place depends on."""
    x = torch.randn(1, Grid(grid).tokens, layer.site.dim, dtype=torch.float64, requires_grad=True)
    y = layer(x, grid=grid).view(*grid, -1)[row, column].sum()
    return torch.autograd.grad(y, x)[0].abs().sum(-1).view(grid) > 0


def rectangle(grid, rows, columns):
    expected = torch.zeros(grid, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    return expected


def copy_shifted(line, ratio, size):
    """Copy-shift padding of a line, as the paper draws it: each end gets what its context lacks from further in."""
    wide, kept = ratio * size, (ratio + 1) * size // 2
    return torch.cat([line[kept:wide], line, line[-wide:-kept]])


@pytest.mark.parametrize(("length", "ratio"), [(16, 2), (24, 2), (32, 4), (24, 4), (40, 8), (24, 3), (16, 1)])
def test_contexts_are_cut_from_the_copy_shift_padded_map(length, ratio):
    layer, size = build(64 if ratio != 3 else 18, 1, ratio=ratio), length // 8
    places, _ = layer._contexts(Grid((length, length)), torch.device("cpu"))
    padded = copy_shifted(torch.arange(length), ratio, size)
    assert torch.equal(places, padded.unfold(0, ratio * size, size)[:8])


def test_contexts_inside_are_centred_crops_and_at_the_border_the_nearest_places():
    places, _ = build(ratio=4)._contexts(Grid((32, 32)), torch.device("cpu"))
    for window, context in enumerate(places):
        begin = min(max(4 * window - 6, 0), 32 - 16)
        assert context.sort().values.tolist() == list(range(begin, begin + 16))
        if 2 <= window <= 5:
            assert context.tolist() == list(range(4 * window - 6, 4 * window + 10))


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_a_context_has_the_shape_of_its_window(ratio):
    layer, grid = build(64, ratio=ratio), Grid((16, 24))
    z = torch.randn(2, grid.tokens, 64 // ratio**2, dtype=torch.float64)
    tokens = layer._tokens(z, grid, layer._contexts(grid, z.device))
    assert tokens.shape == layer._cut(torch.randn(2, grid.tokens, 64), grid).shape == (2 * 64, 2 * 3, 64)
    rows, columns = layer._contexts(grid, z.device)
    patch = grid.unflatten(z)[1][rows[3, ratio : 2 * ratio]][:, columns[5, :ratio]]
    assert torch.equal(tokens[64 + 3 * 8 + 5, 3], patch.flatten())  # second row, first column of the tokens


def test_the_context_grows_and_the_cost_does_not():
    def cost(ratio):
        return attlas.mixer("vwa", 512, 8, ratio=ratio).cost(1, 64 * 64, grid=(64, 64))

    small, large = cost(2), cost(8)
    positions = 64 * 64
    assert small.executed == large.executed == 4 * positions * 64 * 512 + 10 * positions * 512**2
    assert large.flops < small.flops  # of its taps more fall off the map


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_an_output_depends_on_its_context_and_the_taps_around(ratio):
    layer, grid = build(ratio=ratio), (32, 24)
    before, after = (ratio - 1) // 2, ratio // 2
    rows = (16 - 2 * (ratio - 1) - before, 20 + 2 * (ratio - 1) + after)  # window 4 of 4 places
    first = 9 - (3 * (ratio - 1) + 1) // 2  # window 3 of 3 places, a half place more to the left
    columns = (first - before, first + 3 * ratio + after)
    assert torch.equal(reached(layer, grid, 17, 10), rectangle(grid, rows, columns))


def test_at_the_border_an_output_depends_on_as_much():
    layer = build(ratio=2)
    assert torch.equal(reached(layer, (16, 16), 0, 15), rectangle((16, 16), (0, 5), (12, 16)))


def test_what_remains_makes_a_smaller_window_with_a_whole_context():
    layer, grid = build(ratio=2, windows=2), (7, 6)  # windows of 3 places: rows 0 to 2, 3 to 5, and 6
    assert torch.equal(reached(layer, grid, 6, 0), rectangle(grid, (1, 7), (0, 6)))
    assert torch.equal(reached(layer, grid, 3, 0), rectangle(grid, (1, 7), (0, 6)))
    assert torch.equal(reached(layer, grid, 0, 0), rectangle(grid, (0, 7), (0, 6)))


@pytest.mark.parametrize(("length", "size", "count"), [(16, 2, 8), (15, 1, 15), (17, 2, 9), (31, 3, 11)])
def test_lengths_that_do_not_divide_make_more_windows(length, size, count):
    assert build()._windows(Grid((length, 8))) == ((size, 1), (count, 8))


def test_without_a_wider_context_it_is_window_attention():
    layer, grid = build(ratio=1, windows=2, heads=4), Grid((6, 8))
    with torch.no_grad():
        layer.rescale.weight.copy_(torch.eye(16)[:, :, None, None])
        layer.rescale_norm.bias.zero_()
    x = torch.rand(2, 48, 16, dtype=torch.float64)
    got = layer(x, grid=grid).unflatten(1, (6, 8))
    for row, column in ((0, 0), (0, 4), (3, 0), (3, 4)):
        own = (slice(None), slice(row, row + 3), slice(column, column + 4))
        part = grid.unflatten(x)[own].flatten(1, 2)
        q, k, v = (
            proj(part).unflatten(-1, (4, 4)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        expected = layer.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(got[own].flatten(1, 2), expected, rtol=0, atol=1e-12)


def test_padding_enters_no_statistics():
    x, keep = torch.randn(3, 48, 16, dtype=torch.float64), torch.rand(3, 48) > 0.3
    keep[1, 24:] = False
    results = []
    for filler, backend in ((0.0, "auto"), (50.0, "auto"), (0.0, "oracle")):
        torch.manual_seed(1)
        layer = build(ratio=2, windows=2, backend=backend).train()
        y = layer(x.where(keep.unsqueeze(-1), filler), mask=keep, grid=(6, 8))
        results.append((y[keep], layer.rescale_norm.running_mean, layer.out_norm.running_var))
    first, other, oracle = results
    torch.testing.assert_close(other, first, rtol=0, atol=1e-12)
    torch.testing.assert_close(oracle[0], first[0], rtol=0, atol=1e-12)


def test_starts_at_zero():
    x = torch.randn(2, 64, 16)
    assert not attlas.mixer("vwa", 16, 2)(x, grid=(8, 8)).any()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heads": 3}, "heads must divide dim: 16 channels do not split into 3 heads"),
        ({"ratio": 8}, "ratio² must divide dim, got ratio 8 and dim 16"),
        ({"ratio": 0}, "ratio² must divide dim, got ratio 0"),
        ({"ratio": 4, "windows": 2}, "at least as many on every axis, got windows=2"),
        ({"grid": (16, 7)}, "no 8 windows on every axis; build with windows=7 or fewer"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, words):
    with pytest.raises(BadInput, match=words):
        attlas.mixer("vwa", 16, **settings)


def test_a_map_with_fewer_places_than_windows_is_refused():
    with pytest.raises(BadInput, match="windows=4 or fewer"):
        attlas.mixer("vwa", 16)(torch.randn(1, 32, 16), grid=(4, 8))
