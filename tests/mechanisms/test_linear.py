"""Linear attention: the product in chunks, its denominators, its memory."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BackendUnavailable
from attlas.ops.linear import CHUNK, feature_product

DOUBLE = {"dtype": torch.float64}


@pytest.mark.parametrize(("queries", "keys"), [(CHUNK, CHUNK), (2 * CHUNK + 9,) * 2, (70, 150), (150, 70), (1, 90)])
@pytest.mark.parametrize("causal", [False, True])
def test_chunks_equal_the_sum_over_pairs(queries, keys, causal):
    q, k, v = torch.randn(2, 3, queries, 5, **DOUBLE), torch.randn(2, 3, keys, 5, **DOUBLE), torch.randn(2, 3, keys, 7)
    inputs = [q, k, v.double(), torch.randn(2, 3, 5, 7, **DOUBLE)]
    inputs = [x.requires_grad_() for x in inputs]
    results = [feature_product(*inputs, causal=causal, backend=name) for name in ("torch", "oracle")]
    seeds = [torch.randn_like(x) for x in results[0]]
    for got, expected in zip(*results, strict=True):
        assert torch.allclose(got, expected, atol=1e-10)
    for got, expected in zip(*(torch.autograd.grad(r, inputs, seeds) for r in results), strict=True):
        assert torch.allclose(got, expected, atol=1e-10)


def test_the_kernel_serves_what_it_says():
    q, k, v = torch.randn(3, 1, 2, 100, 8)
    with pytest.raises(BackendUnavailable, match="two matrix products"):
        feature_product(q, k, v, backend="cpu")
    with pytest.raises(BackendUnavailable, match="not 3 and 100"):
        feature_product(q[:, :, -3:], k, v, causal=True, backend="cpu")
    with pytest.raises(BackendUnavailable, match="float64"):
        feature_product(q.double(), k.double(), v.double(), causal=True, backend="cpu")


def test_outputs_are_averages_of_values():
    q, k, v = torch.randn(3, 2, 4, 90, 8, **DOUBLE)
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    for causal in (False, True):
        seen = weights.tril() if causal else weights
        o = attlas.attend(q, k, v, "linear", causal=causal)
        assert torch.allclose(o, seen / seen.sum(-1, keepdim=True) @ v, atol=1e-12)


def test_keys_may_come_in_any_order():
    q, k, v = torch.randn(3, 2, 4, 30, 8, **DOUBLE)
    order = torch.randperm(30)
    whole = attlas.attend(q, k, v, "linear")
    assert torch.allclose(attlas.attend(q, k[:, :, order], v[:, :, order], "linear"), whole, atol=1e-12)


def test_memory_never_holds_a_matrix_per_token():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 1024, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        attlas.attend(q, k, v, "linear", causal=True, backend="torch")
    assert 0 < max(saved) <= 2 * 1024 * 64


def test_the_state_does_not_grow():
    layer = attlas.make_attend("linear", 2, 8, causal=True)
    q, k, v = torch.randn(3, 1, 2, 200, 8)
    _, state = layer.extend(q, k, v, layer.initial_state(1, q))
    assert attlas.state_bytes(state) == 4 * 2 * 8 * (8 + 1)


def test_half_precision_neither_overflows_nor_vanishes():
    q, k, v = torch.randn(3, 1, 1, 4096, 64, dtype=torch.float16)
    for causal in (False, True):
        exact = attlas.attend(q.double(), k.double(), v.double() + 2, "linear", causal=causal)
        got = attlas.attend(q, k, v + 2, "linear", causal=causal)  # its denominators reach 300,000
        assert torch.allclose(got.double(), exact, atol=5e-3)
    faint = attlas.attend(q - 25, k, v, "linear")  # exp(-25) is 0 in float16
    assert torch.allclose(faint.double(), attlas.attend(q.double() - 25, k.double(), v.double(), "linear"), atol=5e-3)
