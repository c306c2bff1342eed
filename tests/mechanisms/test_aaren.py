"""Aaren: the scan, its operator, the layer as attention of one learned query."""

import pytest
import torch
from torch import nn

import attlas
from attlas.core.errors import BadInput
from attlas.ops.scan import RunningSoftmax, merge, running_softmax

DOUBLE = {"dtype": torch.float64}


def literal(scores, values):
    rows = [scores[..., :t].softmax(-1).unsqueeze(-2) @ values[..., :t, :] for t in range(1, scores.shape[-1] + 1)]
    return torch.cat(rows, -2)


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 37, 64])
@pytest.mark.parametrize("largest", [1.0, 300.0])
def test_the_scan_is_softmax_over_every_prefix(tokens, largest):
    scores = (torch.rand(2, 3, tokens, **DOUBLE) * 2 - 1) * largest
    values = torch.randn(2, 3, tokens, 5, **DOUBLE)
    for backend in ("torch", "oracle"):
        o, _ = running_softmax(scores, values, backend=backend)
        assert torch.allclose(o, literal(scores, values), rtol=0, atol=1e-12)
    o, _ = running_softmax(scores.float(), values.float())
    assert torch.allclose(o, literal(scores.float(), values.float()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_block_updates_equal_the_scan(size):
    scores, values = torch.randn(2, 3, 29, **DOUBLE) * 50, torch.randn(2, 3, 29, 5, **DOUBLE)
    for backend in ("torch", "oracle"):
        state, parts = None, []
        for s, v in zip(scores.split(size, 2), values.split(size, 2), strict=True):
            o, state = running_softmax(s, v, None, state, backend=backend)
            parts.append(o)
        assert torch.allclose(torch.cat(parts, 2), literal(scores, values), rtol=0, atol=1e-12)


def test_the_operator_is_associative():
    a, b, c = (
        RunningSoftmax(*(torch.randn(4, 1, 1, n, **DOUBLE) * scale for n, scale in ((1, 300), (1, 1), (6, 1))))
        for _ in "abc"
    )
    for left, right in zip(merge(merge(a, b), c), merge(a, merge(b, c)), strict=True):
        assert torch.allclose(left, right, rtol=1e-12)
    nothing = RunningSoftmax.empty(4, 1, 6, a.w)
    for kept, part in zip(merge(nothing, a), a, strict=True):
        assert torch.equal(kept, part)


def test_a_layer_is_attention_of_one_learned_query():
    layer = attlas.mixer("aaren", 32, 4, causal=True).double()
    theirs = nn.MultiheadAttention(32, 4, batch_first=True, **DOUBLE)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([getattr(layer, f"{n}_proj").weight for n in "qkv"]))
        theirs.in_proj_bias.copy_(torch.cat([getattr(layer, f"{n}_proj").bias for n in "qkv"]))
        theirs.out_proj.load_state_dict(layer.out_proj.state_dict())
    x = torch.randn(2, 9, 32, **DOUBLE)
    query = layer.query.expand(2, 1, -1)
    rows = [theirs(query, x[:, :t], x[:, :t])[0] for t in range(1, 10)]
    assert torch.allclose(layer(x), torch.cat(rows, 1), atol=1e-12)


def test_a_block_has_one_vector_more_than_a_transformer():
    block = nn.TransformerEncoderLayer(512, 8, 2048)
    theirs = sum(p.numel() for p in block.parameters())
    block.self_attn = attlas.mixer("aaren", 512, 8, causal=True)
    assert (theirs, sum(p.numel() for p in block.parameters())) == (3_152_384, 3_152_896)


def test_the_state_does_not_grow():
    layer = attlas.mixer("aaren", 32, 4, causal=True)
    sizes = set()
    for tokens in (1, 10, 300):
        _, state = layer.extend(torch.randn(2, tokens, 32), layer.initial_state(2))
        sizes.add(attlas.state_bytes(state))
    assert sizes == {4 * 2 * 4 * (8 + 2)}


def test_before_the_first_real_token_there_is_the_bias_of_the_output():
    layer = attlas.mixer("aaren", 32, 4, causal=True)
    y = layer(torch.randn(2, 6, 32), mask=torch.arange(6).expand(2, -1) >= 2)
    assert torch.equal(y[:, :2], layer.out_proj.bias.expand(2, 2, -1))


def test_padding_leaves_no_trace_in_the_state():
    scores, values = torch.randn(2, 3, 6), torch.randn(2, 3, 6, 5)
    keep = torch.zeros(2, 6, dtype=torch.bool)
    nothing = RunningSoftmax.empty(2, 3, 5, values)
    _, state = running_softmax(scores, values, keep, nothing)
    for part, empty in zip(state, nothing, strict=True):
        assert torch.equal(part, empty)


def test_heads_divide_the_channels():
    with pytest.raises(BadInput, match="30 channels do not split into 4 heads"):
        attlas.mixer("aaren", 30, 4, causal=True)
