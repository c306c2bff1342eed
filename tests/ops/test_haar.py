import pytest
import torch

from attlas.ops.haar import causal_scales, dwt, idwt


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 13, 31])
def test_the_transform_is_orthonormal_at_any_length(tokens, levels):
    x = torch.randn(2, 3, tokens, 4, dtype=torch.float64)
    coefficients = dwt(x, levels)
    assert torch.allclose(idwt(coefficients, tokens), x, rtol=0, atol=1e-12)
    assert sum(float(c.square().sum()) for c in coefficients) == pytest.approx(float(x.square().sum()), rel=1e-12)
    assert [c.shape[-2] for c in coefficients] == [-(-tokens // 2**i) for i in (*range(1, levels + 1), levels)]


def test_levels_beyond_the_tokens_cost_one_coefficient_each():
    x = torch.randn(10, 4, dtype=torch.float64)
    coefficients = dwt(x, 40)
    assert [c.shape[0] for c in coefficients] == [5, 3, 2] + [1] * 38
    assert torch.allclose(idwt(coefficients, 10), x, rtol=0, atol=1e-12)
    assert torch.allclose(sum(causal_scales(x, 40)), x, rtol=0, atol=1e-12)


def test_a_step_between_two_pairs_is_seen_from_the_second_level_on():
    first, second, approximation = dwt(torch.tensor([1.0, 1, 3, 3]).view(4, 1), 2)
    assert first.flatten().tolist() == [0, 0]
    assert second.item() == pytest.approx(-2)
    assert approximation.item() == pytest.approx(4)


@pytest.mark.parametrize("tokens", [1, 3, 9, 20])
def test_causal_scales_are_means_of_the_past_and_sum_to_the_tokens(tokens):
    x = torch.randn(2, tokens, 3, dtype=torch.float64)
    scales = causal_scales(x, 3)
    assert torch.allclose(sum(scales), x, rtol=0, atol=1e-12)
    mean = torch.stack([x[:, max(0, t - 7) : t + 1].sum(1) / 8 for t in range(tokens)], 1)
    assert torch.allclose(scales[-1], mean, rtol=0, atol=1e-12)
    changed = x.clone()
    changed[:, -1] = 9
    assert all(torch.equal(a[:, :-1], b[:, :-1]) for a, b in zip(scales, causal_scales(changed, 3), strict=True))
