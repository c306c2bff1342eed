"""What only efficient channel attention holds: a few weights, shared by all channels, and gates that are local."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput
from attlas.mechanisms.channel.eca import adaptive_kernel

DIM = 10


def build(dim=DIM, **settings):
    torch.manual_seed(0)
    layer = attlas.mixer("eca", dim, **settings).double()
    with torch.no_grad():
        layer.conv.weight.normal_()
    return layer.eval()


def tokens(count=7, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, count, DIM, dtype=torch.float64)


def test_the_rule_of_the_kernel():
    table = {16: 3, 32: 3, 64: 3, 96: 3, 128: 5, 256: 5, 512: 5, 1024: 5, 2048: 7}
    assert {dim: adaptive_kernel(dim) for dim in table} == table
    assert sum(p.numel() for p in attlas.mixer("eca", 2048).parameters()) == 7


def test_a_banded_matrix_of_channels():
    layer, x = build(kernel=5), tokens()
    band = sum(torch.diag(layer.conv.weight[0, 0, t].repeat(DIM - abs(t - 2)), t - 2) for t in range(5))
    gate = (x.mean(1) @ band.T).sigmoid()
    torch.testing.assert_close(layer(x), x * gate[:, None], rtol=0, atol=1e-12)


def test_a_ring_of_channels():
    layer, x = build(kernel=5, circular=True), tokens()
    turned = layer(x.roll(4, 2)).roll(-4, 2)
    torch.testing.assert_close(turned, layer(x), rtol=0, atol=1e-12)
    straight = build(kernel=5)
    assert not torch.allclose(straight(x.roll(4, 2)).roll(-4, 2), straight(x))


def test_without_weight_everything_is_halved():
    layer, x = build(), tokens()
    with torch.no_grad():
        layer.conv.weight.zero_()
    assert torch.equal(layer(x), x / 2)


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_gates_depend_on_neighbours_alone(kernel):
    layer, x = build(kernel=kernel), tokens(batch=1)
    jacobian = torch.autograd.functional.jacobian(lambda t: layer._gate(t.mean(1, keepdim=True))[0, 0], x)
    seen = jacobian.abs().sum((1, 2)) > 0
    channels = torch.arange(DIM)
    assert torch.equal(seen, (channels[:, None] - channels).abs() <= kernel // 2)


def test_tokens_meet_in_the_mean_alone():
    layer, x = build(), tokens()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=0, atol=1e-12)


def test_padding_is_not_in_the_mean():
    layer, x = build(), tokens()
    keep = torch.arange(7).expand(2, -1) < 4
    got = layer(x.masked_fill(~keep.unsqueeze(-1), torch.nan), mask=keep)
    torch.testing.assert_close(got[:, :4], layer(x[:, :4]), rtol=0, atol=1e-12)


def test_a_long_stream_has_a_state_that_does_not_grow():
    layer, x = build(causal=True), tokens(200)
    state, sizes = layer.initial_state(2), set()
    for piece in x.split(9, 1):
        y, state = layer.extend(piece, state)
        sizes.add(attlas.state_bytes(state))
    assert sizes == {8 * 2 * (DIM + 1)}
    torch.testing.assert_close(y[:, -1], build()(x)[:, -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": 4}, "odd"),
        ({"kernel": 0}, "odd"),
        ({"gamma": 0.0}, "gamma"),
        ({"kernel": 23, "circular": True}, "ring of 10 channels twice"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(BadInput, match=message):
        build(**settings)
