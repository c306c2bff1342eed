"""NaLaFormer with cosines: directions count the less the more they differ."""

import math

import pytest
import torch

import attlas


def weights(q, k):
    layer = attlas.make_attend("nalaformer_cos_sin", q.shape[1], q.shape[3], kernel=0)
    values = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:3], -1)
    with torch.no_grad():
        return layer(q, k, values, cross=True)


def test_a_pair_weighs_the_cosine_between_its_directions():
    q, k = (torch.randn(2, 3, tokens, 8, dtype=torch.float64) for tokens in (9, 14))
    norm = q.norm(dim=-1, keepdim=True)
    q_hat, k_hat = q / norm, k / k.norm(dim=-1, keepdim=True)
    reach = q_hat.abs() ** (3 * (0.5 + norm.tanh()))
    cosine = torch.cos(math.pi / 4 * (q_hat.unsqueeze(3) - k_hat.unsqueeze(2)))
    expected = (reach.unsqueeze(3) * k.abs().unsqueeze(2) ** 3 * cosine).sum(-1)
    got = weights(q, k)
    assert torch.allclose(got, expected / 14 / (expected.mean(-1, keepdim=True) + 1e-6), atol=1e-12)
    assert (got >= 0).all()


def test_the_map_keeps_the_norm():
    layer = attlas.make_attend("nalaformer_cos_sin", 1, 8, kernel=0)
    q, k, v = (torch.randn(1, 1, 5, 8, dtype=torch.float64) for _ in "qkv")
    _, features, _ = layer._features(q, k, v, None)
    assert torch.allclose(features.norm(dim=-1), (k**3).norm(dim=-1), rtol=1e-12)


def test_opposite_directions_weigh_nothing():
    q = torch.eye(4, dtype=torch.float64)[:1].expand(1, 1, 1, 4)
    k = torch.stack([q[0, 0, 0], -q[0, 0, 0]]).expand(1, 1, 2, 4)
    assert weights(q, k)[0, 0, 0].tolist() == pytest.approx([1, 0], abs=1e-5)


def test_longer_queries_look_more_sharply():
    q, k = (torch.randn(2, 3, 64, 8, dtype=torch.float64) for _ in "qk")
    entropies = [float(torch.special.entr(weights(c * q, k)).sum(-1).mean()) for c in (0.25, 0.5, 1.0)]
    assert entropies == sorted(entropies, reverse=True)


def test_a_query_of_norm_zero_has_finite_gradients():
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in "qkv")
    q[:, :, 1], k[:, :, 2] = 0, 0
    q, k = q.requires_grad_(), k.requires_grad_()
    o = attlas.make_attend("nalaformer_cos_sin", 2, 8, kernel=0)(q, k, v)
    for grad in torch.autograd.grad(o.sum(), (q, k)):
        assert torch.isfinite(grad).all()
