"""The second stage of softplus attention: what it keeps, what it sharpens, where it falls back."""

import math

import pytest
import torch

import attlas
from attlas.core.errors import BadInput
from attlas.ops.softplus import sharpen

DOUBLE = {"dtype": torch.float64}


def entropy(weights):
    return -(weights * weights.clamp(min=1e-300).log()).sum(-1)


def random_weights(rows=200, keys=30):
    return torch.randn(rows, keys, **DOUBLE).softmax(-1), torch.full((rows, 1), keys, **DOUBLE)


def test_without_offset_and_power_it_is_the_first_stage():
    first, both = attlas.mixer("lssa", 16, 2), attlas.mixer("lssar", 16, 2, offset=0.0, power=1.0)
    both.load_state_dict(first.state_dict())
    x = torch.randn(2, 20, 16)
    assert torch.allclose(both(x), first(x), rtol=0, atol=1e-6)
    both.attend.power = 3.0
    assert not torch.allclose(both(x), first(x), atol=1e-3)


@pytest.mark.parametrize("offset", [0.0, 0.5, 1.0])
def test_power_lowers_the_entropy_and_keeps_the_largest(offset):
    weights, length = random_weights()
    before = None
    for power in (1, 1.5, 2, 3, 15, 100):
        sharp = sharpen(weights, length, offset, power)
        assert torch.allclose(sharp.sum(-1), torch.ones(200, **DOUBLE), rtol=0, atol=1e-12)
        assert torch.equal(sharp.argmax(-1), weights.argmax(-1))
        assert before is None or (entropy(sharp) < before).all()
        before = entropy(sharp)
    assert before.mean() < 0.2


def test_the_offset_drops_what_is_below_a_share_of_the_mean():
    weights, length = random_weights()
    for offset in (0.5, 1.0):
        assert torch.equal(sharpen(weights, length, offset, 3) == 0, weights <= offset / 30)


def test_the_formula_itself():
    weights = torch.tensor([[0.5, 0.25, 0.15, 0.1]], **DOUBLE)
    sharp = sharpen(weights, torch.tensor([[4.0]], **DOUBLE), 0.8, 2.0)
    assert torch.allclose(sharp, torch.tensor([[1.2**2, 0.2**2, 0.0, 0.0]], **DOUBLE) / (1.2**2 + 0.2**2))


def test_rows_of_three_keys_have_no_offset():
    weights = torch.tensor([[0.5, 0.3, 0.2]], **DOUBLE)
    sharp = sharpen(weights, torch.tensor([[3.0]], **DOUBLE), 1.0, 2.0)
    assert torch.allclose(sharp, torch.tensor([[0.25, 0.09, 0.04]], **DOUBLE) / 0.38)


def test_a_row_that_the_offset_empties_stays_as_it_was():
    weights = torch.tensor([[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [0.0] * 4], **DOUBLE, requires_grad=True)
    length = torch.tensor([[4.0], [4.0], [0.0]], **DOUBLE)
    sharp = sharpen(weights, length, 1.0, 3.0)
    assert torch.equal(sharp[0], weights[0])
    assert sharp[1].tolist() == [1, 0, 0, 0]
    assert not sharp[2].any()
    (grad,) = torch.autograd.grad(sharp[:, 0].sum(), weights)
    assert grad.isfinite().all()


def test_long_rows_and_large_powers_do_not_overflow():
    weights = torch.tensor([[0.6, 0.4] + [0.0] * 99_998], requires_grad=True)
    sharp = sharpen(weights, torch.tensor([[1e5]]), 0.5, 50.0)
    assert sharp[0, 0] > 0.999
    (grad,) = torch.autograd.grad(sharp[0, 1], weights)
    assert grad.isfinite().all()
    assert grad.any()


@pytest.mark.parametrize("causal", [False, True])
def test_dropping_equals_the_literal_formula(causal):
    qkv = [torch.randn(2, h, 9, 8, **DOUBLE, requires_grad=True) for h in (4, 2, 2)]
    keep = torch.arange(9).expand(2, -1) >= torch.tensor([[0], [2]])
    mask = attlas.Mask.padding(keep) & attlas.Mask.biased(torch.randn(1, 4, 9, 9, **DOUBLE))
    for offset, power in ((0.5, 3.0), (1.0, 2.0), (1.0, 15.0)):
        outputs = []
        for backend in ("auto", "oracle"):
            settings = {"offset": offset, "power": power, "backend": backend}
            attend = attlas.make_attend("lssar", 4, 8, kv_heads=2, causal=causal, **settings)
            outputs.append(attend(*qkv, mask=mask))
        assert torch.allclose(*outputs, rtol=0, atol=1e-11)
        seed = torch.randn_like(outputs[0])
        for got, expected in zip(*(torch.autograd.grad(o, qkv, seed) for o in outputs), strict=True):
            assert torch.allclose(got, expected, rtol=0, atol=1e-9)


def test_dropped_keys_stream():
    layer = attlas.mixer("lssar", 16, 2, causal=True, offset=1.0).double()
    x = torch.randn(2, 12, 16, **DOUBLE) * 2
    whole, state, parts = layer(x), layer.initial_state(2), []
    for token in x.split(5, 1):
        y, state = layer.extend(token, state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offset": -0.1}, "offset is a share of the mean weight.*got -0.1"),
        ({"power": 0.5}, "power sharpens and is at least 1, got 0.5"),
        ({"power": math.nan}, "power sharpens"),
        ({"scale": 0.0}, "scale multiplies the cosines"),
        ({"weight_dropout": 1.0}, "weight_dropout"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        attlas.make_attend("lssar", 2, 8, **settings)
