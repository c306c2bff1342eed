"""Clipped softmax: exact zeros, exact ones, and a head that does nothing."""

import math

import pytest
import torch

import attlas
from attlas.core.errors import BadInput

DOUBLE = {"dtype": torch.float64}


def random_qkv(queries=6, keys=6, heads=4, kv_heads=2, size=8):
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(2, *shape, size, **DOUBLE, requires_grad=True) for shape in shapes]


def weights(scores, **settings):
    """The weights of rows of scores, by values that are unit vectors."""
    keys = scores.shape[-1]
    q, k = torch.ones(1, 1, 1, 1, **DOUBLE), scores.view(1, 1, keys, 1)
    attend = attlas.make_attend("clipped_softmax", 1, 1, **settings)
    return attend(q, k, torch.eye(keys, **DOUBLE)[None, None], cross=True)[0, 0, 0]


def test_without_a_stretch_it_is_softmax():
    q, k, v = random_qkv()
    got = attlas.attend(q, k, v, "clipped_softmax", gamma=0.0)
    assert torch.equal(got, attlas.attend(q, k, v, "softmax", backend="oracle"))


@pytest.mark.parametrize("gamma", [-0.025, -0.2])
def test_probabilities_below_the_threshold_are_exact_zeros(gamma):
    threshold = -gamma / (1 - gamma)
    for share in (threshold - 1e-6, threshold + 1e-6):
        scores = torch.tensor([math.log((1 - share) / share), 0.0], **DOUBLE)
        weight = weights(scores, gamma=gamma)[1]
        assert (weight == 0) if share < threshold else (0 < weight < 2e-6)


def test_zeta_makes_exact_ones():
    scores = torch.tensor([5.0, 0.0], **DOUBLE)
    assert weights(scores, gamma=0.0, zeta=1.01)[0] == 1
    assert weights(scores, gamma=0.0)[0] < 1


def test_a_clipped_weight_has_no_gradient_and_rows_are_not_normalised_again():
    scores = torch.tensor([2.0, 1.0, -3.0], **DOUBLE, requires_grad=True)
    row = weights(scores, gamma=-0.1)
    p = scores.softmax(0)
    assert torch.allclose(row, (1.1 * p - 0.1).clamp(min=0))
    assert row[2] == 0
    assert row.sum() < 0.95
    (grad,) = torch.autograd.grad(row[2], scores)
    assert not grad.any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("gamma", [-0.1, -0.3])
def test_clipping_equals_the_literal_formula(causal, gamma):
    qkv = random_qkv(7, 7)
    seen = torch.rand(2, 1, 7, 7) > 0.3
    keep = torch.arange(7).expand(2, -1) >= torch.tensor([[0], [2]])
    mask = attlas.Mask.pairs_(seen) & attlas.Mask.padding(keep) & attlas.Mask.biased(torch.randn(1, 4, 7, 7, **DOUBLE))
    outputs = []
    for backend in ("auto", "oracle"):
        attend = attlas.make_attend(
            "clipped_softmax", 4, 8, kv_heads=2, causal=causal, gamma=gamma, zeta=1.05, backend=backend
        )
        outputs.append(attend(*qkv, mask=mask))
    assert torch.allclose(*outputs, rtol=0, atol=1e-12)
    seed = torch.randn_like(outputs[0])
    for got, expected in zip(*(torch.autograd.grad(o, qkv, seed) for o in outputs), strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-11)


def test_clipped_weights_stream():
    layer = attlas.mixer("clipped_softmax", 16, 2, causal=True, alpha=1.0, length=12).double()
    x = torch.randn(2, 12, 16, **DOUBLE) * 3
    whole, state, parts = layer(x), layer.initial_state(2), []
    for token in x.split(1, 1):
        y, state = layer.extend(token, state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


def test_what_padding_holds_never_matters():
    q, k, v = (t.detach() for t in random_qkv())
    keep = torch.arange(6).expand(2, -1) < 4
    attend = attlas.make_attend("clipped_softmax", 4, 8, kv_heads=2, alpha=0.5, length=6)
    expected = attend(q, k, v, mask=keep)
    k[:, :, 4:], v[:, :, 4:] = torch.nan, torch.inf
    assert torch.equal(attend(q, k, v, mask=keep), expected)


def needed_to_do_nothing(steps=300, **settings):
    """The squared outputs that queries and keys begin with and reach where all values are 1, and the largest score."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 16, 8, **DOUBLE).mul_(1.5).requires_grad_() for _ in "qk")
    attend = attlas.make_attend("clipped_softmax", 1, 8, **settings)
    optimizer = torch.optim.Adam([q, k], 0.02)
    ones, losses = torch.ones(1, 1, 16, 1, **DOUBLE), []
    for _ in range(steps):
        loss = attend(q, k, ones).square().sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0], losses[-1], float((q @ k.mT).detach().abs().max()) / math.sqrt(8)


def test_a_head_can_do_nothing_with_small_scores():
    first, last, largest = needed_to_do_nothing(gamma=-3.2 / 16)
    assert first > 1
    assert last == 0
    assert largest < 10
    assert needed_to_do_nothing(gamma=0.0)[:2] == pytest.approx((16, 16))  # softmax: every row sums to 1


def test_gamma_follows_the_trained_length():
    assert attlas.mixer("clipped_softmax", 768, 12).attend.gamma == pytest.approx(-0.025)  # BERT, 128 tokens
    assert attlas.mixer("clipped_softmax", 768, 12, length=512, alpha=12).attend.gamma == pytest.approx(
        -0.0234, abs=5e-5
    )
    attend = attlas.mixer("clipped_softmax", 768, 12, length=512, alpha=12, gamma=-0.003, zeta=1.003).attend
    assert (attend.gamma, attend.zeta) == (-0.003, 1.003)
    assert not attend.state_dict()


def test_weights_are_dropped_in_training_alone():
    attend = attlas.make_attend("clipped_softmax", 4, 8, kv_heads=2, alpha=0.1, weight_dropout=0.5)
    qkv = random_qkv(50, 50)
    whole = attend.eval()(*qkv)
    assert torch.equal(attend(*qkv), whole)
    assert not torch.allclose(attend.train()(*qkv), whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha sets gamma.*got -1.0"),
        ({"alpha": math.nan}, "alpha sets gamma"),
        ({"gamma": 0.1}, "gamma is the lower end.*at most 0, got 0.1"),
        ({"gamma": -math.inf}, "gamma is the lower end"),
        ({"zeta": 0.9}, "zeta is the upper end.*at least 1, got 0.9"),
        ({"weight_dropout": 1.0}, "weight_dropout"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        attlas.make_attend("clipped_softmax", 4, 8, **settings)
