"""The gated recurrence and the delta rule: every backend against the recurrence, whatever the gates."""

import pytest
import torch

from attlas.ops.delta import gated_delta_rule
from attlas.ops.gated import bidirectional_gated_attention, gated_linear_attention

SIZES = [(2, 3, 70, 8, 12), (1, 2, 1, 4, 4), (1, 1, 17, 5, 3), (1, 1, 600, 16, 16)]


def _tokens(batch, heads, tokens, size, value, dtype=torch.float64, gates=None, strength=1.0):
    torch.manual_seed(tokens)
    q, k = (torch.randn(batch, heads, tokens, size, dtype=dtype, requires_grad=True) for _ in "qk")
    v = torch.randn(batch, heads, tokens, value, dtype=dtype, requires_grad=True)
    g = (-strength * torch.rand(batch, heads, tokens, gates or size, dtype=dtype)).requires_grad_()
    state = torch.randn(batch, heads, size, value, dtype=dtype, requires_grad=True)
    keep = torch.rand(batch, tokens) > 0.3
    return q, k, v, g, state, keep


def _agree(run, inputs, backend, tolerance):
    """Outputs and all gradients of a backend and of the oracle."""
    found = []
    for name in (backend, "oracle"):
        outputs = run(name)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(0)
        loss = sum((x * torch.randn_like(x)).sum() for x in outputs)
        found.append((*outputs, *torch.autograd.grad(loss, inputs)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gates", [None, 1], ids=["per channel", "per head"])
@pytest.mark.parametrize("strength", [0.1, 5.0, 300.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gated_is_the_recurrence(sizes, strength, gates):
    """Chunks lose nothing, even where gates let nothing through."""
    q, k, v, g, state, keep = _tokens(*sizes, gates=gates, strength=strength)
    tolerance = 1e-9 if strength < 100 else 1e-6  # the torch backend takes exp(-50) for nothing at all
    _agree(
        lambda backend: gated_linear_attention(q, k, v, g, state, keep, backend=backend),
        [q, k, v, state] + [g] * (strength < 100),
        "torch",
        tolerance,
    )


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_both_directions_are_two_recurrences(sizes):
    """The sum of the recurrence and of its mirror image."""
    q, k, v, g, _, keep = _tokens(*sizes)
    back = g.detach().flip(1).requires_grad_()
    inputs = [q, k, v, g, back]
    _agree(lambda backend: bidirectional_gated_attention(*inputs, keep, backend=backend), inputs, "torch", 1e-9)


@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_delta_is_the_recurrence(sizes, strength):
    """The triangular system of a chunk is the rule, token after token."""
    q, k, v, g, state, keep = _tokens(*sizes, gates=1, strength=strength)
    k = torch.nn.functional.normalize(k.detach(), dim=-1).requires_grad_()
    beta = torch.rand(*sizes[:3], dtype=torch.float64).requires_grad_()
    decay = g.detach().squeeze(-1).requires_grad_() if strength else None
    inputs = [q, k, v, beta, state] + [decay] * bool(strength)
    _agree(lambda backend: gated_delta_rule(q, k, v, beta, decay, state, keep, backend=backend), inputs, "torch", 1e-8)


def test_a_gate_that_is_shut_forgets_everything():
    """Minus infinity is a number like any other for the oracle, and close to it for the rest."""
    q, k, v, g, state, _ = _tokens(1, 1, 40, 4, 4)
    shut = g.detach().clone()
    shut[:, :, 20] = -torch.inf
    for backend in ("oracle", "torch"):
        o, after = gated_linear_attention(q, k, v, shut, state, backend=backend)
        alone, after_alone = gated_linear_attention(
            *(x[:, :, 20:] for x in (q, k, v)), shut[:, :, 20:], backend="oracle"
        )
        torch.testing.assert_close(o[:, :, 20:], alone)
        torch.testing.assert_close(after, after_alone)
