"""Running sums of powers."""

import pytest
import torch

from attlas.ops.favor import PowerSums, running_powers
from attlas.ops.linear import CHUNK
from attlas.ops.scan import NEVER


def random_inputs(queries, keys, spread=1.0, dtype=torch.float64):
    q, k = (torch.rand(2, 3, tokens, 4, dtype=dtype) for tokens in (queries, keys))
    v, b = torch.randn(2, 3, keys, 5, dtype=dtype), torch.randn(2, 3, keys, dtype=dtype) * spread
    return q, k, v, b


@pytest.mark.parametrize(("queries", "keys"), [(2 * CHUNK + 9, 2 * CHUNK + 9), (5, CHUNK + 20), (9, 4), (CHUNK, CHUNK)])
@pytest.mark.parametrize("spread", [1.0, 200.0])
def test_chunks_equal_the_recurrence(queries, keys, spread):
    inputs = [t.requires_grad_() for t in random_inputs(queries, keys, spread)]
    before = PowerSums(torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64) * spread)
    for state in (None, before):
        got, expected = (running_powers(*inputs, state, backend=backend) for backend in ("torch", "oracle"))
        torch.testing.assert_close(got[0], expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(tuple(got[1]), tuple(expected[1]), rtol=1e-10, atol=1e-12)
        grads = [torch.autograd.grad(o.sum() + s.sums.sum(), inputs) for o, s in (got, expected)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["torch", "oracle"])
def test_what_follows_changes_not_a_bit(backend):
    q, k, v, b = random_inputs(30, 30, dtype=torch.float32)
    first, _ = running_powers(q, k, v, b, backend=backend)
    later = b.clone()
    later[:, :, 20:] = 1e6  # its power is infinite
    second, state = running_powers(q, k, v, later, backend=backend)
    assert torch.equal(first[:, :, :20], second[:, :, :20])
    assert torch.isfinite(second).all()
    assert (state.largest == 1e6).all()


def test_no_key_is_a_key_of_zero_that_never_weighs():
    q, k, v, b = random_inputs(6, 6)
    k[:, :, :2], b[:, :, :2] = 0, NEVER
    o, state = running_powers(q, k, v, b)
    assert not o[:, :, :2].any()
    rest, rest_state = running_powers(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:], b[:, :, 2:])
    torch.testing.assert_close(o[:, :, 2:], rest)
    torch.testing.assert_close(tuple(state), tuple(rest_state))
