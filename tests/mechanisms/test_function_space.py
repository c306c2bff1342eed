"""The identities of `function_space`: an integral does not care where, and how often, its integrand is known."""

from itertools import pairwise

import pytest
import torch

import attlas
from attlas.core.errors import BadInput


def tensors(queries=9, keys=12, heads=2, size=4):
    shapes = ((2, heads, queries, size), (2, heads, keys, size), (2, heads, keys, size))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def features(x_M, size=4):
    """Smooth functions (1, 1, M, D) of points in [0, 1]."""
    orders = torch.arange(1, size + 1, dtype=torch.float64)
    return torch.sin(3 * x_M[:, None] * orders + orders).expand(1, 1, -1, -1)


def attended(x_M, q_N, name="function_space", **settings):
    """Attention from the points q_N to functions known at the points x_M."""
    k, v = 2 * features(x_M), features(x_M + 0.3).cos()
    return attlas.attend(2 * features(q_N), k, v, name, **settings)


def cells(points):
    return (torch.arange(points, dtype=torch.float64) + 0.5) / points


def test_equal_weights_are_softmax_attention():
    q, k, v = tensors()
    softmax = attlas.attend(q, k, v, "softmax")
    assert torch.equal(attlas.attend(q, k, v, "function_space"), softmax)
    weighted = attlas.attend(q, k, v, "function_space", weights=torch.full((12,), 0.25))
    assert torch.allclose(weighted, softmax, rtol=0, atol=1e-12)


def test_a_common_factor_of_the_weights_cancels():
    q, k, v = tensors()
    w = torch.rand(12, dtype=torch.float64) + 0.1
    first, second = (attlas.attend(q, k, v, "function_space", weights=c * w) for c in (1, 50))
    assert torch.allclose(first, second, rtol=0, atol=1e-12)


def test_a_point_of_double_weight_is_two_points():
    q, k, v = tensors()
    doubled = attlas.attend(q, torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2), "softmax")
    w = torch.ones(12, dtype=torch.float64)
    w[0] = 2
    assert torch.allclose(attlas.attend(q, k, v, "function_space", weights=w), doubled, rtol=0, atol=1e-12)


def test_half_of_the_domain_twice_as_dense_changes_nothing_with_weights_and_much_without():
    points, queries = 256, cells(7)
    even = attended(cells(points), queries)
    left, right = cells(points) / 2, 0.5 + cells(points // 2) / 2
    uneven = torch.cat([left, right])
    w = torch.cat([torch.full((points,), 0.5 / points), torch.full((points // 2,), 1.0 / points)])
    weighted, plain = attended(uneven, queries, weights=w), attended(uneven, queries, name="softmax")
    assert (weighted - even).abs().max() < 2e-5
    assert (plain - even).abs().max() > 0.03


@pytest.mark.parametrize("rule", ["midpoint", "trapezoid"])
def test_it_converges_as_the_grid_is_refined(rule):
    def at(points):
        places = cells(points) if rule == "midpoint" else torch.linspace(0, 1, points + 1, dtype=torch.float64)
        return attended(places, cells(7), rule=rule)

    steps = [(at(2 * points) - at(points)).abs().max() for points in (32, 64, 128)]
    for coarse, fine in pairwise(steps):
        assert fine < coarse / 3.5


def test_from_border_to_border_the_rule_matters():
    """Softmax attention counts the two borders twice and converges only as fast as they lose weight."""
    exact = attended(cells(4096), cells(7))
    places = torch.linspace(0, 1, 129, dtype=torch.float64)
    ruled, plain = attended(places, cells(7), rule="trapezoid"), attended(places, cells(7), "softmax")
    assert 10 * (ruled - exact).abs().max() < (plain - exact).abs().max()


def test_weights_on_a_plane_are_products():
    layer = attlas.make_attend("function_space", 1, 4, rule="trapezoid").double()
    q, k, v = tensors(12, 12, 1)
    x, y = torch.tensor([0.5, 1, 0.5]), torch.tensor([0.5, 1, 1, 0.5])
    expected = attlas.attend(q, k, v, "function_space", weights=(x[:, None] * y).flatten())
    assert torch.allclose(layer(q, k, v, grid=(3, 4)), expected, rtol=0, atol=1e-12)


def test_padding_weighs_nothing():
    q, k, v = tensors(12, 12)
    w = torch.rand(12, dtype=torch.float64) + 0.1
    keep = torch.arange(12).expand(2, -1) < 8
    padded = attlas.attend(q, k, v, "function_space", weights=w, mask=keep)
    short = attlas.attend(q, k[:, :, :8], v[:, :, :8], "function_space", weights=w[:8])
    assert torch.allclose(padded[:, :, :8], short[:, :, :8], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "oracle"])
def test_padding_does_not_move_the_borders_of_a_rule(backend):
    q, k, v = tensors(12, 12)
    keep = (torch.arange(12) >= torch.tensor([[2], [0]])) & (torch.arange(12) < torch.tensor([[8], [0]]))
    layer = attlas.make_attend("function_space", 2, 4, rule="trapezoid", backend=backend)
    padded, alone = layer(q, k, v, mask=keep), layer(*(x[:, :, 2:8] for x in (q, k, v)))
    assert torch.allclose(padded[0, :, 2:8], alone[0], rtol=0, atol=1e-12)
    assert not padded[1].any()  # nothing to be seen
    with pytest.raises(BadInput, match="give weights="):
        layer(q, k, v, mask=keep, grid=(3, 4))


def test_weights_spread_over_many_orders_survive_bfloat16():
    q, k, v = tensors(keys=64)
    w = torch.logspace(-6, 0, 64, dtype=torch.float64)
    exact = attlas.attend(q, k, v, "function_space", weights=w)
    half = attlas.attend(*(x.bfloat16() for x in (q, k, v)), "function_space", weights=w).double()
    assert (half - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("weights", [(1.0, 0.0, 1.0), (1.0, -1.0, 1.0), ((1.0,), (1.0,)), (1.0, float("nan"), 2.0)])
def test_weights_are_positive_numbers_in_a_row(weights):
    with pytest.raises(BadInput, match="weights are positive"):
        attlas.mixer("function_space", 8, 2, weights=weights)


def test_there_are_as_many_weights_as_keys():
    with pytest.raises(BadInput, match=r"given for 3 points, the keys are 5: build it with weights=\(5 numbers"):
        attlas.mixer("function_space", 8, 2, weights=(1.0, 1.0, 2.0))(torch.randn(1, 5, 8))


def test_an_unknown_rule_is_refused():
    with pytest.raises(BadInput, match="rule is one of 'midpoint'"):
        attlas.mixer("function_space", 8, 2, rule="simpson")
