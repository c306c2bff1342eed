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


@pytest.mark.parametrize("conditioning", TYPES)
def test_a_lone_token_on_a_padded_plane_gets_neither_biases_nor_itself_from_the_holes(conditioning):
    """Of every short convolution it has the tap in the middle, and its kernel is an impulse."""
    layer = build(grid=(3, 4), conditioning=conditioning)
    x = tokens(12)[:1]
    keep = torch.zeros(1, 12, dtype=torch.bool)
    keep[0, 5] = True
    u = layer.in_proj(x[0, 5])
    gate, key, value = (layer.short[:, 1, 1] * u).chunk(3)
    first, second = (taps[:, 1, 1] * u.chunk(3)[2] for taps in (layer.first, layer.second))
    h = first * second / 12 if conditioning == "correlation" else first.abs() / 12**0.5 * layer.second.sum((1, 2))
    y = layer(x, mask=keep)
    assert torch.allclose(y[0, 5], layer.out_proj(gate * h * key * value), rtol=1e-10, atol=1e-12)
    assert not y[~keep].any()


def test_a_padded_batch_compiles_with_its_loop_left_out():
    layer, x, keep = build(), tokens(4), torch.arange(4) < torch.tensor([[3], [4]])
    assert torch.allclose(torch.compile(layer, backend="eager")(x, mask=keep), layer(x, mask=keep))


@pytest.mark.parametrize("conditioning", TYPES)
def test_the_spectrum_at_the_mean_grows_with_the_number_of_tokens(conditioning):
    layer = build(conditioning=conditioning)
    means = [layer.spectrum(torch.ones(1, 6, count).double())[..., 0].real for count in (16, 64)]
    assert torch.allclose(means[1] / means[0], torch.tensor(4.0 if conditioning == "correlation" else 2.0).double())


@pytest.mark.parametrize("conditioning", TYPES)
def test_products_that_half_precision_does_not_hold_are_kept_wide(conditioning):
    layer = build(conditioning=conditioning).half()
    with torch.no_grad():
        for taps, size in ((layer.short[:6], 1e-3), (layer.short[6:], 1e3), (layer.first, 1e-2), (layer.second, 1e-2)):
            taps.mul_(size)
    x = tokens().half()
    y = layer(x).detach()
    assert torch.allclose(y.float(), layer.float()(x.float()), rtol=0.02, atol=0.02 * float(y.abs().max()))
    _, key, value = circular_conv(layer.in_proj(x.float()).mT, layer.short).chunk(3, 1)
    assert (key * value).abs().max() > torch.finfo(torch.float16).max


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
