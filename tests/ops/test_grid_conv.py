"""Depthwise convolution of tokens on a grid."""

import pytest
import torch

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.ops.flops import flop_counter
from attlas.ops.grid_conv import convolution_flops, depthwise, grid_convolution, positions

GRIDS = [(Grid((9,)), 5), (Grid((4, 5), prefix=2), 3), (Grid((3, 2, 4), prefix=1), 5)]


def case(grid, kernel, channels=6):
    conv = depthwise(channels, kernel, grid.rank).double()
    x = torch.randn(2, grid.tokens, channels, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(2, grid.tokens) > 0.3
    return conv, x, keep


@pytest.mark.parametrize(("grid", "kernel"), GRIDS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_it_equals_the_convolution_tap_by_tap(grid, kernel, padded):
    conv, x, keep = case(grid, kernel)
    results = []
    for backend in ("torch", "oracle"):
        y = grid_convolution(x, conv.weight, conv.bias, grid, keep if padded else None, backend=backend)
        cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
        results.append((y, *torch.autograd.grad(y, (x, *conv.parameters()), cotangent)))
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, atol=1e-12)


def test_prefix_and_padding_give_nothing_and_get_nothing():
    grid = Grid((4, 4), prefix=1)
    conv, x, keep = case(grid, 3)
    y = grid_convolution(x, conv.weight, conv.bias, grid, keep)
    assert not y[:, 0].any()
    assert not y[~keep].any()
    other = torch.where(keep.unsqueeze(-1), x, torch.nan)
    other[:, 0] = torch.nan
    assert torch.equal(grid_convolution(other, conv.weight, conv.bias, grid, keep), y)


@pytest.mark.parametrize(("grid", "kernel"), GRIDS, ids=str)
def test_its_flops(grid, kernel):
    conv, x, _ = case(grid, kernel)
    needed, multiplied = convolution_flops(grid, kernel)
    with flop_counter() as counter:
        grid_convolution(x, conv.weight, conv.bias, grid)
    assert 2 * 6 * multiplied == counter.get_total_flops()
    inputs = torch.ones(1, 1, *grid.shape, dtype=torch.float64)
    taps = getattr(torch.nn.functional, f"conv{grid.rank}d")(
        inputs, torch.ones(1, 1, *[kernel] * grid.rank, dtype=torch.float64), padding=kernel // 2
    )
    assert needed == 2 * int(taps.sum())


def test_what_has_no_meaning_is_refused():
    for kernel in (0, 4, -1):
        with pytest.raises(BadInput, match=f"odd, got {kernel}"):
            depthwise(4, kernel, 2)
    conv, x, _ = case(Grid((4, 4)), 3)
    with pytest.raises(BadInput, match="built for 2 axes and called on a grid 16"):
        grid_convolution(x, conv.weight, conv.bias, Grid((16,)))


def test_positions_are_tokens_without_the_prefix_and_padding_is_zero():
    grid = Grid((2, 3), prefix=1)
    x, keep = torch.randn(2, 7, 4), torch.rand(2, 7) > 0.4
    x[~keep] = torch.nan
    at, real = positions(x, grid, keep)
    assert torch.equal(real[..., 0], keep[:, 1:])
    assert torch.equal(at, x[:, 1:].nan_to_num(0))
    at, real = positions(x, grid, None)
    assert torch.equal(at.isnan(), x[:, 1:].isnan())
    assert real.shape == (1, 6, 1)
    assert real.all()
