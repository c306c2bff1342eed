"""The identities of `davit_channel`."""

import math

import pytest
import torch

import attlas
from attlas.core.errors import BadInput


def tensors(tokens=12, heads=2, size=4, batch=2):
    return [torch.randn(batch, heads, tokens, size, dtype=torch.float64) for _ in range(3)]


def test_is_a_softmax_among_the_features_of_a_head():
    q, k, v = tensors()
    expected = torch.empty_like(q)
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(2)):
        for d in range(4):
            scores = [sum(k[b, h, m, d] * v[b, h, m, e] for m in range(12)) / math.sqrt(4) for e in range(4)]
            weights = torch.stack(scores).softmax(0)
            expected[b, h, :, d] = q[b, h] @ weights
    torch.testing.assert_close(attlas.attend(q, k, v, "davit_channel"), expected, rtol=0, atol=1e-12)


def test_permuting_tokens_permutes_outputs():
    layer, x = attlas.mixer("davit_channel", 16, 4).double(), torch.randn(2, 12, 16, dtype=torch.float64)
    order = torch.randperm(12)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=0, atol=1e-12)


def test_every_output_depends_on_every_pixel_of_its_own_group():
    layer = attlas.mixer("davit_channel", 16, 2).double()
    x = torch.randn(1, 30, 16, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x, grid=(5, 6))[0, 0].sum(), x)
    assert grad[0].any(-1).all()
    q, k, v = tensors()
    changed = v.clone()
    changed[:, 0] += 1
    moved = attlas.attend(q, k, changed, "davit_channel") != attlas.attend(q, k, v, "davit_channel")
    assert moved[:, 0].any()
    assert not moved[:, 1].any()


def test_without_scores_the_features_are_averaged():
    q, k, v = tensors()
    got = attlas.attend(q, k * 0, v, "davit_channel")
    torch.testing.assert_close(got, q.mean(-1, keepdim=True).expand_as(q), rtol=0, atol=1e-12)


def test_cost_is_linear_in_tokens():
    layer = attlas.mixer("davit_channel", 96, 3)
    small, large = (layer.cost(1, side * side, grid=(side, side)) for side in (56, 112))
    assert large.flops == 4 * small.flops
    assert small.flops == 8 * 3136 * 96**2 + 4 * 3136 * 32 * 96
    assert small.pairs == 0


def test_padding_is_as_if_it_were_not_there():
    q, k, v = tensors()
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0], dtype=torch.bool)
    got = attlas.attend(q, k, v, "davit_channel", mask=keep.expand(2, -1))[:, :, keep]
    expected = attlas.attend(*(x[:, :, keep] for x in (q, k, v)), "davit_channel")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_the_causal_form_is_the_other_one_on_every_beginning():
    q, k, v = tensors()
    got = attlas.attend(q, k, v, "davit_channel", causal=True)
    for t in range(1, 13):
        whole = attlas.attend(*(x[:, :, :t] for x in (q, k, v)), "davit_channel")
        torch.testing.assert_close(got[:, :, t - 1], whole[:, :, -1], rtol=0, atol=1e-12)


def test_queries_before_the_first_key_give_nothing():
    q, k, v = tensors()
    got = attlas.attend(q, k[:, :, :5], v[:, :, :5], "davit_channel", causal=True)
    assert not got[:, :, :7].any()
    assert got[:, :, 7:].all()


def test_the_state_does_not_grow():
    layer = attlas.make_attend("davit_channel", 2, 4, causal=True).double()
    inputs = tensors()
    state, sizes = layer.initial_state(2, inputs[0]), set()
    for piece in zip(*(x.split(5, 2) for x in inputs), strict=True):
        _, state = layer.extend(*piece, state)
        sizes.add(attlas.state_bytes(state))
    assert len(sizes) == 1


def test_values_of_another_size_are_refused():
    q, k, _ = tensors()
    with pytest.raises(BadInput, match="they are as many, got 6 and 4"):
        attlas.attend(q, k, torch.randn(2, 2, 12, 6, dtype=torch.float64), "davit_channel")
