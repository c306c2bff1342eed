"""The delta rule: a matrix that replaces what it recalls, and one that fades besides."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput, Unsupported
from attlas.ops.gated import CHUNK

DOUBLE = {"dtype": torch.float64}
BOTH = pytest.mark.parametrize("name", ["delta", "gated_delta"])


def layer_of(name="delta", dim=16, heads=2, **settings):
    return attlas.mixer(name, dim, heads, causal=True, **settings).double()


def test_a_token_that_asks_with_its_own_key_reads_its_value():
    layer, x = layer_of(expand_k=0.5, convolution=1, largest_beta=2.0), torch.randn(2, 90, 16, **DOUBLE)
    with torch.no_grad():
        layer.beta_proj.weight.zero_()  # beta = 2 sigmoid(0) = 1
        layer.qkv_proj.weight[:8] = layer.qkv_proj.weight[8:16]
        layer.taps[:, :8] = layer.taps[:, 8:16]
    values = F.silu(layer.taps[0, 16:] * layer.qkv_proj(x)[..., 16:]).unflatten(-1, (2, 8))
    expected = layer.out_proj(F.rms_norm(values / 2, (8,), eps=1e-5).flatten(2))  # over the root of 4 features
    assert torch.allclose(layer(x), expected, atol=2e-3)  # lengths are 1 but for 1e-6 in their squares


def test_writing_again_under_a_key_replaces_what_was_there():
    """In a state of linear attention both values would be found, here only the second."""
    layer = layer_of(dim=8, heads=1, convolution=1, largest_beta=2.0)
    x = 30 * torch.randn(1, 2, 8, **DOUBLE)
    with torch.no_grad():
        layer.beta_proj.weight.zero_()
        layer.qkv_proj.weight[8:16, 4:] = 0  # the key reads the first half of the token, the value all of it
    x[:, 1, :4] = x[:, 0, :4]
    _, twice = layer.extend(x, layer.initial_state(1, x))
    _, once = layer.extend(x[:, 1:], layer.initial_state(1, x))
    assert torch.allclose(twice.sums, once.sums, atol=1e-3)
    assert once.sums.abs().max() > 0.1


def test_beta_up_to_two_lets_the_state_change_its_sign():
    layer = layer_of(dim=4, heads=4, convolution=1, largest_beta=2.0)  # heads of one feature: every key is 1 or -1
    with torch.no_grad():
        layer.beta_proj.weight.fill_(100.0)
        layer.qkv_proj.weight[8:].zero_()  # nothing is stored
    x = 1 + 10 * torch.rand(1, 5, 4, **DOUBLE)
    state = layer.initial_state(1, x)
    state = state._replace(sums=torch.ones_like(state.sums))
    for token in range(5):
        _, state = layer.extend(x[:, token : token + 1], state)
        assert torch.allclose(state.sums, torch.full_like(state.sums, (-1.0) ** (token + 1)), atol=1e-2)


@BOTH
def test_chunks_recurrence_and_tokens_agree(name):
    layer, x = layer_of(name, largest_beta=2.0), torch.randn(2, 2 * CHUNK + 9, 16, **DOUBLE)
    outputs, gradients = [], []
    for backend in ("torch", "oracle"):
        layer.backend = backend
        leaf = x.clone().requires_grad_()
        outputs.append(layer(leaf))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), [leaf, *layer.parameters()]))
    assert torch.allclose(*outputs, atol=1e-10)
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(*gradients, strict=True))
    layer.backend = "auto"
    state, parts = layer.initial_state(2, x), []
    for piece in x.split([1, 2, CHUNK, CHUNK + 6], 1):
        y, state = layer.extend(piece, state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), outputs[0], atol=1e-10)


@BOTH
def test_padding_is_skipped_by_convolution_and_state(name):
    layer, x, keep = layer_of(name), torch.randn(2, 20, 16, **DOUBLE), torch.rand(20) > 0.4
    y = layer(x, mask=keep.expand(2, -1))
    assert torch.allclose(y[:, keep], layer(x[:, keep]), atol=1e-12)
    assert not y[:, ~keep].any()


def test_without_fading_the_gated_state_is_the_plain_one():
    gated, plain = layer_of("gated_delta"), layer_of("delta", expand_k=0.75, expand_v=1.5)
    plain.load_state_dict(gated.state_dict(), strict=False)
    x = torch.randn(2, 30, 16, **DOUBLE)
    with torch.no_grad():
        gated.log_rate.fill_(-100.0)
    states = [layer.extend(x, layer.initial_state(2, x))[1] for layer in (gated, plain)]
    assert torch.allclose(states[0].sums, states[1].sums, atol=1e-12)
    assert torch.equal(states[0].tail, states[1].tail)


def test_a_decay_of_zero_leaves_the_token_itself():
    layer, x = layer_of("gated_delta", convolution=1), torch.randn(2, 30, 16, **DOUBLE)
    with torch.no_grad():
        layer.log_rate.fill_(100.0)
    tokens = layer(x.flatten(0, 1).unsqueeze(1))
    assert torch.allclose(layer(x).flatten(0, 1), tokens[:, 0], atol=1e-12)


def test_a_decay_is_a_rate_times_a_step():
    layer, x = layer_of("gated_delta"), torch.randn(2, 30, 16, **DOUBLE)
    step = (1 + (layer.decay_proj(x) + layer.step_bias).exp()).log()
    assert torch.allclose(layer.log_decay(x), -layer.log_rate.exp() * step, atol=1e-12)


def test_decays_start_as_published():
    layer = layer_of("gated_delta", 1024, 1024, expand_k=1.0, expand_v=1.0)
    rate, step = layer.log_rate.exp(), F.softplus(layer.step_bias)
    assert 0 < rate.min() < 1
    assert 15 < rate.max() < 16
    assert 0.001 <= step.min() < 0.0013
    assert 0.098 < step.max() <= 0.1
    assert (step < 0.01).double().mean() == pytest.approx(0.5, abs=0.1)  # as many below the geometric middle as above


@BOTH
def test_the_state_is_a_matrix_and_three_rows(name):
    layer = layer_of(name, 32, 4, expand_k=1.0, expand_v=2.0)
    x = torch.randn(3, 40, 32, **DOUBLE)
    for tokens in (1, 40):
        _, state = layer.extend(x[:, :tokens], layer.initial_state(3, x))
        assert attlas.state_bytes(state) == 8 * 3 * (4 * 8 * 16 + 3 * (32 + 32 + 64))


@BOTH
def test_long_sequences_stay_bounded(name):
    layer, x = layer_of(name, largest_beta=2.0).float(), 10 * torch.randn(1, 3000, 16)
    y, state = layer.extend(x, layer.initial_state(1, x))
    assert torch.isfinite(y).all()
    assert state.sums.norm() < 50 * F.silu(layer.qkv_proj(x)).norm(dim=-1).max()


@BOTH
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_one_token_again_and_again_stays_bounded_in_bfloat16(name, autocast, backend):
    """A key rounded to more than length 1 would be overcorrected at beta = 2, by a factor each time."""
    for seed in range(4):
        torch.manual_seed(seed)
        layer, x = layer_of(name, 32, largest_beta=2.0, backend=backend).float(), torch.randn(1, 1, 32) + 0.8
        with torch.no_grad():
            layer.beta_proj.weight.fill_(1.0)
            if name == "gated_delta":
                layer.log_rate.fill_(-9.0)
        if not autocast:
            layer, x = layer.bfloat16(), x.bfloat16()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, state = layer.extend(x.expand(1, 2000, 32), layer.initial_state(1, x))
        assert state.sums.norm() < 20


def test_published_sizes():
    width = 256
    layer = attlas.mixer("gated_delta", width, 2, causal=True)
    small = 4 * 3 * width + 2 * 2 * width + 2 * 2 + 192
    assert sum(p.numel() for p in layer.parameters()) == 6 * width**2 + small
    assert (layer.key_size, layer.value_size) == (96, 192)
    layer = attlas.mixer("delta", width, 2, causal=True)
    assert sum(p.numel() for p in layer.parameters()) == 4 * width**2 + 4 * 3 * width + 2 * width + 128


@BOTH
def test_what_has_no_meaning_is_refused(name):
    for settings, message in (
        ({"expand_k": 0.3}, "expand_k times dim"),
        ({"expand_v": -1.0}, "expand_v times dim"),
        ({"convolution": 0}, "convolution counts"),
        ({"largest_beta": 2.5}, "largest_beta is in"),
        ({"largest_beta": 0.0}, "largest_beta is in"),
    ):
        with pytest.raises(BadInput, match=message):
            layer_of(name, **settings)
    with pytest.raises(Unsupported, match="causal=True"):
        attlas.mixer(name, 16, 2)
