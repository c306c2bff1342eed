"""The identities of `criss_cross`."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas import Grid
from attlas.core.errors import BadInput


def build(dim=16, **settings):
    layer = attlas.mixer("criss_cross", dim, **settings).double()
    torch.nn.init.constant_(layer.gamma, 0.7)
    return layer


def reached(grid, recurrence, position):
    """The positions that the output at `position` depends on."""
    layer = build(recurrence=recurrence)
    x = torch.randn(1, Grid(grid).tokens, 16, dtype=torch.float64, requires_grad=True)
    index = sum(p * stride for p, stride in zip(position, torch.empty(grid).stride(), strict=True))
    (grad,) = torch.autograd.grad(layer(x, grid=grid)[0, index].sum(), x)
    return grad[0].any(-1).view(grid)


def cross(grid, position):
    """The positions that differ from `position` on at most one axis."""
    axes = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    return sum((axis != p).int() for axis, p in zip(axes, position, strict=True)) <= 1


def test_equals_dense_attention_masked_to_the_row_or_the_column():
    layer, x = build(recurrence=1), torch.randn(2, 63, 16, dtype=torch.float64)
    place = torch.arange(63)
    row, column = place // 9, place % 9
    seen = (row[:, None] == row) | (column[:, None] == column)
    assert seen.sum(1).tolist() == [7 + 9 - 1] * 63
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    dense = F.scaled_dot_product_attention(q, k, v, seen, scale=1.0)
    assert torch.allclose(layer(x, grid=(7, 9)), 0.7 * dense + x, rtol=0, atol=1e-12)


def test_one_pass_reaches_the_cross_and_two_reach_the_plane():
    assert torch.equal(reached((7, 9), 1, (3, 4)), cross((7, 9), (3, 4)))
    assert reached((7, 9), 2, (3, 4)).all()


def test_three_axes_take_three_passes():
    assert torch.equal(reached((3, 4, 5), 1, (1, 2, 3)), cross((3, 4, 5), (1, 2, 3)))
    assert not reached((3, 4, 5), 2, (1, 2, 3)).all()
    assert reached((3, 4, 5), 3, (1, 2, 3)).all()


def test_starts_as_the_identity():
    x = torch.randn(2, 12, 16)
    assert torch.equal(attlas.mixer("criss_cross", 16)(x, grid=(3, 4)), x)


def test_the_second_pass_has_the_weights_of_the_first():
    once, twice = build(recurrence=1), build(recurrence=2)
    twice.load_state_dict(once.state_dict())
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    grid = {"grid": (3, 4)}
    assert torch.allclose(twice(x, **grid), once(once(x, **grid), **grid), rtol=0, atol=1e-12)


def test_more_passes_take_no_more_parameters():
    counts = {sum(p.numel() for p in build(recurrence=passes).parameters()) for passes in (1, 2, 3)}
    assert counts == {2 * (16 * 2 + 2) + 16 * 16 + 16 + 1}


def test_equals_two_sets_of_energies_with_the_own_place_blotted_out_of_one():
    layer, (height, width) = build(recurrence=1), (5, 4)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    q, k, v = (proj(x).unflatten(1, (height, width)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    column = torch.einsum("bhwc,bgwc->bhwg", q, k)
    column = column.masked_fill(torch.eye(height, dtype=torch.bool)[:, None], -torch.inf)
    row = torch.einsum("bhwc,bhuc->bhwu", q, k)
    down, across = torch.cat([column, row], -1).softmax(-1).split([height, width], -1)
    out = torch.einsum("bhwg,bgwc->bhwc", down, v) + torch.einsum("bhwu,bhuc->bhwc", across, v)
    got = layer(x, grid=(height, width))
    torch.testing.assert_close(got, 0.7 * out.flatten(1, 2) + x, rtol=0, atol=1e-12)


def test_costs_two_percent_of_non_local_attention_at_the_published_crop():
    side, positions = 97, 97 * 97
    layer = attlas.mixer("criss_cross", 512, recurrence=1)
    cost = layer.cost(1, positions, grid=(side, side))
    projections = 2 * positions * 512 * (64 + 64 + 512)
    non_local = 2 * positions**2 * (64 + 512)
    assert cost.pairs / positions**2 == pytest.approx(0.0205, abs=5e-5)
    assert (cost.flops - projections) / non_local == pytest.approx(0.0205, abs=5e-5)


def test_prefix_tokens_pass_and_padding_alone_stays():
    layer, x = build(), torch.randn(1, 13, 16, dtype=torch.float64)
    y = layer(x, grid=Grid((3, 4), prefix=1))
    assert torch.equal(y[:, :1], x[:, :1])
    assert torch.equal(y[:, 1:], layer(x[:, 1:], grid=(3, 4)))
    assert torch.equal(layer(x[:, 1:], grid=(3, 4), mask=torch.zeros(1, 12, dtype=torch.bool)), x[:, 1:])


def test_bad_sizes():
    with pytest.raises(BadInput, match="1 to 4, got 8"):
        attlas.mixer("criss_cross", 4)
    with pytest.raises(BadInput, match="at least 1, got 0"):
        attlas.mixer("criss_cross", 16, recurrence=0)
    with pytest.raises(BadInput, match="pass grid="):
        attlas.mixer("criss_cross", 16)(torch.randn(1, 12, 16))
