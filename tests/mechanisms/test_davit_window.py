"""The identities of `davit_window`."""

from itertools import pairwise

import pytest
import torch

import attlas
from attlas import Grid
from attlas.core.errors import BadInput


def tensors(grid, heads=2, size=4):
    return [torch.randn(2, heads, Grid(grid).tokens, size, dtype=torch.float64) for _ in "qkv"]


@pytest.mark.parametrize(
    ("grid", "window", "rows", "columns"),
    [
        ((6, 8), (3, 4), (0, 3, 6), (0, 4, 8)),
        ((7, 5), 3, (0, 3, 6, 7), (0, 3, 5)),  # what remains makes smaller windows
        ((9, 4), 7, (0, 7, 9), (0, 4)),  # an axis shorter than a window is one
    ],
)
def test_is_full_attention_in_every_window(grid, window, rows, columns):
    q, k, v = tensors(grid)
    got = attlas.attend(q, k, v, "davit_window", grid=grid, window=window).unflatten(2, grid)
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            own = (..., slice(top, bottom), slice(left, right), slice(None))
            part = attlas.attend(*(x.unflatten(2, grid)[own].flatten(2, 3) for x in (q, k, v)))
            torch.testing.assert_close(got[own].flatten(2, 3), part, rtol=0, atol=1e-12)


def test_nothing_leaves_a_window_and_all_of_it_is_seen():
    layer = attlas.mixer("davit_window", 16, 2, window=3).double()
    x = torch.randn(1, 56, 16, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x, grid=(7, 8)).view(7, 8, 16)[4, 7].sum(), x)
    expected = torch.zeros(7, 8, dtype=torch.bool)
    expected[3:6, 6:] = True
    assert torch.equal(grad.abs().sum(-1).view(7, 8) > 0, expected)


def test_the_place_inside_a_window_does_not_matter():
    q, k, v = tensors((3, 3))
    order = torch.randperm(9)
    run = {"grid": (3, 3), "window": 3}
    got = attlas.attend(*(x[:, :, order] for x in (q, k, v)), "davit_window", **run)
    torch.testing.assert_close(got, attlas.attend(q, k, v, "davit_window", **run)[:, :, order], rtol=0, atol=1e-12)


def test_pairs_are_counted_exactly_and_sizes_are_the_published_ones():
    layer = attlas.mixer("davit_window", 96, 3)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 96 * 97
    assert layer.cost(1, 3136, grid=(56, 56)).pairs == 3 * 3136 * 49
    assert layer.cost(2, 90, grid=(9, 10)).pairs == 2 * 3 * (49 + 4) * (49 + 9)


def test_a_window_of_padding_alone_gives_nothing():
    q, k, v = tensors((4, 4))
    keep = torch.ones(2, 4, 4, dtype=torch.bool)
    keep[0, :2, :2] = False
    got = attlas.attend(q, k, v, "davit_window", mask=keep.flatten(1), grid=(4, 4), window=2).unflatten(2, (4, 4))
    assert not got[0, :, :2, :2].any()
    assert got[0, :, 2:].all()
    assert got[1].all()


def test_what_has_no_meaning_is_refused():
    with pytest.raises(BadInput, match="a window holds a place at least, got window 0"):
        attlas.mixer("davit_window", 16, 2, window=0)
    with pytest.raises(BadInput, match=r"window \(3, 3\) is for 2 axes, the grid has 1"):
        attlas.mixer("davit_window", 16, 2, window=(3, 3), grid=(9,))
