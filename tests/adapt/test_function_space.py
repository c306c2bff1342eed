"""Converted networks: themselves on their own grid, the same operator on all others."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attlas
from attlas.adapt.function_space import InputOutputInterpolate, convert, relative_l2
from attlas.blocks.function_space import DifferentialConv2d, LearnedMap, SpectralConv2d
from attlas.core.errors import BadInput
from attlas.mechanisms.conv.mgno import VCycle


def function(points, channels=2, dtype=torch.float64):
    """Smooth periodic functions on the unit square, known in the middle of cells."""
    x = (torch.arange(points, dtype=dtype) + 0.5) / points * 2 * math.pi
    waves = [torch.sin((c + 1) * x[:, None] + 0.3) * torch.cos(x + c).exp() for c in range(channels)]
    return torch.stack(waves).unsqueeze(0)


@torch.no_grad()
def steps(run, sizes=(32, 64, 128, 256)):
    """How far outputs on successive grids are apart, as means over 16 x 16 parts of the domain."""
    outs = [F.adaptive_avg_pool2d(run(function(points, dtype=torch.float32)), 16) for points in sizes]
    return [float((b - a).norm() / outs[-1].norm()) for a, b in pairwise(outs)]


class UNet(nn.Module):
    """Two levels, a skip, norms, and a table of positions."""

    def __init__(self, width=6, points=32):
        super().__init__()
        self.first = nn.Conv2d(2, width, 5, padding=2, padding_mode="circular")
        self.places = LearnedMap(width, (points, points))
        self.norm = nn.GroupNorm(2, width)
        self.down = nn.MaxPool2d(2)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, x):
        x = F.gelu(self.norm(self.places(self.first(x))))
        return self.last(F.gelu(self.up(F.gelu(self.middle(self.down(x))))) + x)


LAYERS = {
    "convolution": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
    "depthwise, dilated": lambda: nn.Conv2d(2, 2, 3, padding=2, dilation=2, groups=2, padding_mode="circular"),
    "same": lambda: nn.Conv2d(2, 3, 5, padding="same", padding_mode="circular"),
    "strided": lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, 4, stride=2, padding=1),
    "mean pool": lambda: nn.AvgPool2d(4),
    "maximum pool": lambda: nn.MaxPool2d(4),
    "table": lambda: LearnedMap(2, (32, 32)),
    "layer norm": lambda: nn.LayerNorm([2, 32, 32]),
    "global pool": lambda: nn.AdaptiveAvgPool2d(4),
    "upsampled": lambda: nn.Upsample(size=(64, 64), mode="bilinear"),
}


@pytest.mark.parametrize("interpolation", ["bilinear", "fourier"])
@pytest.mark.parametrize("name", LAYERS)
def test_converted_layers_converge_as_the_grid_is_refined(name, interpolation):
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    found = steps(convert(layer, 32, interpolation=interpolation))
    assert found[-1] < 0.05
    assert found[-1] < 0.7 * max(found[:-1])


@pytest.mark.parametrize("name", ["convolution", "same", "maximum pool"])
def test_on_a_finer_grid_a_plain_layer_is_another_operator(name):
    """Converted, a layer gives on 128 points nearly what it gives on 32; plain, its window shrinks to a quarter."""
    layer = LAYERS[name]().double()
    converted, at_base = convert(layer, 32), F.adaptive_avg_pool2d(layer(function(32)), 8)
    fine = function(128)
    near, far = (F.adaptive_avg_pool2d(run(fine), 8) for run in (converted, layer))
    assert 2 * (near - at_base).norm() < (far - at_base).norm()


@pytest.mark.parametrize("interpolation", ["bilinear", "fourier"])
@pytest.mark.parametrize("name", LAYERS)
def test_at_the_base_everything_is_bit_identical(name, interpolation):
    layer, x = LAYERS[name](), function(32, dtype=torch.float32)
    assert torch.equal(convert(layer, 32, interpolation=interpolation)(x), layer(x))


def test_the_sum_of_a_kernel_survives_resampling():
    """Inside, a constant gives on all grids what it gives on the first."""
    for interpolation, kernel in (("fourier", torch.randn(1, 1, 3, 3)), ("bilinear", torch.ones(1, 1, 3, 3))):
        conv = nn.Conv2d(1, 1, 3, padding=1)
        conv.weight.data.copy_(kernel)
        operator = convert(conv, 16, interpolation=interpolation)
        expected = operator(torch.ones(1, 1, 16, 16))[0, 0, 8, 8]
        for points in (32, 48, 64):
            y = operator(torch.ones(1, 1, points, points))
            assert y.shape[2:] == (points, points)
            assert torch.allclose(y[0, 0, points // 2, points // 2], expected, atol=1e-5)


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_kernel_at_twice_the_resolution_by_hand(padding):
    conv = nn.Conv2d(2, 3, 3, padding=padding).double()
    x = function(32)
    weight = F.interpolate(conv.weight, (5, 5), mode="bilinear") * 9 / 25
    expected = F.conv2d(x, weight, conv.bias, padding=2 * padding)
    assert torch.allclose(convert(conv, 16)(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("interpolation", ["bilinear", "fourier"])
@pytest.mark.parametrize("points", [16, 24, 40, 48, 56])
def test_no_ratio_takes_a_centred_kernel_off_its_centre(points, interpolation):
    """A symmetric kernel on a symmetric function gives a symmetric one, wherever rounding leaves the taps."""
    conv = nn.Conv2d(1, 1, 5, padding=2).double()
    conv.weight.data += conv.weight.data.flip(3)
    x = torch.randn(1, 1, points, points, dtype=torch.float64)
    y = convert(conv, 32, interpolation=interpolation)(x + x.flip(3))
    assert y.shape == x.shape
    assert torch.allclose(y, y.flip(3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("points", [32, 64, 128])
@torch.no_grad()
def test_a_table_and_a_transposed_convolution_stay_where_they_are(points):
    """The first mode of the output has the phase that it has on the base grid."""

    def phase(y):
        modes = torch.fft.fft(y[0, 0].mean(0))
        places = (torch.arange(y.shape[3]) + 0.5) / y.shape[3]
        assert modes[1].abs() > 0.1
        return (y[0, 0].mean(0) * torch.exp(-2j * math.pi * places)).sum().angle()

    table, up = LearnedMap(1, (32, 32)).double(), nn.ConvTranspose2d(1, 1, 2, 2, bias=False).double()
    table.table.data.copy_(function(32, 1)[0].mT)
    up.weight.data.fill_(1)
    f = function(points, 1).mT
    for layer, x in ((table, torch.zeros_like(f)), (up, f)):
        y = convert(layer, 32, interpolation="fourier")(x)
        assert phase(y) == pytest.approx(phase(f).item(), abs=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.MaxPool2d(2, 2, 1),
        lambda: nn.MaxPool2d(3, 2, 1),
        lambda: nn.MaxPool2d(3, 1, 1),
        lambda: nn.MaxPool2d(2, 1),
        lambda: nn.AvgPool2d(2, 2, 1, count_include_pad=False),
        lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        lambda: nn.AvgPool2d(5, 3, 2, count_include_pad=False),
    ],
)
@pytest.mark.parametrize("base", [15, 16])
def test_every_window_of_a_pool_holds_a_point(build, base):
    pool = build()
    operator = convert(pool, base)
    outputs = pool(torch.randn(1, 1, base, base)).shape[2]
    for points in range(base // 2, 4 * base + 1):
        x = torch.rand(1, 1, points, base + 1) + 1
        y = operator(x)
        assert y.shape[2] == round(outputs * points / base)
        assert y.min() >= 1
        assert y.max() <= 2


def test_a_strided_convolution_of_one_tap_keeps_pace_with_those_of_more():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.skip = nn.Conv2d(1, 1, 3, 2, 1), nn.Conv2d(1, 1, 1, 2)

        def forward(self, x):
            return self.main(x) + self.skip(x)

    for base, points in ((15, 30), (15, 20), (16, 24), (16, 40)):
        operator = convert(Block(), base)
        assert operator.report.where("converted") == ["main", "skip"]
        assert operator(torch.randn(1, 1, points, points)).shape[2] == round(8 * points / base)
    padded = convert(nn.Conv2d(1, 1, 1, padding=1), 8)
    assert padded(torch.randn(1, 1, 16, 16)).shape == (1, 1, 20, 20)


@pytest.mark.parametrize("shape", [(16, 16), (48, 48), (64, 128), (36, 60), (32, 40)])
def test_any_grid_gives_an_output_on_itself(shape):
    operator = convert(UNet(), 32)
    assert operator(torch.randn(2, 2, *shape)).shape == (2, 1, *shape)


def test_a_network_keeps_its_output_on_finer_grids_where_plain_it_leaves_it():
    model = UNet().double().eval()
    model.places = nn.Identity()  # plain, its table would refuse other grids
    at_base = F.adaptive_avg_pool2d(model(function(32)), 16)
    apart = [(F.adaptive_avg_pool2d(run(function(128)), 16) - at_base).norm() for run in (convert(model, 32), model)]
    assert 2 * apart[0] < apart[1]


def test_the_report_speaks_of_every_layer():
    report = convert(UNet(), 32).report
    assert report.where("converted") == ["first", "places", "down", "middle", "up"]
    assert report.where("kept") == ["norm", "last"]
    assert report.where("left") == []
    assert "kernel of 5 x 5 resampled" in str(report)
    assert len(str(report).splitlines()) == 7


def test_what_is_not_known_is_left_and_said_so():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(1, 2, 8, 8))
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(x + self.table)

    model = nn.Sequential(
        Own(),
        nn.Flatten(),
        nn.AvgPool2d(3, 2, 1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.LayerNorm([8, 8]),
        attlas.mixer("pool", 8),
        attlas.mixer("softmax", 8, position=attlas.positions.Rotary(8)),
    )
    report = convert(model, 8).report
    assert report.where("left") == ["0", "1", "2", "3", "4", "5", "6"]
    assert report.where("kept") == ["0.act"]
    assert "table" in str(report)
    assert "Rotary positions count tokens" in str(report)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=self.padding)


class Inside(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Both(nn.MaxPool2d):
    def forward(self, x):
        return super().forward(x) - super().forward(-x)


class Scaled(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Doubled(nn.GELU):
    def forward(self, x):
        return super().forward(x + x.mean())


class Renamed(nn.Conv2d):
    """Nothing of its own."""


def test_a_layer_with_a_forward_of_its_own_is_left_as_it_is():
    own = nn.Sequential(
        Standardised(2, 2, 3, padding=1), Inside(2, 2, 1), Both(3, 1, 1), Scaled([2, 8, 8]), Doubled(), Renamed(2, 2, 3)
    )
    operator, x = convert(own, 8), torch.randn(1, 2, 8, 8)
    assert operator.report.where("left") == ["0", "1", "2", "3", "4"]
    assert operator.report.where("converted") == ["5"]
    assert "a Conv2d with a forward of its own" in str(operator.report)
    assert torch.equal(operator(x), own(x))


def test_a_parametrized_layer_is_left_unless_it_is_pointwise():
    def normed(conv):
        return nn.utils.parametrizations.weight_norm(conv)

    model = nn.Sequential(normed(nn.Conv2d(2, 2, 3, padding=1)), normed(nn.Conv2d(2, 2, 1)))
    operator = convert(model, 8)
    assert operator.report.where("left") == ["0"]
    assert operator.report.where("kept") == ["1"]
    assert "parametrized" in str(operator.report)
    for points in (8, 16):
        x = torch.randn(1, 2, points, points)
        assert torch.equal(operator(x), model(x))


def test_of_adaptive_pools_only_the_mean_of_everything_is_an_operator():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.AdaptiveMaxPool2d((1, 4)), nn.AdaptiveAvgPool2d((1, 1)))
    report = convert(model, 32).report
    assert report.where("left") == ["0", "1"]
    assert report.where("kept") == ["2"]
    assert "always 8 x 8 cells" in str(report)


def test_a_multigrid_cycle_is_left_as_one():
    report = convert(nn.Sequential(VCycle(1, 2, steps=((1, 0), (1, 0))), nn.Conv2d(2, 1, 3)), 8).report
    assert report.where("left") == ["0"]
    assert report.where("converted") == ["1"]


def test_a_finite_difference_on_cells_that_are_no_squares_is_refused():
    operator = convert(DifferentialConv2d(1, 1), 8)
    assert operator.report.where("kept") == ["(model)"]
    assert operator(torch.randn(1, 1, 16, 16)).shape == (1, 1, 16, 16)
    with pytest.raises(BadInput, match="no squares"):
        operator(torch.randn(1, 1, 16, 24))


def test_operators_are_kept():
    model = nn.Sequential(SpectralConv2d(2, 2, (3, 3)), attlas.mixer("galerkin", 8), nn.BatchNorm2d(2), nn.GELU())
    report = convert(model, 8).report
    assert report.where("kept") == ["0", "1", "2", "3"]


def test_the_model_stays_as_it_is_and_weights_have_their_names():
    model = UNet().eval()
    before, state = copy.deepcopy(model), model.state_dict()
    operator = convert(model, 32)
    assert type(model.first) is nn.Conv2d
    assert not operator.training
    assert list(operator.model.state_dict()) == list(state)
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))


def test_a_converted_network_trains_on_several_grids_and_can_be_copied():
    operator = convert(UNet(), 32)
    for points in (32, 64):
        operator(torch.randn(1, 2, points, points)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in operator.parameters())
    other = copy.deepcopy(operator).double()
    x = function(64)
    other(function(32))
    assert torch.allclose(other(x), operator.double()(x), rtol=0, atol=1e-12)


def test_a_shared_layer_stays_shared():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    operator = convert(nn.Sequential(conv, nn.ReLU(), conv), 8)
    assert operator.model[0] is operator.model[2]


def test_input_output_interpolation_runs_the_model_on_its_own_grid():
    seen = []
    model = nn.Conv2d(2, 1, 3, padding=1).double()
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[2:])))
    for interpolation in ("bilinear", "fourier"):
        wrapped = InputOutputInterpolate(model, 16, interpolation)
        assert torch.equal(wrapped(function(16)), model(function(16)))
        assert wrapped(function(48)).shape == (1, 1, 48, 48)
    assert set(seen) == {(16, 16)}
    smooth = InputOutputInterpolate(nn.Identity(), 32, "fourier")
    assert relative_l2(smooth(function(64)), function(64)).item() > 0  # what 32 points cannot hold
    assert relative_l2(smooth(function(64)), function(64)).item() < 0.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convert(nn.ReLU(), 0), "base_res is the grid"),
        (lambda: convert(nn.ReLU(), 8, interpolation="cubic"), "interpolation is one of"),
        (lambda: convert(nn.ReLU(), 8)(torch.randn(2, 8, 8)), "a function on a plane"),
        (lambda: InputOutputInterpolate(nn.ReLU(), (8, 0)), "base_res is the grid"),
    ],
)
def test_what_has_no_meaning_is_refused(call, message):
    with pytest.raises(BadInput, match=message):
        call()
