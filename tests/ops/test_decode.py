"""Decoding: every backend against the oracle over ragged, windowed, paged and int8 caches, and its errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

import attlas
from attlas.core.errors import BackendUnavailable, BadInput
from attlas.core.mask import Mask
from attlas.kernels.cpu import decode as kernel
from attlas.ops.decode import quantise_heads, softmax_decode
from attlas.ops.flash import merge
from attlas.ops.softmax import softmax_attention
from tests.contract import checks

TOLERANCE = {
    "cpu": {torch.float32: 3e-6, torch.bfloat16: 8e-3},
    "torch": checks.TOLERANCE,  # products of bfloat16 are rounded to it on the way
}
BACKENDS = list(TOLERANCE)
DTYPES = list(TOLERANCE["cpu"])


def relative_rms(got, expected):
    """RMS error, relative to the expected RMS or to the 0.1 that sums of about a hundred normal values come to."""
    error, size = (x.pow(2).mean().sqrt() for x in (got.double() - expected, expected))
    return float(error / size.clamp(min=0.1))


def tensors(batch, heads, groups, queries, keys, size, value_size, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, queries, size), (batch, groups, keys, size), (batch, groups, keys, value_size)
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def compare(backend, arrays, lengths=None, **kwargs):
    dtype = arrays[0].dtype
    expected, expected_lse = softmax_decode(*(x.double() for x in arrays), lengths, backend="oracle", **kwargs)
    o, lse = softmax_decode(*arrays, lengths, backend=backend, **kwargs)
    assert o.dtype == dtype
    tolerance = TOLERANCE[backend][dtype]
    assert relative_rms(o, expected) < tolerance
    empty = expected_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert torch.allclose(lse[~empty].double(), expected_lse[~empty], atol=4 * tolerance)
    assert not o[empty].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.integers(1, 6),
    queries=st.integers(1, 5),
    keys=st.integers(5, 700),
    size=st.sampled_from([1, 16, 33, 64, 96, 128]),
    value_size=st.sampled_from([1, 16, 47, 64, 112, 128]),
    window=st.sampled_from([None, 1, 7, 100]),
    sinks=st.integers(0, 20),
    ragged=st.booleans(),
    padded=st.booleans(),
    causal=st.booleans(),
)
def test_odd_sizes(
    backend, dtype, batch, groups, shared, queries, keys, size, value_size, window, sinks, ragged, padded, causal
):
    arrays = tensors(batch, groups * shared, groups, queries, keys, size, value_size, dtype)
    g = torch.Generator().manual_seed(1)
    compare(
        backend,
        arrays,
        torch.randint(0, keys + 1, (batch,), generator=g) if ragged else None,
        keep_BM=torch.rand(batch, keys, generator=g) > 0.3 if padded else None,
        window=window if causal else None,
        sinks=sinks if causal and window else 0,
        causal=causal,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("heads", "queries"), [(2, 1), (2, 3), (8, 1), (14, 2)])
def test_usual_sizes_side_by_side(dtype, size, heads, queries):
    arrays = tensors(2, heads, 2, queries, 1003, size, size, dtype)
    lengths = torch.tensor([1003, 517])
    for settings_ in ({}, {"causal": False}, {"window": 333, "sinks": 37}, {"window": 5, "sinks": 1}):
        compare("cpu", arrays, lengths, **settings_)


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
def test_any_number_of_threads(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    lengths = torch.tensor([3000, 0, 257, 2048, 1])
    for heads, groups in ((1, 1), (8, 2)):
        compare("cpu", tensors(5, heads, groups, 2, 3000, 32, 32, torch.float32), lengths)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_pages(backend, page_size):
    q, k, v = tensors(3, 4, 2, 2, 200, 16, 24, torch.float32)
    lengths = torch.tensor([200, 130, 7])
    per_sequence = -(-200 // page_size)
    order = torch.randperm(3 * per_sequence + 5, generator=torch.Generator().manual_seed(0))
    pages = order[: 3 * per_sequence].view(3, -1)
    caches = []
    for x in (k, v):
        cache = torch.full((len(order), 2, page_size, x.shape[3]), math.nan)
        rows = torch.nn.functional.pad(x, (0, 0, 0, per_sequence * page_size - 200), value=math.nan)
        cache[pages] = rows.unflatten(2, (per_sequence, page_size)).transpose(1, 2)
        caches.append(cache)
    used = torch.arange(per_sequence) * page_size < lengths[:, None]
    pages = torch.where(used, pages, -1)  # pages behind the end are never looked up
    expected, _ = softmax_decode(q.double(), k.double(), v.double(), lengths, window=50, sinks=3, backend="oracle")
    caches = [torch.where(x.isnan(), math.nan, x) for x in caches]
    o, _ = softmax_decode(q, *caches, lengths, window=50, sinks=3, pages_BP=pages, backend=backend)
    assert relative_rms(o, expected) < TOLERANCE[backend][torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_pages_need_no_lengths(backend):
    q, k, v = tensors(2, 4, 2, 1, 60, 16, 24, torch.float32)
    pages = torch.tensor([[2, 0, 1], [5, 3, 4]])
    caches = [torch.empty(6, 2, 20, x.shape[3]) for x in (k, v)]
    for cache, x in zip(caches, (k, v), strict=True):
        cache[pages] = x.unflatten(2, (3, 20)).transpose(1, 2)
    expected, _ = softmax_decode(q.double(), k.double(), v.double(), backend="oracle")
    o, _ = softmax_decode(q, *caches, pages_BP=pages, backend=backend)
    assert relative_rms(o, expected) < TOLERANCE[backend][torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "size"), [(2, 32), (8, 32), (6, 20), (2, 64), (8, 128)])
def test_int8_cache(backend, dtype, heads, size):
    q, k, v = tensors(2, heads, 2, 1, 500, size, size, torch.float32)
    (k8, k_scale), (v8, v_scale) = quantise_heads(k), quantise_heads(v * 3)
    assert relative_rms(k8 * k_scale[..., None, None], k.double()) < 0.012  # steps of 1/127 of the largest
    scales = (k_scale, v_scale)
    q = q.to(dtype)
    expected, _ = softmax_decode(q.double(), k8, v8, scales=tuple(s.double() for s in scales), backend="oracle")
    o, _ = softmax_decode(q, k8, v8, scales=scales, backend=backend)
    assert relative_rms(o, expected) < TOLERANCE[backend][dtype]
    exact, _ = softmax_decode(q.double(), k.double(), 3 * v.double(), backend="oracle")
    assert relative_rms(o, exact) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_hidden_may_be_anything(backend, dtype, bad):
    q, k, v = tensors(2, 4, 2, 1, 300, 32, 32, dtype)
    lengths, keep = torch.tensor([280, 100]), torch.arange(300).expand(2, -1) != 17
    kwargs = {"window": 60, "sinks": 20, "keep_BM": keep}
    expected = softmax_decode(q, k, v, lengths, backend=backend, **kwargs)[0]
    hidden = torch.zeros(2, 300, dtype=torch.bool)
    for b, length in enumerate(lengths):
        hidden[b, length:] = True
        hidden[b, 20 : length - 60] = True
    hidden |= ~keep
    k[hidden[:, None].expand(-1, 2, -1)] = bad
    v[hidden[:, None].expand(-1, 2, -1)] = bad
    assert torch.equal(softmax_decode(q, k, v, lengths, backend=backend, **kwargs)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("keys", "size"), [(50, 16), (300, 64)])
def test_what_one_head_sees_does_not_reach_the_others(dtype, keys, size, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # one worker takes a short sequence after the long one
    q, k, v = tensors(2, 6, 3, 1, keys, size, size, dtype)
    lengths = torch.tensor([keys, 5])
    expected = softmax_decode(q, k, v, lengths, backend="cpu")[0]
    k[0, 2], v[0, 2] = math.nan, math.inf
    o = softmax_decode(q, k, v, lengths, backend="cpu")[0]
    changed = torch.zeros(2, 6, dtype=torch.bool)
    changed[0, 4:] = True
    assert torch.equal(o[~changed], expected[~changed])
    assert o[changed].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_later_query_sees_does_not_reach_an_earlier_one(dtype):
    q, k, v = tensors(1, 2, 2, 3, 50, 16, 16, dtype)
    expected = softmax_decode(q, k, v, backend="cpu")[0]
    k[:, :, -1], v[:, :, -1] = math.nan, math.nan
    o = softmax_decode(q, k, v, backend="cpu")[0]
    assert torch.equal(o[:, :, :2], expected[:, :, :2])
    assert o[:, :, 2].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_cache_merge(backend):
    q, k, v = tensors(2, 4, 2, 1, 300, 16, 16, torch.float32)
    expected, expected_lse = softmax_decode(q, k, v, causal=False, backend=backend)
    parts = [
        softmax_decode(q, k[:, :, part], v[:, :, part], causal=False, backend=backend)
        for part in (slice(0, 111), slice(111, 300))
    ]
    o, lse = merge(*parts[0], *parts[1])
    assert torch.allclose(o, expected, atol=1e-6)
    assert torch.allclose(lse, expected_lse, atol=1e-5)


@pytest.mark.parametrize(("first", "last"), [(-20, 20), (20, -20)])
def test_the_largest_score_comes_late_or_early(first, last):
    q, k, v = tensors(1, 1, 1, 1, 2000, 16, 16, torch.float32)
    k = q / q.pow(2).sum() * torch.linspace(first, last, 2000)[:, None]
    compare("cpu", [q.expand(-1, 4, -1, -1), k, v], scale=1.0)


def test_a_layer_decodes_with_the_kernel(monkeypatch):
    layer = attlas.mixer("softmax", dim=32, heads=4, kv_heads=2, causal=True, backend="cpu").eval()
    x = torch.randn(2, 40, 32)
    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[0, :5] = False
    calls = []
    decode = kernel.softmax_decode
    monkeypatch.setattr(kernel, "softmax_decode", lambda *a, **kw: calls.append(a[0].shape[2]) or decode(*a, **kw))
    with torch.no_grad():
        whole = layer(x, mask=keep)
        _, state = layer.extend(x[:, :38], layer.initial_state(2), keep=keep[:, :38])
        y, _ = layer.extend(x[:, 38:], state, keep=keep[:, 38:])
    assert calls == [2]
    assert torch.allclose(y, whole[:, 38:], atol=1e-6)


def test_grouped_heads_and_padding_in_softmax_attention():
    q, k, v = tensors(2, 6, 2, 3, 100, 16, 16, torch.float32)
    mask = Mask(causal=True, keys=torch.rand(2, 100) > 0.5)
    expected = softmax_attention(q, k, v, mask, backend="oracle")
    assert torch.allclose(softmax_attention(q, k, v, mask, backend="cpu"), expected, atol=1e-6)


def test_as_an_operator():
    q, k, v = tensors(2, 4, 2, 1, 9, 4, 3, torch.float32)
    lengths = torch.tensor([9, 4])
    arguments = (q, k, v, lengths, None, None, None, None, 0.5, True, kernel.UNLIMITED, 0)
    library.opcheck(torch.ops.attlas.softmax_decode, arguments)


@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.mT.contiguous().mT], ids=["rows", "columns"])
def test_a_prepared_call_writes_what_the_operator_returns(layout):
    q, k, v = (layout(x) for x in tensors(2, 4, 2, 1, 300, 64, 64, torch.float32))
    run, o, lse, _kept = kernel.prepare(q, k, v, scale=0.125)
    o.zero_()
    assert run() == 0
    expected, expected_lse = softmax_decode(q, k, v, backend="cpu")
    assert torch.equal(o, expected)
    assert torch.equal(lse, expected_lse)


def test_it_refuses_gradients():
    q, k, v = tensors(1, 1, 1, 1, 4, 4, 4, torch.float32)
    q.requires_grad_()
    with pytest.raises(BackendUnavailable, match="no gradient"):
        softmax_decode(q, k, v, backend="cpu")
    o, _ = softmax_decode(q, k, v)
    (grad,) = torch.autograd.grad(o.sum(), q)
    assert grad.any()
    with torch.no_grad():
        softmax_decode(q, k, v, backend="cpu")


Q, K = torch.zeros(2, 4, 2, 8), torch.zeros(2, 2, 10, 8)


@pytest.mark.parametrize("backend", ["cpu", "torch", "oracle"])
@pytest.mark.parametrize(
    ("arrays", "kwargs", "message"),
    [
        ((Q, K, K[:, :, :9]), {}, "cache .*9, 8"),
        ((Q, K[:1], K[:1]), {}, "one batch size"),
        ((Q[:, :3], K, K), {}, "multiple of key/value heads"),
        ((Q, K.to(torch.int8), K.to(torch.int8)), {}, "quantise_heads"),
        ((Q, K, K.half()), {}, "got torch.float32 and torch.float16"),
        ((Q, K, K), {"scales": (torch.ones(2, 2),) * 2}, "only that"),
        ((Q, K[:, :, :1], K[:, :, :1]), {}, "cache is too short: it holds 1 keys, and the 2 queries"),
        ((Q, K, K, torch.tensor([10, 11])), {}, "between 0 and the 10 keys .*: sequence 1 has 11"),
        ((Q, K, K, torch.tensor([-1, 3])), {}, "sequence 0 has -1"),
        ((Q, K, K, torch.tensor([3])), {}, r"lengths should be \(2,\)"),
        ((Q, K, K), {"window": 0}, "window is at least 1"),
        ((Q, K, K), {"window": 3, "causal": False}, "needs causal=True"),
        ((Q, K, K), {"sinks": 3}, "sinks are .* window=None"),
        ((Q, K, K), {"keep_BM": torch.ones(2, 9, dtype=torch.bool)}, r"keep should be \(2, 10\)"),
        ((Q, K, K), {"keep_BM": torch.ones(2, 10)}, "keep is bool"),
        ((Q, K, K, torch.tensor([20, 30])), {"pages_BP": torch.tensor([[0, 1], [1, 0]])}, "sequence 1 has 30"),
        ((Q, K, K, torch.tensor([20, 10])), {"pages_BP": torch.tensor([[0, 2], [1, 9]])}, "names page 2, .* has 2"),
        ((Q, K, K), {"pages_BP": torch.zeros(3, 1, dtype=torch.long)}, r"pages is \(B, P\)"),
        (
            (Q, K, K),
            {"pages_BP": torch.zeros(2, 1, dtype=torch.long), "keep_BM": torch.ones(2, 10, dtype=torch.bool)},
            "not paged",
        ),
    ],
)
def test_bad_input(backend, arrays, kwargs, message):
    with pytest.raises(BadInput, match=message):
        softmax_decode(*arrays, backend=backend, **kwargs)
