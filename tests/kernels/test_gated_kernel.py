"""The kernels of the gated recurrence and of the delta rule against the recurrences in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import library
from torch.utils.flop_counter import FlopCounterMode

from attlas.bench import machine
from attlas.core.errors import BackendUnavailable, BadInput
from attlas.kernels.cpu import build
from attlas.kernels.cpu import gated as kernel
from attlas.ops.delta import gated_delta_rule
from attlas.ops.gated import bidirectional_gated_attention, gated_linear_attention

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}  # relative RMS error
SIZES = [
    (1, 1, 1, 1, 1),
    (1, 2, 3, 33, 70),
    (2, 2, 5, 16, 4),
    (2, 3, 33, 20, 7),
    (1, 5, 77, 32, 64),
    (3, 1, 64, 64, 48),
]
KINDS = ("per channel", "per head", "both ways", "delta")


@pytest.fixture(autouse=True, scope="module")
def _compiled():
    usable, reason = build.status("gated")
    assert usable, reason  # a kernel that does not compile is a failure, not a reason to test nothing


def _problem(kind, batch, heads, tokens, size, value, dtype=torch.float32):
    """The op, and its inputs: three of tokens, then gates and the like in float32."""
    torch.manual_seed(tokens)
    q, k = torch.randn(2, batch, heads, tokens, size).to(dtype)
    v = torch.randn(batch, heads, tokens, value).to(dtype)
    state = torch.randn(batch, heads, size, value)
    gates = (
        -torch.rand(batch, heads, tokens, 1 if kind == "per head" else size) * torch.tensor([0.01, 1, 3])[tokens % 3]
    )
    if kind == "both ways":
        return bidirectional_gated_attention, [q, k, v, gates, gates.flip(3)]
    if kind == "delta":
        k, beta = F.normalize(k.float(), dim=-1).to(dtype), torch.rand(batch, heads, tokens)
        return gated_delta_rule, [q, k, v, beta, gates[..., 0].contiguous(), state]
    return gated_linear_attention, [q, k, v, gates, state]


def _results(op, inputs, backend, keep=None):
    """Outputs and the gradients of all inputs, for gradients that are the same in every call."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = op(*leaves, keep, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in outputs]
    return *outputs, *torch.autograd.grad(outputs, leaves, grads)


def _error(actual, expected):
    """Relative RMS; absolute where nothing is expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    size = float(expected.norm())
    return float((actual - expected).norm()) / (size or 1)


def _assert_equals_oracle(op, inputs, keep=None, threads=1):
    with machine.threads(threads):
        actual = _results(op, inputs, "cpu", keep)
    assert actual[0].dtype == inputs[2].dtype
    expected = _results(op, [x.double() for x in inputs], "oracle", keep)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error = _error(a, e)
        assert error <= TOLERANCE[inputs[0].dtype], f"result {i} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_recurrence(sizes, kind, dtype):
    _assert_equals_oracle(*_problem(kind, *sizes, dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [2, 3])
def test_columns_are_split_between_threads(threads, kind):
    """One head is more than one thread's work; the result does not depend on who does it."""
    op, inputs = _problem(kind, 1, 1, 300, 48, 70)
    _assert_equals_oracle(op, inputs, threads=threads)
    with machine.threads(1):
        alone = _results(op, inputs, "cpu")
    with machine.threads(threads):
        together = _results(op, inputs, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_may_be_missing_anywhere(kind):
    """They enter nothing, decay nothing, give 0, and may be NaN."""
    op, inputs = _problem(kind, 4, 2, 70, 8, 5)
    keep = torch.rand(4, 70) < torch.tensor([0.0, 0.3, 0.7, 1.0])[:, None]
    _assert_equals_oracle(op, inputs, keep)
    expected = _results(op, inputs, "cpu", keep)
    poisoned = [x.masked_fill(~keep[:, None, :, None], torch.nan) for x in inputs[:3]] + inputs[3:]
    for a, e in zip(_results(op, poisoned, "cpu", keep), expected, strict=True):
        assert torch.equal(a, e)
    assert not expected[0].transpose(1, 2)[~keep].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["per channel", "delta"])
@pytest.mark.parametrize("pieces", [[1] * 45, [40, 1, 1, 3], [32, 13]], ids=["one by one", "ragged", "a chunk"])
def test_any_segmentation_equals_one_pass(pieces, kind, dtype):
    op, (*tokens, state) = _problem(kind, 2, 3, 45, 16, 20, dtype)
    whole, last = op(*tokens, state, backend="cpu")
    rows = []
    for part in zip(*(x.split(pieces, 2) for x in tokens), strict=True):
        o, state = op(*part, state, backend="cpu")
        rows.append(o)
    assert _error(torch.cat(rows, 2), whole) <= TOLERANCE[dtype]
    assert _error(state, last) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", ["per channel", "per head", "delta"])
def test_the_future_changes_nothing(kind):
    op, inputs = _problem(kind, 1, 2, 100, 16, 16)
    before, _ = op(*inputs, backend="cpu")
    for now in (1, 31, 32, 50, 99):
        for x in inputs[:3]:
            x[:, :, now:] *= -1
        after, _ = op(*inputs, backend="cpu")
        assert torch.equal(after[:, :, :now], before[:, :, :now])
        before = after


