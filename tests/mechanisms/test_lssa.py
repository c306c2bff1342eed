"""Softplus attention: the l1 frame, its stability, its entropy, and that parts add up."""

import math

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput
from attlas.ops.softplus import log_softplus, softplus_weights

DOUBLE = {"dtype": torch.float64}


def random_qk(queries=6, keys=6, heads=4, kv_heads=2, size=8):
    return (torch.randn(2, h, n, size, **DOUBLE) for h, n in ((heads, queries), (kv_heads, keys)))


def test_log_softplus_is_the_logarithm_of_softplus_where_that_has_digits():
    s = torch.linspace(-29.9, 50, 999, **DOUBLE)
    assert torch.allclose(log_softplus(s), F.softplus(s, threshold=100).log(), rtol=0, atol=1e-12)
    assert torch.allclose(log_softplus(s - 100), s - 100, rtol=0, atol=1e-7)
    far = torch.tensor([-1e30, -1e4, -30.0, 0.0, 1e4, 1e30], requires_grad=True)
    (grad,) = torch.autograd.grad(log_softplus(far).sum(), far)
    assert log_softplus(far).isfinite().all()
    assert grad.isfinite().all()
    assert torch.autograd.gradcheck(log_softplus, torch.tensor([-40.0, -29.0, 0.0, 3.0], **DOUBLE, requires_grad=True))


def test_where_softplus_is_an_exponential_it_is_softmax():
    q, k, v = torch.randn(3, 2, 4, 9, 8, **DOUBLE)
    attend = attlas.make_attend("lssa", 4, 8, scale=5 / math.log(9))
    low = attlas.Mask.biased(torch.full((9, 9), -60.0, **DOUBLE))
    expected = attlas.attend(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, scale=5.0)
    assert torch.allclose(attend(q, k, v, mask=low), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(attend(q, k, v), expected, atol=1e-2)


def test_the_size_of_queries_and_keys_does_not_matter():
    q, k, v = torch.randn(3, 2, 4, 9, 8, **DOUBLE)
    for name in ("lssa", "lssar"):
        attend = attlas.make_attend(name, 4, 8)
        assert torch.allclose(attend(q * 7, k / 5, v), attend(q, k, v), rtol=0, atol=1e-11)


def test_rows_sum_to_one_over_what_they_see():
    q, k = random_qk()
    seen = torch.rand(2, 4, 6, 6) > 0.4
    seen[0, 0, 2] = False
    weights = softplus_weights(q, k, attlas.Mask.pairs_(seen), 1.0)
    assert not weights[~seen].any()
    assert torch.allclose(weights.sum(-1), seen.any(-1).double(), rtol=0, atol=1e-12)


def test_lengths_are_of_rows_and_padding_is_not_counted():
    layer = attlas.mixer("lssa", 16, 2, causal=True).double()
    x = torch.randn(1, 9, 16, **DOUBLE)
    keep = torch.arange(9)[None] >= 4
    assert torch.allclose(layer(x, mask=keep)[:, 4:], layer(x[:, 4:]), rtol=0, atol=1e-12)
    assert torch.allclose(layer(x)[:, :5], layer(x[:, :5]), rtol=0, atol=1e-12)
    attend = layer.attend
    assert attend.scale == math.log(8)
    q, k = torch.randn(2, 1, 2, 5, 8, **DOUBLE)
    weights = attend(q, k, torch.eye(5, **DOUBLE).expand(1, 2, 5, 5))
    cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    phi = F.softplus(cosines * math.log(8) * torch.arange(1, 6, **DOUBLE).log()[:, None]).tril()
    assert torch.allclose(weights, phi / phi.sum(-1, keepdim=True), rtol=0, atol=1e-9)
    assert torch.equal(weights[:, :, 0, 0], torch.ones(1, 2, **DOUBLE))


@pytest.mark.parametrize("name", ["lssa", "lssar"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_of_ten_thousand_are_finite_in_every_precision(name, dtype):
    q, k, v = (torch.randn(1, 2, 40, 64) for _ in "qkv")
    q, k, v = (t.to(dtype).requires_grad_() for t in (q * 1e4, k, v))
    bias = 1e4 * torch.randn(40, 40)
    for causal in (False, True):
        o = attlas.attend(q, k, v, name, causal=causal, mask=bias)
        assert o.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(o.float().sum(), (q, k, v)))


def entropy(keys, scale):
    torch.manual_seed(keys)
    weights = softplus_weights(torch.randn(1, 1, 64, 64), torch.randn(1, 1, keys, 64), attlas.Mask(), scale)
    return -(weights * weights.clamp(min=1e-30).log()).sum(-1).mean()


def test_the_length_in_the_scale_holds_entropy_back():
    scale = 2.0  # scores of size 1; large ones make softplus a relu, whose weights no scale can change
    growing = torch.stack([entropy(n, scale) for n in (64, 512, 4096)])
    fixed = torch.stack([entropy(n, scale * math.log(64) / math.log(n)) for n in (64, 512, 4096)])
    assert growing[0] == fixed[0]
    assert (growing.diff() < fixed.diff() - 0.03).all()


def test_tiles_in_any_order_add_up_to_the_whole():
    q, k, v = torch.randn(3, 2, 4, 50, 8)
    attend = attlas.make_attend("lssa", 4, 8)
    above, below = torch.zeros(2, 4, 50, 8), torch.zeros(2, 4, 50, 1)
    for tile in torch.randperm(50).split(7):
        cosines = F.normalize(q, dim=-1) @ F.normalize(k[:, :, tile], dim=-1).mT
        phi = F.softplus(cosines * math.log(8) * math.log(50))
        above, below = above + phi @ v[:, :, tile], below + phi.sum(-1, keepdim=True)
    assert torch.allclose(attend(q, k, v), above / below, rtol=0, atol=1e-5)


def test_it_streams_at_the_length_of_each_row():
    layer = attlas.mixer("lssa", 16, 4, kv_heads=2, causal=True).double()
    x = torch.randn(2, 12, 16, **DOUBLE)
    whole, state, parts = layer(x), layer.initial_state(2), []
    for token in x.split(5, 1):
        y, state = layer.extend(token, state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["lssa", "lssar"])
def test_what_padding_holds_never_matters(name):
    q, k, v = torch.randn(3, 2, 2, 6, 8, **DOUBLE)
    keep = torch.arange(6).expand(2, -1) < 4
    attend = attlas.make_attend(name, 2, 8)
    expected = attend(q, k, v, mask=keep)
    k[:, :, 4:], v[:, :, 4:] = torch.nan, torch.inf
    assert torch.equal(attend(q, k, v, mask=keep), expected)


def test_what_has_no_meaning_is_refused():
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(BadInput, match="scale multiplies the cosines and is positive"):
            attlas.make_attend("lssa", 2, 8, scale=scale)
    with pytest.raises(BadInput, match="weight_dropout"):
        attlas.make_attend("lssa", 2, 8, weight_dropout=1.0)
