"""Integrals as sums, and functions on grids of other sizes."""

import math

import pytest
import torch
import torch.nn.functional as F

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.ops.quadrature import Quadrature, normalised, relative_l2, rule_weights
from attlas.ops.resample import resample

DOUBLE = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize("rule", ["midpoint", "trapezoid"])
@pytest.mark.parametrize("shape", [(1,), (5,), (4, 7), (2, 3, 4)])
def test_the_weights_of_a_rule_sum_to_one(rule, shape):
    assert rule_weights(shape, rule, DOUBLE).sum() == pytest.approx(1, abs=1e-12)


def test_rules_are_exact_for_straight_lines_and_of_second_order():
    def error(points, rule):
        middle, ends = (torch.arange(points) + 0.5) / points, torch.linspace(0, 1, points)
        x = (middle if rule == "midpoint" else ends).double()
        w = rule_weights((points,), rule, DOUBLE)
        assert (w * (3 * x - 1)).sum() == pytest.approx(0.5, abs=1e-6)
        return abs((w * x.exp()).sum() - (torch.tensor(1.0).double().exp() - 1))

    for rule in ("midpoint", "trapezoid"):
        assert error(64, rule) < error(16, rule) / 12


def test_normalised_functions_have_mean_0_and_variance_1_as_integrals():
    x, w = torch.randn(2, 3, 20, 4).double(), torch.rand(2, 20).double()
    w[:, 5:8] = 0
    x[:, :, 6] = torch.nan
    y = normalised(x, w, 1e-12)
    share = (w / w.sum(1, keepdim=True))[:, None, :, None]
    assert torch.allclose((share * y).sum(2), torch.zeros(2, 3, 4).double(), atol=1e-12)
    assert torch.allclose((share * y.square()).sum(2), torch.ones(2, 3, 4).double(), atol=1e-9)
    assert not y[:, :, 5:8].any()


def test_the_relative_error_does_not_see_a_finer_grid():
    got, expected = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    fine = [x.repeat_interleave(4, 2).repeat_interleave(4, 3) for x in (got, expected)]
    assert torch.allclose(relative_l2(got, expected), relative_l2(*fine))
    assert torch.allclose(relative_l2(1.1 * expected, expected), torch.full((2,), 0.1))
    with pytest.raises(BadInput, match="one set of points"):
        relative_l2(got, expected[..., :4])


def test_the_relative_error_weighs_points_in_order():
    got, expected, w = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.rand(4, 5)
    wanted = (((got - expected).square() * w).sum((1, 2, 3)) / (expected.square() * w).sum((1, 2, 3))).sqrt()
    assert torch.allclose(relative_l2(got, expected, w), wanted)
    assert torch.allclose(relative_l2(got, expected, w.flatten()), wanted)
    for wrong in (w[0], w[:1], torch.rand(5, 4)):
        with pytest.raises(BadInput, match="one weight for each point"):
            relative_l2(got, expected, wrong)


def test_the_relative_error_is_a_number_where_functions_are_large_equal_or_zero():
    large = torch.full((1, 1, 8, 8), 400.0).half()
    assert relative_l2(1.5 * large, large).item() == pytest.approx(0.5)
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    relative_l2(x, x.detach()).sum().backward()
    assert x.grad is not None
    assert x.grad.eq(0).all()
    nothing = torch.zeros(1, 1, 4, 4)
    assert relative_l2(nothing, nothing).item() == 0
    assert relative_l2(x, nothing).item() == torch.inf


def test_padding_does_not_move_the_borders_of_a_rule():
    keep = torch.tensor([[False, True, True, True, False, False], [True] * 6, [False, False, True] + 3 * [False]])
    found = Quadrature("trapezoid")(None, 6, DOUBLE, keep)
    expected = [[0, 0.25, 0.5, 0.25, 0, 0], [0.1, 0.2, 0.2, 0.2, 0.2, 0.1], [0, 0, 1, 0, 0, 0]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not Quadrature("trapezoid")(None, 6, DOUBLE, keep & False).any()
    with pytest.raises(BadInput, match="give weights="):
        Quadrature("trapezoid")(Grid((2, 3)), 6, DOUBLE, keep)


def test_fourier_resampling_keeps_means_and_goes_through_the_points():
    for length in (5, 6):
        x = torch.randn(2, 3, length, length).double()
        up = resample(x, (3 * length, 5 * length), "fourier")
        assert torch.allclose(up[:, :, 1::3, 2::5], x, rtol=0, atol=1e-12)
        assert torch.allclose(up.mean((2, 3)), x.mean((2, 3)), rtol=0, atol=1e-12)
    odd = torch.randn(1, 1, 5, 7).double()
    assert torch.allclose(resample(resample(odd, (11, 9), "fourier"), (5, 7), "fourier"), odd, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("points", "size"), [(32, 64), (32, 48), (31, 64), (64, 32), (6, 9), (7, 4), (9, 6)])
def test_fourier_resampling_leaves_waves_where_they_are(points, size):
    def wave(length):
        x = 2 * math.pi * (torch.arange(length).double() + 0.5) / length
        return (torch.sin(x + 0.4)[:, None] * torch.cos(x - 0.7))[None, None]

    assert torch.allclose(resample(wave(points), (size, size), "fourier"), wave(size), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("points", "size"), [(6, 11), (6, 8), (5, 8), (8, 6)])
def test_fourier_resampling_keeps_a_symmetric_function_symmetric(points, size):
    x = torch.randn(1, 1, points, points).double()
    y = resample(x + x.flip(3), (size, size), "fourier")
    assert torch.allclose(y, y.flip(3), rtol=0, atol=1e-14)


def test_bilinear_resampling_is_that_of_torch_and_the_same_size_is_x_itself():
    x = torch.randn(1, 2, 4, 6)
    assert torch.equal(resample(x, (7, 3)), F.interpolate(x, (7, 3), mode="bilinear"))
    assert resample(x, (4, 6)) is x
    with pytest.raises(BadInput, match="interpolation is one of 'bilinear'"):
        resample(x, (7, 3), "cubic")