@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind):
    """Heads and tokens in any order in memory, features apart, heads shared."""
    op, inputs = _problem(kind, 2, 3, 40, 20, 24)
    expected = _results(op, inputs, "cpu")
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    moved[1] = inputs[1].transpose(2, 3).contiguous().transpose(2, 3)
    for a, e in zip(_results(op, moved, "cpu"), expected, strict=True):
        assert torch.equal(a, e)
    op, inputs = _problem(kind, 2, 3, 40, 21, 23)
    shared = [
        inputs[0][:, :, ::2],
        inputs[1][:, :1].expand(-1, 3, -1, -1)[:, :, ::2],
        inputs[2][:1].expand(2, -1, -1, -1)[:, :, ::2],
    ]
    rest = [x[:, :, ::2] if x.shape[2] == 40 else x for x in inputs[3:]]
    copies = [x.contiguous() for x in shared + rest]
    for a, e in zip(_results(op, shared + rest, "cpu"), _results(op, copies, "cpu"), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("gate", [-1e-4, -1e-5])
def test_long_memories_keep_their_digits(gate, backend):
    """A gate near 1, rounded, would be off in the same direction at every token."""
    q, k, v = torch.rand(3, 1, 1, 8000, 4) + 0.5
    for kind, gates in (("per channel", torch.full((1, 1, 8000, 4), gate)), ("delta", torch.full((1, 1, 8000), gate))):
        inputs = (
            [q, k, v, gates] if kind != "delta" else [q, F.normalize(k, dim=-1), v, torch.full_like(gates, 0.01), gates]
        )
        op = gated_delta_rule if kind == "delta" else gated_linear_attention
        exact, _ = op(*(x.double() for x in inputs), backend="torch")
        assert _error(op(*inputs, backend=backend)[0], exact) < 5e-6


@pytest.mark.parametrize("shut", [-1e4, -torch.inf])
def test_a_gate_that_is_shut_forgets_everything(shut):
    op, (q, k, v, gates, state) = _problem("per channel", 1, 1, 40, 4, 4)
    gates[:, :, 20] = shut
    o, after = op(q, k, v, gates, state, backend="cpu")
    alone, after_alone = op(*(x[:, :, 20:] for x in (q, k, v, gates)), backend="cpu")
    assert torch.equal(o[:, :, 20:], alone)
    assert torch.equal(after, after_alone)


def test_long_sums_of_gates_stay_exact():
    """Gradients of gates are differences of large sums; they keep their digits over thousands of tokens."""
    op, inputs = _problem("per channel", 1, 1, 4000, 8, 8)
    exact = _results(op, [x.double() for x in inputs], "torch")
    for backend in ("cpu", "torch"):
        actual = _results(op, inputs, backend)
        assert max(map(_error, actual, exact)) < 2e-5, backend


@pytest.mark.parametrize("kind", KINDS)
def test_torch_sees_through_it(kind):
    """Schema, fake, autograd and compilation."""
    op, inputs = _problem(kind, 1, 2, 20, 8, 4)
    leaves = [x.requires_grad_() for x in inputs]
    operator = {
        "both ways": torch.ops.attlas.bidirectional_gated_attention,
        "delta": torch.ops.attlas.gated_delta_rule,
    }.get(kind, torch.ops.attlas.gated_linear_attention)
    library.opcheck(operator.default, tuple(leaves))
    compiled = torch.compile(lambda *x: op(*x, backend="cpu"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), op(*leaves, backend="cpu"))


@pytest.mark.parametrize(("kind", "ahead", "back"), [("per channel", 2, 5), ("both ways", 4, 10), ("delta", 3, 8)])
def test_flops(kind, ahead, back):
    op, inputs = _problem(kind, 2, 3, 10, 8, 4)
    product = 2 * 2 * 3 * 10 * 8 * 4
    with FlopCounterMode(display=False) as counter:
        op(*inputs, backend="cpu")
    assert counter.get_total_flops() == ahead * product
    with FlopCounterMode(display=False) as counter:
        _results(op, inputs, "cpu")
    assert counter.get_total_flops() == (ahead + back) * product


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused_with_the_cure(kind):
    op, inputs = _problem(kind, 1, 1, 5, 4, 4)
    leaves = [x.requires_grad_() for x in inputs]
    o = op(*leaves, backend="cpu")
    o = o[0] if isinstance(o, tuple) else o
    (grad,) = torch.autograd.grad(o.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(BackendUnavailable, match="backend='torch'"):
        grad.square().sum().backward()


def test_bad_input():
    op, (q, k, v, gates, state) = _problem("per channel", 1, 2, 5, 4, 3)
    with pytest.raises(BadInput, match="q and k"):
        kernel.gated_linear_attention(q, k[..., :2], v, gates)
    with pytest.raises(BadInput, match="log_decay"):
        kernel.gated_linear_attention(q, k, v, gates[:, :, :4])
    with pytest.raises(BadInput, match="state"):
        kernel.gated_linear_attention(q, k, v, gates, state[:, :1])
    with pytest.raises(BadInput, match="beta"):
        kernel.gated_delta_rule(q, k, v, gates, gates[..., 0])
    with pytest.raises(BadInput, match="both directions"):
        kernel.bidirectional_gated_attention(q, k, v, gates, gates[..., :1])
    for backend in ("cpu", "torch", "oracle"):
        with pytest.raises(BadInput, match="q and k"):
            op(q, k[:, :, :3], v, gates, state, backend=backend)
        with pytest.raises(BadInput, match="at least one feature"):
            op(q, k, v[..., :0], gates, backend=backend)
        assert op(q, k, v, gates, state.bfloat16(), backend=backend)[1].dtype == torch.float32
    assert "float64" in str(kernel.refuses(q.double(), k.double(), v.double(), gates))
    assert "float64" in str(kernel.refuses(q, k, v, gates.double()))
    with pytest.raises(Exception, match="float16"):
        op(q.half(), k.half(), v.half(), gates, backend="cpu")
