"""The identities of `dcal_global_local`."""

import pytest
import torch

import attlas
from attlas import Grid, Mask
from attlas.analysis.rollout import rollout
from attlas.core.errors import BadInput, Unsupported

GRID = Grid((3, 4), prefix=1)


def qkv(tokens=13, batch=2):
    return [torch.randn(batch, 2, tokens, 4, dtype=torch.float64) for _ in "qkv"]


def build(**settings):
    return attlas.make_attend("dcal_global_local", 2, 4, **settings)


def rows(o):
    """Which rows are not zero, per sequence."""
    return [row.nonzero()[:, 0].tolist() for row in o.abs().sum((1, 3))]


def test_the_share_of_all_is_softmax_attention():
    q, k, v = qkv()
    keep = torch.arange(13).expand(2, -1) < 9
    for mask in (None, keep, Mask.window(3) & Mask.biased(torch.randn(13, 13).double())):
        real = slice(9) if mask is keep else slice(None)
        got = build(share=1.0)(q, k, v, grid=GRID, mask=mask)
        expected = attlas.attend(q, k, v, mask=mask)
        assert torch.allclose(got[:, :, real], expected[:, :, real], rtol=0, atol=1e-12)


def test_chosen_rows_are_those_of_softmax_attention_and_others_zero():
    q, k, v = qkv()
    o = build(share=0.25)(q, k, v, grid=GRID)
    expected = attlas.attend(q, k, v)
    assert [len(row) for row in rows(o)] == [1 + 3] * 2
    for b, row in enumerate(rows(o)):
        assert row[0] == 0
        assert torch.allclose(o[b, :, row], expected[b, :, row], rtol=0, atol=1e-12)


def test_without_a_rollout_the_class_token_of_this_layer_chooses():
    q, k, v = qkv()
    held = (q[:, :, :1] @ k.mT / 2).softmax(-1).mean(1)[:, 0, 1:]
    best = held.topk(3).indices + 1
    assert rows(build(share=0.25)(q, k, v, grid=GRID)) == [[0, *sorted(row.tolist())] for row in best]


def test_a_rollout_chooses():
    q, k, v = qkv()
    maps = [torch.rand(2, 2, 13, 13, dtype=torch.float64).softmax(-1) for _ in range(3)]
    attend = build(share=0.25)
    attend.relevance = rollout(maps)[:, 0]
    best = attend.relevance[:, 1:].topk(3).indices + 1
    assert rows(attend(q, k, v, grid=GRID)) == [[0, *sorted(row.tolist())] for row in best]
    assert attend.cost(2, 13, grid=GRID).flops < build(share=0.25).cost(2, 13, grid=GRID).flops


def test_the_share_is_rounded_and_at_least_one_patch():
    q, k, v = qkv()
    for share, patches in ((0.01, 1), (0.1, 1), (0.3, 4), (0.5, 6)):
        assert [len(row) for row in rows(build(share=share)(q, k, v, grid=GRID))] == [1 + patches] * 2


def test_padding_is_never_preferred():
    q, k, v = qkv()
    keep = torch.arange(13).expand(2, -1) < 6
    attend = build(share=0.4)
    attend.relevance = torch.arange(13.0).expand(2, -1)
    assert rows(attend(q, k, v, grid=GRID, mask=keep)) == [[0, 1, 2, 3, 4, 5]] * 2


def test_gradients_reach_all_keys_but_only_chosen_queries():
    q, k, v = (t.requires_grad_() for t in qkv())
    o = build(share=0.25)(q, k, v, grid=GRID)
    dq, dk, _ = torch.autograd.grad((o * torch.randn_like(o)).sum(), (q, k, v))
    assert rows(dq) == rows(o)
    assert rows(dk) == [list(range(13))] * 2


def test_cost_is_linear_in_the_share():
    costs = [build(share=share).cost(1, 101, grid=Grid((10, 10), prefix=1)).flops for share in (0.1, 0.2, 0.3)]
    assert costs[1] - costs[0] == costs[2] - costs[1] == 4 * 2 * 10 * 101 * 4


def test_what_does_not_fit_is_refused():
    q, k, v = qkv()
    with pytest.raises(BadInput, match="above 0 and up to 1, got 0"):
        build(share=0)
    with pytest.raises(BadInput, match=r"pass grid=Grid\(shape, prefix=1\)"):
        build()(q, k, v)
    with pytest.raises(BadInput, match="the same tokens here, got 5 and 13"):
        build()(q[:, :, :5], k, v, grid=Grid((4,), prefix=1))
    attend = build()
    attend.relevance = torch.zeros(3, 13)
    with pytest.raises(BadInput, match=r"relevance is \(batch, tokens\) = \(2, 13\), got \(3, 13\)"):
        attend(q, k, v, grid=GRID)
    with pytest.raises(Unsupported, match="causal"):
        build(causal=True)
