"""Tiles that neighborhood attention visits."""

import random

import pytest
import torch

from attlas.analysis.tiles import Tiling
from attlas.core.errors import BadInput

VIDEO = {"grid": (30, 48, 80), "window": (18, 24, 24), "key_tile": (2, 8, 8)}


def counted(tiling):
    """Pairs of tiles between which somebody sees something, looked up in the dense mask of every axis."""
    total = 1
    for axis, queries, keys in zip(tiling.axes, tiling.query_tile, tiling.key_tile, strict=True):
        place = torch.arange(axis.length)
        seen = axis.sees(place.unsqueeze(1), place)
        visited = 0
        for group in range(axis.dilation):
            own = seen[group :: axis.dilation, group :: axis.dilation]
            visited += sum(bool(tile.any()) for rows in own.split(queries) for tile in rows.split(keys, 1))
        total *= visited
    return total


def test_visited_tiles_are_those_that_hold_a_visible_pair():
    draw = random.Random(0)
    for _ in range(300):
        length = draw.randint(1, 40)
        dilation = draw.randint(1, min(3, length))
        window = draw.randint(1, length // dilation)
        tiling = Tiling.of(
            (length,),
            (window,),
            stride=draw.randint(1, window),
            dilation=dilation,
            causal=draw.random() < 0.5,
            query_tile=(draw.randint(1, 9),),
            key_tile=(draw.randint(1, 9),),
        )
        assert tiling.visited() == counted(tiling), tiling
    mixed = Tiling.of(
        (9, 8, 14), (4, 3, 5), stride=(2, 1, 3), causal=(True, False, False), query_tile=(2, 4, 4), key_tile=(2, 2, 8)
    )
    assert mixed.visited() == counted(mixed)


@pytest.mark.parametrize(
    ("grid", "window", "query_tile", "key_tile", "stride", "flop_bound"),
    [
        ((32768,), (2048,), (256,), (128,), (256,), 16.0),
        ((32768,), (2048,), (128,), (128,), (256,), 16.0),
        ((256, 256), (80, 80), (16, 16), (16, 8), (16, 16), 10.24),
        ((256, 256), (80, 80), (16, 8), (16, 8), (16, 16), 10.24),
        ((30, 48, 80), (18, 24, 24), (4, 8, 8), (2, 8, 8), (16, 8, 8), 100 / 9),
    ],
)
def test_the_smallest_stride_that_wastes_nothing_is_the_published_one(
    grid, window, query_tile, key_tile, stride, flop_bound
):
    sliding = Tiling.of(grid, window, query_tile=query_tile, key_tile=key_tile)
    assert sliding.flop_bound() == pytest.approx(flop_bound, rel=1e-12)
    assert sliding.smallest_stride() == stride
    assert sliding.bound() < 0.99 * flop_bound
    assert sliding.with_strides(stride).bound() == pytest.approx(flop_bound, rel=1e-12)
    assert sliding.with_strides(stride).flop_bound() == sliding.flop_bound()


def test_smaller_tiles_are_content_with_less_than_the_published_stride():
    video = Tiling.of(**VIDEO, query_tile=(2, 8, 8))
    assert video.with_strides((16, 8, 8)).bound() == video.with_strides((2, 8, 8)).bound() == video.flop_bound()
    assert video.smallest_stride() == (2, 8, 8)


def test_strides_that_nest_in_tiles_never_lose():
    sliding = Tiling.of((128,), (32,), query_tile=(16,), key_tile=(16,))
    bounds = [sliding.with_stride(stride).bound() for stride in (1, 2, 4, 8, 16, 32)]
    assert bounds == sorted(bounds)
    assert bounds[0] < sliding.flop_bound() == bounds[-1]


def test_a_larger_stride_can_lose_and_blocks_of_a_window_that_tiles_do_not_fit_waste():
    video = Tiling.of(**VIDEO, query_tile=(4, 8, 8))
    assert video.with_stride(16).bound() < video.with_stride(8).bound() < video.flop_bound()
    blocks = Tiling.of((60,), (20,), stride=20, query_tile=(16,), key_tile=(16,))
    assert blocks.bound() < blocks.flop_bound()
    assert Tiling.of((60,), (20,), stride=20, query_tile=(20,), key_tile=(10,)).bound() == 3


def test_tiles_of_one_place_waste_nothing_and_a_tile_of_everything_gains_nothing():
    single = Tiling.of((6, 7), (3, 2), dilation=(2, 1), causal=(False, True), query_tile=(1, 1), key_tile=(1, 1))
    assert single.bound() == single.flop_bound()
    assert Tiling.of((6, 7), (3, 2), query_tile=(6, 7), key_tile=(6, 7)).bound() == 1


def test_a_causal_window_has_no_stride_that_wastes_nothing():
    assert Tiling.of((64,), (16,), causal=True, query_tile=(8,), key_tile=(8,)).smallest_stride() is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": (3,)}, "window .* is for 1 axes, the grid has 2"),
        ({"stride": (1, 1, 1)}, "stride .* is for 3 axes"),
        ({"stride": 4}, "stride 4 is more than window 3"),
        ({"query_tile": (2,)}, "query_tile is one size .* of 2 axes"),
        ({"key_tile": (2, 0)}, "key_tile .* at least 1"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, words):
    with pytest.raises(BadInput, match=words):
        Tiling.of(**{"grid": (8, 8), "window": (3, 3), "query_tile": (2, 2), "key_tile": (2, 2)} | settings)
    with pytest.raises(BadInput, match="is for 1 axes"):
        Tiling.of((8, 8), (3, 3), query_tile=(2, 2), key_tile=(2, 2)).with_strides((2,))
