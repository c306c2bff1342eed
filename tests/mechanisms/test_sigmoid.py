"""Sigmoid attention: what only weights without a normaliser do."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attlas
from attlas.blocks.layer_scale import LayerScale
from attlas.core.errors import BadInput
from attlas.ops.sigmoid import TILE, sigmoid_attention


def random_qkv(queries, keys, heads=4, kv_heads=2, size=8):
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(2, *shape, size, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("queries", [TILE - 1, 2 * TILE + 3])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_equal_the_whole(queries, causal):
    keys = queries + 5
    keep = torch.arange(keys).expand(2, -1) > torch.tensor([[3], [40]])
    bias = torch.randn(1, 4, queries, keys, dtype=torch.float64)
    mask = attlas.Mask(causal=causal) & attlas.Mask.padding(keep) & attlas.Mask.biased(bias)
    qkv = random_qkv(queries, keys)
    outputs = [sigmoid_attention(*qkv, mask, shift=-3.0, backend=name) for name in ("torch", "oracle")]
    assert torch.allclose(*outputs, rtol=0, atol=1e-12)
    seed = torch.randn_like(outputs[0])
    for got, expected in zip(*(torch.autograd.grad(o, qkv, seed) for o in outputs), strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-11)


def test_outputs_over_disjoint_keys_add_up():
    q, k, v = random_qkv(5, 12, kv_heads=4)

    def parts(name):
        layer = attlas.make_attend(name, 4, 8, length=12)
        first = layer(q, k[:, :, :7], v[:, :, :7], cross=True)
        second = layer(q, k[:, :, 7:], v[:, :, 7:], cross=True)
        return first + second, layer(q, k, v, cross=True)

    assert torch.allclose(*parts("sigmoid"), atol=1e-12)
    assert not torch.allclose(*parts("softmax"), atol=0.1)


def test_the_shift_keeps_the_output_at_one_size_at_every_length():
    def sizes(**settings):
        norms = []
        for n in (64, 256, 1024):
            q, k, v = torch.randn(3, 1, 2, n, 64)
            norms.append(sigmoid_attention(q, k, v + 1, **settings or {"shift": -math.log(n)}).norm(dim=-1).mean())
        return torch.stack(norms)

    shifted, plain = sizes(), sizes(shift=0.0)
    assert shifted.max() / shifted.min() < 1.2
    assert torch.allclose(plain[1:] / plain[:-1], torch.tensor(4.0), rtol=0.05)


def test_the_shift_is_a_constant_of_the_trained_length():
    assert attlas.mixer("sigmoid", 32, 4, length=512).attend.shift == -math.log(512)
    layer = attlas.mixer("sigmoid", 32, 4)
    assert math.isclose(layer.attend.shift, -7.62, abs_tol=0.005)  # as published
    assert not layer.attend.state_dict()
    q, k, v = random_qkv(3, 9, kv_heads=4)
    weights = torch.sigmoid(q @ k.mT / math.sqrt(8) - math.log(2048))
    assert torch.allclose(layer.attend(q, k, v, cross=True), weights @ v, atol=1e-12)


def test_a_bias_is_added_to_the_scores():
    q, k, v = random_qkv(6, 6, kv_heads=4)
    bias = attlas.positions.ALiBi(4).bias(attlas.Grid((6,))).double()
    layer = attlas.make_attend("sigmoid", 4, 8, length=6)
    weights = torch.sigmoid(q @ k.mT / math.sqrt(8) + bias - math.log(6))
    assert torch.allclose(layer(q, k, v, mask=bias), weights @ v, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "oracle"])
def test_no_shift_brings_back_what_is_masked(backend):
    q, k, v = random_qkv(4, 4, kv_heads=4)
    seen = torch.ones(4, 4, dtype=torch.bool).tril(-1)
    o = sigmoid_attention(q, k, v, attlas.Mask.pairs_(seen), shift=1e30, backend=backend)
    assert torch.allclose(o, seen.double() @ v, atol=1e-12)  # every weight is 1, or exactly 0
    assert not o[:, :, 0].any()


def test_the_published_layer():
    layer = attlas.mixer("sigmoid", 32, 4, length=7).eval()
    x = torch.randn(2, 7, 32)
    q, k, v = (getattr(layer, f"{name}_proj")(x).view(2, 7, 4, 8).transpose(1, 2) for name in "qkv")
    q, k = F.layer_norm(q, [8]), F.layer_norm(k, [8])
    o = torch.sigmoid(q @ k.mT / math.sqrt(8) - math.log(7)) @ v
    assert torch.allclose(layer(x), layer.out_proj(o.transpose(1, 2).reshape(2, 7, 32)), atol=1e-6)
    assert [name for name, _ in layer.named_parameters() if name.endswith("bias")] == ["q_norm.bias", "k_norm.bias"]


def test_weights_are_dropped_in_training_alone():
    layer = attlas.make_attend("sigmoid", 4, 8, length=50, weight_dropout=0.5)
    q, k, _ = random_qkv(50, 50, kv_heads=4)
    ones = torch.ones_like(k)
    whole = layer.eval()(q, k, ones)
    dropped = layer.train()(q, k, ones)
    assert not torch.allclose(dropped, whole)
    assert torch.allclose(dropped.mean(), whole.mean(), rtol=0.05)
    with pytest.raises(BadInput, match="weight_dropout"):
        attlas.make_attend("sigmoid", 4, 8, weight_dropout=1.0)


def test_alibi_takes_the_place_of_the_shift():
    layer = attlas.mixer("sigmoid", 32, 4, causal=True, shift=0.0, position=attlas.positions.ALiBi(4)).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    q, k, v = (getattr(layer, f"{name}_proj")(x).view(2, 9, 4, 8).transpose(1, 2) for name in "qkv")
    q, k = layer.q_norm(q), layer.k_norm(k)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], dtype=torch.float64)[:, None, None]
    weights = (q @ k.mT / math.sqrt(8) - slopes * distance.abs()).sigmoid() * (distance >= 0)
    assert torch.allclose(layer(x), layer.out_proj((weights @ v).transpose(1, 2).flatten(2)), atol=1e-12)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_hybrid_norm_keeps_the_output_at_one_size_without_the_shift(norm):
    x = torch.randn(1, 1024, 32) + 0.5

    def growth(**settings):
        torch.manual_seed(0)
        layer = attlas.mixer("sigmoid", 32, 4, shift=0.0, **settings)
        return float((layer(x).norm(dim=-1).mean() / layer(x[:, :64]).norm(dim=-1).mean()).detach())

    assert growth() > 8
    assert growth(output_norm=norm) < 1.5


def test_values_are_normalised_over_the_head_size():
    settings = {"length": 9, "context_dim": 24}
    layer = attlas.mixer("sigmoid", 32, 4, value_norm=True, **settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    plain = attlas.mixer("sigmoid", 32, 4, **settings).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x, context = torch.randn(2, 5, 32).double(), torch.randn(2, 9, 24).double()
    v = layer.v_proj(context).view(2, 9, 4, 8)
    norm = layer.attend.value_norm
    v = F.layer_norm(v, [8], norm.weight, norm.bias).transpose(1, 2)
    q = plain.q_norm(plain.q_proj(x).view(2, 5, 4, 8)).transpose(1, 2)
    k = plain.k_norm(plain.k_proj(context).view(2, 9, 4, 8)).transpose(1, 2)
    o = plain.attend(q, k, v, cross=True)
    assert torch.allclose(layer(x, context), layer.out_proj(o.transpose(1, 2).flatten(2)), atol=1e-12)
    assert not torch.allclose(layer(x, context), plain(x, context), atol=1e-2)


def test_decoding_keeps_the_shift_of_the_trained_length():
    layer = attlas.mixer("sigmoid", 32, 4, causal=True, length=6, value_norm=True).double()
    x = torch.randn(2, 15, 32, dtype=torch.float64)  # two and a half times as long as it is trained on
    with torch.no_grad():
        y, state = layer.extend(x[:, :4], layer.initial_state(2))
        parts = [y]
        for t in range(4, 15):
            y, state = layer.extend(x[:, t : t + 1], state)
            parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), layer(x), atol=1e-12)
    longer = attlas.mixer("sigmoid", 32, 4, causal=True, length=15, value_norm=True).double()
    longer.load_state_dict(layer.state_dict())  # -log of the length at hand, for extrapolation
    assert longer.attend.shift == -math.log(15)
    assert not torch.allclose(longer(x), layer(x), atol=1e-2)


def test_a_layer_scale_lets_branches_start_small():
    branch = nn.Sequential(attlas.mixer("sigmoid", 32, 4, length=7), LayerScale(32))
    x = torch.randn(2, 7, 32)
    assert torch.allclose(branch(x), 1e-4 * branch[0](x))
    branch(x).sum().backward()
    assert branch[1].weight.grad.abs().min() > 0
    with pytest.raises(BadInput, match="LayerScale"):
        LayerScale(0)


@pytest.mark.parametrize("shift", [math.inf, math.nan])
def test_a_shift_that_is_no_number_is_refused(shift):
    with pytest.raises(BadInput, match="shift is a finite number"):
        attlas.make_attend("sigmoid", 4, 8, shift=shift)
