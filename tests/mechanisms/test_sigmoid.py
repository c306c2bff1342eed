"""Sigmoid attention: what only weights without a normaliser do."""

import math

import pytest
import torch
import torch.nn.functional as F

import attlas
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
