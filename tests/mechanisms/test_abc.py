"""Bounded-memory control: slots, their recurrence, their state."""

import pytest
import torch

import attlas
from attlas.core.errors import BackendUnavailable, BadInput
from attlas.mechanisms.linear.abc import CHUNK

DOUBLE = {"dtype": torch.float64}


def qkv(queries, keys, size=4):
    return [torch.randn(2, 3, tokens, size, **DOUBLE) for tokens in (queries, keys, keys)]


def build(**settings):
    torch.manual_seed(3)
    return attlas.make_attend("abc", 3, 4, **settings).double()


def recurrence(layer, q, k, v):
    """The paper's recurrence token by token, without any of the stable forms."""
    z_k = z_v = torch.zeros(())
    keys = values = torch.zeros(())
    rows = []
    for q_t, k_t, v_t in zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True):
        a_k, a_v = (k_t @ layer.keys).exp(), (v_t @ layer.values).exp()
        z_k, z_v = z_k + a_k, z_v + a_v
        keys = keys + a_k.unsqueeze(-1) * k_t.unsqueeze(-2)
        values = values + a_v.unsqueeze(-1) * v_t.unsqueeze(-2)
        reading = (keys / z_k.unsqueeze(-1) @ q_t.unsqueeze(-1)).squeeze(-1) * q.shape[3] ** -0.5
        rows.append((reading.softmax(-1).unsqueeze(-2) @ (values / z_v.unsqueeze(-1))).squeeze(-2))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("tokens", [1, CHUNK, 2 * CHUNK + 5])
def test_chunks_are_the_recurrence(tokens):
    layer, inputs = build(causal=True), qkv(tokens, tokens)
    assert torch.allclose(layer(*inputs), recurrence(layer, *inputs), atol=1e-12)


def test_the_last_causal_query_reads_the_noncausal_memory():
    inputs = qkv(70, 70)
    causal, free = build(causal=True), build()
    assert torch.allclose(causal(*inputs)[:, :, -1], free(*inputs)[:, :, -1], atol=1e-12)


def test_one_slot_gives_every_query_the_same_mean():
    layer, (q, k, v) = build(slots=1), qkv(5, 9)
    mean = (v @ layer.values).softmax(2).mT @ v
    assert torch.allclose(layer(q, k, v, cross=True), mean.expand(-1, -1, 5, -1), atol=1e-12)


def test_slots_that_each_hold_one_token_are_softmax_attention():
    layer, (q, k, v) = build(slots=4), qkv(6, 4)
    k[:], v[:] = torch.randn(4, 4, **DOUBLE), torch.randn(4, 4, **DOUBLE)
    with torch.no_grad():  # slot s scores token s alone, and so much that the others vanish
        layer.keys.copy_(1e3 * torch.linalg.inv(k[0, 0]))
        layer.values.copy_(1e3 * torch.linalg.inv(v[0, 0]))
    assert torch.allclose(layer(q, k, v, cross=True), attlas.attend(q, k, v, "softmax"), atol=1e-9)


@pytest.mark.parametrize("loudness", [1.0, 5000.0], ids=["quiet", "exponentials overflow"])
def test_any_segments_give_one_pass_however_loud_the_controls(loudness):
    layer, (q, k, v) = build(causal=True), qkv(80, 80)
    q, k, v = q / loudness, loudness * k, loudness * v
    whole, state, parts = layer(q, k, v), layer.initial_state(2, q), []
    for part in (slice(0, 1), slice(1, 50), slice(50, 51), slice(51, 80)):
        o, state = layer.extend(q[:, :, part], k[:, :, part], v[:, :, part], state)
        parts.append(o)
    assert torch.allclose(torch.cat(parts, 2), whole, atol=1e-10 * loudness)
    layer.backend = "oracle"
    assert torch.allclose(whole, layer(q, k, v), atol=1e-10 * loudness)


@pytest.mark.parametrize("tokens", [1, 50, 200])
def test_the_memory_is_bounded(tokens):
    layer = build(causal=True)
    q, k, v = (x.float() for x in qkv(tokens, tokens))
    layer = layer.float()
    _, state = layer.extend(q, k, v, layer.initial_state(2, q))
    assert attlas.state_bytes(state) == 4 * 2 * 3 * 2 * (16 * 4 + 16)


def test_a_stream_that_begins_with_padding():
    layer, (q, k, v) = build(causal=True), qkv(12, 12)
    keep = (torch.arange(12) >= 5).expand(2, -1)
    state = layer.initial_state(2, q)
    _, state = layer.extend(*(x[:, :, :3] for x in (q, k, v)), state, keep=keep[:, :3])
    o, _ = layer.extend(*(x[:, :, 3:] for x in (q, k, v)), state, keep=keep[:, 3:])
    assert not o[:, :, :2].any()
    assert torch.allclose(o[:, :, 2:], layer(*(x[:, :, 5:] for x in (q, k, v))), atol=1e-12)


def test_queries_are_the_last_of_the_keys():
    layer, (q, k, v) = build(causal=True), qkv(50, 50)
    assert torch.allclose(layer(q[:, :, -3:], k, v), layer(q, k, v)[:, :, -3:], atol=1e-12)
    with pytest.raises(BadInput, match="50 queries and 20 keys"):
        layer(q, k[:, :, :20], v[:, :, :20])


def test_causal_cross_attention_reads_all_of_the_memory():
    layer, (q, k, v) = build(causal=True), qkv(5, 9)
    assert torch.allclose(layer(q, k, v, cross=True), build()(q, k, v, cross=True), atol=1e-12)
    assert torch.allclose(layer(q[:, :, :2], k, v, cross=True), layer(q, k, v, cross=True)[:, :, :2], atol=1e-12)


def test_what_does_not_fit_is_refused():
    with pytest.raises(BackendUnavailable, match="'triton'"):
        build(backend="triton")
    with pytest.raises(BadInput, match="slots"):
        build(slots=0)
    q, k, v = qkv(5, 5)
    with pytest.raises(BadInput, match="values of 4 features, got 3"):
        build()(q, k, v[..., :3])
