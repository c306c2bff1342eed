"""Cells: which tokens make which key."""

import pytest
import torch
import torch.nn.functional as F

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.ops.cells import cell_convolution, cell_flops, cell_shape, live_cells


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("grid", [(6, 4), (5, 7), (9,), (3, 4, 5)])
def test_cells_are_a_convolution_with_long_steps(grid, groups):
    torch.manual_seed(0)
    grid, rank = Grid(grid), len(grid)
    x = torch.randn(2, grid.tokens, 6, dtype=torch.float64)
    weight = torch.randn(6, 6 // groups, *[2] * rank, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    over = [pad for length in reversed(grid.shape) for pad in (0, length % 2)]
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    expected = conv(F.pad(x.mT.unflatten(2, grid.shape), over), weight, bias, 2, groups=groups).flatten(2).mT
    for backend in ("torch", "oracle"):
        got = cell_convolution(x, weight, bias, grid, backend=backend)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "oracle"])
def test_padding_is_nothing(backend):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 12, 4), torch.randn(4, 4, 2, 2)
    keep = torch.ones(1, 12, dtype=torch.bool)
    keep[:, [0, 5]] = False
    got = cell_convolution(
        x.masked_fill(~keep[..., None], torch.nan), weight, None, Grid((3, 4)), keep, backend=backend
    )
    expected = cell_convolution(x * keep[..., None], weight, None, Grid((3, 4)), backend=backend)
    torch.testing.assert_close(got, expected)


def test_a_cell_lives_while_one_of_its_tokens_does():
    keep = torch.zeros(2, 15, dtype=torch.bool)
    keep[0, [1, 14]] = True  # places (0, 1) and (2, 4) of 3 x 5
    keep[1] = True
    live = live_cells(Grid((3, 5)), 2, keep)
    assert live.tolist() == [[True, False, False, False, False, True], [True] * 6]
    assert live_cells(Grid((3, 5)), 2, None) is None


def test_flops_of_places_on_the_grid_and_of_all():
    assert cell_shape(Grid((3, 5)), 2) == (2, 3)
    assert cell_flops(Grid((3, 5)), 2, 7) == (2 * 15 * 7, 2 * 6 * 4 * 7)


def test_what_is_no_cell_is_refused():
    with pytest.raises(BadInput, match="take a reduction of at most 3"):
        cell_shape(Grid((3, 5)), 4)
    with pytest.raises(BadInput, match=r"prefix tokens lie in no cell.* pass grid=\(3, 5\)"):
        cell_shape(Grid((3, 5), prefix=1), 2)
