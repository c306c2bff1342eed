"""L2ViT's linear attention: a floor under the denominator, a temperature on the output."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput
from attlas.ops.linear import CHUNK


def random_qkv(tokens, size=32, dtype=torch.float64):
    return [torch.randn(2, 3, tokens, size, dtype=dtype) for _ in "qkv"]


def make(size=32, **settings):
    layer = attlas.make_attend("l2vit", 3, size, **settings).double()
    with torch.no_grad():
        layer.temperature.uniform_(0.5, 2.0)
    return layer


def test_keys_with_values_first_is_queries_with_keys_first():
    q, k, v = random_qkv(20)
    layer = make()
    weights = q.relu() @ k.relu().mT
    total = weights.sum(-1, keepdim=True)
    assert (total < 100).any()
    assert (total > 100).any()
    expected = layer.temperature * (weights / total.clamp(min=100)) @ v
    assert torch.allclose(layer(q, k, v), expected, atol=1e-12)


def test_rows_sum_to_the_temperature_above_the_floor_and_to_less_below():
    q, k, _ = random_qkv(20)
    layer = make()
    rows = layer(q, k, torch.ones_like(k[..., :1]))[..., 0]
    total = (q.relu() @ k.relu().mT).sum(-1)
    share = (total / 100).clamp(max=1)
    assert torch.allclose(rows, layer.temperature[:, :, 0] * share, atol=1e-12)
    assert (rows < layer.temperature[:, :, 0] - 1e-6).any()


def test_temperature_starts_as_the_scale_of_scores_and_scales_the_output():
    layer = attlas.make_attend("l2vit", 3, 16)
    assert layer.temperature.shape == (3, 1, 1)
    assert torch.equal(layer.temperature, torch.full((3, 1, 1), 0.25))
    q, k, v = random_qkv(9, 16)
    layer = make(16)
    o = layer(q, k, v)
    with torch.no_grad():
        layer.temperature *= torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    assert torch.allclose(layer(q, k, v), o * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1), atol=1e-12)


def test_a_published_layer_has_one_number_per_head_more_than_plain_attention():
    layer = attlas.mixer("l2vit", 96, 3)
    assert sum(p.numel() for p in layer.parameters()) == 4 * (96 * 96 + 96) + 3


def test_gradients_are_finite_where_all_weights_are_zero():
    q, k, v = random_qkv(5)
    q = (-q.abs()).requires_grad_()
    o = make(floor=1e-3)(q, k, v)
    assert not o.any()
    assert torch.isfinite(torch.autograd.grad(o.sum(), q)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_stream_of_many_chunks(dtype):
    tokens = 2 * CHUNK + 11
    q, k, v = random_qkv(tokens, dtype=dtype)
    layer = make(causal=True).to(dtype)
    whole = layer(q, k, v)
    weights = (q.relu() @ k.relu().mT).tril()
    expected = layer.temperature * (weights / weights.sum(-1, keepdim=True).clamp(min=100)) @ v
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.allclose(whole, expected, atol=tolerance)
    state, parts = layer.initial_state(2, q), []
    for part in (slice(0, CHUNK + 1), slice(CHUNK + 1, CHUNK + 2), slice(CHUNK + 2, tokens)):
        o, state = layer.extend(q[:, :, part], k[:, :, part], v[:, :, part], state)
        parts.append(o)
    assert torch.allclose(torch.cat(parts, 2), whole, atol=tolerance)
    assert attlas.state_bytes(state) == whole.element_size() * 2 * 3 * 32 * 33


def test_a_floor_at_zero_is_refused():
    for floor in (0.0, -1.0, float("nan")):
        with pytest.raises(BadInput, match="floor is the smallest denominator"):
            attlas.make_attend("l2vit", 3, 8, floor=floor)
