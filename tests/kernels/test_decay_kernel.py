"""The C++ kernel of decayed linear attention against the float64 recurrence."""

import pytest
import torch

from attlas.core.errors import BadInput
from attlas.kernels.cpu.decay import decayed_linear_attention, refuses
from attlas.ops import decay

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative RMS error against the float64 oracle, forward and backward."""

SIZES = [  # B, H, N, D, E
    (2, 3, 77, 16, 16),
    (1, 1, 1000, 32, 32),  # one head: the sequence is cut among the threads
    (2, 2, 64, 64, 48),
    (1, 2, 130, 5, 3),
    (3, 1, 33, 1, 17),
    (1, 5, 32, 80, 8),
    (2, 2, 1, 16, 16),
]


@pytest.fixture(params=[1, 2, 3], ids="{}-threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def problem(batch, heads, tokens, size, value, dtype=torch.float32):
    q, k = (torch.randn(batch, heads, tokens, size).mul(size**-0.5).to(dtype) for _ in "qk")
    v = torch.randn(batch, heads, tokens, value).to(dtype)
    slopes = torch.tensor([0.0, 0.03, 0.5, 2.0, 40.0])[:heads]
    return q, k, v, slopes, torch.randn(batch, heads, size, value)


def relative_rms(got, expected):
    got, expected = got.detach().double(), expected.detach()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_equal_to_oracle(run, q, k, v, slopes, state, keep=None, *, tolerance):
    """Outputs, final state and all gradients."""
    ours = [x.detach().requires_grad_() for x in (q, k, v, state)]
    theirs = [x.detach().double().requires_grad_() for x in (q, k, v, state)]
    got = run(*ours[:3], slopes, ours[3])
    expected = decay.oracle(*theirs[:3], slopes, theirs[3], keep)
    assert got[0].dtype == q.dtype
    assert got[1].dtype == torch.float32
    for a, b in zip(got, expected, strict=True):
        assert relative_rms(a, b) <= tolerance
    seeds = [torch.randn(x.shape, dtype=torch.float64) for x in got]
    grads = torch.autograd.grad(got, ours, [s.to(x.dtype) for s, x in zip(seeds, got, strict=True)])
    for name, a, b in zip("qkvs", grads, torch.autograd.grad(expected, theirs, seeds), strict=True):
        assert relative_rms(a, b) <= tolerance, name
    return grads


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_recurrence(sizes, dtype):
    assert_equal_to_oracle(decayed_linear_attention, *problem(*sizes, dtype), tolerance=TOLERANCE[dtype])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("run", [decay.cpu, decay.chunked], ids=["cpu", "torch"])
def test_gaps_enter_neither_state_nor_decay(run):
    q, k, v, slopes, state = problem(4, 3, 70, 16, 8)
    keep = torch.rand(4, 70) > 0.3
    keep[1] = False
    keep[2, 20:] = False
    q[~keep[:, None].expand(-1, 3, -1)] = torch.nan
    k[~keep[:, None].expand(-1, 3, -1)] = torch.nan
    v[~keep[:, None].expand(-1, 3, -1)] = torch.nan
    o, after = run(q, k, v, slopes, state, keep)
    assert torch.equal(after[1], state[1])
    assert not o[1].any()
    for b in (0, 2, 3):
        mine = (x[b : b + 1, :, keep[b]] for x in (q, k, v))
        expected, expected_after = decay.chunked(*mine, slopes, state[b : b + 1])
        assert torch.allclose(o[b : b + 1, :, keep[b]], expected, atol=1e-5)
        assert not o[b, :, ~keep[b]].any()
        assert torch.allclose(after[b : b + 1], expected_after, atol=1e-5)


@pytest.mark.usefixtures("threads")
def test_ragged_lengths_end_the_sequences():
    q, k, v, slopes, state = problem(3, 2, 50, 16, 16)
    lengths = torch.tensor([50, 17, 0])
    keep = torch.arange(50) < lengths[:, None]

    def run(q, k, v, slopes, state):
        return decayed_linear_attention(q, k, v, slopes, state, lengths)

    grads = assert_equal_to_oracle(run, q, k, v, slopes, state, keep, tolerance=1e-5)
    for grad in grads[:3]:
        assert not grad[1, :, 17:].any()
        assert not grad[2].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_steps_and_segments_equal_the_whole(dtype):
    q, k, v, slopes, _ = problem(2, 3, 67, 32, 16, dtype)
    whole, last = decayed_linear_attention(q, k, v, slopes)
    for sizes in ([1] * 67, [40, 1, 26], [33, 34]):
        state, parts = None, []
        for piece in zip(*(x.split(sizes, 2) for x in (q, k, v)), strict=True):
            o, state = decayed_linear_attention(*piece, slopes, state)
            parts.append(o)
        assert relative_rms(torch.cat(parts, 2), whole.double()) <= TOLERANCE[dtype]
        assert relative_rms(state, last.double()) <= 1e-5


def test_any_strides():
    q, k, v, slopes, state = problem(2, 3, 40, 16, 16)
    expected = decayed_linear_attention(q, k, v, slopes, state)
    for order in ((0, 2, 1, 3), (2, 0, 1, 3), (3, 1, 2, 0)):
        back = torch.tensor(order).argsort().tolist()
        strided = [x.permute(order).contiguous().permute(back) for x in (q, k, v, state)]
        got = decayed_linear_attention(*strided[:3], slopes, strided[3])
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def test_a_long_memory_neither_overflows_nor_underflows():
    q, k, v, _, _ = problem(1, 2, 3000, 16, 16)
    slopes = torch.tensor([0.0, 90.0])
    o, state = decayed_linear_attention(q, k, v, slopes)
    expected, expected_state = decay.oracle(q.double(), k.double(), v.double(), slopes)
    assert relative_rms(o, expected) <= 1e-5
    assert relative_rms(state, expected_state) <= 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("lengths", [None, torch.tensor([9, 4])], ids=["full", "ragged"])
def test_opcheck(lengths):
    q, k, v, slopes, state = problem(2, 2, 9, 16, 8)
    leaves = [x.requires_grad_() for x in (q, k, v, state)]
    arguments = (*leaves[:3], slopes, leaves[3], lengths)
    torch.library.opcheck(torch.ops.attlas.decayed_linear_attention, arguments)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v, slopes, _ = problem(2, 3, 40, 16, 8)
    with FlopCounterMode(display=False) as counter:
        o, _ = decayed_linear_attention(q.requires_grad_(), k, v, slopes)
    assert counter.get_total_flops() == 4 * 2 * 3 * 40 * 16 * 8
    with FlopCounterMode(display=False) as counter:
        o.sum().backward()
    assert counter.get_total_flops() == 10 * 2 * 3 * 40 * 16 * 8


def test_what_does_not_fit_is_named():
    q, k, v, slopes, _ = problem(2, 2, 9, 16, 8)
    with pytest.raises(BadInput, match=r"q and k are \(B, H, N, D\)"):
        decayed_linear_attention(q, k[:, :, 1:], v, slopes)
    with pytest.raises(BadInput, match=r"slopes is torch\.float32 of shape"):
        decayed_linear_attention(q, k, v, slopes[:1])
    assert "float32 or bfloat16" in refuses(q.double(), k.double(), v.double(), slopes)
    assert "no gradient for the slopes" in refuses(q, k, v, slopes.requires_grad_())
