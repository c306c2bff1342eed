"""What Activator's unit does, and what it does not."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput


def test_no_token_sees_another() -> None:
    torch.manual_seed(0)
    mixer, x = attlas.mixer("activator", 8), torch.randn(1, 5, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer(x)[0, 2].sum(), x)
    assert grad[0, 2].any()
    assert not grad[0, [0, 1, 3, 4]].any()


def test_both_branches_share_one_norm() -> None:
    torch.manual_seed(0)
    mixer, x = attlas.mixer("activator", 8, hidden=6), torch.randn(1, 5, 8)
    with torch.no_grad():
        mixer.out.bias.zero_()
        before = mixer(x)
        mixer.norm.weight.mul_(2)
    assert torch.allclose(mixer(x), 4 * before, atol=1e-5)


def test_cost_is_three_matrices() -> None:
    mixer = attlas.mixer("activator", 16, hidden=32)
    assert mixer.cost(2, 10).flops == 2 * 2 * 10 * 3 * 16 * 32
    assert mixer.cost(2, 20).flops == 2 * mixer.cost(2, 10).flops


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="at least 1, got 0"):
        attlas.mixer("activator", 8, hidden=0)
