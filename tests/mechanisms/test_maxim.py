"""The identities of `maxim`, the multi-axis gated MLP."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.ops.multi_axis import MultiAxisLinear, join, partition

GRID = (8, 12)


def build(grid=GRID, dim=6, **settings):
    torch.manual_seed(0)
    layer = attlas.mixer("maxim", dim, grid=grid, **{"cells": (4, 3), "block": (2, 4)} | settings).double()
    for value in layer.parameters():
        torch.nn.init.normal_(value, std=0.5)
    return layer


def reached(layers, place, grid=GRID):
    """Which places the output at `place` depends on."""
    x = torch.randn(1, grid[0] * grid[1], 6, dtype=torch.float64, requires_grad=True)
    y = x
    for layer in layers:
        y = layer(y, grid=grid)
    (grad,) = torch.autograd.grad(y.unflatten(1, grid)[0, place[0], place[1]].sum(), x)
    return grad[0].abs().sum(-1).unflatten(0, grid) > 0


def test_a_place_depends_on_its_block_and_on_its_likes_in_all_blocks():
    seen, expected = reached([build()], (3, 6)), torch.zeros(GRID, dtype=torch.bool)
    expected[2:4, 4:8] = True  # the block of 2 x 4 places
    expected[3 % 2 :: 2, 6 % 4 :: 4] = True  # 4 x 3 blocks of 2 x 4 places
    assert torch.equal(seen, expected)


def test_two_layers_reach_everything():
    assert reached([build(), build()], (5, 1)).all()


def test_a_gate_that_mixes_nothing_is_one():
    layer = build()
    for branch in (layer.across, layer.within):
        torch.nn.init.zeros_(branch.mix.weight)
        torch.nn.init.zeros_(branch.mix.bias)
    x = torch.randn(2, 96, 6, dtype=torch.float64)
    order = torch.randperm(96)
    torch.testing.assert_close(layer(x[:, order], grid=GRID), layer(x, grid=GRID)[:, order], rtol=0, atol=1e-12)


def test_one_set_of_weights_serves_every_grid_that_divides():
    layer = build()
    for grid in ((4, 12), (16, 24), (8, 36)):
        assert layer(torch.randn(1, grid[0] * grid[1], 6, dtype=torch.float64), grid=grid).isfinite().all()
    with pytest.raises(BadInput, match=r"\(4, 3\) blocks.*grid 6x12"):
        layer(torch.randn(1, 72, 6, dtype=torch.float64), grid=(6, 12))
    with pytest.raises(BadInput, match=r"\(2, 4\) places"):
        build(cells=1)(torch.randn(1, 42, 6, dtype=torch.float64), grid=(7, 6))


def test_blocks_are_cut_and_joined():
    grid, x = Grid((4, 6)), torch.randn(2, 24, 3)
    blocks = partition(x, grid, (2, 3))
    assert torch.equal(blocks[0, 1, :, 0], x[0, :, 0].view(4, 6)[:2, 3:].flatten())
    assert torch.equal(join(blocks, grid, (2, 3)), x)


def test_mixing_across_blocks_and_within_them_are_one_on_a_transposed_layout():
    across, within = MultiAxisLinear((4,), True), MultiAxisLinear((4,), False)
    within.load_state_dict(across.state_dict())
    x = torch.randn(2, 12, 3)
    turned = x.unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)
    expected = within(turned, Grid((12,))).unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(across(x, Grid((12,))), expected)


def test_bad_input():
    with pytest.raises(BadInput, match="at least 1"):
        build(cells=0)
    with pytest.raises(BadInput, match="for 3 axes"):
        build(block=(1, 2, 3))
