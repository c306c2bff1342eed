"""Three rules of conditioning: Hebb's, Rescorla and Wagner's, and a fading one."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput

RULES = ("pavlovian_hebb", "pavlovian_delta", "pavlovian_oja")


def random_qkv(tokens, size=8, dtype=torch.float64):
    return [torch.randn(2, 3, tokens, size, dtype=dtype) for _ in "qkv"]


def fixed(name):
    return {"rate": 0.6} if name == "pavlovian_delta" else {}


def test_hebb_is_linear_attention_without_a_feature_map():
    q, k, v = random_qkv(150)
    memory = v.mT @ k
    assert torch.allclose(attlas.attend(q, k, v, "pavlovian_hebb"), q @ memory.mT, atol=1e-12)
    weights = (q @ k.mT).tril()
    assert torch.allclose(attlas.attend(q, k, v, "pavlovian_hebb", causal=True), weights @ v, atol=1e-12)


def test_delta_recalls_independent_pairs_exactly_after_enough_trials():
    size, repeats = 8, 100
    k, v = torch.randn(2, 1, 1, size, size, dtype=torch.float64)
    k = torch.nn.functional.normalize(torch.eye(size) + 0.1 * k, dim=-1)  # independent, not orthogonal
    layer = attlas.make_attend("pavlovian_delta", 1, size, causal=True, rate=0.9)
    _, state = layer.extend(*(x.repeat(1, 1, repeats, 1) for x in (k, k, v)), layer.initial_state(1, k))
    assert torch.allclose(k @ state.sums, v, atol=1e-6)
    hebb = attlas.make_attend("pavlovian_hebb", 1, size)
    assert (hebb(k, k, v) - v).abs().max() > 0.1


def test_delta_with_rate_1_recalls_the_last_trial_whatever_came_before():
    _, k, v = random_qkv(9)
    k = k * 4
    recalled = attlas.attend(k, k, v, "pavlovian_delta", causal=True, rate=1.0)
    assert torch.allclose(recalled, v, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_delta_stays_bounded_for_keys_of_any_length(scale):
    _, k, v = random_qkv(500)
    layer = attlas.make_attend("pavlovian_delta", 3, 8, causal=True, rate=1.0)
    recalled = layer(k * scale, k * scale, v)
    assert recalled.norm(dim=-1).max() <= v.norm(dim=-1).max() * 8


def test_the_rates_of_delta_are_learned_per_head_from_a_half_on():
    layer = attlas.make_attend("pavlovian_delta", 3, 8, causal=True)
    assert [(name, tuple(p.shape)) for name, p in layer.named_parameters()] == [("rate_logit", (3,))]
    q, k, v = random_qkv(9)
    half = attlas.attend(q, k, v, "pavlovian_delta", causal=True, rate=0.5)
    assert torch.allclose(layer.double()(q, k, v), half, atol=1e-12)


def test_oja_without_decay_is_hebb_times_the_rate():
    q, k, v = random_qkv(20)
    hebb = attlas.attend(q, k, v, "pavlovian_hebb", causal=True)
    assert torch.allclose(attlas.attend(q, k, v, "pavlovian_oja", causal=True, rate=0.3, decay=0.0), 0.3 * hebb)


def test_oja_forgets_by_a_share_of_each_later_trial():
    q, k, v = random_qkv(6)
    v[:, :, 1:] = 0
    k, q = k[:, :, :1].expand_as(k), q[:, :, :1].expand_as(q)
    o = attlas.attend(q, k, v, "pavlovian_oja", causal=True, rate=0.5, decay=0.4)
    assert torch.allclose(o, o[:, :, :1] * (1 - 0.5 * 0.4) ** torch.arange(6.0).double()[:, None], atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_many_chunks_and_segments_in_float32(name):
    q, k, v = random_qkv(203, dtype=torch.float32)
    layer = attlas.make_attend(name, 3, 8, causal=True, **fixed(name))
    whole = layer(q, k, v)
    state, parts = layer.initial_state(2, q), []
    for part in (slice(0, 65), slice(65, 66), slice(66, 203)):
        o, state = layer.extend(q[:, :, part], k[:, :, part], v[:, :, part], state)
        parts.append(o)
    scale = whole.abs().max()
    assert torch.allclose(torch.cat(parts, 2) / scale, whole / scale, atol=1e-5)
    layer.backend = "oracle"
    assert torch.allclose(layer(q.double(), k.double(), v.double()) / scale, whole.double() / scale, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("name", "params"), [("pavlovian_hebb", {}), ("pavlovian_oja", {"decay": 1e-3})])
def test_sums_beyond_float16_are_normed_away(name, params, backend):
    """A read-out passes 65504, and the norm of the shell brings it back."""
    layer = attlas.mixer(name, 64, 1, causal=True, backend=backend, **params)
    x = 0.5 * torch.randn(1, 2048, 64) + 4 * torch.randn(1, 1, 64)
    expected = layer(x)
    with torch.autocast("cpu", torch.float16):
        mixed = layer(x)
    for y in (mixed, layer.half()(x.half())):
        assert (y - expected).norm() < 3e-2 * expected.norm()  # a test whose products nearly cancel is rounded more


def test_a_model_laid_out_on_meta_keeps_its_rate_of_forgetting():
    with torch.device("meta"):
        layer = attlas.make_attend("pavlovian_oja", 3, 8, causal=True)
    q, k, v = random_qkv(5)
    assert torch.equal(layer(q, k, v), attlas.attend(q, k, v, "pavlovian_oja", causal=True))


@pytest.mark.parametrize("name", RULES)
def test_the_state_is_one_matrix_per_head(name):
    layer = attlas.make_attend(name, 3, 8, causal=True, **fixed(name))
    assert attlas.state_bytes(layer.initial_state(2, torch.zeros(1, dtype=torch.bfloat16))) == 2 * 3 * 8 * 8 * 4


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("pavlovian_delta", {"rate": 0.0}, r"rate is a share of the difference, in \(0, 1\]"),
        ("pavlovian_delta", {"rate": 1.5}, "or None to learn it, got 1.5"),
        ("pavlovian_oja", {"rate": 0.0}, "rate is the share of a trial"),
        ("pavlovian_oja", {"rate": float("nan")}, "rate is the share of a trial"),
        ("pavlovian_oja", {"rate": 0.5, "decay": 2.0}, r"a share in \[0, 1\), got 0.5 x 2.0"),
        ("pavlovian_oja", {"decay": -0.1}, "rate times decay"),
    ],
)
def test_rates_without_a_meaning_are_refused(name, params, message):
    with pytest.raises(BadInput, match=message):
        attlas.make_attend(name, 1, 8, causal=True, **params)


@pytest.mark.parametrize("name", RULES[1:])
def test_more_queries_than_keys_are_refused(name):
    q, k, v = random_qkv(5)
    with pytest.raises(BadInput, match="queries are the last of the keys' positions"):
        attlas.attend(q, k[:, :, :4], v[:, :, :4], name, causal=True, **fixed(name))
