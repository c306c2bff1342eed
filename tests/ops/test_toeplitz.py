"""Toeplitz products by transforms, by a matrix and pair by pair."""

import math

import pytest
import torch

from attlas.core.errors import BackendUnavailable
from attlas.ops import toeplitz
from attlas.ops.dispatch import record_choices
from attlas.ops.toeplitz import fast_length, toeplitz_attention, toeplitz_matrix, toeplitz_product

GRIDS = [(1,), (9,), (16,), (3, 5), (1, 4), (6, 1)]


def random_inputs(axes, heads=3, size=4, value=5, dtype=torch.float64):
    tokens = math.prod(axes)
    q, k, v = (torch.randn(2, heads, tokens, n, dtype=dtype, requires_grad=True) for n in (size, size, value))
    c = torch.randn(heads, *(2 * n - 1 for n in axes), dtype=dtype, requires_grad=True)
    return q, k, v, c


@pytest.mark.parametrize("axes", GRIDS, ids=str)
def test_every_backend_equals_the_oracle_with_gradients(axes):
    q, k, v, c = random_inputs(axes)
    for op, inputs in ((toeplitz_product, (v, c)), (toeplitz_attention, (q, k, v, c))):
        expected = op(*inputs, backend="oracle")
        seed = torch.randn_like(expected)
        expected_grads = torch.autograd.grad(expected, inputs, seed)
        for backend in ("fft", "torch"):
            got = op(*inputs, backend=backend)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
            for grad, expected_grad in zip(torch.autograd.grad(got, inputs, seed), expected_grads, strict=True):
                torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("axes", [(5,), (2, 3)], ids=str)
def test_gradients_of_transforms_and_theirs(axes):
    inputs = [t[:1].detach().requires_grad_() for t in random_inputs(axes, heads=1, size=2, value=2)]

    def run(*tensors):
        return toeplitz_attention(*tensors, backend="fft")

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("tokens", [256, 257])
def test_long_sums_match_to_the_last_digits(tokens):
    q, k, v, c = random_inputs((tokens,), heads=1, size=3, value=2)
    seed = torch.randn_like(v)
    results = []
    for backend in ("fft", "torch"):
        o = toeplitz_attention(q, k, v, c, backend=backend)
        results.append([o, *torch.autograd.grad(o, (q, k, v, c), seed)])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() < 1e-9


def test_the_offset_goes_from_the_row_to_the_column():
    c = torch.zeros(1, 2 * 6 - 1, dtype=torch.float64)
    c[0, 6 - 1 + 2] = 1.0  # two places ahead
    x = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 1, 6, 1)
    for backend in ("fft", "torch", "oracle"):
        y = toeplitz_product(x, c, backend=backend).flatten()
        torch.testing.assert_close(y, torch.tensor([3.0, 4, 5, 6, 0, 0]).double(), rtol=0, atol=1e-12)


def test_a_matrix_on_a_grid_reads_both_offsets():
    _, _, _, c = random_inputs((3, 4), heads=2)
    matrix = toeplitz_matrix(c)
    for i, j in ((0, 0), (1, 11), (10, 3), (7, 6)):
        expected = c[:, j // 4 - i // 4 + 2, j % 4 - i % 4 + 3]
        assert torch.equal(matrix[:, i, j], expected)
    assert torch.equal(toeplitz_matrix(c, 5), matrix[:, -5:])


def test_the_last_queries_are_the_last_rows():
    q, k, v, c = random_inputs((8,))
    whole = toeplitz_attention(q, k, v, c, backend="oracle")[:, :, 5:]
    for backend in ("torch", "oracle"):
        torch.testing.assert_close(toeplitz_attention(q[:, :, 5:], k, v, c, backend=backend), whole)
    with pytest.raises(BackendUnavailable, match="as many queries as keys, not 3 and 8"):
        toeplitz_attention(q[:, :, 5:], k, v, c, backend="fft")


def test_features_a_few_at_a_time_give_the_same(monkeypatch):
    q, k, v, c = random_inputs((9,), size=5)
    results = []
    for numbers in (2**22, 1):
        monkeypatch.setattr(toeplitz, "NUMBERS", numbers)
        o = toeplitz_attention(q, k, v, c, backend="fft")
        results.append([o, toeplitz_product(v, c), *torch.autograd.grad(o.sum(), (q, k, v, c))])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


def test_nothing_that_grows_with_features_times_values_is_kept_for_gradients():
    q, k, v, c = random_inputs((64,), heads=1, size=16, value=16, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        toeplitz_attention(q, k, v, c, backend="fft")
    assert sum(kept) == sum(t.numel() for t in (q, k, v, c))


def test_half_precision_is_transformed_in_float32():
    x, c = torch.randn(1, 1, 50, 3).bfloat16(), torch.randn(1, 99)
    y = toeplitz_product(x, c)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, toeplitz_product(x.double(), c.double(), backend="torch").bfloat16())


def test_lengths_have_small_factors_and_never_wrap():
    assert [fast_length(n) for n in (1, 7, 11, 97, 513, 1021)] == [1, 8, 12, 100, 540, 1024]


@pytest.mark.parametrize(("tokens", "chosen"), [(512, "torch"), (4096, "fft")])
def test_transforms_are_chosen_for_long_sequences(tokens, chosen):
    q, k, v = (torch.empty(1, 1, tokens, 16, device="meta") for _ in "qkv")
    backend, _ = toeplitz_attention.choose("auto", q, k, v, torch.empty(1, 2 * tokens - 1, device="meta"))
    assert backend.name == chosen


def test_the_compiled_transforms_are_whole():
    inputs = [t.detach().float().requires_grad_() for t in random_inputs((3, 4))]

    def run(*tensors):
        return toeplitz_attention(*tensors, backend="fft")

    with record_choices() as choices:
        expected = run(*inputs)
    assert [choice.backend for choice in choices] == ["fft"]
    torch._dynamo.reset()
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(o.sum(), inputs) for o in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)
