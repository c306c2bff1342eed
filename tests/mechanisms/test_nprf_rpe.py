"""Normalised positive random features with relative positions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attlas
from attlas.core.errors import BackendUnavailable, BadInput, Unsupported
from attlas.core.grid import Grid
from attlas.ops import toeplitz
from attlas.ops.dispatch import record_choices
from attlas.ops.random_features import exponents
from attlas.ops.toeplitz import toeplitz_matrix


def random_qkv(tokens, size=8, heads=3, batch=2, dtype=torch.float64):
    return [torch.randn(batch, heads, tokens, size, dtype=dtype) for _ in "qkv"]


def build(heads=3, size=8, biased=True, **settings):
    layer = attlas.make_attend("nprf_rpe", heads, size, **settings).double()
    if biased:
        nn.init.normal_(layer.bias)
    return layer


def features(layer, x):
    return exponents(F.normalize(x, dim=-1), layer.projection).exp()


@pytest.mark.parametrize("tokens", [256, 257])
@pytest.mark.parametrize("causal", [False, True])
def test_transforms_equal_the_quadratic_form(tokens, causal):
    layer, qkv = build(1, 4, length=300, causal=causal, features=6), random_qkv(tokens, 4, 1, 1)
    qkv = [x.requires_grad_() for x in qkv]
    results = []
    for backend in ("fft", "torch"):
        layer.backend = backend
        o = layer(*qkv)
        results.append([o, *torch.autograd.grad(o.square().sum(), [*qkv, layer.bias])])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() < 1e-9


def test_without_biases_it_is_linear_attention():
    layer, (q, k, v) = build(biased=False, length=20), random_qkv(20)
    phi_q, phi_k = features(layer, q), features(layer, k)
    expected = phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(2).unsqueeze(-1))
    for backend in ("fft", "torch"):
        layer.backend = backend
        torch.testing.assert_close(layer(q, k, v), expected, rtol=0, atol=1e-12)


def test_more_features_come_closer_to_softmax_with_the_bias():
    q, k, v = random_qkv(128, 16, 4, 1)
    errors = []
    for count in (64, 256, 1024):
        torch.manual_seed(count)
        layer = build(4, 16, length=128, features=count)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT + toeplitz_matrix(layer.bias)
        expected = scores.softmax(-1) @ v
        errors.append(((layer(q, k, v) - expected).norm() / expected.norm()).item())
    for error, published in zip(errors, (0.27, 0.14, 0.08), strict=True):
        assert 0.6 * published < error < 1.2 * published


@pytest.mark.parametrize("tokens", [40, 200])
def test_later_tokens_move_no_bit(tokens, monkeypatch):
    monkeypatch.setattr(toeplitz, "BLOCK", 16)
    layer, (q, k, v) = build(length=tokens, causal=True, backend="fft"), random_qkv(tokens)
    first = layer(q, k, v)
    for j in (1, tokens // 2, tokens - 1):
        changed = [torch.cat([x[:, :, :j], 1e3 * torch.randn_like(x[:, :, j:])], 2) for x in (q, k, v)]
        assert torch.equal(layer(*changed)[:, :, :j], first[:, :, :j])


def test_a_ramp_of_biases_over_thousands_of_tokens_in_float32():
    tokens = 4096
    layer = attlas.make_attend("nprf_rpe", 1, 8, length=tokens, causal=True, features=4)
    nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layer.bias += 10 * (torch.arange(2 * tokens - 1) - tokens + 1).abs() / tokens
        q, k, v = random_qkv(tokens, 8, 1, 1, torch.float32)
        with record_choices() as choices:
            got = layer(q, k, v)
        assert [choice.backend for choice in choices] == ["fft"]
        later = torch.cat([v[:, :, : tokens // 2], torch.full_like(v[:, :, tokens // 2 :], 1000.0)], 2)
        assert torch.equal(layer(q, k, later)[:, :, : tokens // 2], got[:, :, : tokens // 2])
        stream, _ = layer.extend(*[x[:, :, :100] for x in (q, k, v)], layer.initial_state(1, q))
        torch.testing.assert_close(stream, got[:, :, :100], rtol=0, atol=1e-5)
        layer.backend = "torch"
        exact = layer.double()(q.double(), k.double(), v.double())
    assert ((got - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 3e-4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [12.0, 20.0, 60.0])
def test_a_large_bias_elsewhere_shrinks_no_small_sum(bias, causal):
    layer, qkv = build(length=32, causal=causal, biased=False), random_qkv(32, dtype=torch.float32)
    with torch.no_grad():
        layer.bias[:, :20] = bias
    expected = layer(*[x.double() for x in qkv])
    torch.testing.assert_close(layer.float()(*qkv).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["fft", "torch", "oracle"])
def test_zero_queries_and_keys_weigh_as_their_positions_do(backend, causal):
    layer, (q, k, v) = build(length=9, causal=causal, backend=backend), random_qkv(9)
    q[:, :, 4], k[:, :, 2] = 0, 0
    got = layer(q, k, v)
    layer.backend = "oracle"
    torch.testing.assert_close(got, layer(q, k, v))
    mapped = layer._map(torch.zeros(1, 8).double())
    torch.testing.assert_close(mapped, torch.full_like(mapped, layer.features**-0.5))
    layer.backend = backend
    alone = layer(q[:, :, :1] * 0, k[:, :, :1] * 0, v[:, :, :1])
    torch.testing.assert_close(alone, v[:, :, :1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_it_is_built_under_any_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        layers = [
            attlas.make_attend(name, 2, 4, **more) for name, more in (("nprf_rpe", {"length": 6}), ("performer", {}))
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in layers:
        assert layer.projection.dtype == dtype
        assert layer(*random_qkv(6, 4, 2, dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grid", [Grid((7, 9)), Grid((3, 4), prefix=2), Grid((9,), prefix=1)], ids=str)
def test_grids_equal_the_formula(grid, causal):
    layer = build(grid=grid, causal=causal, features=5)
    qkv = random_qkv(grid.tokens, batch=1)
    results = []
    for layer.backend in ("fft", "torch", "oracle"):
        results.append(layer(*qkv, grid=grid))
    for got in results[:2]:
        torch.testing.assert_close(got, results[2], rtol=0, atol=1e-11)


def test_a_smaller_grid_reads_the_offsets_that_it_has():
    layer, qkv = build(grid=(5, 6)), random_qkv(12)
    smaller = build(grid=(3, 4))
    smaller.projection = layer.projection
    smaller.bias = nn.Parameter(layer.bias[:, 2:-2, 2:-2])
    torch.testing.assert_close(layer(*qkv, grid=(3, 4)), smaller(*qkv))


def test_a_bias_for_all_offsets_changes_nothing_however_large():
    layer, qkv = build(length=30), random_qkv(30)
    first = layer(*qkv)
    with torch.no_grad():
        layer.bias += 1e4
    torch.testing.assert_close(layer(*qkv), first)


def test_norms_of_queries_and_keys_do_not_matter():
    layer, (q, k, v) = build(length=30), random_qkv(30)
    torch.testing.assert_close(layer(q * 1e3, k * torch.rand(2, 3, 30, 1).double(), v), layer(q, k, v))


@pytest.mark.parametrize("backend", ["fft", "torch"])
def test_queries_that_see_nothing_give_zero(backend):
    layer, qkv = build(length=40, causal=True, backend=backend), random_qkv(40)
    keep = (torch.arange(40) >= 7).expand(2, -1)
    o = layer(*qkv, mask=keep)
    assert not o[:, :, :7].any()
    torch.testing.assert_close(o[:, :, 7:], layer(*[x[:, :, 7:] for x in qkv]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_stream_goes_on_from_cached_features(dtype):
    layer, qkv = build(length=50, causal=True).to(dtype), random_qkv(50, dtype=dtype)
    whole, state, parts = layer(*qkv), layer.initial_state(2, qkv[0]), []
    for part in (slice(0, 20), slice(20, 21), slice(21, 50)):
        with torch.no_grad():
            o, state = layer.extend(*[x[:, :, part] for x in qkv], state)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    assert attlas.state_bytes(state) == dtype.itemsize * 2 * 3 * 50 * (64 + 9)
    with pytest.raises(BadInput, match="length=51 or more"):
        layer.extend(*[x[:, :, :1] for x in qkv], state)


def test_new_features_are_drawn_and_saved():
    layer, qkv = build(length=20), random_qkv(20)
    first, saved = layer(*qkv), {name: t.clone() for name, t in layer.state_dict().items()}
    layer.redraw()
    assert not torch.allclose(layer(*qkv), first)
    layer.load_state_dict(saved)
    assert torch.equal(layer(*qkv), first)


def learned_accuracy(name, back=5, tokens=24, words=8, steps=120, **settings):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(words, 32),
            "mixer": attlas.mixer(name, 32, 2, causal=True, **settings),
            "head": nn.Linear(32, words),
        }
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(steps):
        tokens_BN = torch.randint(words, (16, tokens))
        logits = model["head"](model["mixer"](model["embedding"](tokens_BN)))[:, back:]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens_BN[:, :-back].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((logits.argmax(-1) == tokens_BN[:, :-back]).float().mean())


def test_only_positions_can_copy_from_five_tokens_before():
    assert learned_accuracy("nprf_rpe", length=24, features=16) > 0.95
    assert learned_accuracy("performer", features=16) < 0.4


def test_what_has_no_meaning_is_refused():
    q, k, v = random_qkv(12)
    with pytest.raises(BadInput, match="pass length="):
        attlas.make_attend("nprf_rpe", 3, 8)
    with pytest.raises(BadInput, match="features"):
        build(length=4, features=0)
    with pytest.raises(Unsupported, match="2x2x2"):
        build(grid=(2, 2, 2))
    with pytest.raises(BadInput, match="length=12 or more"):
        build(length=11)(q, k, v)
    with pytest.raises(BadInput, match=r"grid=\(2, 6\) or more"):
        build(grid=(3, 4))(q, k, v, grid=(2, 6))
    with pytest.raises(BadInput, match="as many queries as keys"):
        build(grid=(3, 4))(q[:, :, :6], k, v, grid=(2, 3))
    with pytest.raises(Unsupported, match="cross"):
        build(length=12)(q, k, v, cross=True)
    with pytest.raises(BadInput, match="one axis"):
        build(grid=(3, 4), causal=True).initial_state(1, q)
    layer = build(length=12, causal=True, backend="fft")
    with pytest.raises(BackendUnavailable, match="as many queries as keys"):
        layer(q[:, :, :2], k, v)
    _, state = layer.extend(q[:, :, :5], k[:, :, :5], v[:, :, :5], layer.initial_state(2, q))
    with pytest.raises(BackendUnavailable, match="as many queries as keys"):
        layer.extend(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], state)
