"""Gated linear attention: what the gates let through."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput, Unsupported
from attlas.ops.gated import CHUNK

DOUBLE = {"dtype": torch.float64}


def layer_of(dim=16, heads=2, **settings):
    return attlas.mixer("gla", dim, heads, causal=True, **settings).double()


def with_logits(layer, logit):
    """All gates fixed: the logits do not depend on the token."""
    with torch.no_grad():
        layer.decay_proj[1].weight.zero_()
        layer.decay_proj[1].bias.fill_(logit)
    return layer


def ungated(layer, x, weights):
    """The output of the layer for given weights (B, H, N, N) of the values."""
    v = layer.v_proj(x).unflatten(-1, (layer.site.heads, -1)).transpose(1, 2)
    o = F.rms_norm(weights @ v, (v.shape[-1],), layer.norm.weight, 1e-5)
    return layer.out_proj(F.silu(layer.gate_proj(x)) * o.transpose(1, 2).flatten(2))


def scores(layer, x):
    q, k = (proj(x).unflatten(-1, (layer.site.heads, -1)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj))
    return q @ k.mT / q.shape[-1] ** 0.5


def test_with_open_gates_it_is_linear_attention():
    layer, x = with_logits(layer_of(), 100.0), torch.randn(2, 90, 16, **DOUBLE)
    assert torch.allclose(layer(x), ungated(layer, x, scores(layer, x).tril()), atol=1e-10)


def test_with_closed_gates_a_token_sees_itself_alone():
    layer, x = with_logits(layer_of(), -1e6), torch.randn(2, 90, 16, **DOUBLE)
    own = torch.diag_embed(scores(layer, x).diagonal(dim1=-2, dim2=-1))
    assert torch.allclose(layer(x), ungated(layer, x, own), atol=1e-10)


def test_one_gate_for_all_is_an_exponential_decay():
    layer, x = with_logits(layer_of(), 0.0), torch.randn(2, 90, 16, **DOUBLE)
    distance = (torch.arange(90)[:, None] - torch.arange(90)).clamp(min=0)
    assert torch.allclose(layer.decay_proj(x).exp(), torch.tensor(0.5**0.0625, **DOUBLE))
    weights = (scores(layer, x) * 0.5 ** (distance.double() / 16)).tril()
    assert torch.allclose(layer(x), ungated(layer, x, weights), atol=1e-10)


def test_pairs_chunks_and_recurrence_agree():
    layer, x = layer_of(expand_k=1.0, divisor=1.0), torch.randn(2, CHUNK + 21, 16, **DOUBLE)
    outputs, gradients = [], []
    for backend in ("torch", "oracle"):
        layer.backend = backend
        leaf = x.clone().requires_grad_()
        outputs.append(layer(leaf))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), [leaf, *layer.parameters()]))
    assert torch.allclose(*outputs, atol=1e-10)
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(*gradients, strict=True))
    layer.backend = "auto"
    state, steps = layer.initial_state(2, x), []
    for token in x.split(1, 1):
        y, state = layer.extend(token, state)
        steps.append(y)
    assert torch.allclose(torch.cat(steps, 1), outputs[0], atol=1e-10)


def test_gates_near_zero_and_near_one_side_by_side_stay_finite():
    layer, x = layer_of(divisor=1e-2).float(), 30 * torch.randn(2, 3 * CHUNK, 16)
    leaf = x.requires_grad_()
    y = layer(leaf)
    assert layer.decay_proj(x).min() < -1000
    assert all(torch.isfinite(t).all() for t in (y, *torch.autograd.grad(y.sum(), [leaf, *layer.parameters()])))
    expected = layer.double()(x.detach().double()).detach()
    assert torch.allclose(y.double(), expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", ["auto", "torch", "oracle"])
def test_sums_beyond_float16_are_normed_away(backend):
    layer, x = layer_of(32, backend=backend), 3 * torch.randn(1, 1, 32, **DOUBLE) + torch.randn(1, 64, 32, **DOUBLE)
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
            projection.weight.mul_(10)
    expected = layer(x)
    with torch.autocast("cpu", torch.float16):
        mixed = layer.float()(x.float())
    for y in (mixed, layer.half()(x.half())):
        assert (y - expected).norm() < 2e-2 * expected.norm()


def test_padding_is_skipped():
    layer, x, keep = layer_of(), torch.randn(2, 20, 16, **DOUBLE), torch.rand(20) > 0.4
    y = layer(x, mask=keep.expand(2, -1))
    assert torch.allclose(y[:, keep], layer(x[:, keep]), atol=1e-12)
    assert not y[:, ~keep].any()


def test_the_state_does_not_grow():
    layer, x = layer_of(32, 4), torch.randn(3, 40, 32, **DOUBLE)
    for tokens in (1, 40):
        _, state = layer.extend(x[:, :tokens], layer.initial_state(3, x))
        assert attlas.state_bytes(state) == 8 * 3 * 4 * (4 * 8)


def test_published_sizes():
    layer = attlas.mixer("gla", 1024, 4, causal=True)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 1024**2 + (1024 * 16 + 16 * 512 + 512) + 256
    assert (layer.key_size, layer.value_size) == (128, 256)
    assert layer.cost(1, 4096).flops == 4 * layer.cost(1, 1024).flops


def test_what_has_no_meaning_is_refused():
    for settings, message in (
        ({"expand_k": 0.3}, "expand_k times dim"),
        ({"expand_v": 0.0}, "expand_v times dim"),
        ({"rank": 0}, "rank counts"),
        ({"divisor": 0.0}, "divisor is positive"),
    ):
        with pytest.raises(BadInput, match=message):
            layer_of(**settings)
    with pytest.raises(Unsupported, match="causal=True"):
        attlas.mixer("gla", 16, 2)
