"""cosFormer: the cosine of the distance is a sum of two products."""

import math

import pytest
import torch

import attlas
from attlas.core.errors import BadInput
from attlas.ops.linear import CHUNK


def random_qkv(queries, keys=None, size=16, dtype=torch.float64):
    keys = queries if keys is None else keys
    return [torch.randn(2, 3, tokens, size, dtype=dtype) for tokens in (queries, keys, keys)]


def build(**settings):
    return attlas.make_attend("cosformer", 3, 16, **settings)


def test_equal_features_leave_the_cosine_of_the_distance():
    tokens = 12
    ones = torch.ones(2, 3, tokens, 16, dtype=torch.float64)
    values = torch.eye(tokens, 16, dtype=torch.float64).expand(2, 3, -1, -1)
    weights = build(length=tokens)(ones, ones, values)[0, 0, :, :tokens]
    places = torch.arange(tokens, dtype=torch.float64)
    cosine = (math.pi / 2 * (places[:, None] - places) / tokens).cos()
    torch.testing.assert_close(weights, cosine / cosine.sum(-1, keepdim=True))
    assert (weights > 0).all()


def test_long_lengths_leave_plain_relu_attention():
    q, k, v = random_qkv(30)
    weights = q.relu() @ k.relu().mT
    expected = weights @ v / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(build(length=10**6)(q, k, v), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("queries", "keys"), [(10, 20), (20, 10)])
def test_a_noncausal_layer_without_a_length_takes_the_longer_sequence(queries, keys):
    q, k, v = random_qkv(queries, keys)
    got = build()(q, k, v, cross=True)
    assert torch.equal(got, build(length=20)(q, k, v, cross=True))
    assert torch.equal(got, build(length=8)(q, k, v, cross=True))
    assert not torch.allclose(got, build(length=40)(q, k, v, cross=True))


@pytest.mark.parametrize("front", [0, 4])
@pytest.mark.parametrize("length", [None, 5])
def test_padding_does_not_stretch_the_cosine(front, length):
    q, k, v = random_qkv(30)
    keep = torch.zeros(2, 30, dtype=torch.bool)
    keep[0, front : front + 9], keep[1, front : front + 14] = True, True
    got = build(length=length)(q, k, v, mask=keep)
    for b, tokens in enumerate((9, 14)):
        real = slice(front, front + tokens)
        alone = build(length=length)(*(x[b : b + 1, :, real] for x in (q, k, v)))
        torch.testing.assert_close(got[b : b + 1, :, real], alone)
    assert not got[:, :, 20:].any()


@pytest.mark.parametrize(("queries", "keys"), [(8, 12), (12, 8)])
def test_padding_does_not_stretch_the_cosine_where_lengths_differ(queries, keys):
    q, k, v = random_qkv(queries, keys)
    longer = [torch.nn.functional.pad(x, (0, 0, 0, 20)) for x in (q, k, v)]
    real_q, real_k = ((torch.arange(n + 20) < n).expand(2, -1) for n in (queries, keys))
    mask = attlas.Mask(keys=real_k, queries=real_q)
    got = build()(*longer, mask=mask, cross=True)[:, :, :queries]
    torch.testing.assert_close(got, build()(q, k, v, cross=True))
    only_keys = build()(q, *longer[1:], mask=attlas.Mask(keys=real_k), cross=True)
    torch.testing.assert_close(only_keys, build()(q, k, v, cross=True))


def test_padding_does_not_stretch_the_cosine_for_the_last_positions():
    q, k, v = random_qkv(30)
    keep = (torch.arange(30) < 12).expand(2, -1)
    whole = build()(q, k, v, mask=keep)
    torch.testing.assert_close(build()(q[:, :, 3:], k, v, mask=keep), whole[:, :, 3:])


def test_both_sequences_of_cross_attention_count_from_their_start():
    _, _, v = random_qkv(4, 8)
    ones_q, ones_k = torch.ones(2, 3, 4, 16).double(), torch.ones(2, 3, 8, 16).double()
    o = build()(ones_q, ones_k, v, cross=True)
    distance = torch.arange(4.0).double()[:, None] - torch.arange(8.0).double()
    cosine = (math.pi / 2 * distance / 8).cos()
    torch.testing.assert_close(o, cosine / cosine.sum(-1, keepdim=True) @ v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_stream_over_many_chunks(dtype):
    tokens = 2 * CHUNK + 11
    layer, qkv = build(causal=True, length=tokens), random_qkv(tokens, dtype=dtype)
    whole, state, parts = layer(*qkv), layer.initial_state(2, qkv[0]), []
    for part in (slice(0, CHUNK + 1), slice(CHUNK + 1, CHUNK + 2), slice(CHUNK + 2, tokens)):
        o, state = layer.extend(*[x[:, :, part] for x in qkv], state)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    assert attlas.state_bytes(state) == dtype.itemsize * 2 * 3 * 2 * 16 * 17
    with pytest.raises(BadInput, match=f"length={tokens + 1} or more"):
        layer.extend(*[x[:, :, :1] for x in qkv], state)


def test_queries_without_a_positive_feature_give_zero():
    q, k, v = (x.requires_grad_() for x in random_qkv(9))
    o = build()(-q.abs(), k, v)
    assert not o.any()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(o.sum(), (q, k, v)))


def test_weights_stay_positive_at_the_far_end_in_float32():
    tokens = 4096
    ones = torch.ones(1, 1, tokens, 4)
    v = torch.zeros(1, 1, tokens, 4)
    v[:, :, 0] = 1.0
    o = attlas.make_attend("cosformer", 1, 4, length=tokens)(ones, ones, v)
    assert 0 < o[0, 0, -1, 0] < 1e-6
    assert (o >= 0).all()


def test_what_has_no_meaning_is_refused():
    with pytest.raises(BadInput, match="pass length="):
        build(causal=True)
    with pytest.raises(BadInput, match="eps"):
        build(eps=0.0)
    with pytest.raises(BadInput, match="length=9 or more"):
        build(causal=True, length=8)(*random_qkv(9))
