"""The identities of `axial`."""

from itertools import product

import pytest
import torch

import attlas
from attlas import Grid
from attlas.core.errors import BadInput, Unsupported


def tensors(tokens, heads=2, kv_heads=None, size=4):
    return [torch.randn(2, h, tokens, size, dtype=torch.float64) for h in (heads, *2 * [kv_heads or heads])]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("grid", "axis"), [((4, 5), 0), ((4, 5), 1), ((2, 3, 4), 0), ((2, 3, 4), 1), ((2, 3, 4), -1)])
def test_equals_a_loop_over_the_lines(grid, axis, causal):
    q, k, v = tensors(Grid(grid).tokens, 4, 2)
    got = attlas.attend(q, k, v, "axial", grid=grid, axis=axis, causal=causal).unflatten(2, grid)
    laid = [x.unflatten(2, grid) for x in (q, k, v)]
    others = [range(length) for number, length in enumerate(grid) if number != axis % len(grid)]
    for place in product(*others):
        index = list(place)
        index.insert(axis % len(grid), slice(None))
        line = (slice(None), slice(None), *index)
        expected = attlas.attend(*(x[line] for x in laid), causal=causal)
        torch.testing.assert_close(got[line], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_position_sees_its_line_and_nothing_else(axis, causal):
    grid = Grid((3, 2, 4))
    q, k, v = (x[:1, :1] for x in tensors(grid.tokens))
    layer = attlas.make_attend("axial", 1, 4, axis=axis, causal=causal)
    seen = torch.autograd.functional.jacobian(lambda v: layer(q, k, v, grid=grid).sum(-1), v)
    place = grid.places()
    differs = place.unsqueeze(1) != place
    elsewhere = torch.ones(3, dtype=torch.bool)
    elsewhere[axis] = False
    rule = ~(differs & elsewhere).any(-1)
    if causal:
        rule &= place[:, None, axis] >= place[:, axis]
    assert torch.equal(seen[0, 0, :, 0, 0].any(-1), rule)
    assert layer.cost(1, grid.tokens, grid=grid).pairs == rule.sum()


@pytest.mark.parametrize("side", [8, 32])
def test_two_axes_take_two_sides_of_the_pairs_of_full_attention(side):
    axial = sum(attlas.make_attend("axial", 1, 4, axis=a).cost(1, side**2, grid=(side, side)).pairs for a in (0, 1))
    full = attlas.make_attend("softmax", 1, 4).cost(1, side**2).pairs
    assert axial * side == 2 * full


def test_two_layers_reach_every_position():
    x = torch.randn(1, 12, 8, requires_grad=True)
    rows, columns = (attlas.mixer("axial", 8, grid=(3, 4), axis=axis) for axis in (1, 0))
    (grad,) = torch.autograd.grad(columns(rows(x))[0, 5].sum(), x)
    assert grad[0].any(-1).all()


@pytest.mark.parametrize("sizes", [[1] * 24, [5, 7, 1, 0, 11], [24], [23, 1]])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("grid", "axis"), [((4, 6), 1), ((4, 6), 0), ((2, 3, 4), 0), ((2, 3, 4), 1), ((2, 3, 4), 2)])
def test_a_stream_is_the_grid_in_raster_order(grid, axis, padded, sizes):
    torch.manual_seed(0)
    layer = attlas.mixer("axial", 16, 4, kv_heads=2, causal=True, grid=grid, axis=axis).double()
    x = torch.randn(2, 24, 16, dtype=torch.float64)
    keep = torch.rand(2, 24) > 0.3 if padded else torch.ones(2, 24, dtype=torch.bool)
    with torch.no_grad():
        whole = layer(x, mask=keep if padded else None)
        state, parts = layer.initial_state(2), []
        for piece, real in zip(x.split(sizes, 1), keep.split(sizes, 1), strict=True):
            y, state = layer.extend(piece, state, keep=real if padded else None)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1)[keep], whole[keep], rtol=0, atol=1e-12)


def test_the_state_along_rows_is_the_open_row():
    layer = attlas.mixer("axial", 16, 2, causal=True, grid=(50, 4))
    state, kept = layer.initial_state(1), []
    with torch.no_grad():
        for token in torch.randn(1, 200, 16).split(1, 1):
            _, state = layer.extend(token, state)
            kept.append(attlas.state_bytes(state.attend) // (2 * 16 * 4))
    assert kept == [1, 2, 3, 0] * 50


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sizes", [[25], [24, 1], [20, 5]])
def test_a_stream_ends_where_its_grid_does(axis, sizes):
    layer = attlas.mixer("axial", 16, 2, causal=True, grid=(2, 3, 4), axis=axis)
    *fits, last = torch.randn(1, 25, 16).split(sizes, 1)
    state = layer.initial_state(1)
    for piece in fits:
        _, state = layer.extend(piece, state)
    with pytest.raises(BadInput, match=f"24 positions, the stream {25 - sizes[-1]} and {sizes[-1]} more: the next"):
        layer.extend(last, state)


def test_on_one_axis_a_stream_has_no_end():
    layer = attlas.mixer("axial", 16, 2, causal=True, grid=(3,)).double()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    y, _ = layer.extend(x, layer.initial_state(1))
    torch.testing.assert_close(y, layer(x, grid=(5,)), rtol=0, atol=1e-12)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(BadInput, match="axis 2 is not on a grid 4x5: take -2 to 1"):
        attlas.mixer("axial", 16, 2, grid=(4, 5), axis=2)
    with pytest.raises(BadInput, match="-3 to 2, got 3"):
        attlas.mixer("axial", 16, 2, axis=3)
    with pytest.raises(BadInput, match="axis 1 is not on a grid 12"):
        attlas.attend(*tensors(12), "axial", axis=1)
    with pytest.raises(BadInput, match="a stream along axis 1 needs a grid: build the layer with grid="):
        attlas.mixer("axial", 16, 2, axis=1, causal=True).initial_state(1)
    with pytest.raises(BadInput, match=r"axis is a whole number, got 1\.5"):
        attlas.mixer("axial", 16, 2, axis=1.5, grid=(4, 5))
    q, k, v = tensors(12)
    layer = attlas.make_attend("axial", 2, 4, causal=True, grid=(3, 4))
    with pytest.raises(BadInput, match="every token is a query"):
        layer(q[:, :, -3:], k, v, grid=(3,))
    with pytest.raises(Unsupported, match="no prefix tokens"):
        layer(*tensors(13), grid=Grid((3, 4), prefix=1))
