"""Layers between functions: on finer grids they converge, and their parameters know no grid."""

import math
from itertools import pairwise

import pytest
import torch

from attlas.blocks.function_space import (
    CoordinateMap,
    DifferentialConv2d,
    LearnedMap,
    LocalIntegral,
    SampledFunction,
    SpectralConv2d,
)
from attlas.core.errors import BadInput


def periodic(points, channels=2):
    """Smooth periodic functions on the unit square (1, C, points, points), known in the middle of cells."""
    x = (torch.arange(points, dtype=torch.float64) + 0.5) / points * 2 * math.pi
    waves = [torch.sin((c + 1) * x[:, None] + 0.3) * torch.cos(x + c).exp() for c in range(channels)]
    return torch.stack(waves).unsqueeze(0)


def coarse(y):
    """A function at the middles of 8 x 8 cells, by the mean of the points around them."""
    return torch.nn.functional.avg_pool2d(y, y.shape[2] // 8)


def test_a_sampled_function_integrates_over_its_domain():
    f = SampledFunction.on_grid(periodic(32), length=2.0)
    assert f.weights.sum() == pytest.approx(4)
    assert torch.allclose(f.integral(), 4 * periodic(32).mean((2, 3)))
    assert torch.allclose(f.mean(), periodic(32).mean((2, 3)))
    assert torch.allclose(f.norm() ** 2, 4 * periodic(32).square().sum(1).mean((1, 2)))
    nothing = torch.zeros(1, 1, 4, 4, requires_grad=True)
    SampledFunction.on_grid(nothing).norm().sum().backward()
    assert nothing.grad is not None
    assert not nothing.grad.any()
    assert f.coordinates.min() == pytest.approx(1 / 32)
    assert f.coordinates.max() == pytest.approx(2 - 1 / 32)


def test_functions_on_points_and_on_grids_are_the_same_function():
    f = SampledFunction.on_grid(periodic(8))
    points = SampledFunction(f.values.flatten(2), f.coordinates, f.weights)
    assert torch.allclose(points.integral(), f.integral())
    with pytest.raises(BadInput, match="one weight for each of the 64 points"):
        SampledFunction(f.values, f.coordinates, f.weights[:-1])
    with pytest.raises(BadInput, match="coordinates"):
        SampledFunction(f.values, f.coordinates[:-1], f.weights)


def test_spectral_convolution_is_the_same_operator_on_every_grid_that_has_its_modes():
    layer = SpectralConv2d(2, 3, (3, 4)).double()
    x = torch.arange(32, dtype=torch.float64) / 32 * 2 * math.pi
    f = torch.stack([torch.sin(2 * x[:, None] + 3 * x), torch.cos(3 * x[:, None]) + torch.sin(x)]).unsqueeze(0)
    for step in (2, 3):  # 16 points have the modes, and so do 11 of 33
        fine = torch.arange(16 * step, dtype=torch.float64) / (16 * step) * 2 * math.pi
        g = torch.stack([torch.sin(2 * fine[:, None] + 3 * fine), torch.cos(3 * fine[:, None]) + torch.sin(fine)])
        assert torch.allclose(layer(g.unsqueeze(0))[:, :, ::step, ::step], layer(f)[:, :, ::2, ::2], rtol=0, atol=1e-12)


def test_spectral_convolution_multiplies_each_mode():
    layer = SpectralConv2d(1, 1, (2, 2)).double()
    x = torch.arange(9, dtype=torch.float64) / 9 * 2 * math.pi
    wave = torch.cos(-1 * x[:, None] + 2 * x)
    w = torch.view_as_complex(layer.weight.detach())[0, 0, 2 - 1, 2]  # row -1, column 2
    expected = w.real * wave - w.imag * torch.sin(-1 * x[:, None] + 2 * x)
    assert torch.allclose(layer(wave[None, None])[0, 0], expected, rtol=0, atol=1e-12)
    assert layer(torch.cos(4 * x).expand(1, 1, 9, 9)).abs().max() < 1e-12  # beyond its modes


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (5, 1)])
def test_spectral_convolution_serves_grids_too_coarse_for_its_modes(shape):
    layer = SpectralConv2d(2, 3, (6, 6))
    y = layer(torch.randn(2, 2, *shape))
    assert y.shape == (2, 3, *shape)
    y.sum().backward()


def test_a_finite_difference_becomes_a_derivative():
    layer = DifferentialConv2d(1, 1).double()
    errors = []
    taps = layer.weight.detach()[0, 0]
    step = torch.tensor([-1.0, 0, 1]).double()
    along = ((taps * step[:, None]).sum(), (taps * step).sum())  # what it weighs either derivative with
    for points in (32, 64, 128):
        x = (torch.arange(points, dtype=torch.float64) + 0.5) / points * 2 * math.pi
        y = layer((torch.sin(x[:, None]) * torch.cos(2 * x))[None, None])[0, 0]
        exact = along[0] * torch.cos(x[:, None]) * torch.cos(2 * x) - 2 * along[1] * torch.sin(x[:, None]) * torch.sin(
            2 * x
        )
        errors.append(float((y.detach() - 2 * math.pi * exact).abs().max()))
    assert errors[1] < errors[0] / 1.8
    assert errors[2] < errors[1] / 1.8
    assert layer(torch.ones(1, 1, 8, 8).double()).abs().max() < 1e-9


