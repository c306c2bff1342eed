"""The C++ kernels of softmax and sigmoid attention against the oracles, and as torch operators."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from attlas.core.errors import BackendUnavailable, BadInput
from attlas.core.mask import Mask
from attlas.kernels.cpu import attention
from attlas.ops.sigmoid import sigmoid_attention
from attlas.ops.softmax import softmax_attention

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}
OPS = {"softmax": (softmax_attention, {}), "sigmoid": (sigmoid_attention, {"shift": -math.log(50)})}


def relative_rms(got, expected):
    """RMS error, relative to the expected RMS or to the 0.1 that sums of about a hundred normal values come to."""
    error, size = (x.pow(2).mean().sqrt() for x in (got.double() - expected, expected))
    return float(error / size.clamp(min=0.1))


def tensors(batch, heads, groups, queries, keys, size, value_size, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, size), (batch, groups, keys, size), (batch, groups, keys, value_size)
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


def compare(name, arrays, mask, dtype):
    op, extra = OPS[name]
    exact = [x.detach().double().requires_grad_() for x in arrays]
    got = op(*arrays, mask, backend="cpu", **extra)
    expected = op(*exact, mask, backend="oracle", **extra)
    assert got.dtype == dtype
    assert relative_rms(got.detach(), expected.detach()) < TOLERANCE[dtype]
    seed = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(got, arrays, seed)
    for what, a, b in zip("qkv", grads, torch.autograd.grad(expected, exact, seed.double()), strict=True):
        assert relative_rms(a, b) < 2 * TOLERANCE[dtype], what


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    queries=st.integers(1, 140),
    keys=st.integers(1, 230),
    size=st.sampled_from([1, 7, 16, 33, 64, 80, 128]),
    value_size=st.sampled_from([1, 5, 16, 47, 64, 112]),
    causal=st.booleans(),
    padded=st.booleans(),
)
def test_odd_sizes(name, dtype, batch, groups, shared, queries, keys, size, value_size, causal, padded):
    arrays = tensors(batch, groups * shared, groups, queries, keys, size, value_size, dtype)
    keep = torch.rand(batch, keys, generator=torch.Generator().manual_seed(2)) > 0.3 if padded else None
    compare(name, arrays, Mask(causal=causal, keys=keep), dtype)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(name, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for heads, groups in ((1, 1), (6, 2)):
        compare(name, tensors(1, heads, groups, 300, 300, 32, 32, torch.float32), Mask(causal=True), torch.float32)


@pytest.mark.parametrize("name", OPS)
def test_strides_of_the_shell(name):
    op, extra = OPS[name]
    q, k, v = (x.detach() for x in tensors(2, 3, 3, 50, 50, 16, 16, torch.float32))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    flipped = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    expected = op(q, k, v, backend="cpu", **extra)
    got = op(*strided, backend="cpu", **extra)
    assert torch.equal(got, expected)
    assert got.transpose(1, 2).is_contiguous()  # merging the heads needs no copy
    assert torch.equal(op(*flipped, backend="cpu", **extra), expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_large_scores_do_not_overflow(dtype):
    q, k, v = (x.detach() for x in tensors(1, 2, 2, 70, 200, 16, 16, dtype))
    q = q * 3000
    expected = softmax_attention(q.double(), k.double(), v.double(), backend="oracle")
    assert relative_rms(softmax_attention(q, k, v, backend="cpu"), expected) < TOLERANCE[dtype]
    gated = sigmoid_attention(q, k, v, backend="cpu")
    assert relative_rms(gated, sigmoid_attention(q.double(), k.double(), v.double(), backend="oracle")) < 8e-3


@pytest.mark.parametrize("factor", [3e3, 1e6, 1e10, 1e18])
def test_gradients_at_large_scores(factor):
    arrays = tensors(1, 2, 2, 70, 70, 16, 16, torch.float32)
    found = []
    for backend, leaves in (("cpu", arrays), ("torch", arrays), ("oracle", [x.detach().double() for x in arrays])):
        q, k, v = (x.detach().requires_grad_() for x in leaves)
        o = softmax_attention(q * factor, k, v, backend=backend)
        found.append((o.detach(), *torch.autograd.grad(o.sum(), (v, k))))
    got, usual, expected = found
    assert all(x.isfinite().all() for x in got)
    for a, b, exact in list(zip(got, usual, expected, strict=True))[:2]:  # scores are rounded in float32 at best
        assert relative_rms(a, exact) < 3e-6 + 2 * relative_rms(b, exact)


def test_the_logarithm_of_the_sum():
    q, k, v = (x.detach() for x in tensors(1, 2, 1, 20, 90, 16, 16, torch.float32))
    _, lse = attention.softmax_attention(q, k, v, scale=0.3, causal=True)
    scores = (q.double() @ k.double().transpose(-1, -2)) * 0.3
    hidden = torch.arange(90) > torch.arange(70, 90)[:, None]
    assert torch.allclose(lse.double(), scores.masked_fill(hidden, -torch.inf).logsumexp(-1), atol=1e-5)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_hidden_may_be_anything(name, dtype, bad):
    op, extra = OPS[name]
    arrays = tensors(2, 2, 1, 100, 100, 16, 24, dtype)
    q, k, v = (x.detach() for x in arrays)
    keep = torch.rand(2, 100, generator=torch.Generator().manual_seed(2)) > 0.3
    keep[:, 80] = True
    expected = op(q, k, v, Mask(causal=True, keys=keep), backend="cpu", **extra)
    k[~keep[:, None, :, None].expand_as(k)] = bad  # padding
    v[~keep[:, None, :, None].expand_as(v)] = bad
    k[:, :, 80], v[:, :, 80, 3] = bad, bad  # the future of the first 80
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    got = op(q, k, v, Mask(causal=True, keys=keep), backend="cpu", **extra)
    assert torch.equal(got[:, :, :80], expected[:, :, :80])
    assert not torch.isfinite(got[:, :, 80:, 3]).any()
    for grad in torch.autograd.grad(got[:, :, :80].sum(), (q,)):
        assert torch.isfinite(grad[:, :, :80]).all()


@pytest.mark.parametrize("name", OPS)
def test_a_query_that_sees_nothing(name):
    arrays = tensors(2, 2, 2, 30, 20, 8, 8, torch.float32)  # the first ten of causal queries come before every key
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0] = False
    op, extra = OPS[name]
    o = op(*arrays, Mask(causal=True, keys=keep), backend="cpu", **extra)
    assert not o[0].any()
    assert not o[1, :, :10].any()
    assert o[1, :, 10:].any()
    for grad in torch.autograd.grad(o.sum(), arrays):
        assert torch.isfinite(grad).all()
        assert not grad[0].any()
        assert grad[1].any()


def test_no_keys():
    q, k, v = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 0, 4), torch.randn(1, 1, 0, 4)
    assert torch.equal(attention.softmax_attention(q, k, v, scale=1.0)[0], torch.zeros(1, 1, 3, 4))
    assert torch.equal(attention.sigmoid_attention(q, k, v, scale=1.0, shift=0.0), torch.zeros(1, 1, 3, 4))


@pytest.mark.parametrize("normalised", [True, False])
def test_as_an_operator(normalised):
    q, k, v = tensors(1, 2, 1, 5, 7, 4, 3, torch.float32)
    keep = torch.tensor([[True] * 5 + [False] * 2])
    library.opcheck(torch.ops.attlas.attention, (q, k, v, keep, 0.5, -1.0, True, normalised))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 4), torch.ones(1, 2, 6, 4)), "got .*5, 4.*6, 4"),
        ((torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 4)), "one size"),
        ((torch.ones(1, 3, 3, 4), torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4)), "multiple"),
        ((torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 4).half(), torch.ones(1, 2, 5, 4)), "all float32"),
        (
            (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4), torch.ones(1, 4).bool()),
            r"keep .*\(1, 4\)",
        ),
    ],
)
def test_bad_shapes(arrays, message):
    with pytest.raises(BadInput, match=message):
        attention.softmax_attention(*arrays, scale=1.0)


def test_what_it_refuses():
    q, k, v = tensors(1, 1, 1, 4, 4, 4, 4, torch.float32)
    for arrays, mask, extra, reason in (
        ((q.double(), k.double(), v.double()), None, {}, "float32 or bfloat16"),
        ((q, k, v), Mask.window(2), {}, "causality and padding only"),
        ((q, k, v), Mask.biased(torch.zeros(1, 1, 4, 4)), {}, "causality and padding only"),
        ((q, k, v), None, {"dropout": 0.1}, "drops no weights"),
    ):
        for op in (softmax_attention, sigmoid_attention):
            with pytest.raises(BackendUnavailable, match=reason):
                op(*arrays, mask, backend="cpu", **extra)
