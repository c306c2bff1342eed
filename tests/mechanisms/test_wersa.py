"""WERSA, as published and causal: scales that can be gated, and linear attention when they are not."""

import math

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput, Unsupported
from attlas.ops.scale_gates import EPSILON

BOTH = [("wersa", False), ("wersa_causal", True)]


def build(name, causal, **settings):
    torch.manual_seed(0)
    return attlas.make_attend(name, 2, 8, causal=causal, **settings).double().eval()


def inputs(tokens, batch=2):
    q, k, v = (torch.randn(batch, 2, tokens, 8, dtype=torch.float64) for _ in "qkv")
    return q, k, v, torch.randn(batch, tokens, 16, dtype=torch.float64)


def open_gates(attend):
    """f w = 1 for every token and scale."""
    with torch.no_grad():
        attend.gate_out.weight.zero_()
        attend.gate_out.bias.zero_()
        attend.scale_weights.fill_(2.0)


def weights(attend, q, k):
    """phi(q) phi(k)^T with all factors of phi."""
    bandwidth = F.softplus(attend.log_bandwidth) + 0.1
    features = [
        ((F.gelu(z) / bandwidth) @ random).relu() / math.sqrt(attend.features)
        for z, random in ((q, attend.random_q), (k, attend.random_k))
    ]
    return features[0] @ features[1].mT


