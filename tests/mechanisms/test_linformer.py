"""Linformer: projections along the sequence."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput, Unsupported
from attlas.mechanisms.linear.linformer import Projections

DOUBLE = {"dtype": torch.float64}


def qkv(tokens, size=4):
    return [torch.randn(2, 3, tokens, size, **DOUBLE) for _ in range(3)]


def build(length, slots, **settings):
    return attlas.make_attend("linformer", 3, 4, length=length, slots=slots, **settings).double()


def test_the_identity_as_projection_is_softmax_attention():
    layer, inputs = build(6, 6), qkv(6)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.eye(6))
    assert torch.allclose(layer(*inputs), attlas.attend(*inputs, "softmax"), atol=1e-12)


def test_the_weights_have_the_rank_of_the_slots():
    layer, (q, k, _) = build(12, 3), qkv(12)
    one = torch.eye(12, **DOUBLE).expand(2, 3, -1, -1)
    assert torch.linalg.matrix_rank(layer(q, k, one)).eq(3).all()


@pytest.mark.parametrize("real", [12, 7, 1])
def test_a_shorter_sequence_takes_the_first_columns(real):
    layer, inputs = build(12, 5), qkv(12)
    short = [x[:, :, :real] for x in inputs]
    keep = (torch.arange(12) < real).expand(2, -1)
    assert torch.allclose(layer(*inputs, mask=keep)[:, :, :real], layer(*short), atol=1e-12)


def test_sharing_over_keys_and_values_and_over_layers():
    assert sum(p.numel() for p in build(12, 5).parameters()) == 2 * 5 * 12
    shared = build(12, 5, shared=True)
    assert sum(p.numel() for p in shared.parameters()) == 5 * 12
    other = attlas.mixer("linformer", 12, 3, projections=shared.projections)
    assert other.attend.projections is shared.projections
    assert shared.projections.values is shared.projections.keys
    stack = torch.nn.ModuleList([shared, other.attend])
    assert sum(p.numel() for p in stack.parameters()) == 5 * 12


def test_weights_are_dropped_in_training_alone():
    layer, inputs = build(12, 5, weight_dropout=0.5), qkv(12)
    dropped, whole = layer(*inputs), layer.eval()(*inputs)
    assert not torch.allclose(dropped, whole)
    layer.weight_dropout = 0.0
    assert torch.equal(whole, layer.train()(*inputs))


def test_the_paper_takes_256_slots():
    layer = attlas.mixer("linformer", 64, 4, length=1024)
    assert layer.attend.projections.keys.shape == (256, 1024)


def test_cost_is_linear_in_tokens():
    layer = build(3000, 16)
    assert layer.cost(1, 3000).flops == 3 * layer.cost(1, 1000).flops == 8 * 3 * 16 * 4 * 3000


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="pass length"):
        attlas.mixer("linformer", 8, 2)
    with pytest.raises(BadInput, match="up to 12 tokens, got 13: build it with length=13"):
        build(12, 5)(*qkv(13))
    with pytest.raises(BadInput, match="slots"):
        Projections(12, 0)
    with pytest.raises(Unsupported, match="causal"):
        attlas.mixer("linformer", 8, 2, length=8, causal=True)
