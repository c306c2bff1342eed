"""NaLaFormer: the norm of the query sharpens, opposite signs do not meet."""

import math

import pytest
import torch

import attlas
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.ops.linear import CHUNK


def weights(q, k, name="nalaformer", **settings):
    """Without places: keys of another sequence."""
    layer = attlas.make_attend(name, q.shape[1], q.shape[3], **settings)
    values = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:3], -1)
    with torch.no_grad():
        return layer(q, k, values, cross=True)


def random_qkv(tokens, size=8, dtype=torch.float64):
    return [torch.randn(2, 3, tokens, size, dtype=dtype) for _ in "qkv"]


def entropy(p):
    return float(torch.special.entr(p).sum(-1).mean())


def test_weights_are_those_of_the_split_features():
    q, k, _ = random_qkv(20)
    norm = q.norm(dim=-1, keepdim=True)
    power = 3 * (0.5 + norm.tanh())
    positive, negative = ((sign * q / norm).relu() ** power for sign in (1, -1))
    expected = positive @ (k**3).relu().mT + negative @ (-(k**3)).relu().mT
    expected = expected / 20 / (expected.mean(-1, keepdim=True) + 1e-6)
    got = weights(q, k, kernel=0)
    assert torch.allclose(got, expected, atol=1e-12)
    assert (got >= 0).all()
    assert torch.allclose(got.sum(-1), torch.ones(2, 3, 20).double(), atol=1e-4)


def test_longer_queries_look_more_sharply():
    q, k, _ = random_qkv(64)
    short, same, long = (entropy(weights(c * q, k, kernel=0)) for c in (0.25, 0.5, 1.0))
    assert short > same > long
    # A homogeneous map with an L1 normaliser does not know the norm.
    relu = [weights(c * q, k, "l2vit", floor=1e-9) for c in (0.25, 1.0)]
    assert torch.allclose(relu[0], relu[1], atol=1e-12)


def test_opposite_signs_do_not_meet():
    q = torch.eye(4, dtype=torch.float64)[:1].expand(1, 1, 1, 4)
    k = torch.stack([q[0, 0, 0], -q[0, 0, 0]]).expand(1, 1, 2, 4)
    got = weights(q, k, kernel=0)
    assert got[0, 0, 0].tolist() == pytest.approx([1, 0], abs=1e-5)
    assert float(got[0, 0, 0, 1]) == 0


@pytest.mark.parametrize(("norm", "power"), [(0.0, 1.5), (math.atanh(0.5), 3.0), (50.0, 4.5)])
def test_the_power_lies_between_one_and_a_half_and_four_and_a_half(norm, power):
    layer = attlas.make_attend("nalaformer", 1, 4, kernel=0)
    assert float(layer._exponent(torch.tensor(norm))) == pytest.approx(power)


@pytest.mark.parametrize("name", ["nalaformer", "nalaformer_cos_sin"])
def test_a_query_of_norm_zero_gives_zero_and_finite_gradients(name):
    q, k, v = random_qkv(6)
    q[:, :, 2] = 0
    k[:, :, 3] = 0
    q, k = q.requires_grad_(), k.requires_grad_()
    results = []
    for backend in ("auto", "oracle"):
        o = attlas.make_attend(name, 3, 8, kernel=0, backend=backend)(q, k, v)
        results.append((o, *torch.autograd.grad(o.square().sum(), (q, k))))
    assert all(torch.isfinite(x).all() for x in results[0])
    for fast, literal in zip(*results, strict=True):
        assert torch.allclose(fast, literal, atol=1e-10)
    assert not results[0][0][:, :, 2].any()


def test_large_keys_fit_half_precision():
    q, k, v = random_qkv(6, dtype=torch.float16)
    o = attlas.make_attend("nalaformer", 3, 8, kernel=0)(q, 100 * k, v)  # 100³ is beyond float16
    assert o.dtype == torch.float16
    assert torch.isfinite(o).all()


def test_the_layer_is_the_published_one():
    layer = attlas.mixer("nalaformer", 64, 4, grid=(7, 9))
    assert sum(p.numel() for p in layer.parameters()) == 5 * (64 * 64 + 64) + 2 * 64 + 64 * 26
    x = torch.randn(2, 63, 64)
    layer.attend.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    with torch.no_grad():
        layer.output_norm.bias.normal_()
        gate = torch.nn.functional.silu(layer.gate_proj(x))
        assert torch.allclose(layer(x), layer.out_proj(gate * layer.output_norm.bias), atol=1e-6)


