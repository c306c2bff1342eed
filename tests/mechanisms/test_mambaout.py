"""What only the gated convolution of MambaOut holds: which channels are convolved, and that the others are not."""

import pytest
import torch
from torch.nn import functional as F

import attlas
from attlas.core.errors import BadInput
from attlas.core.grid import Grid

DIM = 6
GRID = (9, 9)


def build(**settings):
    torch.manual_seed(0)
    layer = attlas.mixer("mambaout", DIM, **{"grid": GRID} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer.eval()


def tokens(*grid, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, *grid, DIM, dtype=torch.float64).flatten(1, -2)


def test_a_loop_over_a_map():
    layer, x = build(), tokens(*GRID)
    hidden = int(8 / 3 * DIM)
    h = x @ layer.fc1.weight.T + layer.fc1.bias
    gate, kept, moved = h[..., :hidden], h[..., hidden : 2 * hidden - DIM], h[..., 2 * hidden - DIM :]
    convolved = torch.empty_like(moved)
    for row in range(9):
        for column in range(9):
            total = layer.conv.bias.clone().expand(2, -1)
            for a in range(max(0, row - 3), min(9, row + 4)):
                for b in range(max(0, column - 3), min(9, column + 4)):
                    weight = layer.conv.weight[:, 0, a - row + 3, b - column + 3]
                    total = total + weight * moved[:, 9 * a + b]
            convolved[:, 9 * row + column] = total
    expected = (F.gelu(gate) * torch.cat([kept, convolved], -1)) @ layer.fc2.weight.T + layer.fc2.bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-11)


def test_a_position_sees_its_kernel_and_no_more():
    layer, x = build(), tokens(*GRID, batch=1)
    jacobian = torch.autograd.functional.jacobian(lambda t: layer(t).sum(-1), x)[0, :, 0].abs().sum(-1)
    places = Grid(GRID).places()
    near = ((places[:, None] - places).abs() <= 3).all(-1)
    assert torch.equal(jacobian > 0, near)


def test_without_convolved_channels_tokens_do_not_meet():
    layer, x = build(conv_ratio=0.0), tokens(*GRID)
    assert layer.conv is None
    order = torch.randperm(81, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=0, atol=1e-12)
    causal = build(grid=None, causal=True, conv_ratio=0.0)
    y, state = causal.extend(x[:, :5], causal.initial_state(2))
    torch.testing.assert_close(y, causal(x)[:, :5])
    assert state.numel() == 0


def test_only_the_last_channels_are_convolved():
    layer = build(conv_ratio=0.5)
    assert layer.conv.weight.shape == (3, 1, 7, 7)
    with torch.no_grad():
        before = layer(tokens(*GRID))
        layer.conv.weight.zero_()
        layer.conv.bias.zero_()
        layer.fc2.weight[:, -3:] = 0
        cut = layer(tokens(*GRID))
        layer.fc1.weight[2 * layer.hidden - 3 :] += 1
    torch.testing.assert_close(layer(tokens(*GRID)), cut, rtol=0, atol=0)
    assert not torch.allclose(before, cut)


def test_a_padded_picture_gives_what_it_gives_alone():
    layer, x = build(), tokens(4, 5).unflatten(1, (4, 5))
    padded = F.pad(x, (0, 0, 2, 1, 0, 3), value=torch.nan)
    keep = F.pad(torch.ones(2, 4, 5, dtype=torch.bool), (2, 1, 0, 3))
    got = layer(padded.flatten(1, 2), mask=keep.flatten(1), grid=keep.shape[1:])
    expected = layer(x.flatten(1, 2), grid=(4, 5))
    torch.testing.assert_close(got[keep.flatten(1)].view_as(expected), expected, rtol=0, atol=1e-12)


def test_prefix_tokens_give_nothing_and_enter_nothing():
    layer, x = build(), tokens(*GRID)
    prefix = torch.randn(2, 2, DIM, dtype=torch.float64)
    y = layer(torch.cat([prefix, x], 1), grid=Grid(GRID, prefix=2))
    assert not y[:, :2].any()
    torch.testing.assert_close(y[:, 2:], layer(x), rtol=0, atol=1e-12)


def test_a_causal_layer_reaches_back_a_kernel():
    layer, x = build(grid=None, causal=True, kernel=3), tokens(12, batch=1)
    jacobian = torch.autograd.functional.jacobian(lambda t: layer(t).sum(-1), x)[0, :, 0].abs().sum(-1)
    back = torch.arange(12)[:, None] - torch.arange(12)
    assert torch.equal(jacobian > 0, (back >= 0) & (back < 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conv_ratio": 3.0}, "conv_ratio from 0 to expansion"),
        ({"conv_ratio": -0.5}, "conv_ratio from 0 to expansion"),
        ({"kernel": 4}, "kernel is odd"),
        ({"grid": None}, "pass grid"),
        ({"causal": True}, "one axis without prefix"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(BadInput, match=message):
        build(**settings)


def test_a_grid_of_other_axes():
    with pytest.raises(BadInput, match="built for 2 axes"):
        build()(tokens(81), grid=(81,))