@pytest.mark.parametrize(("name", "causal"), BOTH)
@pytest.mark.parametrize("tokens", [3, 16, 21])
def test_open_gates_leave_linear_attention_on_random_features(name, causal, tokens):
    attend = build(name, causal, features=64, levels=3)
    open_gates(attend)
    with torch.no_grad():
        attend.log_bandwidth.fill_(0.7)
    q, k, v, x = inputs(tokens)
    w = weights(attend, q, k)
    if causal:
        w = w.tril()
    expected = attend.norm(w @ v / (w.sum(-1, keepdim=True) + EPSILON))
    assert torch.allclose(attend(q, k, v, tokens=x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_a_shared_projection_estimates_the_arc_cosine_kernel(name, causal):
    attend = build(name, causal, features=2**16, share_random=True)
    assert "random_k" not in attend.state_dict()
    a, b = torch.randn(2, 40, 8, dtype=torch.float64)
    got = ((a @ attend.random_q).relu() * (b @ attend.random_q).relu()).mean(-1)
    angle = F.cosine_similarity(a, b, dim=-1).arccos()
    kernel = (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    expected = a.norm(dim=-1) * b.norm(dim=-1) * kernel / 8
    assert (got - expected).norm() < 0.05 * expected.norm()
    apart = build(name, causal, features=2**16)
    other = ((a @ apart.random_q).relu() * (b @ apart.random_k).relu()).mean(-1)
    assert (other - expected).norm() > 0.2 * expected.norm()


def test_a_closed_gate_removes_its_scale():
    attend = build("wersa", False, levels=2)
    z = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    gates = torch.zeros(1, 8, 3, dtype=torch.float64)
    gates[..., 2] = 1
    expected = z.view(1, 2, 2, 4, 8).mean(3, keepdim=True).expand(1, 2, 2, 4, 8).reshape(z.shape)
    assert torch.allclose(attend.filtered(z, gates), expected, rtol=0, atol=1e-12)


def test_a_coefficient_takes_the_gate_of_its_first_token():
    attend = build("wersa", False, levels=1)
    z = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    gates = torch.tensor([1.0, 5, 0, 5]).double().view(1, 4, 1).expand(1, 4, 2)
    filtered = attend.filtered(z, gates)
    assert torch.allclose(filtered[:, :, :2], z[:, :, :2])
    assert not filtered[:, :, 2:].any()


@pytest.mark.parametrize(("name", "causal"), BOTH)
@pytest.mark.parametrize("real", [5, 8, 11])
def test_padding_on_the_right_gives_what_the_sequence_gives_alone(name, causal, real):
    attend = build(name, causal, features=64)
    q, k, v, x = inputs(14)
    keep = torch.arange(14).expand(2, -1) < real
    got = attend(q, k, v, mask=keep, tokens=x)[:, :, :real]
    alone = attend(q[:, :, :real], k[:, :, :real], v[:, :, :real], tokens=x[:, :real])
    assert torch.allclose(got, alone, rtol=0, atol=1e-12)


def test_the_published_form_looks_ahead_and_refuses_causal_use():
    with pytest.raises(Unsupported, match=r"does not serve causal use.*look ahead; wersa_causal's do not"):
        attlas.mixer("wersa", dim=16, heads=2, causal=True)
    attend = build("wersa", False, features=64)
    gates = torch.rand(1, 8, 3, dtype=torch.float64)
    z = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    later = z.clone()
    later[:, :, 1] += 1
    assert not torch.allclose(attend.filtered(z, gates)[:, :, 0], attend.filtered(later, gates)[:, :, 0])
    causal = build("wersa_causal", True, features=64)
    assert torch.equal(causal.filtered(z, gates)[:, :, 0], causal.filtered(later, gates)[:, :, 0])


def test_the_state_has_the_same_size_after_any_number_of_tokens():
    attend = build("wersa_causal", True, features=32, levels=3)
    q, k, v, x = inputs(50)
    for tokens in (1, 50):
        state = attend.initial_state(2, q)
        _, state = attend.extend(q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens], state, tokens=x[:, :tokens])
        numbers = 2 * (32 * 16 + 2 * 2 * 7 * 8 + 2 * 32 * 9)
        assert attlas.state_bytes(state) == 8 * numbers + 2


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_levels_beyond_the_tokens_cost_nothing(name, causal):
    attend = build(name, causal, features=16, levels=32)
    q, k, v, x = inputs(10)
    fast = attend(q, k, v, tokens=x)
    attend.backend = "oracle"
    assert torch.allclose(fast, attend(q, k, v, tokens=x), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_gates_start_at_half_and_drop_hidden_units_in_training_alone(name, causal):
    attend, x = build(name, causal, gate_dropout=0.5), torch.randn(2, 9, 16, dtype=torch.float64)
    assert attend.scale_weights.tolist() == [0.5] * 3
    whole = attend.gates(x)
    assert torch.equal(attend.gates(x), whole)
    assert not torch.allclose(attend.train().gates(x), whole)


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_flops_grow_with_the_tokens(name, causal):
    layer = attlas.mixer(name, dim=16, heads=2, causal=causal)
    assert layer.cost(1, 2**14).flops == 2 * layer.cost(1, 2**13).flops


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_the_coarse_scale_opens_for_a_trend_under_noise(name, causal):
    """Values say which half of a slow square wave their token lies in; queries and keys hide the wave in noise."""
    attend = build(name, causal, features=128, share_random=True).float()
    attend.requires_grad_(False)
    attend.scale_weights.requires_grad_()
    optimiser = torch.optim.Adam([attend.scale_weights], lr=0.05)
    wave = torch.where(torch.arange(128) // 32 % 2 == 0, 1.0, -1.0).view(128, 1)
    direction, meaning = torch.randn(2, 8)
    meaning = meaning - meaning.mean()
    for _ in range(80):
        q, k = (wave * direction + 1.5 * torch.randn(8, 2, 128, 8) for _ in "qk")
        v = wave * meaning + torch.randn(8, 2, 128, 8)
        o = attend(q, k, v, tokens=torch.zeros(8, 128, 16))
        loss = -(o * wave * meaning).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert attend.scale_weights.abs().argmax() == 2, attend.scale_weights


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_what_has_no_meaning_is_refused(name, causal):
    for settings in ({"levels": 0}, {"levels": 33}, {"features": 0}, {"kernel": 4}, {"gate_dropout": 1.0}):
        with pytest.raises(BadInput, match=next(iter(settings))):
            build(name, causal, **settings)
    attend = build(name, causal)
    q, k, v, x = inputs(4)
    with pytest.raises(BadInput, match="pass tokens="):
        attend(q, k, v)
    with pytest.raises(BadInput, match=r"\(2, 4, 16\) here, got \(2, 3, 16\)"):
        attend(q, k, v, tokens=x[:, :3])
    with pytest.raises(BadInput, match="values of 8 features, which it norms, got 5"):
        attend(q, k, v[..., :5], tokens=x)


def test_the_causal_form_takes_as_many_queries_as_keys():
    q, k, v, x = inputs(4)
    with pytest.raises(BadInput, match="got 3 and 4"):
        build("wersa_causal", True)(q[:, :, :3], k, v, tokens=x[:, :3])
