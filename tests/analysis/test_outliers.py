"""Outliers of activations and what eight bits make of them."""

import pytest
import torch

from attlas.analysis.outliers import inf_norm, int8, kurtosis


def test_kurtosis_of_known_distributions():
    x = torch.randn(4, 200, 500)
    assert torch.allclose(kurtosis(x), torch.full((4,), 3.0), atol=0.1)
    assert torch.allclose(kurtosis(torch.rand(4, 100_000)), torch.full((4,), 1.8), atol=0.05)
    assert kurtosis(torch.tensor([[-1.0, 1.0, -1.0, 1.0]])).item() == 1
    assert kurtosis(torch.full((1, 5), 7.0)).item() == 0


def test_kurtosis_and_norm_are_of_each_sequence():
    x = torch.randn(3, 20, 30)
    x[1, 4, 7] = -100
    assert inf_norm(x)[1] == 100
    assert (inf_norm(x)[[0, 2]] < 6).all()
    assert kurtosis(x)[1] > 300
    assert (kurtosis(x)[[0, 2]] < 4).all()
    assert torch.equal(kurtosis(x.bfloat16())[1:2], kurtosis(x[1:2].bfloat16()))


def test_kurtosis_ignores_place_and_scale():
    x = torch.randn(2, 1000, dtype=torch.float64)
    assert torch.allclose(kurtosis(3 * x + 5), kurtosis(x))


def test_eight_bits_round_to_half_a_step_and_keep_zero():
    x = torch.rand(1000, dtype=torch.float64) * 3 - 1
    x[0] = 0
    step = (x.max() - x.min()) / 255
    assert int8(x)[0] == 0
    assert (int8(x) - x).abs().max() <= step * (1 + 1e-9)  # half a step, and as much again by moving 0 onto the grid
    assert len(int8(x).unique()) <= 256
    assert torch.equal(int8(torch.zeros(3)), torch.zeros(3))
    assert torch.allclose(int8(int8(x)), int8(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_outlier_costs_all_the_others(dtype):
    x = torch.randn(10_000)
    x_out = x.clone()
    x_out[0] = 100 * x.abs().max()
    errors = [float((int8(t.to(dtype)).float() - t)[1:].square().mean()) for t in (x, x_out)]
    assert int8(x.to(dtype)).dtype == dtype
    assert errors[1] > 200 * errors[0]
