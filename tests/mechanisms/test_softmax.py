"""Softmax attention with every head count; the identities of `sqa`."""

import pytest
import torch
from torch import nn

import attlas

DIM, HEADS, TOKENS = 32, 8, 12
VARIANTS = {  # variant: (query heads, key/value heads) of 8 nominal heads
    "gqa": (8, 2),
    "mqa": (8, 1),
    "sqa": (4, 2),
    "ssqa": (4, 4),
    "xsqa": (2, 2),
    "xsmqa": (2, 1),
}


def attend_cost(layer, tokens=64):
    return layer.attend.cost(1, tokens)


def test_full_heads_equal_torch():
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    ours = attlas.mixer("softmax", DIM, HEADS)
    weights = dict(zip(("q_proj", "k_proj", "v_proj"), theirs.in_proj_weight.chunk(3), strict=True))
    biases = dict(zip(("q_proj", "k_proj", "v_proj"), torch.randn(3 * DIM).chunk(3), strict=True))
    with torch.no_grad():
        theirs.in_proj_bias.copy_(torch.cat(list(biases.values())))
        for name in weights:
            getattr(ours, name).weight.copy_(weights[name])
            getattr(ours, name).bias.copy_(biases[name])
        ours.out_proj.load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(2, TOKENS, DIM)
    assert (ours(x) - theirs(x, x, x)[0]).abs().max() <= 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_build_the_published_heads(variant):
    query_heads, kv_heads = VARIANTS[variant]
    layer = attlas.mixer(f"softmax:{variant}", DIM, HEADS, bias=False)
    size = DIM // HEADS
    assert layer.q_proj.weight.shape == (query_heads * size, DIM)
    assert layer.k_proj.weight.shape == layer.v_proj.weight.shape == (kv_heads * size, DIM)
    assert layer.out_proj.weight.shape == (DIM, query_heads * size)
    assert attend_cost(layer).flops * HEADS == attend_cost(attlas.mixer("softmax", DIM, HEADS)).flops * query_heads


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_equals_full_heads_with_repeated_weights(variant):
    query_heads, kv_heads = VARIANTS[variant]
    layer = attlas.mixer(f"softmax:{variant}", DIM, HEADS, bias=False).double()
    size = DIM // HEADS
    full = attlas.mixer("softmax", DIM, query_heads, head_dim=size, bias=False).double()
    full.load_state_dict(layer.state_dict(), strict=False) if query_heads == kv_heads else None
    repeat = query_heads // kv_heads
    with torch.no_grad():
        full.q_proj.weight.copy_(layer.q_proj.weight)
        for name in ("k_proj", "v_proj"):
            rows = getattr(layer, name).weight.view(kv_heads, size, DIM).repeat_interleave(repeat, 0)
            getattr(full, name).weight.copy_(rows.flatten(0, 1))
        full.out_proj.load_state_dict(layer.out_proj.state_dict())
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    assert torch.allclose(layer(x), full(x), rtol=0, atol=1e-12)


def test_fewer_query_than_key_heads_tile_the_queries():
    layer = attlas.mixer("softmax", DIM, HEADS, query_heads=2, kv_heads=4, bias=False).double()
    size = DIM // HEADS
    full = attlas.mixer("softmax", DIM, 4, head_dim=size, bias=False).double()
    with torch.no_grad():
        full.q_proj.weight.copy_(layer.q_proj.weight.repeat(2, 1))  # heads 0, 1, 0, 1
        for name in ("k_proj", "v_proj", "out_proj"):
            getattr(full, name).load_state_dict(getattr(layer, name).state_dict())
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    assert torch.allclose(layer(x), full(x), rtol=0, atol=1e-12)
    assert sum(p.numel() for p in layer.parameters()) == DIM * size * (2 + 4 + 4 + 4) + DIM


def test_the_cache_holds_two_numbers_per_token_feature_and_shared_head():
    layer = attlas.mixer("softmax:sqa", DIM, HEADS, causal=True)
    with torch.no_grad():
        _, state = layer.extend(torch.randn(3, TOKENS, DIM), layer.initial_state(3))
    assert attlas.state_bytes(state) == 2 * 3 * TOKENS * 2 * (DIM // HEADS) * 4


def test_weight_dropout_is_on_in_training_only():
    layer = attlas.mixer("softmax", DIM, HEADS, weight_dropout=0.5)
    x = torch.randn(2, TOKENS, DIM)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    with pytest.raises(attlas.core.errors.BadInput, match="weight_dropout"):
        attlas.mixer("softmax", DIM, HEADS, weight_dropout=1.0)
