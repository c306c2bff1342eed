"""The identities of `galerkin`: inner products of functions, whatever points they are known at."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput


def tensors(queries=9, keys=12, heads=2, size=4):
    shapes = ((2, heads, queries, size), (2, heads, keys, size), (2, heads, keys, size))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def cells(points):
    return (torch.arange(points, dtype=torch.float64) + 0.5) / points


def attended(x_M, **settings):
    def features(x):
        orders = torch.arange(1, 5, dtype=torch.float64)
        return torch.sin(3 * x[:, None] * orders + orders).expand(1, 1, -1, -1)

    return attlas.attend(features(cells(7)), features(x_M), features(x_M + 0.3).cos(), "galerkin", **settings)


def test_on_equal_weights_it_is_the_product_of_instance_norms_over_the_points():
    q, k, v = tensors()
    k_hat, v_hat = (F.instance_norm(x.transpose(2, 3).flatten(1, 2)).unflatten(1, (2, 4)) for x in (k, v))
    expected = q @ (k_hat @ v_hat.transpose(2, 3)) / 12
    assert torch.allclose(attlas.attend(q, k, v, "galerkin"), expected, rtol=0, atol=1e-12)


def test_over_features_it_is_the_product_of_instance_norms_as_released():
    q, k, v = tensors()
    k_hat, v_hat = (F.instance_norm(x.flatten(0, 1)).unflatten(0, (2, 2)) for x in (k, v))
    expected = q @ (k_hat.transpose(2, 3) @ v_hat) / 12
    assert torch.allclose(attlas.attend(q, k, v, "galerkin", over="features"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("over", ["points", "features"])
def test_half_of_the_domain_twice_as_dense_changes_nothing_with_weights_and_much_without(over):
    points = 256
    even = attended(cells(points), over=over)
    uneven = torch.cat([cells(points) / 2, 0.5 + cells(points // 2) / 2])
    w = torch.cat([torch.full((points,), 0.5 / points), torch.full((points // 2,), 1.0 / points)])
    assert (attended(uneven, over=over, weights=w) - even).abs().max() < 1e-4
    assert (attended(uneven, over=over) - even).abs().max() > 0.05


def test_a_point_of_double_weight_is_two_points():
    q, k, v = tensors()
    w = torch.ones(12, dtype=torch.float64)
    w[0] = 2
    twice = [torch.cat([x, x[:, :, :1]], 2) for x in (k, v)]
    doubled = attlas.attend(q, *twice, "galerkin", weights=torch.ones(13))
    assert torch.allclose(attlas.attend(q, k, v, "galerkin", weights=w), doubled, rtol=0, atol=1e-12)


def test_given_weights_are_a_measure():
    q, k, v = tensors()
    w = torch.rand(12, dtype=torch.float64) + 0.1
    first, second = (attlas.attend(q, k, v, "galerkin", weights=c * w) for c in (1.0, 3.0))
    assert torch.allclose(3 * first, second, rtol=0, atol=1e-12)


def test_it_converges_as_the_grid_is_refined():
    steps = [(attended(cells(2 * n)) - attended(cells(n))).abs().max() for n in (32, 64, 128)]
    assert steps[1] < steps[0] / 3
    assert steps[2] < steps[1] / 3


@pytest.mark.parametrize("over", ["points", "features"])
@pytest.mark.parametrize("rule", ["midpoint", "trapezoid"])
def test_padding_enters_neither_means_nor_the_measure(over, rule):
    q, k, v = tensors(12, 12)
    keep = torch.arange(12).expand(2, -1) < 8
    k[:, :, 8:] = torch.nan
    layer = attlas.make_attend("galerkin", 2, 4, rule=rule, over=over)
    padded = layer(q, k, v, mask=keep)
    w = torch.ones(12, dtype=torch.float64)
    if rule == "trapezoid":
        w[0] = w[7] = 0.5
    short = attlas.attend(q, k[:, :, :8], v[:, :, :8], "galerkin", weights=w[:8] / w[:8].sum(), over=over)
    assert torch.allclose(padded[:, :, :8], short[:, :, :8], rtol=0, atol=1e-12)
    alone = layer(*(x[:, :, :8] for x in (q, k, v)))
    assert torch.allclose(padded[:, :, :8], alone, rtol=0, atol=1e-12)


def test_over_features_equals_the_oracle():
    q, k, v = tensors()
    keep = torch.rand(2, 12) > 0.3
    settings = {"over": "features", "weights": torch.rand(12) + 0.1, "mask": keep}
    expected = attlas.attend(q, k, v, "galerkin", backend="oracle", **settings)
    assert torch.allclose(attlas.attend(q, k, v, "galerkin", **settings), expected, rtol=0, atol=1e-12)


def test_queries_at_other_points_read_the_same_function():
    q, k, v = tensors(12, 12)
    assert torch.allclose(attlas.attend(q, k, v, "galerkin")[:, :, ::2], attlas.attend(q[:, :, ::2], k, v, "galerkin"))


def test_a_constant_function_gives_zero():
    q, k, v = tensors()
    assert attlas.attend(q, k, torch.ones_like(v), "galerkin").abs().max() < 1e-9


def test_its_time_is_linear():
    layer = attlas.mixer("galerkin", 32, 2)
    assert layer.cost(1, 2000).flops == 2 * layer.cost(1, 1000).flops


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"eps": 0.0}, "eps keeps the variance"), ({"over": "heads"}, "over is 'points'"), ({"rule": "gauss"}, "rule is")],
)
def test_what_has_no_meaning_is_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        attlas.mixer("galerkin", 8, 2, **settings)
