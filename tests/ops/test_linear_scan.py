"""x_t = a_t x_{t-1} + b_t."""

import pytest
import torch

from attlas.core.errors import BadInput
from attlas.ops.linear_scan import linear_scan


@pytest.mark.parametrize("steps", [*range(1, 10), 33, 64, 100])
def test_the_scan_is_the_loop(steps):
    a = torch.rand(2, steps, 1, 4, dtype=torch.float64) * 2 - 1
    a[:, ::3] = 0.0
    b, initial = torch.randn(2, steps, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    for first in (None, initial):
        expected = linear_scan(a, b, first, backend="oracle")
        assert torch.allclose(linear_scan(a, b, first), expected, rtol=0, atol=1e-12)
    last = torch.zeros(2, 3, 4, dtype=torch.float64)
    for t in range(steps):
        last = a[:, t] * last + b[:, t]
    assert torch.allclose(linear_scan(a, b)[:, -1], last, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_any_axis(dim):
    a, b = torch.rand(5, 6, 7, dtype=torch.float64), torch.randn(5, 6, 7, dtype=torch.float64)
    expected = linear_scan(a.movedim(dim, 1), b.movedim(dim, 1), backend="oracle").movedim(1, dim)
    assert torch.allclose(linear_scan(a, b, dim=dim), expected, atol=1e-12)


def test_decay_over_many_steps_neither_overflows_nor_vanishes_into_nan():
    a, b = torch.full((1, 4096, 1), 1e-3), torch.ones(1, 4096, 1)
    a[:, 2000] = 0.0
    x = linear_scan(a, b)
    assert torch.allclose(x[:, 1:2000], torch.full((1, 1999, 1), 1 / (1 - 1e-3)), rtol=1e-5)
    assert x[0, 2000] == 1.0


def test_factors_up_to_one_serve_any_number_of_steps_and_larger_ones_only_a_few():
    a, b = torch.ones(4096, 1), torch.ones(4096, 1)
    a[1::2] = -1.0
    assert torch.equal(linear_scan(a, b, dim=0), linear_scan(a, b, dim=0, backend="oracle"))
    a, b = torch.full((512, 1), 2.0), torch.zeros(512, 1)  # 2^128 is beyond float32
    assert not linear_scan(a[:64], b[:64], dim=0).any()
    assert not torch.isfinite(linear_scan(a, b, dim=0)).all()


@pytest.mark.parametrize("backend", ["torch", "oracle"])
def test_it_is_differentiable_twice_at_zeros_too(backend):
    a, b, initial = (torch.randn(1, 5, 2), torch.randn(1, 5, 2), torch.randn(1, 2))
    a[:, 2] = 0.0
    leaves = [x.double().requires_grad_() for x in (a, b, initial)]

    def run(*x):
        return linear_scan(*x, backend=backend).square()  # so that the second derivatives are not all 0

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_what_has_no_meaning_is_refused():
    b = torch.randn(2, 5, 3)
    with pytest.raises(BadInput, match="at least one step"):
        linear_scan(torch.ones(2, 5), b)
    with pytest.raises(BadInput, match="at least one step"):
        linear_scan(b[:, :0], b[:, :0])
    with pytest.raises(BadInput, match="as many steps"):
        linear_scan(torch.ones(2, 4, 3), b)
    with pytest.raises(BadInput, match="as many steps"):
        linear_scan(torch.ones(2, 5, 2), b)
    with pytest.raises(BadInput, match="initial x"):
        linear_scan(b, b, torch.ones(2, 1))
