"""Batch normalisation that does not count padding."""

import pytest
import torch
from torch import nn

from attlas.ops.batch_norm import TokenBatchNorm


def pair():
    ours, theirs = TokenBatchNorm(5).double(), nn.BatchNorm2d(5).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
def test_without_padding_it_is_torchs(training):
    ours, theirs = (norm.train(training) for norm in pair())
    for _ in range(2):
        x = torch.randn(3, 12, 5, dtype=torch.float64) * 2 + 1
        expected = theirs(x.mT.unflatten(-1, (3, 4))).flatten(2).mT
        assert torch.allclose(ours(x), expected, atol=1e-12)
        assert torch.allclose(ours.oracle(x), expected, atol=1e-12)
    for name, expected in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], expected, atol=1e-12), name


def test_padding_enters_no_statistics():
    x = torch.randn(3, 12, 5, dtype=torch.float64)
    keep = torch.rand(3, 12) > 0.4
    (ours, _), (alone, _) = pair(), pair()
    alone.load_state_dict(ours.state_dict())
    got = ours(torch.where(keep.unsqueeze(-1), x, torch.nan), keep)
    expected = alone(x[keep].unsqueeze(0))[0]
    assert torch.allclose(got[keep], expected, atol=1e-12)
    assert torch.isfinite(got).all()
    assert torch.allclose(ours.running_var, alone.running_var, atol=1e-12)
    assert torch.allclose(ours.oracle(x, keep)[keep], expected, atol=1e-12)


def test_nothing_real_changes_nothing():
    norm, _ = pair()
    before = {name: t.clone() for name, t in norm.state_dict().items()}
    y = norm(torch.full((2, 3, 5), torch.nan).double(), torch.zeros(2, 3, dtype=torch.bool))
    assert torch.isfinite(y).all()
    assert all(torch.equal(t, before[name]) for name, t in norm.state_dict().items())
    norm(torch.randn(1, 1, 5, dtype=torch.float64))
    assert torch.isfinite(norm.running_var).all()


def test_one_real_token_counts():
    norm, x = TokenBatchNorm(5).double(), torch.randn(1, 3, 5, dtype=torch.float64)
    norm(x, torch.tensor([[False, True, False]]))
    assert torch.allclose(norm.running_mean, 0.1 * x[0, 1])
    assert torch.allclose(norm.running_var, torch.full((5,), 0.9).double())


def test_statistics_of_half_precision_are_wide():
    norm = TokenBatchNorm(5)
    x = (torch.randn(4, 4096, 5) + 50).bfloat16()
    y = norm.bfloat16()(x)
    assert y.dtype == torch.bfloat16
    assert y.float().mean().abs() < 0.01
