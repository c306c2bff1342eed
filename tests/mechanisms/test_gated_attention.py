"""Gated attention: its predictors, where gates start, and a head that does nothing."""

import math

import pytest
import torch
from torch import nn

import attlas
from attlas.core.errors import BadInput, Unsupported
from attlas.mechanisms.softmax.gated_attention import Predictor

DOUBLE = {"dtype": torch.float64}
PREDICTORS = ("linear", "mlp", "mlp2", "all_heads_linear")


def test_open_gates_are_plain_attention():
    gated, plain = (attlas.mixer(name, 32, 4).double() for name in ("gated_attention", "softmax"))
    gated.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        gated.attend.predict.weight.zero_()
        gated.attend.predict.bias.fill_(30)
    x = torch.randn(2, 9, 32, **DOUBLE)
    assert torch.allclose(gated(x), plain(x), rtol=0, atol=1e-12)
    with torch.no_grad():
        gated.attend.predict.bias.fill_(-1000)
    assert torch.equal(gated(x), gated.out_proj.bias.expand(2, 9, -1))


@pytest.mark.parametrize("kind", PREDICTORS)
def test_predictors_are_small_networks_of_each_head(kind):
    heads, size = 3, 8
    ours = Predictor(heads * size, heads, kind).double()
    x = torch.randn(2, 5, heads * size, **DOUBLE)
    logits = []
    for h in range(heads):
        part = x if kind == "all_heads_linear" else x[..., h * size : (h + 1) * size]
        last = nn.Linear(ours.weight.shape[1], 1, **DOUBLE)
        last.load_state_dict({"weight": ours.weight[h : h + 1], "bias": ours.bias[h : h + 1]})
        net = last
        if kind.startswith("mlp"):
            first = nn.Linear(size, {"mlp": size // 4, "mlp2": size}[kind], **DOUBLE)
            first.load_state_dict({"weight": ours.hidden_weight[h], "bias": ours.hidden_bias[h]})
            net = nn.Sequential(first, nn.ReLU(), last)
        logits.append(net(part))
    assert torch.allclose(ours(x), torch.cat(logits, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kind", "extra"), list(zip(PREDICTORS, (780, 12_684, 50_700, 9_228), strict=True)))
def test_parameters_of_the_published_gates(kind, extra):
    gated = attlas.mixer("gated_attention", 768, 12, predictor=kind)  # BERT-base
    assert sum(p.numel() for p in gated.attend.parameters()) == extra


def test_only_gates_of_slices_need_heads_that_divide_the_channels():
    layer = attlas.mixer("gated_attention", 16, 3, head_dim=5, predictor="all_heads_linear")
    assert layer(torch.randn(1, 4, 16)).shape == (1, 4, 16)


def test_gates_are_of_the_tokens_and_not_of_queries():
    attend = attlas.make_attend("gated_attention", 2, 4).double()
    q, k, v = torch.randn(3, 1, 2, 5, 4, **DOUBLE)
    x = torch.randn(1, 5, 8, **DOUBLE)
    plain = attlas.attend(q, k, v)
    assert torch.allclose(attend(q, k, v, tokens=x) / plain, attend(-q, k, v, tokens=x) / attlas.attend(-q, k, v))
    gates = torch.sigmoid((x.view(1, 5, 2, 4) * attend.predict.weight).sum(-1) + attend.predict.bias)
    assert torch.allclose(attend(q, k, v, tokens=x), plain * gates.mT.unsqueeze(-1), atol=1e-12)


@pytest.mark.parametrize("kind", PREDICTORS)
def test_gates_start_near_pi(kind):
    attend = attlas.mixer("gated_attention", 64, 4, predictor=kind, pi_init=0.25).attend
    gates = attend.gates(torch.randn(8, 50, 64) * 0.1)
    assert gates.mean().item() == pytest.approx(0.25, abs=0.05)
    attend = attlas.mixer("gated_attention", 64, 4, gate_type="unconditional_per_head", pi_init=0.25).attend
    assert torch.allclose(attend.gates(torch.randn(2, 5, 64)), torch.tensor(0.25))


@pytest.mark.parametrize("kind", PREDICTORS)
def test_fine_tuning_starts_as_the_model_without_gates(kind):
    plain = attlas.mixer("softmax", 64, 4)
    tuned = attlas.mixer("gated_attention", 64, 4, predictor=kind, pi_init=0.25, fine_tuning=True)
    tuned.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 50, 64)
    assert attlas.mixer("gated_attention", 64, 4, pi_init=0.25).attend.factor == 1
    assert tuned.attend.factor == 4
    assert ((tuned.attend.gates(x) - 1).abs() < 0.4).all()
    error = (tuned(x) - plain(x)).norm() / plain(x).norm()
    assert error < 0.1
    with torch.no_grad():
        tuned.attend.predict.weight.zero_()
    assert torch.allclose(tuned(x), plain(x), atol=1e-5)


def test_a_gate_per_head_is_a_mean_over_real_tokens():
    layer = attlas.mixer("gated_attention", 16, 2, gate_type="conditional_per_head").double()
    x = torch.randn(2, 8, 16, **DOUBLE)
    keep = torch.arange(8).expand(2, -1) < 5
    x[:, 5:] = torch.nan
    gates = layer.attend.gates(x, keep)
    assert gates.shape == (2, 1, 2)
    assert torch.allclose(gates, layer.attend.gates(x[:, :5]), rtol=0, atol=1e-12)
    assert torch.allclose(gates, layer.attend.predict(x[:, :5]).mean(1, keepdim=True).sigmoid())


@pytest.mark.parametrize("gate_type", ["conditional_per_token", "unconditional_per_head"])
def test_gates_stream(gate_type):
    layer = attlas.mixer("gated_attention", 16, 2, causal=True, gate_type=gate_type, predictor="mlp2").double()
    with torch.no_grad():
        for parameter in layer.attend.parameters():
            parameter.normal_()
    x = torch.randn(2, 9, 16, **DOUBLE)
    whole, state, parts = layer(x), layer.initial_state(2), []
    for token in x.split(1, 1):
        y, state = layer.extend(token, state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


def test_a_head_learns_to_do_nothing():
    attend = attlas.make_attend("gated_attention", 1, 8).double()
    q, k, x = torch.randn(3, 1, 1, 16, 8, **DOUBLE)
    x = x[0].requires_grad_()
    ones = torch.ones(1, 1, 16, 1, **DOUBLE)
    parameters = [q.requires_grad_(), k.requires_grad_(), *attend.parameters()]
    optimizer = torch.optim.Adam(parameters, 1.0)
    for _ in range(600):
        loss = attend(q, k, ones, tokens=x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-4
    assert (q @ k.mT).detach().abs().max() / math.sqrt(8) < 5


def test_what_does_not_fit_is_refused():
    q = torch.randn(1, 4, 6, 8)
    attend = attlas.make_attend("gated_attention", 4, 8)
    with pytest.raises(BadInput, match=r"pass tokens of shape \(1, 6, 32\).*got None"):
        attend(q, q, q)
    with pytest.raises(BadInput, match=r"got \(1, 1, 32\)"):
        attend(q, q, q, tokens=torch.randn(1, 1, 32))
    with pytest.raises(Unsupported, match=r"learns predict\.weight"):
        attlas.attend(q, q, q, "gated_attention")
    unconditional = attlas.make_attend("gated_attention", 4, 8, gate_type="unconditional_per_head")
    assert torch.allclose(unconditional(q, q, q), attlas.attend(q, q, q) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"predictor": "conv"}, "predictor is one of linear, mlp.*'conv'"),
        ({"predictor": "conv", "gate_type": "unconditional_per_head"}, "predictor is one of"),
        ({"gate_type": "per_token"}, "gate_type is one of conditional_per_token.*'per_token'"),
        ({"gate_type": "conditional_per_head", "causal": True}, "cannot be causal.*conditional_per_token"),
        ({"pi_init": 1.0}, "pi_init is what the gates start near.*got 1.0"),
        ({"fine_tuning": True}, "fine_tuning divides the gates by pi_init"),
        ({"head_dim": 5, "heads": 3}, "3 heads do not divide 16 channels"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        attlas.mixer("gated_attention", **{"dim": 16, "heads": 4} | settings)