def test_a_finite_difference_has_one_spacing_so_cells_are_squares():
    layer = DifferentialConv2d(1, 1).double()
    wide = DifferentialConv2d(1, 1, length=(1.0, 2.0)).double()
    wide.load_state_dict(layer.state_dict())
    f = periodic(16, 1)
    assert torch.allclose(wide(torch.cat([f, f], 3)), torch.cat([layer(f)] * 2, 3), rtol=0, atol=1e-12)
    for refused, x in ((layer, f[..., ::2]), (wide, f)):
        with pytest.raises(BadInput, match="no squares"):
            refused(x)


@pytest.mark.parametrize("around", [False, True])
@torch.no_grad()
def test_a_local_integral_converges(around):
    layer = LocalIntegral(2, 3, 0.15, rings=3, periodic=around)
    outs = [coarse(layer(SampledFunction.on_grid(periodic(n).float())).values) for n in (16, 32, 64, 128)]
    steps = [float((b - a).norm()) for a, b in pairwise(outs)]
    assert steps[1] < 0.7 * steps[0]
    assert steps[2] < 0.7 * steps[1]
    assert steps[2] < 0.02 * float(outs[-1].norm())


@pytest.mark.parametrize("around", [False, True])
def test_a_local_integral_over_a_grid_equals_that_over_its_points(around):
    layer = LocalIntegral(2, 3, 0.21, periodic=around).double()
    f = SampledFunction.on_grid(periodic(12))
    points = SampledFunction(f.values.flatten(2), f.coordinates, f.weights)
    assert torch.allclose(layer(f).values.flatten(2), layer(points).values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("around", [False, True])
def test_a_local_integral_over_a_grid_takes_the_weights_of_the_function(around):
    layer = LocalIntegral(2, 3, 0.3, periodic=around).double()
    f = SampledFunction.on_grid(periodic(8))
    w = torch.rand(64).double() + 0.1
    on_grid = layer(SampledFunction(f.values, f.coordinates, w))
    points = layer(SampledFunction(f.values.flatten(2), f.coordinates, w))
    assert torch.allclose(on_grid.values.flatten(2), points.values, rtol=0, atol=1e-12)


def test_around_a_periodic_domain_a_radius_reaches_half_of_it_at_most():
    f = SampledFunction.on_grid(periodic(8))
    points = SampledFunction(f.values.flatten(2), f.coordinates, f.weights)
    layer = LocalIntegral(2, 1, 0.5, periodic=True).double()
    assert torch.allclose(layer(f).values.flatten(2), layer(points).values, rtol=0, atol=1e-12)
    for g in (f, points):
        with pytest.raises(BadInput, match="at most half of the length"):
            LocalIntegral(2, 1, 0.51, periodic=True).double()(g)


def test_a_single_angle_is_all_directions_alike():
    turned = torch.tensor([[0.2, 0.0], [-0.2, 0.0], [0.0, 0.2]])
    assert torch.allclose(LocalIntegral(1, 1, 0.4, angles=1).basis(turned)[1], torch.ones(3))
    assert torch.allclose(LocalIntegral(1, 1, 0.4, angles=2).basis(turned)[1], torch.tensor([1.0, 0.0, 0.5]), atol=1e-6)


def test_a_local_integral_of_a_constant_is_the_sum_of_its_weights():
    layer = LocalIntegral(1, 1, 0.2).double()
    torch.nn.init.constant_(layer.bias, 0.5)
    y = layer(SampledFunction.on_grid(torch.full((1, 1, 20, 20), 3.0, dtype=torch.float64))).values
    inside = y[0, 0, 5:-5, 5:-5]
    assert torch.allclose(inside, 3 * layer.weight.sum() + 0.5, rtol=0, atol=1e-12)


def test_twice_as_many_points_of_half_the_weight_give_the_same_local_integral():
    layer = LocalIntegral(2, 2, 0.3).double()
    f = SampledFunction.on_grid(periodic(10))
    values, places = f.values.flatten(2), f.coordinates
    once = layer(SampledFunction(values, places, f.weights)).values
    left = places[:, 0] < 0.5
    both = SampledFunction(
        torch.cat([values, values[:, :, left]], 2),
        torch.cat([places, places[left]]),
        torch.cat([f.weights.where(~left, f.weights / 2), f.weights[left] / 2]),
    )
    assert torch.allclose(layer(both).values[:, :, :100], once, rtol=0, atol=1e-12)


def test_a_table_belongs_to_its_grid_and_a_function_of_coordinates_to_none():
    table, function = LearnedMap(2, (8, 8)).double(), CoordinateMap(2, (8, 8)).double()
    function.load_state_dict(table.state_dict())
    x = periodic(8)
    assert torch.equal(table(x), function(x))
    assert function(periodic(16)).shape == (1, 2, 16, 16)
    with pytest.raises(BadInput, match="CoordinateMap"):
        table(periodic(16))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SpectralConv2d(1, 1, (-1, 2)), "none negative"),
        (lambda: DifferentialConv2d(1, 1, 4), "taps are odd"),
        (lambda: DifferentialConv2d(1, 1, beyond="open"), "beyond is one of"),
        (lambda: LocalIntegral(1, 1, 0.0), "radius is above 0"),
        (lambda: CoordinateMap(1, (4, 4), "cubic"), "interpolation is one of"),
    ],
)
def test_what_has_no_meaning_is_refused(build, message):
    with pytest.raises(BadInput, match=message):
        build()


def test_a_local_integral_over_a_line_is_refused():
    with pytest.raises(BadInput, match="over a plane"):
        LocalIntegral(1, 1, 0.1)(SampledFunction.on_grid(torch.randn(1, 1, 8)))
