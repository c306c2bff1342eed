"""What only heavy-hitter eviction holds: who stays, who goes, and that the cache never grows."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput


def tensors(tokens, heads=2, size=4):
    return [torch.randn(2, heads, tokens, size, dtype=torch.float64) for _ in "qkv"]


def seen_by(q, k, **settings):
    """Which keys each query of the first sequence and head sees, (N, N)."""
    v = torch.eye(q.shape[2], dtype=q.dtype).expand(*q.shape[:2], -1, -1)
    return attlas.attend(q, k, v, "h2o", causal=True, **settings)[0, 0] > 0


@pytest.mark.parametrize(("recent", "heavy"), [(12, 0), (0, 12), (5, 7), (100, 100), (5, 6)])
def test_a_cache_that_holds_everything_is_full_attention(recent, heavy):
    q, k, v = tensors(12)  # the last query sees what is cached and itself: 11 places do
    got = attlas.attend(q, k, v, "h2o", causal=True, recent=recent, heavy=heavy)
    torch.testing.assert_close(got, attlas.attend(q, k, v, causal=True), rtol=0, atol=1e-12)


def test_without_heavy_hitters_it_is_a_window():
    q, k, v = tensors(20)
    got = attlas.attend(q, k, v, "h2o", causal=True, recent=5, heavy=0)
    expected = attlas.attend(q, k, v, causal=True, mask=attlas.Mask.window(5, 0))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_heavy_key_is_never_evicted():
    q, k, _ = tensors(200, heads=1)
    q[..., 0], k[..., 0] = 2, 0
    k[:, :, 17, 0] = 4  # which every query is drawn to
    seen = seen_by(q, k, recent=4, heavy=3)
    assert seen[17:, 17].all()
    assert not seen_by(q, k, recent=7, heavy=0)[25:, 17].any()


def test_what_is_evicted_stays_away_and_the_newest_stay():
    q, k, _ = tensors(60, heads=1)
    seen = seen_by(q, k, recent=4, heavy=3)
    assert seen.sum(1).tolist() == [min(t + 1, 8) for t in range(60)]
    for t in range(60):
        assert seen[t, max(t - 4, 0) : t + 1].all()
        if t:
            assert not (seen[t, :t] & ~seen[t - 1, :t]).any()


def test_of_equal_attention_the_oldest_goes():
    q, k = torch.zeros(1, 1, 6, 4, dtype=torch.float64), torch.randn(1, 1, 6, 4, dtype=torch.float64)
    # All weights are equal, so what came later has received less: with one recent token the second newest goes.
    assert seen_by(q, k, recent=1, heavy=2)[5].nonzero().flatten().tolist() == [0, 1, 4, 5]
    # No token is attended to before its own turn, and a cache of one recent keeps the newest alone.
    assert seen_by(q, k, recent=1, heavy=0)[5].nonzero().flatten().tolist() == [4, 5]
    # Each has all of its own attention and nothing after: masses are equal, and the oldest go.
    q[...], k[...] = 1, torch.arange(6).view(6, 1) * 1e4
    layer = attlas.make_attend("h2o", 1, 4, causal=True, recent=0, heavy=2)
    _, state = layer.extend(q, k, k, layer.initial_state(1, k))
    assert state.token.flatten().sort().values.tolist() == [-1, 4, 5]


def test_padding_neither_stays_nor_counts():
    q, k, v = tensors(14)
    keep = torch.ones(2, 14, dtype=torch.bool)
    keep[:, [0, 5, 6, 11]] = False
    settings = {"causal": True, "recent": 3, "heavy": 2}
    padded = [t.masked_fill(~keep[:, None, :, None], torch.nan) for t in (q, k, v)]
    got = attlas.attend(*padded, "h2o", mask=keep, **settings)
    real = keep[0]
    expected = attlas.attend(*(t[:, :, real] for t in (q, k, v)), "h2o", **settings)
    torch.testing.assert_close(got[:, :, real], expected, rtol=0, atol=1e-12)
    assert not got[:, :, ~real].any()


@pytest.mark.parametrize(("dtype", "size", "tolerance"), [(torch.float16, 60, 1e-3), (torch.bfloat16, 3, 3e-3)])
def test_half_precision_neither_overflows_nor_rounds_scores(dtype, size, tolerance):
    q, k, v = (torch.randn(1, 2, 100, 64).to(dtype) for _ in "qkv")
    q, k, settings = size * q, size * k, {"recent": 8, "heavy": 8}
    got = attlas.attend(q, k, v, "h2o", causal=True, **settings)
    exact = attlas.attend(q.double(), k.double(), v.double(), "h2o", causal=True, backend="oracle", **settings)
    assert (got - exact).norm() < tolerance * exact.norm()


def test_a_padded_query_evicts_nobody():
    q, k, v = tensors(60)
    asks, real = torch.rand(2, 2, 60) > 0.3
    settings = {"causal": True, "recent": 1, "heavy": 2}
    for mask in (attlas.Mask(queries=asks), attlas.Mask(keys=real, queries=asks)):
        other = torch.randn_like(q).where(~asks[:, None, :, None], q)
        got, same = (attlas.attend(x, k, v, "h2o", mask=mask, **settings) for x in (q, other))
        oracle = attlas.attend(q, k, v, "h2o", mask=mask, backend="oracle", **settings)
        torch.testing.assert_close(got, oracle, rtol=0, atol=1e-12)
        assert torch.equal(got, same)
        assert not got.masked_select(~asks[:, None, :, None]).any()


def test_gradients_are_finite_whatever_padding_holds():
    keep = torch.ones(2, 14, dtype=torch.bool)
    keep[:, [0, 5, 6, 11]] = False
    inputs = [x.masked_fill(~keep[:, None, :, None], torch.nan).requires_grad_() for x in tensors(14)]
    gradients = []
    for backend in ("auto", "oracle"):
        o = attlas.attend(*inputs, "h2o", causal=True, mask=keep, backend=backend, recent=3, heavy=2)
        gradients.append(torch.autograd.grad(o.square().sum(), inputs))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got[:, :, keep[0]], expected[:, :, keep[0]], rtol=0, atol=1e-12)
        assert got.isfinite().all()


def test_counts():
    cost = attlas.make_attend("h2o", 2, 4, causal=True, recent=2, heavy=1).cost(3, 6)
    assert cost.pairs == 3 * 2 * (1 + 2 + 3 + 4 + 4 + 4)
    assert cost.flops == 4 * 4 * cost.pairs
    assert cost.executed == 4 * 4 * 3 * 2 * 6 * 4


def test_the_cache_never_grows():
    layer = attlas.mixer("h2o", 16, 2, causal=True, recent=3, heavy=3)
    x = torch.randn(1, 80, 16)
    state, sizes, parts = layer.initial_state(1), set(), []
    with torch.no_grad():
        for piece in x.split([1, 39, 1, 20, 19], 1):
            y, state = layer.extend(piece, state)
            sizes.add(attlas.state_bytes(state))
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=0, atol=1e-5)
    assert len(sizes) == 1
    assert (state.attend.token >= 0).sum(-1).tolist() == [[6, 6]]


def test_bad_inputs():
    for recent, heavy in ((0, 0), (-1, 4), (4, -1)):
        with pytest.raises(BadInput, match="a cache of at least one token"):
            attlas.mixer("h2o", 16, 2, causal=True, recent=recent, heavy=heavy)
    q, k, v = tensors(8)
    with pytest.raises(BadInput, match="every token is a query"):
        attlas.make_attend("h2o", 2, 4, causal=True)(q[:, :, 1:], k, v)
