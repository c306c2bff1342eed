"""What only sink fixed attention holds: its mask, that nothing leaks, and a state of fixed size."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput


def tensors(tokens, heads=4, size=4):
    return [torch.randn(2, heads, tokens, size, dtype=torch.float64) for _ in "qkv"]


def rule(tokens, heads, group, sinks):
    place = torch.arange(tokens)
    masks = []
    for head in range(heads):
        number = (place + (group // 2 if head >= heads // 2 else 0)) // group
        same = number.unsqueeze(1) == number
        masks.append((place <= place.unsqueeze(1)) & (same | (place < sinks)))
    return torch.stack(masks)


@pytest.mark.parametrize(
    ("tokens", "heads", "ratio", "group", "sinks"),
    [(32, 4, 0.25, 8, 4), (21, 4, 0.25, 5, 3), (13, 1, 0.5, 6, 0), (9, 2, 0.12, 1, 2), (10, 2, 0.5, 5, 10)],
)
def test_it_is_dense_attention_under_its_mask(tokens, heads, ratio, group, sinks):
    q, k, v = (t.requires_grad_() for t in tensors(tokens, heads))
    settings = {"causal": True, "group_ratio": ratio, "sinks": sinks}
    got = attlas.attend(q, k, v, "sinklora", **settings)
    seen = rule(tokens, heads, group, sinks)
    expected = attlas.attend(q, k, v, mask=attlas.Mask.pairs_(seen.unsqueeze(0)))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), weight) for o in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    cost = attlas.make_attend("sinklora", heads, 4, length=tokens, **settings).cost(1, tokens)
    assert cost.pairs == seen.sum()


def test_one_group_without_sinks_is_causal_attention():
    q, k, v = tensors(12, heads=2)
    got = attlas.attend(q, k, v, "sinklora", causal=True, group_ratio=1.0, sinks=0)
    expected = attlas.attend(q, k, v, causal=True)
    torch.testing.assert_close(got[:, 0], expected[:, 0], rtol=0, atol=1e-12)
    # The other head has the border of its two groups in the middle.
    torch.testing.assert_close(got[:, 1, :6], expected[:, 1, :6], rtol=0, atol=1e-12)


def test_the_end_does_not_leak_to_the_beginning():
    q, k, v = tensors(32)
    other = [t.clone() for t in (q, k, v)]
    for t in other:
        t[:, :, -4:] += 1
    first, second = (attlas.attend(*x, "sinklora", causal=True)[:, :, :4] for x in ((q, k, v), other))
    leaking, leaked = (attlas.attend(*x, "shifted_sparse")[:, :, :4] for x in ((q, k, v), other))
    assert torch.equal(first, second)
    assert not torch.equal(leaking, leaked)


def test_counts_are_linear_in_the_group():
    cost = attlas.mixer("sinklora", 64, 4, causal=True, length=16384, sinks=4).attend.cost(1, 16384)
    group = 16384 // 4
    assert cost.pairs < 4 * 16384 * (group / 2 + 4 + 1)
    assert cost.executed < 4 * 64 * 16384 * group * 1.15  # the shifted heads have one group more, two of them half


def test_the_state_has_a_fixed_size():
    layer = attlas.mixer("sinklora", 16, 2, causal=True, length=40, sinks=3).double()
    x = torch.randn(1, 60, 16, dtype=torch.float64)  # longer than what the groups were made for
    state, parts, sizes = layer.initial_state(1), [], []
    with torch.no_grad():
        for piece in x.split([7, 1, 30, 2, 19, 1], 1):
            y, state = layer.extend(piece, state)
            parts.append(y)
            sizes.append(attlas.state_bytes(state))
        torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=0, atol=1e-12)
    assert sizes[2:] == [(3 + 9) * (2 * 16 * 8 + 1)] * 4


def test_the_state_holds_no_more_than_it_says():
    layer = attlas.mixer("sinklora", 16, 2, causal=True, length=40, sinks=3)
    with torch.no_grad():
        _, state = layer.extend(torch.randn(1, 1000, 16), layer.initial_state(1))
    held = sum(x.untyped_storage().nbytes() for x in (*state.attend.sinks, *state.attend.recent))
    assert held == attlas.state_bytes(state)


def test_bad_inputs():
    with pytest.raises(BadInput, match="group_ratio is the share"):
        attlas.mixer("sinklora", 16, 2, causal=True, group_ratio=0)
    with pytest.raises(BadInput, match=r"sinks counts .* got -1"):
        attlas.mixer("sinklora", 16, 2, causal=True, sinks=-1)
    with pytest.raises(BadInput, match="build with length="):
        attlas.mixer("sinklora", 16, 2, causal=True).initial_state(1)
    q, k, v = tensors(8)
    with pytest.raises(BadInput, match="8 queries and 7 keys"):
        attlas.make_attend("sinklora", 4, 4, causal=True)(q, k[:, :, 1:], v[:, :, 1:])
