"""Positions tile after tile, and back."""

from itertools import product
from math import prod

import pytest
import torch

from attlas.core.errors import BadInput
from attlas.ops.tile_order import TileOrder

CASES = [
    ((12,), (4,)),
    ((11,), (4,)),
    ((4, 6), (2, 3)),
    ((5, 7), (2, 3)),
    ((5, 7), (5, 1)),
    ((4, 6, 4), (2, 3, 4)),
    ((3, 5, 4), (2, 2, 3)),
]
over_cases = pytest.mark.parametrize(("shape", "tile"), CASES, ids=str)


def by_hand(shape, tile):
    """The positions of each tile, in order."""
    counts = [range(-(-length // side)) for length, side in zip(shape, tile, strict=True)]
    number = {place: n for n, place in enumerate(product(*map(range, shape)))}
    tiles = []
    for corner in product(*counts):
        axes = [range(c * side, (c + 1) * side) for c, side in zip(corner, tile, strict=True)]
        tiles.append([number.get(place) for place in product(*axes)])
    return tiles


@over_cases
def test_tiles_hold_their_positions_in_raster_order(shape, tile):
    order, expected = TileOrder(shape, tile), by_hand(shape, tile)
    got = order.cut(torch.arange(1, prod(shape) + 1), 0)
    assert got.shape == (order.tiles, order.places)
    assert got.tolist() == [[0 if n is None else n + 1 for n in places] for places in expected]
    assert order.real().tolist() == [[n is not None for n in places] for places in expected]
    assert order.sizes() == [sum(n is not None for n in places) for places in expected]
    owner = order.owner().tolist()
    assert all(owner[n] == t for t, places in enumerate(expected) for n in places if n is not None)
    assert order.even == all(None not in places for places in expected)


@over_cases
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_there_and_back_is_the_identity_and_so_is_its_gradient(shape, tile, dim):
    order, sizes = TileOrder(shape, tile), [2, 3, 5]
    sizes[dim] = prod(shape)
    x = torch.randn(sizes, dtype=torch.float64, requires_grad=True)
    tiles = order.cut(x, dim)
    back = order.join(tiles, dim % 3)
    assert torch.equal(back, x)
    weight = torch.randn_like(back)
    assert torch.equal(torch.autograd.grad(back, x, weight)[0], weight)


def test_what_stands_off_the_grid_is_dropped_on_the_way_back():
    order = TileOrder((3, 3), (2, 2))
    tiles = torch.full((order.tiles, order.places), torch.nan).where(~order.real(), 1.0)
    assert torch.equal(order.join(tiles, 0), torch.ones(9))


def test_what_is_held_is_on_the_grid_and_no_padding():
    uneven, even, x = TileOrder((3, 3), (2, 2)), TileOrder((4, 2), (2, 2)), torch.zeros(2, 1)
    held_BTP, rows = uneven.held(None, x)
    assert torch.equal(held_BTP, uneven.real()[None])
    assert torch.equal(rows, uneven.real().flatten().expand(2, -1))
    assert even.held(None, x)[1] is None
    keep = torch.rand(2, 8) > 0.5
    held_BTP, rows = even.held(keep, x)
    assert torch.equal(held_BTP, even.cut(keep, 1))
    assert torch.equal(rows, held_BTP.flatten(1))


def test_it_compiles_into_one_graph():
    order = TileOrder((5, 6), (2, 3))
    x = torch.randn(2, 30, 4)
    compiled = torch.compile(lambda t: order.join(order.cut(t) * 2), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), 2 * x)


def test_tiles_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match="a tile of 1 axes"):
        TileOrder((4, 4), (2,))
    with pytest.raises(BadInput, match=r"at most those of the grid on every axis, got \(2, 5\)"):
        TileOrder((4, 4), (2, 5))
    with pytest.raises(BadInput, match="at least one place"):
        TileOrder((4,), (0,))
