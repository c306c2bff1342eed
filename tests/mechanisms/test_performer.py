"""FAVOR+: an unbiased estimate of softmax attention."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput
from attlas.ops.linear import CHUNK
from attlas.ops.random_features import exponents, orthogonal_gaussian


def random_qkv(queries, keys=None, size=8, scale=1.0, dtype=torch.float64):
    keys = queries if keys is None else keys
    return [torch.randn(2, 3, n, size, dtype=dtype) * s for n, s in ((queries, scale), (keys, scale), (keys, 1))]


def build(size=8, **settings):
    torch.manual_seed(0)
    return attlas.make_attend("performer", 3, size, **settings).double()


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("sign", [1, -1])
def test_features_estimate_the_exponential_without_bias(sign):
    x, y = torch.eye(4, dtype=torch.float64)[0] * 0.7, sign * torch.tensor([0.5, 0.1, 0.0, -0.1], dtype=torch.float64)
    w = orthogonal_gaussian(40_000, 4)
    for direction in (x, -x):  # a preferred side would show
        products = exponents(direction, w).exp() * exponents(y, w).exp()
        assert (products.mean() - (direction @ y).exp()).abs() < 4 * products.std() / 200
    assert w.mean(0).abs().max() < 4 / 200


def test_rows_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones():
    w = orthogonal_gaussian(1000, 8)
    assert w.shape == (1000, 8)
    blocks = w.unflatten(0, (-1, 8))
    products = blocks @ blocks.mT
    assert (products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
    assert 7.5 < w.square().sum(1).mean() < 8.5  # that of a chi-squared variable
    assert 2 < w.square().sum(1).std() < 6
    cut = orthogonal_gaussian(5, 8)
    assert (cut @ cut.mT).triu(1).abs().max() < 1e-4


def test_orthogonal_rows_err_less_than_independent_ones():
    x, y = torch.randn(2, 50, 8, dtype=torch.float64) * 0.5
    exact = (x * y).sum(-1).exp()

    def error(draw):
        torch.manual_seed(1)
        estimates = [(exponents(x, w).exp() * exponents(y, w).exp()).mean(-1) for w in (draw() for _ in range(300))]
        return float((torch.stack(estimates) - exact).square().mean())

    assert error(lambda: orthogonal_gaussian(8, 8)) < 0.9 * error(lambda: torch.randn(8, 8))


@pytest.mark.parametrize("causal", [False, True])
def test_more_features_come_closer_to_softmax(causal):
    q, k, v = random_qkv(40, scale=0.4)
    expected = attlas.attend(q, k, v, "softmax", causal=causal)
    errors = [relative(build(features=r, causal=causal)(q, k, v), expected) for r in (32, 512, 8192)]
    assert errors[2] < errors[1] / 2 < errors[0] / 4
    assert errors[2] < 0.05


def test_causal_outputs_are_those_of_the_tokens_up_to_their_own():
    tokens = CHUNK + 10
    q, k, v = random_qkv(tokens, scale=3.0)
    causal, noncausal = (build(features=16, causal=c, eps=1e-3) for c in (True, False))
    o = causal(q, k, v)
    for t in (1, 2, CHUNK, CHUNK + 1, tokens):
        alone = noncausal(q[:, :, t - 1 : t], k[:, :, :t], v[:, :, :t])
        torch.testing.assert_close(o[:, :, t - 1 : t], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_large_key_to_come_moves_no_bit(dtype):
    layer = build(causal=True, features=32).to(dtype)
    q, k, v = random_qkv(60, dtype=dtype)
    first = layer(q, k, v)
    k[:, :, 40:] = 30 * layer.projection[0] / layer.projection[0].norm()
    k[:, :, 50:] = 1e18  # |k|² is as large as float32 knows
    v[:, :, 40:] = 1e8
    second = layer(q, k, v)
    assert torch.equal(second[:, :, :40], first[:, :, :40])
    assert torch.isfinite(second).all()


def test_padding_sets_no_maximum():
    layer, (q, k, v) = build(features=16), random_qkv(9, 14)
    keep = (torch.arange(14) < 11).expand(2, -1)
    k[:, :, 11:] *= 100
    got = layer(q, k, v, mask=keep, cross=True)
    torch.testing.assert_close(got, layer(q, k[:, :, :11], v[:, :, :11], cross=True))


@pytest.mark.parametrize("causal", [False, True])
def test_large_norms_stay_finite_in_float32(causal):
    layer = attlas.make_attend("performer", 3, 64, causal=causal)
    inputs = [x.requires_grad_() for x in random_qkv(100, size=64, scale=100.0, dtype=torch.float32)]
    o = layer(*inputs)
    grads = torch.autograd.grad(o.sum(), inputs)
    assert all(torch.isfinite(t).all() for t in (o, *grads))
    assert o.abs().max() <= inputs[2].abs().max() * 1.001  # an average of values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_stream_over_many_chunks(dtype):
    tokens = 2 * CHUNK + 11
    layer, qkv = build(causal=True, features=16).to(dtype), random_qkv(tokens, scale=2.0, dtype=dtype)
    whole, state, parts = layer(*qkv), layer.initial_state(2, qkv[0]), []
    for part in (slice(0, CHUNK + 1), slice(CHUNK + 1, CHUNK + 2), slice(CHUNK + 2, tokens)):
        o, state = layer.extend(*[x[:, :, part] for x in qkv], state)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-11 if dtype == torch.float64 else 2e-5)
    assert attlas.state_bytes(state) == dtype.itemsize * 2 * 3 * (16 * 9 + 9 + 1)


def test_new_features_are_drawn_and_saved():
    layer, qkv = build(features=16), random_qkv(20)
    first, saved = layer(*qkv), {name: t.clone() for name, t in layer.state_dict().items()}
    layer.redraw(torch.Generator().manual_seed(5))
    second = layer(*qkv)
    assert not torch.allclose(second, first)
    layer.redraw(torch.Generator().manual_seed(5))
    assert torch.equal(layer(*qkv), second)
    layer.load_state_dict(saved)
    assert torch.equal(layer(*qkv), first)


def test_by_default_every_feature_has_a_millionth_of_the_largest():
    layer, (q, k, v) = build(), random_qkv(20, scale=3.0)
    assert layer.features == 256
    torch.testing.assert_close(layer(q, k, v), build(features=256, eps=1e-6)(q, k, v), rtol=0, atol=0)
    assert not torch.allclose(layer(q, k, v), build(features=256, eps=2e-6)(q, k, v), rtol=0, atol=1e-9)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(BadInput, match="features"):
        build(features=0)
    for eps in (0.0, 1.0, float("nan")):
        with pytest.raises(BadInput, match="eps"):
            build(eps=eps)
