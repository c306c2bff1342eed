"""The identities of `dependency_vit`."""

from itertools import pairwise

import pytest
import torch

import attlas
from attlas import Mask
from attlas.core.errors import BadInput, Unsupported


def build(heads=2):
    return attlas.make_attend("dependency_vit", heads, 4).double()


def inputs(tokens=5, heads=2, batch=2):
    q, k, v = (torch.randn(batch, heads, tokens, 4, dtype=torch.float64) for _ in "qkv")
    return q, k, v, torch.randn(batch, tokens, 4 * heads, dtype=torch.float64)


def fixed(attend, head=None, message=None):
    """Let all children send through one head, or all by one share."""
    with torch.no_grad():
        if head is not None:
            attend.select.weight.zero_()
            attend.select.bias.fill_(-60).index_fill_(0, torch.tensor(head), 60)
        if message is not None:
            attend.control.weight.zero_()
            attend.control.bias.fill_(message)
    return attend


def test_each_child_gives_away_its_message_and_no_more():
    attend, (q, k, _, tokens) = build(), inputs()
    strengths = attend.edges(q, k, tokens=tokens)
    assert torch.allclose(strengths.sum(1), attend.message(tokens), rtol=0, atol=1e-12)
    assert not torch.allclose(strengths.sum(2), attend.message(tokens))


def test_messages_arrive_as_the_edges_say():
    attend, (q, k, v, tokens) = build(1), inputs(heads=1)
    strengths = attend.edges(q, k, tokens=tokens)
    assert torch.allclose(attend(q, k, v, tokens=tokens)[:, 0], strengths @ v[:, 0], rtol=0, atol=1e-12)


def test_one_head_and_full_messages_are_softmax_attention_transposed():
    q, k, v, tokens = inputs()
    o = fixed(build(), head=1, message=60.0)(q, k, v, tokens=tokens)
    weights = (q @ k.mT / 2).softmax(-1)
    assert torch.allclose(o[:, 1], weights[:, 1].mT @ v[:, 1], rtol=0, atol=1e-12)
    assert torch.allclose(o[:, 0], torch.zeros_like(o[:, 0]), rtol=0, atol=1e-12)


def test_without_messages_nothing_arrives():
    attend, (q, k, v, tokens) = build(), inputs()
    attend.incoming = torch.zeros(2, 5)
    assert not attend(q, k, v, tokens=tokens).any()


def test_a_silent_token_says_nothing_but_can_be_told():
    attend, (q, k, v, tokens) = build(), inputs()
    attend.incoming = torch.ones(2, 5, dtype=torch.float64)
    attend.incoming[:, 3] = 0
    o = attend(q, k, v, tokens=tokens)
    loud_q, loud_k, loud_v = (t.clone() for t in (q, k, v))
    for loud in (loud_q, loud_k, loud_v):
        loud[:, :, 3] += 1
    assert torch.equal(attend(loud_q, k, loud_v, tokens=tokens), o)
    assert not torch.allclose(attend(q, loud_k, v, tokens=tokens), o)  # it stays a parent that others may choose


def test_messages_get_fainter_down_the_depth():
    layers = [attlas.mixer("dependency_vit", 8, 2).double() for _ in range(4)]
    x, message, history = torch.randn(2, 5, 8, dtype=torch.float64), None, []
    for layer in layers:
        layer.attend.incoming = message
        y, message = layer(x), layer.attend.message(x)
        x = x + y
        history.append(message)
    assert all((after < before).all() for before, after in pairwise(history))
    message.sum().backward()
    assert all(layer.attend.control.weight.grad.any() for layer in layers)


def test_padding_neither_sends_nor_receives():
    attend, (q, k, v, tokens) = build(), inputs()
    keep = torch.arange(5).expand(2, -1) < 3
    got = attend(q, k, v.masked_fill(~keep[:, None, :, None], torch.nan), tokens=tokens, mask=keep)
    expected = attend(q[:, :, :3], k[:, :, :3], v[:, :, :3], tokens=tokens[:, :3])
    assert torch.allclose(got[:, :, :3], expected, rtol=0, atol=1e-12)
    assert not got[:, :, 3:].any()


def test_a_mask_says_from_whom_a_token_may_receive():
    attend, (q, k, v, tokens) = build(), inputs()
    seen = torch.ones(5, 5, dtype=torch.bool)
    seen[1, 2] = False  # 1 may not receive from 2
    before = attend(q, k, v, tokens=tokens, mask=Mask.pairs_(seen))
    changed = v.clone()
    changed[:, :, 2] += 1
    after = attend(q, k, changed, tokens=tokens, mask=Mask.pairs_(seen))
    assert (before != after).any(-1).all(1).tolist() == [[True, False, True, True, True]] * 2


def test_what_does_not_fit_is_refused():
    attend, (q, k, v, tokens) = build(), inputs()
    with pytest.raises(BadInput, match=r"pass tokens of shape \(2, 5, 8\)"):
        attend(q, k, v)
    with pytest.raises(BadInput, match="the same tokens, got 3 queries, 5 keys"):
        attend(q[:, :, :3], k, v, tokens=tokens[:, :3])
    attend.incoming = torch.ones(2, 4)
    with pytest.raises(BadInput, match=r"incoming is \(batch, tokens\) = \(2, 5\), got \(2, 4\)"):
        attend(q, k, v, tokens=tokens)
    with pytest.raises(Unsupported, match="causal"):
        attlas.mixer("dependency_vit", 8, 2, causal=True)
    with pytest.raises(Unsupported, match="noncausal cross"):
        attlas.mixer("dependency_vit", 8, 2)(torch.randn(1, 3, 8), torch.randn(1, 4, 8))
