"""What only shifted sparse attention holds: its two groupings, and the seam between end and beginning."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput, Unsupported


def tensors(tokens, heads=4, size=4):
    return [torch.randn(2, heads, tokens, size, dtype=torch.float64) for _ in "qkv"]


def published(q, k, v, group, keep=None):
    """The steps as published: turn half of the heads, cut, attend causally, glue, turn back. Even groups that fit."""
    batch, heads, tokens, size = q.shape
    half = heads // 2
    keep = torch.ones(batch, tokens, dtype=torch.bool) if keep is None else keep

    def cut(x):
        x = torch.cat([x[:, :half], x[:, half:].roll(-group // 2, 2)], 1)
        return x.transpose(1, 2).reshape(batch * tokens // group, group, heads, -1).transpose(1, 2)

    q, k, v, real = (cut(x) for x in (q, k, v, keep[:, None, :, None].expand(-1, heads, -1, 1)))
    hidden = torch.ones(group, group, dtype=torch.bool).triu(1) | ~real.mT
    o = (q @ k.mT / size**0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v
    o = o.transpose(1, 2).reshape(batch, tokens, heads, size).transpose(1, 2)
    return torch.cat([o[:, :half], o[:, half:].roll(group // 2, 2)], 1)


@pytest.mark.parametrize(("tokens", "ratio", "group"), [(16, 0.25, 4), (24, 0.25, 6), (8, 0.5, 4), (8, 1.0, 8)])
def test_it_is_the_published_steps(tokens, ratio, group):
    q, k, v = (t.requires_grad_() for t in tensors(tokens))
    got = attlas.attend(q, k, v, "shifted_sparse", group_ratio=ratio)
    expected = published(q, k, v, group)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), weight) for o in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_beginning_of_half_of_the_heads_sees_the_end():
    q, k, v = tensors(16)
    other = [t.clone() for t in (q, k, v)]
    for t in other:
        t[:, :, -2:] += 1
    first, second = (attlas.attend(*x, "shifted_sparse")[:, :, :2] for x in ((q, k, v), other))
    assert torch.equal(first[:, :2], second[:, :2])
    assert (first[:, 2:] != second[:, 2:]).all()


@pytest.mark.parametrize(("tokens", "group"), [(16, 4), (9, 4), (10, 4), (11, 4), (11, 3), (10, 3), (13, 5), (7, 7)])
def test_who_sees_across_the_seam(tokens, group):
    q, k, _ = tensors(tokens, heads=2)
    eye = torch.eye(tokens, dtype=q.dtype).expand(2, 2, -1, -1)
    seen = attlas.attend(q, k, eye, "shifted_sparse", group_ratio=(group + 0.5) / tokens if group < tokens else 1.0) > 0
    half, rest = group // 2, tokens % group or group
    first, last = (half, rest - half) if rest > half else (half - rest, group + rest - half)
    later = torch.zeros(tokens, tokens, dtype=torch.bool)
    later[:first, tokens - last :] = True
    assert torch.equal(seen[0, 1].triu(1), later)
    assert not seen[0, 0].triu(1).any()


def test_padding_inside_a_turned_group():
    q, k, v = tensors(16)
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[:, [0, 5, 15]] = False  # both sides of the seam, and between
    blank = [x.masked_fill(~keep[:, None, :, None], torch.nan) for x in (q, k, v)]
    got = attlas.attend(*blank, "shifted_sparse", mask=keep)
    expected = published(q, k, v, 4, keep)
    torch.testing.assert_close(got[:, :, keep[0]], expected[:, :, keep[0]], rtol=0, atol=1e-12)


def test_it_serves_no_causal_pattern():
    with pytest.raises(Unsupported, match="does not serve causal use"):
        attlas.mixer("shifted_sparse", 16, 2, causal=True)


def test_one_head_is_turned_and_odd_sizes_have_smaller_groups():
    q, k, v = tensors(11, heads=1)
    a, b = (attlas.attend(q, k, v, "shifted_sparse", backend=name, group_ratio=0.3) for name in ("auto", "oracle"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_counts_are_linear_in_the_group():
    layer = attlas.mixer("shifted_sparse", 64, 4).attend
    cost = layer.cost(1, 1024)
    assert cost.pairs == 4 * 4 * 256 * 257 // 2
    assert cost.executed == 4 * 64 * 1024 * 256


def test_bad_inputs():
    for ratio in (0, 1.5, -1):
        with pytest.raises(BadInput, match="group_ratio is the share"):
            attlas.mixer("shifted_sparse", 16, 2, group_ratio=ratio)
    q, k, v = tensors(8)
    with pytest.raises(BadInput, match="every token is a query"):
        attlas.make_attend("shifted_sparse", 4, 4)(q[:, :, 1:], k, v)
