"""Lightning attention: its slopes, its layer, its state."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BackendUnavailable, BadInput
from attlas.ops.decay import decayed_linear_attention
from attlas.ops.dispatch import record_choices

DOUBLE = {"dtype": torch.float64}


def masked(q, k, v, slopes):
    """Every pair with its decay."""
    place = torch.arange(q.shape[2])
    distance = (place[:, None] - place).clamp(min=0)
    decay = torch.exp(-slopes[:, None, None].to(q) * distance).tril()
    return (q @ k.mT * decay) @ v


def test_a_model_laid_out_on_meta_keeps_its_slopes():
    with torch.device("meta"):
        layer, alibi = attlas.make_attend("lightning", 2, 4, causal=True), attlas.positions.ALiBi(2)
    q, k, v = torch.randn(3, 1, 2, 5, 4, **DOUBLE)
    assert torch.equal(layer(q, k, v), attlas.attend(q, k, v, "lightning", causal=True))
    assert alibi.slopes.is_meta  # a buffer goes where the model goes


@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0, 20.0])
def test_blocks_recurrence_and_pairs_agree(slope):
    q, k = torch.randn(2, 2, 3, 201, 6, **DOUBLE)
    v = torch.randn(2, 3, 201, 4, **DOUBLE)
    slopes = torch.tensor([slope, slope / 2, 0.0])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected = masked(*inputs, slopes)
    seed = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, seed)
    for backend in ("torch", "oracle"):
        o, _ = decayed_linear_attention(*inputs, slopes, backend=backend)
        assert torch.allclose(o, expected, atol=1e-9)
        for got, grad in zip(torch.autograd.grad(o, inputs, seed), expected_grads, strict=True):
            assert torch.allclose(got, grad, atol=1e-9)


def test_without_decay_the_last_token_reads_the_plain_sum():
    q, k, v = torch.randn(3, 2, 3, 150, 8, **DOUBLE)
    o, state = decayed_linear_attention(q, k, v, torch.zeros(3))
    assert torch.allclose(state, k.mT @ v, atol=1e-10)
    assert torch.allclose(o[:, :, -1:], q[:, :, -1:] @ (k.mT @ v), atol=1e-10)


def test_features_may_be_split_over_calls():
    q, k, v = torch.randn(3, 1, 2, 100, 32, **DOUBLE)
    slopes = torch.tensor([0.5, 0.1])
    whole, _ = decayed_linear_attention(q, k, v, slopes)
    parts = [decayed_linear_attention(a, b, v, slopes)[0] for a, b in zip(q.split(8, 3), k.split(8, 3), strict=True)]
    assert torch.allclose(sum(parts), whole, atol=1e-10)


def test_slopes_are_those_of_the_paper():
    def slopes(heads, **place):
        return attlas.mixer("lightning", 4 * heads, heads, causal=True, **place).attend.slopes.double()

    def powers(exponents):
        return 2.0 ** torch.tensor(exponents).double()

    assert torch.equal(slopes(8), powers([-1.0, -2, -3, -4, -5, -6, -7, -8]))
    eight, odd = [-1.0, -2, -3, -4, -5, -6, -7, -8], [-0.5, -1.5, -2.5, -3.5]
    assert torch.allclose(slopes(12), powers(eight + odd))
    for layer, factor in ((0, 1 + 1e-5), (2, 0.6 + 1e-5), (5, 1e-5)):
        assert torch.allclose(slopes(8, layer=layer, layers=6), factor * slopes(8), rtol=1e-4)


def test_a_model_in_half_precision_forgets_at_the_same_rate():
    layer = attlas.mixer("lightning", 24, 6, causal=True, layer=1, layers=5)
    before = layer.attend.slopes.clone()
    assert torch.equal(layer.to(torch.bfloat16).attend.slopes, before)
    assert not [name for name in layer.state_dict() if "slopes" in name]


@pytest.mark.parametrize("prefill", [1, 64, 100])
def test_prefill_and_single_tokens_equal_one_pass(prefill):
    layer = attlas.mixer("lightning", 32, 4, causal=True, layer=1, layers=3)
    x = torch.randn(2, 140, 32)
    with torch.no_grad():
        y, state = layer.extend(x[:, :prefill], layer.initial_state(2))
        parts = [y]
        for token in x[:, prefill:].split(1, 1):
            y, state = layer.extend(token, state)
            parts.append(y)
        assert torch.allclose(torch.cat(parts, 1), layer(x), atol=2e-6)
    assert attlas.state_bytes(state) == 4 * 2 * 4 * 8 * 8


def test_queries_are_the_last_of_the_keys():
    q, k, v = torch.randn(3, 2, 4, 90, 8)
    whole = attlas.attend(q, k, v, "lightning", causal=True)
    assert torch.allclose(attlas.attend(q[:, :, -3:], k, v, "lightning", causal=True), whole[:, :, -3:], atol=1e-5)
    with pytest.raises(BadInput, match="90 queries and 50 keys"):
        attlas.attend(q, k[:, :, :50], v[:, :, :50], "lightning", causal=True)


def test_the_published_layer():
    layer = attlas.mixer("lightning", 32, 4, causal=True).double()
    x = torch.randn(2, 9, 32, **DOUBLE)
    q, k, v = (getattr(layer, f"{name}_proj")(x).view(2, 9, 4, 8).transpose(1, 2) for name in "qkv")
    o = masked(F.silu(q), F.silu(k), v, layer.attend.slopes).transpose(1, 2).reshape(2, 9, 32)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6)
    assert torch.allclose(layer(x), layer.out_proj(o * layer.gate_proj(x)), atol=1e-12)
    assert sum(p.numel() for p in layer.parameters()) == 5 * 32 * 32


def test_the_choice_of_backend():
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    slopes = torch.ones(2)
    with pytest.raises(BackendUnavailable, match="float64"):
        decayed_linear_attention(q.double(), k.double(), v.double(), slopes, backend="cpu")
    layer = attlas.mixer("lightning", 8, 2, causal=True)
    x = torch.randn(2, 5, 8)
    with record_choices() as choices:
        program = torch.export.export(layer, (x,))
    assert {choice.backend for choice in choices} == {"torch"}
    assert not [node for node in program.graph.nodes if "attlas" in str(node.target)]
    assert torch.allclose(program.module()(x), layer(x), atol=1e-5)