def test_the_convolution_is_added_to_the_attention():
    q, k, v = random_qkv(12)
    plain = attlas.make_attend("nalaformer", 3, 8, kernel=0)(q, k, v, grid=(3, 4))
    layer = attlas.make_attend("nalaformer", 3, 8, grid=(3, 4)).double()
    picture = v.transpose(2, 3).reshape(2, 24, 3, 4)
    local = layer.lepe(picture).reshape(2, 3, 8, 12).transpose(2, 3)
    assert torch.allclose(layer(q, k, v, grid=(3, 4)), plain + local, atol=1e-12)


def test_places_count_in_the_numerator_only():
    q, k, v = random_qkv(12)
    layer = attlas.make_attend("nalaformer", 3, 8, kernel=0)
    plane, line = layer(q, k, v, grid=(3, 4)), layer(q, k, v)
    placeless = layer(q, k, v, cross=True)
    assert not torch.allclose(plane, line)
    assert not torch.allclose(line, placeless)
    # All tokens at one place: prefix tokens stand at 0, as does the one position.
    assert torch.allclose(layer(q, k, v, grid=Grid((1, 1), prefix=11)), placeless, atol=1e-12)


def test_the_last_causal_query_sees_what_a_noncausal_one_sees():
    q, k, v = random_qkv(30)
    causal = attlas.make_attend("nalaformer", 3, 8, causal=True)
    assert causal.lepe is None
    whole = attlas.make_attend("nalaformer", 3, 8, kernel=0)(q, k, v)
    assert torch.allclose(causal(q, k, v)[:, :, -1], whole[:, :, -1], atol=1e-5)  # but for ε on a mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_stream_of_many_chunks(dtype):
    tokens = 2 * CHUNK + 11
    q, k, v = random_qkv(tokens, dtype=dtype)
    layer = attlas.make_attend("nalaformer", 3, 8, causal=True)
    whole = layer(q, k, v)
    state, parts = layer.initial_state(2, q), []
    for part in (slice(0, CHUNK + 1), slice(CHUNK + 1, CHUNK + 2), slice(CHUNK + 2, tokens)):
        o, state = layer.extend(q[:, :, part], k[:, :, part], v[:, :, part], state)
        parts.append(o)
        assert attlas.state_bytes(state) == whole.element_size() * 2 * 3 * 2 * 8 * (8 + 1)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    assert torch.allclose(torch.cat(parts, 2), whole, rtol=tolerance, atol=tolerance)


def test_what_has_no_meaning_is_refused():
    q, k, v = random_qkv(6)
    for settings in ({"power": 1.0}, {"offset": 0.0}, {"power": -3.0, "offset": -1.0}):
        with pytest.raises(BadInput, match="power"):
            attlas.make_attend("nalaformer", 3, 8, kernel=0, **settings)
    with pytest.raises(BadInput, match="key_power is at least 1"):
        attlas.make_attend("nalaformer", 3, 8, kernel=0, key_power=0.5)
    with pytest.raises(BadInput, match="pass grid="):
        attlas.make_attend("nalaformer", 3, 8)
    with pytest.raises(BadInput, match="odd, got 4"):
        attlas.make_attend("nalaformer", 3, 8, grid=(2, 3), kernel=4)
    layer = attlas.make_attend("nalaformer", 3, 8, kernel=0)
    with pytest.raises(BadInput, match="6 queries and 4 keys"):
        layer(q, k[:, :, :4], v[:, :, :4])
    with pytest.raises(BadInput, match="a multiple of 6, got 8"):
        layer(q, k, v, grid=(1, 2, 3))
    with pytest.raises(BadInput, match="one axis, got a grid 2x3: build and call it without grid="):
        attlas.make_attend("nalaformer", 3, 8, causal=True)(q, k, v, grid=(2, 3))
    built = attlas.make_attend("nalaformer", 3, 8, grid=(2, 3)).double()
    with pytest.raises(BadInput, match="built for 2 axes"):
        built(q, k, v, grid=(6,))
    with pytest.raises(BadInput, match="values of 8 features, got 5"):
        built(q, k, v[..., :5], grid=(2, 3))
