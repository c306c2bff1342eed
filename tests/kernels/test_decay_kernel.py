"""The kernel of decayed linear attention against the recurrence in float64."""

import itertools

import pytest
import torch
from torch import library
from torch.utils.flop_counter import FlopCounterMode

from attlas.bench import machine
from attlas.core.errors import BadInput
from attlas.kernels.cpu import build
from attlas.kernels.cpu.decay import decayed_linear_attention, refuses
from attlas.ops import decay
from attlas.ops.linear import weighted_average

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}  # relative RMS error
SLOPES = torch.tensor([0.02, 0.0, 1.0, 40.0, 1e-4])


@pytest.fixture(autouse=True, scope="module")
def _compiled():
    usable, reason = build.status("decay")
    assert usable, reason  # a kernel that does not compile is a failure, not a reason to test nothing


def _inputs(batch, heads, tokens, size, value, dtype=torch.float32):
    q, k = torch.randn(2, batch, heads, tokens, size).to(dtype)
    v = torch.randn(batch, heads, tokens, value).to(dtype)
    return q, k, v, SLOPES[:heads], torch.randn(batch, heads, size, value)


def _results(function, q, k, v, slopes, state, where=None):
    """Output, final state and the gradients of all inputs, for gradients that are the same in every call."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, state) if x is not None]
    o, final = function(*leaves[:3], slopes, leaves[3] if state is not None else None, where)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in (o, final)]
    return o, final, *torch.autograd.grad([o, final], leaves, grads)


def _error(actual, expected):
    """Relative RMS."""
    actual, expected = actual.detach().double(), expected.detach()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-12))


def _assert_equals_oracle(function, q, k, v, slopes, state, where=None, keep=None, threads=1, tolerance=None):
    with machine.threads(threads):
        actual = _results(function, q, k, v, slopes, state, where)
    assert (actual[0].dtype, actual[1].dtype) == (q.dtype, torch.promote_types(q.dtype, torch.float32))
    wide = [None if x is None else x.double() for x in (q, k, v, slopes, state)]
    expected = _results(decay.oracle, *wide, keep)
    for name, a, e in zip(("o", "state", "dq", "dk", "dv", "dstate"), actual, expected, strict=False):
        error = _error(a, e)
        assert error <= (tolerance or TOLERANCE[q.dtype]), f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 1), (1, 2, 3, 33, 70), (2, 2, 5, 16, 4), (2, 3, 33, 20, 7), (1, 5, 77, 32, 64), (3, 1, 64, 64, 48)],
)
def test_equals_the_recurrence(sizes, with_state, dtype):
    *inputs, state = _inputs(*sizes, dtype)
    _assert_equals_oracle(decayed_linear_attention, *inputs, state if with_state else None)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_sequence_is_split_between_threads(heads, threads, dtype):
    inputs = _inputs(1, heads, 690, 48, 64, dtype)
    _assert_equals_oracle(decayed_linear_attention, *inputs, threads=threads)


def test_splitting_happens():
    """Splitting adds in another order, so one head is only nearly the same for one thread and for three."""
    inputs = _inputs(1, 1, 2000, 64, 64)
    with machine.threads(1):
        alone, _ = decayed_linear_attention(*inputs)
    with machine.threads(3):
        together, _ = decayed_linear_attention(*inputs)
    assert not torch.equal(alone, together)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [3, 300])
def test_ragged_lengths(tokens, threads):
    q, k, v, slopes, state = _inputs(5, 2, tokens, 24, 33)
    lengths = torch.tensor([0, tokens, 1, tokens // 2, tokens - 1])
    keep = torch.arange(tokens) < lengths[:, None]
    _assert_equals_oracle(decayed_linear_attention, q, k, v, slopes, state, lengths, keep, threads)
    q, k, v = (x.masked_fill(~keep[:, None, :, None], torch.nan) for x in (q, k, v))
    with machine.threads(threads):
        o, final, *grads = _results(decayed_linear_attention, q, k, v, slopes, state, lengths)
    for x in (o, *grads[:3]):
        assert not x.transpose(1, 2)[~keep].any()
    assert torch.equal(final[0], state[0])


@pytest.mark.parametrize("tokens", [3, 70])
@pytest.mark.parametrize("function", [decay.cpu, decay.chunked])
def test_tokens_may_be_missing_anywhere(function, tokens):
    q, k, v, slopes, state = _inputs(4, 2, tokens, 8, 5)
    keep = torch.rand(4, tokens) < torch.tensor([0.0, 0.3, 0.7, 1.0])[:, None]
    _assert_equals_oracle(function, q, k, v, slopes, state, keep, keep)
    missing = ~keep[:, None, :, None]
    expected = _results(function, q, k, v, slopes, state, keep)
    q, k, v = (x.masked_fill(missing, torch.nan) for x in (q, k, v))
    for a, e in zip(_results(function, q, k, v, slopes, state, keep), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("tokens", [1, 63, 64, 700])
def test_chunked_equals_the_recurrence_in_float64(tokens):
    q, k, v, slopes, state = (x.double() for x in _inputs(2, 4, tokens, 4, 6))
    _assert_equals_oracle(decay.chunked, q, k, v, slopes, state, tolerance=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pieces", [[1] * 45, [40, 1, 1, 3], [7, 38], [32, 13]])
def test_any_segmentation_equals_one_pass(pieces, dtype):
    q, k, v, slopes, state = _inputs(2, 3, 45, 16, 20, dtype)
    whole, last = decayed_linear_attention(q, k, v, slopes, state)
    rows = []
    for part in zip(*(x.split(pieces, 2) for x in (q, k, v)), strict=True):
        o, state = decayed_linear_attention(*part, slopes, state)
        rows.append(o)
    assert _error(torch.cat(rows, 2), whole.double()) <= TOLERANCE[dtype]
    assert _error(state, last.double()) <= TOLERANCE[torch.float32]


def test_bfloat16_is_float32_rounded():
    """To nearest, ties to even; infinities and NaN stay what they are."""
    *inputs, _ = _inputs(2, 3, 45, 16, 20, torch.bfloat16)
    inputs[2][0, 0, 20] = torch.inf
    inputs[2][0, 1, 20] = torch.nan
    half = _results(decayed_linear_attention, *inputs, None)
    full = _results(decayed_linear_attention, *(x.float() for x in inputs), None)
    for a, e in zip(half, full, strict=True):
        torch.testing.assert_close(a, e.to(a.dtype), rtol=0, atol=0, equal_nan=True)


def test_the_future_changes_nothing():
    q, k, v, slopes, state = _inputs(1, 2, 100, 16, 16)
    before, _ = decayed_linear_attention(q, k, v, slopes, state)
    for now in (1, 31, 32, 50, 99):
        for x in (q, k, v):
            x[:, :, now:] = torch.randn_like(x[:, :, now:]) * 100
        after, _ = decayed_linear_attention(q, k, v, slopes, state)
        assert torch.equal(after[:, :, :now], before[:, :, :now])
        before = after


def test_any_strides():
    q, k, v, slopes, state = _inputs(2, 3, 40, 20, 24)
    expected = _results(decayed_linear_attention, q, k, v, slopes, state)

    def tokens_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def features_apart(x):
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    def rows_apart(x):
        return torch.stack([x, x], 3).flatten(2, 3)[:, :, ::2]

    for layouts in itertools.permutations((tokens_first, features_apart, rows_apart)):
        q2, k2, v2 = (layout(x) for layout, x in zip(layouts, (q, k, v), strict=True))
        actual = _results(decayed_linear_attention, q2, k2, v2, slopes, features_apart(state))
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)
        assert actual[0].transpose(1, 2).is_contiguous() == v2.transpose(1, 2).is_contiguous()

    shared = k[:, :1].expand(-1, 3, -1, -1)
    expected = decayed_linear_attention(q, shared.contiguous(), v, slopes)
    for a, e in zip(decayed_linear_attention(q, shared, v, slopes), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("value", [64, 72])  # rows of 72 are not aligned, so that they cannot pass the caches
def test_results_larger_than_the_caches(value):
    """They are written in another way than small ones, and are the same."""
    q, k, v, slopes, state = _inputs(34, 4, 523, 64, value)
    leaves, grad = [x.requires_grad_() for x in (q, k, v, state)], torch.randn_like(v)
    assert v.nbytes > 2**24 > v[:17].nbytes

    def results(part):
        o, _ = decayed_linear_attention(q[part], k[part], v[part], slopes, state[part])
        return o, *(x[part] for x in torch.autograd.grad(o, leaves, grad[part]))

    for whole, one, other in zip(*map(results, (slice(None), slice(17), slice(17, None))), strict=True):
        assert torch.equal(whole, torch.cat([one, other]))


@pytest.mark.parametrize("slope", [0.0, 1e-6, 1e4])
def test_extreme_slopes(slope):
    q, k, v, _, state = _inputs(1, 1, 300, 16, 16)
    _assert_equals_oracle(decayed_linear_attention, q, k, v, torch.tensor([slope]), state)


def test_no_tokens_and_no_sequences():
    q, k, v, slopes, state = _inputs(2, 2, 0, 4, 4)
    o, final, *_, dstate = _results(decayed_linear_attention, q, k, v, slopes, state)
    assert o.shape == (2, 2, 0, 4)
    assert torch.equal(final, state)
    assert dstate.isfinite().all()
    assert decayed_linear_attention(*_inputs(0, 2, 9, 4, 4))[0].shape == (0, 2, 9, 4)


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_opcheck(dtype, optional):
    *inputs, state = _inputs(2, 3, 9, 5, 4, dtype)
    arguments = (*inputs, state, torch.tensor([9, 4])) if optional else (*inputs, None, None)
    for x in (*inputs[:3], *([state] if optional else [])):
        x.requires_grad_()
    library.opcheck(torch.ops.attlas.decayed_linear_attention.default, arguments)
    backward = (*(x if x is None else x.detach() for x in arguments), inputs[2].detach(), state.detach())
    library.opcheck(torch.ops.attlas.decayed_linear_attention_backward.default, backward)


def test_compiles_as_one_graph():
    def function(q, k, v, slopes, state):
        assert refuses(q, k, v, slopes) is None
        o, state = decayed_linear_attention(q, k, v, slopes, state)
        return o.tanh(), state

    inputs = _inputs(1, 2, 40, 8, 8)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_flops():
    *inputs, _ = _inputs(2, 3, 11, 5, 4)
    for x in inputs[:3]:
        x.requires_grad_()
    product = 2 * 2 * 3 * 11 * 5 * 4
    with FlopCounterMode(display=False) as counter:
        o, _ = decayed_linear_attention(*inputs)
        assert counter.get_total_flops() == 2 * product
        o.sum().backward()
    assert counter.get_total_flops() == (2 + 5) * product


def test_what_the_kernel_refuses(monkeypatch):
    q, k, v, slopes, _ = _inputs(1, 2, 4, 4, 4)
    assert refuses(q, k, v, slopes) is None
    assert "on meta" in refuses(q.to("meta"), k, v, slopes)
    assert "not torch.float64" in refuses(q.double(), k.double(), v.double(), slopes)
    assert "not torch.bfloat16, torch.float32" in refuses(q, k, v.bfloat16(), slopes)
    assert "no gradient for the slopes" in refuses(q, k, v, slopes.clone().requires_grad_())
    monkeypatch.setenv("ATTLAS_NO_KERNELS", "1")
    assert "ATTLAS_NO_KERNELS" in refuses(q, k, v, slopes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 2, 5, 4)}, r"got \(1, 2, 4, 4\), \(1, 2, 5, 4\), "),
        ({"v": torch.zeros(1, 2, 4, 4).half()}, "torch.float16"),
        ({"slopes": torch.zeros(3)}, r"slopes is torch.float32 of shape \(2,\)"),
        ({"state": torch.zeros(1, 2, 4, 4).double()}, "state is torch.float32"),
        ({"lengths": torch.tensor([4], dtype=torch.int32)}, "lengths is torch.int64"),
    ],
)
def test_what_does_not_fit_is_said(change, message):
    q, k, v, slopes, state = _inputs(1, 2, 4, 4, 4)
    arguments = {"q": q, "k": k, "v": v, "slopes": slopes, "state": state, "lengths": None, **change}
    with pytest.raises(BadInput, match=message):
        decayed_linear_attention(*arguments.values())


def _averages(q, k, v, state, backend):
    leaves = [x.detach().requires_grad_() for x in (q, k, v, state) if x is not None]
    o, final = weighted_average(*leaves, causal=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (o, final)]
    return o, final, *torch.autograd.grad([o, final], leaves, grads)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("sizes", [(1, 2, 2, 5, 3), (2, 3, 70, 8, 12), (1, 2, 3, 33, 70), (2, 1, 900, 20, 17)])
def test_averages_equal_sums_over_sums(sizes, with_state, threads):
    """The normaliser is a column of the state that is no column of the values."""
    batch, heads, tokens, size, value = sizes
    q, k = torch.rand(2, batch, heads, tokens, size) + 0.1
    v = torch.randn(batch, heads, tokens, value)
    state = torch.rand(batch, heads, size, value + 1) if with_state else None
    with machine.threads(threads):
        actual = _averages(q, k, v, state, "cpu")
    expected = _averages(*(None if x is None else x.double() for x in (q, k, v, state)), "oracle")
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert _error(a, e) <= TOLERANCE[torch.float32], f"result {i}"


@pytest.mark.parametrize("tokens", [3, 40])
def test_averages_of_nothing_are_nothing(tokens):
    """Keys of zeros weigh nothing: no output, no division by 0, finite gradients."""
    q, v = torch.rand(1, 1, tokens, 4), torch.randn(1, 1, tokens, 5)
    k = torch.rand(1, 1, tokens, 4)
    k[:, :, : tokens // 2 + 1] = 0
    results = _averages(q, k, v, None, "cpu")
    assert not results[0][:, :, : tokens // 2 + 1].any()
    assert all(torch.isfinite(x).all() for x in results)
    for a, e in zip(results, _averages(q.double(), k.double(), v.double(), None, "oracle"), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


def test_averages_in_pieces_and_for_torch():
    q, k = torch.rand(2, 2, 2, 45, 8)
    v = torch.randn(2, 2, 45, 6)
    whole, last = weighted_average(q, k, v, causal=True, backend="cpu")
    state, rows = None, []
    for part in zip(*(x.split([1, 1, 40, 3], 2) for x in (q, k, v)), strict=True):
        o, state = weighted_average(*part, state, causal=True, backend="cpu")
        rows.append(o)
    torch.testing.assert_close(torch.cat(rows, 2), whole)
    torch.testing.assert_close(state, last)
    library.opcheck(torch.ops.attlas.weighted_average.default, (*(x.requires_grad_() for x in (q, k, v)), None))
    with FlopCounterMode(display=False) as counter:
        weighted_average(q, k, v, causal=True, backend="cpu")
    assert counter.get_total_flops() == 2 * 2 * 2 * 2 * 45 * 8 * 7
    with pytest.raises(BadInput, match="averages are of float32"):
        torch.ops.attlas.weighted_average(q, k, v, torch.zeros(2, 2, 8, 6))
