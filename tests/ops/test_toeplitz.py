"""Toeplitz products by transforms, by a matrix and pair by pair."""

import math

import pytest
import torch

from attlas.core.errors import BackendUnavailable, BadInput
from attlas.ops import toeplitz
from attlas.ops.dispatch import record_choices
from attlas.ops.toeplitz import (
    fast_length,
    toeplitz_attention,
    toeplitz_flops,
    toeplitz_matrix,
    toeplitz_product,
    transform_flops,
)

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


@pytest.mark.parametrize("axes", [*GRIDS, (37,), (7, 5), (9, 2)], ids=str)
def test_causal_sums_equal_the_oracle_with_gradients(axes, monkeypatch):
    monkeypatch.setattr(toeplitz, "BLOCK", 4)
    inputs = random_inputs(axes)
    expected = toeplitz_attention(*inputs, causal=True, backend="oracle")
    seed = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, seed)
    for backend in ("fft", "torch"):
        got = toeplitz_attention(*inputs, causal=True, backend=backend)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        for grad, expected_grad in zip(torch.autograd.grad(got, inputs, seed), expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("axes", [(37,), (7, 5)], ids=str)
@pytest.mark.parametrize("backend", ["fft", "torch", "oracle"])
def test_what_follows_moves_no_bit_of_a_causal_sum_nor_gets_a_gradient(backend, axes, monkeypatch):
    monkeypatch.setattr(toeplitz, "BLOCK", 4)
    q, k, v, c = random_inputs(axes, dtype=torch.float32)
    first = toeplitz_attention(q, k, v, c, causal=True, backend=backend)
    for n in (1, 9, 20, 34):
        changed = [torch.cat([x[:, :, :n], torch.full_like(x[:, :, n:], 1e6)], 2) for x in (q, k, v)]
        second = toeplitz_attention(*changed, c, causal=True, backend=backend)
        assert torch.equal(second[:, :, :n], first[:, :, :n])
        for grad in torch.autograd.grad(first[:, :, :n].sum(), (q, k, v), retain_graph=True):
            assert not grad[:, :, n:].any()
    ahead = torch.arange(c[0].numel()).view(c.shape[1:]) > c[0].numel() // 2
    huge = toeplitz_attention(q, k, v, c.masked_fill(ahead, 1e9), causal=True, backend=backend)
    assert torch.equal(huge, first)


def test_small_sums_before_large_ones_keep_their_digits_in_float32():
    tokens, heads, size, value = 4096, 1, 4, 5
    q, k = (torch.rand(1, heads, tokens, size) for _ in "qk")
    v = torch.randn(1, heads, tokens, value)
    c = torch.linspace(0, -10, tokens).exp().expand(heads, -1)  # what is far away weighs e¹⁰ times as much
    c = torch.cat([c, torch.zeros(heads, tokens - 1)], 1)
    backend, _ = toeplitz_attention.choose("auto", q, k, v, c, causal=True)
    assert backend.name == "fft"
    got, lost = (toeplitz_attention(q, k, v.abs(), c, causal=causal) for causal in (True, False))
    exact = toeplitz_attention(*(x.double() for x in (q, k, v.abs(), c)), backend="torch")
    assert ((got - exact) / exact).abs().max() < 2e-4
    assert ((lost - exact) / exact).abs().max() > 2e-3  # transformed whole


@pytest.mark.parametrize("axes", [(5,), (2, 3)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_transforms_and_theirs(axes, causal, monkeypatch):
    monkeypatch.setattr(toeplitz, "BLOCK", 2)
    inputs = [t[:1].detach().requires_grad_() for t in random_inputs(axes, heads=1, size=2, value=2)]

    def run(*tensors):
        return toeplitz_attention(*tensors, causal=causal, backend="fft")

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


def test_functional_gradients_are_the_same():
    q, k, v, c = (t.detach() for t in random_inputs((6,)))

    def total(x, backend):
        return toeplitz_attention(q, x, v, c, backend=backend).square().sum()

    got, expected = (torch.func.grad(total)(k, backend) for backend in ("fft", "torch"))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["fft", "torch", "oracle"])
def test_weights_that_do_not_fit_the_tokens_are_refused(backend):
    q, k, v, c = random_inputs((8,))
    for other in (c[:, :-2], c[:, :-1], c[:1], torch.cat([c, c], 1)[:, : 2 * 9 - 1], c[:, None].expand(3, 3, 15)):
        with pytest.raises(BadInput, match="a weight for every head and offset"):
            toeplitz_attention(q, k, v, other, backend=backend)
        with pytest.raises(BadInput, match="a weight for every head and offset"):
            toeplitz_product(v, other, backend=backend)
    if backend != "fft":
        with pytest.raises(BadInput, match="last of the tokens"):
            toeplitz_attention(q, k[:, :, :4], v[:, :, :4], c[:, 4:-4], backend=backend)


def test_half_precision_is_transformed_in_float32():
    x, c = torch.randn(1, 1, 50, 3).bfloat16(), torch.randn(1, 99)
    y = toeplitz_product(x, c)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, toeplitz_product(x.double(), c.double(), backend="torch").bfloat16())


def test_lengths_have_small_factors_and_never_wrap():
    assert [fast_length(n) for n in (1, 7, 11, 97, 513, 1021)] == [1, 8, 12, 100, 540, 1024]


def test_causal_transforms_take_a_little_more_arithmetic_and_pairs_less_where_they_are_few():
    whole, causal = (transform_flops((8192,), 16, 17, c) for c in (False, True))
    assert whole < causal < 3 * whole
    assert transform_flops((2 * 8192,), 16, 17, True) < 2.5 * causal
    pairs = 100 * 101 // 2
    assert transform_flops((100,), 16, 17, True) == 2 * pairs * (16 + 17) == toeplitz_flops((100,), 16, 17, pairs)
    assert toeplitz_flops((8192,), 16, 17, 8192**2) == whole


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("tokens", "chosen"), [(512, "torch"), (4096, "fft")])
def test_transforms_are_chosen_for_long_sequences(tokens, chosen, causal):
    q, k, v = (torch.empty(1, 1, tokens, 16, device="meta") for _ in "qkv")
    backend, _ = toeplitz_attention.choose(
        "auto", q, k, v, torch.empty(1, 2 * tokens - 1, device="meta"), causal=causal
    )
    assert backend.name == chosen


@pytest.mark.parametrize("causal", [False, True])
def test_the_compiled_transforms_are_whole(causal, monkeypatch):
    monkeypatch.setattr(toeplitz, "BLOCK", 4)
    inputs = [t.detach().float().requires_grad_() for t in random_inputs((3, 4))]

    def run(*tensors):
        return toeplitz_attention(*tensors, causal=causal, backend="fft")

    with record_choices() as choices:
        expected = run(*inputs)
    assert [choice.backend for choice in choices] == ["fft"]
    torch._dynamo.reset()
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(o.sum(), inputs) for o in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)
