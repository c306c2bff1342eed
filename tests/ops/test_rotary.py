"""Places on a grid as rotations of feature pairs."""

import math

import pytest
import torch

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.ops.rotary import relative_turn, rotate_axes


def test_pairs_of_the_first_half_turn_by_rows_and_of_the_second_by_columns():
    x = torch.tensor([1.0, 0.0] * 4, dtype=torch.float64).expand(1, 1, 6, 8)
    turned = rotate_axes(x, Grid((2, 3)).places())
    for n, (row, column) in enumerate(Grid((2, 3)).places().tolist()):
        angles = [row, row * 1e-4, column, column * 1e-4]
        expected = [f(angle) for angle in angles for f in (math.cos, math.sin)]
        assert turned[0, 0, n].tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 2)], ids=str)
def test_products_depend_on_differences_of_places(shape):
    places = Grid(shape).places()
    q, k = (torch.randn(2, 3, len(places), 12, dtype=torch.float64) for _ in "qk")
    got = rotate_axes(q, places + 5) @ rotate_axes(k, places + 5).mT
    assert torch.allclose(got, rotate_axes(q, places) @ rotate_axes(k, places).mT, atol=1e-12)
    cos, sin = relative_turn(places, places, 12)
    (a, b), (c, d) = ((x[..., 0::2], x[..., 1::2]) for x in (q.unsqueeze(3), k.unsqueeze(2)))
    assert torch.allclose(got, ((a * c + b * d) * cos - (b * c - a * d) * sin).sum(-1), atol=1e-12)


def test_lengths_stay_and_so_does_the_origin():
    x = torch.randn(1, 2, 5, 8)
    turned = rotate_axes(x, torch.tensor([[0, 0], [0, 0], [1, 2], [300, 7], [90_000, 1]]))
    assert torch.equal(turned[:, :, :2], x[:, :, :2])
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)


def test_features_that_make_no_pairs_are_refused():
    with pytest.raises(BadInput, match=r"on 2 axes .* a multiple of 4, got 6"):
        rotate_axes(torch.zeros(1, 1, 4, 6), Grid((2, 2)).places())
