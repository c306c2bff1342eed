"""Flow attention: what flows is conserved."""

import math

import pytest
import torch

import attlas
from attlas.core.errors import BadInput
from attlas.mechanisms.linear import flow as flow_module
from attlas.mechanisms.linear.flow import flows
from attlas.ops.linear import CHUNK


def random_qkv(queries, keys, size=8, dtype=torch.float64):
    return [torch.randn(2, 3, tokens, size, dtype=dtype) for tokens in (queries, keys, keys)]


@pytest.mark.parametrize(("sinks", "sources"), [(16, 16), (21, 13), (9, 30)])
def test_flow_is_conserved(monkeypatch, sinks, sources):
    monkeypatch.setattr(flow_module, "EPS", 0.0)  # the identity holds but for what is added against 1 / 0
    q, k, _ = random_qkv(sinks, sources)
    _, into, out = flows(q.sigmoid(), k.sigmoid())
    assert torch.allclose(into.sum(-1), torch.full((2, 3), float(sources)).double(), rtol=1e-12)
    assert torch.allclose(out.sum(-1), torch.full((2, 3), float(sinks)).double(), rtol=1e-12)


def test_padding_takes_no_part_in_the_flow():
    q, k, v = random_qkv(9, 14)
    q_keep = torch.arange(9).expand(2, -1) != 4
    k_keep = torch.arange(14).expand(2, -1) < 11
    layer = attlas.make_attend("flow", 3, 8)
    got = layer(q, k, v, mask=attlas.Mask(keys=k_keep, queries=q_keep), cross=True)
    real = layer(q[:, :, q_keep[0]], k[:, :, :11], v[:, :, :11], cross=True)
    assert torch.allclose(got[:, :, q_keep[0]], real, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_a_single_source_gives_its_value_to_a_single_sink(causal):
    q, k, v = random_qkv(1, 1)
    assert torch.allclose(attlas.attend(q, k, v, "flow", causal=causal), v / (1 + math.exp(-1)), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_running_sums_over_many_chunks(dtype):
    tokens = 2 * CHUNK + 11
    q, k, v = random_qkv(tokens, tokens, dtype=dtype)
    layer = attlas.make_attend("flow", 3, 8, causal=True, clamp=5.0)
    whole = layer(q, k, v)
    state, parts = layer.initial_state(2, q), []
    for part in (slice(0, CHUNK + 1), slice(CHUNK + 1, CHUNK + 2), slice(CHUNK + 2, tokens)):
        o, state = layer.extend(q[:, :, part], k[:, :, part], v[:, :, part], state)
        parts.append(o)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.allclose(torch.cat(parts, 2), whole, atol=tolerance)
    layer.backend = "oracle"
    assert torch.allclose(layer(q.double(), k.double(), v.double()).to(dtype), whole, atol=tolerance)


def test_the_state_is_a_matrix_four_vectors_and_a_number():
    layer = attlas.make_attend("flow", 3, 8, causal=True)
    q, k, v = random_qkv(50, 50, dtype=torch.float32)
    for keep in (None, torch.arange(50).expand(2, -1) > 3):
        _, state = layer.extend(q, k, v, layer.initial_state(2, q), keep=keep)
        assert attlas.state_bytes(state) == 4 * 2 * 3 * (8 * 8 + 4 * 8 + 1) + 2 * 8  # and the counter
        assert state.tokens.tolist() == [50 if keep is None else 46] * 2


def test_half_of_the_sources_meet_the_published_clamp():
    q, k, v = random_qkv(64, 64)
    _, _, out = flows(q.sigmoid(), k.sigmoid())
    assert 0.3 < (out > 1).double().mean() < 0.7
    free = attlas.attend(q, k, v, "flow", clamp=math.inf)
    assert torch.allclose(attlas.attend(q, k, v, "flow", clamp=5.0), free)
    assert not torch.allclose(attlas.attend(q, k, v, "flow"), free)


def test_competition_and_allocation_weigh_every_pair():
    q, k, v = random_qkv(32, 32)
    into, conserved_into, out = flows(q.sigmoid(), k.sigmoid())
    weights = (q.sigmoid() @ k.sigmoid().mT) / into.unsqueeze(-1) * 32 * out.softmax(-1).unsqueeze(-2)
    expected = conserved_into.sigmoid().unsqueeze(-1) * (weights @ v)
    assert torch.allclose(attlas.attend(q, k, v, "flow", clamp=math.inf), expected, atol=1e-12)


def test_parameters_of_the_published_image_model():
    """Four stages; a scale on the channel mixer's path alone; one map of positions behind the stem."""
    dims, depths = (96, 192, 384, 768), (3, 3, 10, 3)
    total = 3 * 4**2 * 96 + 96 + 56**2 * 96 + 2 * 768 + 768 * 1000 + 1000
    for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        layer = attlas.mixer("flow", dim, 12)
        total += depth * (sum(p.numel() for p in layer.parameters()) + 4 * dim + 8 * dim**2 + 5 * dim + dim)
        if stage:
            total += 2**2 * dims[stage - 1] * dim + dim
    assert round(total / 1e6, 2) == 43.31


def test_what_has_no_meaning_is_refused():
    q, k, v = random_qkv(3, 5)
    with pytest.raises(BadInput, match="3 queries and 5 keys"):
        attlas.attend(q, k, v, "flow", causal=True)
    for clamp, causal in ((0.0, False), (math.nan, False), (math.inf, True)):
        with pytest.raises(BadInput, match="clamp"):
            attlas.make_attend("flow", 3, 8, causal=causal, clamp=clamp)
