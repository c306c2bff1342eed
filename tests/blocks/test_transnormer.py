"""The TransNormer block: its positions, gates, norms and stream."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas import positions
from attlas.blocks.transnormer import SGLU, LightningAttention, SimpleRMSNorm, TransNormerBlock, transnormer_attention
from attlas.core.errors import BadInput
from attlas.ops.flops import flop_counter

DOUBLE = {"dtype": torch.float64}


def decayed(q, k, v, slopes):
    place = torch.arange(q.shape[2])
    distance = (place[:, None] - place).clamp(min=0)
    return (q @ k.mT * torch.exp(-slopes[:, None, None].double() * distance).tril()) @ v


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def test_lrpe_weighs_each_feature_by_the_cosine_of_its_angle():
    lrpe = positions.LRPE(3, 4).double()
    q, k = torch.randn(2, 2, 3, 6, 4, **DOUBLE)
    got = lrpe.rotate(q, 5) @ lrpe.rotate(k, 5).mT
    place = torch.arange(6)
    cosine = torch.cos(lrpe.theta.unsqueeze(1) * (place[:, None] - place)[..., None])
    assert torch.allclose(got, torch.einsum("bhnd,bhmd,hnmd->bhnm", q, k, cosine), atol=1e-12)


def test_lrpe_begins_with_the_wavelengths_of_all_channels():
    theta = positions.LRPE(3, 4).theta
    assert torch.allclose(theta.flatten(), 10000 ** (-torch.arange(12) / 6.0))
    assert theta.requires_grad


def test_rotary_positions_of_some_features_leave_the_others():
    part, whole = positions.Rotary(8, features=4), positions.Rotary(4)
    x = torch.randn(1, 2, 5, 8, **DOUBLE)
    turned = part.rotate(x, 3)
    assert torch.equal(turned[..., :4], whole.rotate(x[..., :4], 3))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    with pytest.raises(BadInput, match="features = 3 is odd"):
        positions.Rotary(8, features=3)
    with pytest.raises(BadInput, match="at most as many features turn, got 10"):
        positions.Rotary(8, features=10)


@pytest.mark.parametrize("lrpe", [False, True])
def test_the_layer_of_the_released_models(lrpe):
    layer = transnormer_attention(24, 3, layer=1, layers=4, lrpe=lrpe).double()
    x = torch.randn(2, 7, 24, **DOUBLE)
    q, k, v = (heads(x @ getattr(layer, f"{name}_proj").weight.T, 3) for name in "qkv")
    q, k = F.silu(q), F.silu(k)
    if lrpe:
        angle = layer.position.theta * torch.arange(7).unsqueeze(1)
        q, k = (torch.cat([t * angle.cos(), t * angle.sin()], -1) for t in (q, k))
    o = decayed(q, k, v, layer.attend.slopes).transpose(1, 2).flatten(2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = (o * (x @ layer.gate_proj.weight.T)) @ layer.out_proj.weight.T
    assert torch.allclose(layer(x), expected, atol=1e-12)
    assert sum(p.numel() for p in layer.parameters()) == 5 * 24 * 24 + 24 * lrpe


def test_the_later_layer_with_a_gate_of_low_rank():
    layer = transnormer_attention(24, 3, low_rank_gate=True).double()
    with torch.no_grad():
        layer.output_norm.weight.normal_()
    x = torch.randn(2, 7, 24, **DOUBLE)
    q, k, v = (heads(F.silu(x @ getattr(layer, f"{name}_proj").weight.T), 3) for name in "qkv")
    o = decayed(q, k, v, layer.attend.slopes).transpose(1, 2).flatten(2)
    o = F.layer_norm(o, (24,), layer.output_norm.weight, layer.output_norm.bias)
    down, up = layer.gate_proj
    gate = torch.sigmoid(x @ down.weight.T @ up.weight.T)
    assert down.weight.shape == (8, 24)
    assert torch.allclose(layer(x), (o * gate) @ layer.out_proj.weight.T, atol=1e-12)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 24 * 24 + 2 * 24 * 8 + 2 * 24


@pytest.mark.parametrize(
    "settings", [{}, {"lrpe": True}, {"low_rank_gate": True}, {"lrpe": True, "low_rank_gate": True}]
)
def test_the_cost_is_what_runs(settings):
    layer = transnormer_attention(24, 3, backend="torch", **settings)
    with torch.no_grad(), flop_counter() as counter:
        layer(torch.randn(2, 70, 24))
    cost = layer.cost(2, 70)
    assert cost.executed == counter.get_total_flops()
    assert cost.flops <= cost.executed


@pytest.mark.parametrize("settings", [{}, {"lrpe": True}, {"low_rank_gate": True}])
def test_a_block_streams_token_by_token(settings):
    block = TransNormerBlock(transnormer_attention(24, 3, layer=1, layers=3, **settings), 40).double()
    x = torch.randn(2, 12, 24, **DOUBLE)
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[1, :3] = False
    whole = block(x, mask=keep)
    state, parts = block.initial_state(2), []
    for piece, real in zip(x.split([5, 1, 1, 5], 1), keep.split([5, 1, 1, 5], 1), strict=True):
        y, state = block.extend(piece, state, keep=real)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1)[keep], whole[keep], atol=1e-12)


def test_a_block_is_two_residual_paths_behind_norms_without_weights():
    block = TransNormerBlock(transnormer_attention(24, 3), 40).double()
    x = 5 * torch.randn(2, 7, 24, **DOUBLE)
    norm = SimpleRMSNorm()
    assert torch.allclose(norm(x).square().mean(-1), torch.ones(2, 7).double(), atol=1e-6)
    assert not list(norm.parameters())
    h = x + block.mixer(norm(x))
    w1, w2, w3 = (part.weight for part in (block.channels.first, block.channels.second, block.channels.last))
    expected = h + ((norm(h) @ w1.T) * (norm(h) @ w2.T)) @ w3.T
    assert torch.allclose(block(x), expected, atol=1e-12)
    assert sum(p.numel() for p in block.parameters()) == 5 * 24 * 24 + 3 * 24 * 40


def test_sglu_is_quadratic():
    sglu, x = SGLU(8, 12).double(), torch.randn(3, 5, 8, **DOUBLE)
    assert torch.allclose(sglu(3 * x), 9 * sglu(x), atol=1e-12)


def test_any_mixer_fits_into_the_block():
    block = TransNormerBlock(attlas.mixer("softmax", 16, 2), 20)
    assert block(torch.randn(2, 5, 16)).shape == (2, 5, 16)


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="heads must divide dim"):
        transnormer_attention(10, 3)
    attend = attlas.make_attend("lightning", 2, 4, causal=True)
    with pytest.raises(BadInput, match="gate_rank is at least 1, of a gate that there is"):
        LightningAttention(attend, gate_rank=2)
    with pytest.raises(BadInput, match="value_activation is one of"):
        LightningAttention(attend, value_activation="tanh")
