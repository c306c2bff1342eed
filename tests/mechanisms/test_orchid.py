"""Orchid: a kernel made from the input, and still a shift of the input shifts the output."""

import pytest
import torch
from torch import nn

import attlas
from attlas.core.errors import BadInput, Unsupported
from attlas.mechanisms.conv.orchid import circular_conv

TYPES = ["magnitude", "correlation"]


def build(dim=6, grid=None, **settings):
    torch.manual_seed(0)
    return attlas.mixer("orchid", dim, grid=grid, **settings).double()


def tokens(count=12, dim=6):
    return torch.randn(2, count, dim, dtype=torch.float64)


@pytest.mark.parametrize("activation", ["identity", "tanh", "softshrink"])
@pytest.mark.parametrize("conditioning", TYPES)
@pytest.mark.parametrize("count", [11, 12])
def test_a_shift_of_the_tokens_shifts_the_output(conditioning, activation, count):
    layer = build(conditioning=conditioning, activation=activation, size=5)
    x = tokens(count)
    for shift in (1, 4, -3):
        assert torch.allclose(layer(x.roll(shift, 1)), layer(x).roll(shift, 1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("conditioning", TYPES)
def test_a_shift_along_either_axis_shifts_the_plane(conditioning):
    layer = build(grid=(4, 5), conditioning=conditioning)
    x = tokens(20)
    for shifts in ((1, 0), (0, 2), (3, 4)):
        moved = x.view(2, 4, 5, 6).roll(shifts, (1, 2)).flatten(1, 2)
        expected = layer(x).view(2, 4, 5, 6).roll(shifts, (1, 2)).flatten(1, 2)
        assert torch.allclose(layer(moved), expected, rtol=0, atol=1e-10)


def test_the_magnitude_behind_the_convolution_of_frequencies_would_break_it():
    layer = build()
    u = tokens().mT

    def kernel(u, magnitude_first):
        spectrum = torch.fft.fft(circular_conv(u, layer.first))
        if magnitude_first:
            spectrum = circular_conv(spectrum.abs(), layer.second)
        else:
            parts = (circular_conv(part, layer.second) for part in (spectrum.real, spectrum.imag))
            spectrum = torch.complex(*parts).abs()
        return torch.fft.ifft(spectrum).real

    assert torch.allclose(kernel(u, True), kernel(u.roll(3, 2), True), rtol=0, atol=1e-10)
    assert not torch.allclose(kernel(u, False), kernel(u.roll(3, 2), False), rtol=0, atol=1e-2)


@pytest.mark.parametrize("conditioning", TYPES)
@pytest.mark.parametrize("count", [9, 12])
def test_a_kernel_once_made_is_that_of_torchs_circular_convolution(conditioning, count):
    layer = build(conditioning=conditioning)
    u, z = tokens(count)[:1].mT, tokens(count)[:1].mT
    impulse = torch.zeros_like(z)
    impulse[..., 0] = 1
    h = layer.convolve(u, impulse)[0].detach()
    conv = nn.Conv1d(6, 6, count, groups=6, bias=False, dtype=torch.float64)
    conv.weight.data = h.flip(1).unsqueeze(1)
    around = torch.cat([z, z], 2)[..., 1:]
    assert torch.allclose(layer.convolve(u, z), conv(around), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("conditioning", "degree"), [("magnitude", 2), ("correlation", 3)])
def test_the_convolution_of_the_tokens_with_their_own_kernel_is_no_linear_map(conditioning, degree):
    layer = build(conditioning=conditioning)
    u = tokens().mT
    assert torch.allclose(layer.convolve(2 * u, 2 * u), 2**degree * layer.convolve(u, u), rtol=1e-10)
    assert torch.allclose(layer.convolve(u, 2 * u), 2 * layer.convolve(u, u), rtol=1e-10)


def test_only_the_even_part_of_the_taps_over_frequencies_matters():
    layer = build()
    x = tokens()
    before = layer(x)
    with torch.no_grad():
        layer.second += torch.tensor([0.7, 0.0, -0.7])
    assert torch.allclose(layer(x), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["identity", "tanh", "softshrink"])
@pytest.mark.parametrize("conditioning", TYPES)
def test_gradients_are_finite_at_a_spectrum_of_zero(conditioning, activation):
    layer = build(conditioning=conditioning, activation=activation).float()
    x = torch.zeros(1, 8, 6, requires_grad=True)
    layer.in_proj.bias.data.zero_()
    layer(x).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, *layer.parameters()))


@pytest.mark.parametrize("conditioning", TYPES)
def test_a_padded_sequence_is_mixed_as_if_it_were_alone(conditioning):
    layer = build(conditioning=conditioning)
    x = tokens(9)
    keep = torch.tensor([[True] * 6 + [False] * 3, [False, True, True, False, True, True, True, True, True]])
    got = layer(x, mask=keep)
    for b in range(2):
        alone = layer(x[b : b + 1, keep[b]])
        assert torch.allclose(got[b : b + 1, keep[b]], alone, rtol=0, atol=1e-12)
    assert not got[~keep].any()


def test_padding_on_a_plane_is_zeros():
    layer = build(grid=(3, 4))
    x = tokens(12)
    keep = torch.rand(2, 12) > 0.3
    expected = layer(x.masked_fill(~keep.unsqueeze(-1), 0))
    assert torch.allclose(layer(x, mask=keep)[keep], expected[keep])


def test_every_output_depends_on_every_token():
    layer = build()
    x = tokens()[:1].requires_grad_()
    for n in (0, 5, 11):
        (grad,) = torch.autograd.grad(layer(x)[0, n].sum(), x)
        assert (grad.abs().sum(-1) > 0).all()
    with pytest.raises(Unsupported, match=r"does not serve causal use.*is a sum over all tokens"):
        attlas.mixer("orchid", 6, causal=True)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(BadInput, match="'magnitude' or 'correlation', got 'phase'"):
        build(conditioning="phase")
    with pytest.raises(BadInput, match="activation is one of"):
        build(activation="relu")
    with pytest.raises(BadInput, match="size is odd; got 4"):
        build(size=4)
    with pytest.raises(BadInput, match=r"built for 1 axes, got a grid 3x4; build it with grid=\(height, width\)"):
        build()(tokens(12), grid=(3, 4))
