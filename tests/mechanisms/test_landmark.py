"""What only landmark attention holds: who is seen through whom, and what it is without landmarks."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput


def tensors(tokens, heads=2, kv_heads=None, size=4):
    return [torch.randn(2, h, tokens, size, dtype=torch.float64) for h in (heads, *2 * [kv_heads or heads])]


def test_without_landmarks_it_is_softmax():
    q, k, v = tensors(12, 4, 2)
    for mem_freq in (12, 50):
        got = attlas.attend(q, k, v, "landmark", causal=True, mem_freq=mem_freq)
        torch.testing.assert_close(got, attlas.attend(q, k, v, causal=True), rtol=0, atol=1e-12)


def test_one_block_is_softmax_in_which_nobody_sees_the_landmark():
    q, k, v = tensors(12)
    got = attlas.attend(q, k, v, "landmark", causal=True, mem_freq=11)
    everyone = torch.ones(2, 12, dtype=torch.bool)
    everyone[:, 11] = False
    expected = attlas.attend(q, k, v, causal=True, mask=attlas.Mask(keys=everyone))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_who_is_seen_and_through_whom():
    tokens, period = 14, 4
    q, k, v = (t[:1, :1].requires_grad_() for t in tensors(tokens))
    layer = attlas.make_attend("landmark", 1, 4, causal=True, mem_freq=period - 1)
    o = layer(q, k, v)
    for i in range(tokens):
        by_key, by_value = torch.autograd.grad(o[0, 0, i].norm(), (k, v), retain_graph=True)
        seen = by_value[0, 0].any(-1).tolist()
        assert seen == [j <= i and j % period < 3 for j in range(tokens)]
        # A key matters where it competes: not the only token of the row, not a landmark of the own block.
        asked = by_key[0, 0].any(-1).tolist()
        assert asked == [j <= i and i > 0 and (j % period < 3 or j // period < i // period) for j in range(tokens)]


def test_values_of_landmarks_never_matter():
    q, k, v = tensors(23)
    other = v.clone()
    other[:, :, 4::5] = 7
    a, b = (attlas.attend(q, k, x, "landmark", causal=True, mem_freq=4) for x in (v, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "size", "tolerance"), [(torch.float16, 60, 1e-3), (torch.bfloat16, 3, 3e-3)])
def test_half_precision_neither_overflows_nor_rounds_scores(dtype, size, tolerance):
    q, k, v = (torch.randn(1, 2, 100, 64).to(dtype) for _ in "qkv")
    q, k, settings = size * q, size * k, {"mem_freq": 3}
    got = attlas.attend(q, k, v, "landmark", causal=True, **settings)
    exact = attlas.attend(q.double(), k.double(), v.double(), "landmark", causal=True, backend="oracle", **settings)
    assert (got - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("backend", ["auto", "oracle"])
def test_group_dropout_drops_whole_earlier_blocks(backend):
    layer = attlas.make_attend("landmark", 2, 12, causal=True, backend=backend, mem_freq=3, group_dropout=0.5)
    q, k = torch.randn(2, 100, 2, 12, 4).unbind()
    values = torch.eye(12).expand(100, 2, 12, 12)
    whole = layer.eval()(q, k, values)
    dropped = layer.train()(q, k, values)
    own = torch.block_diag(*[torch.ones(4, 4, dtype=torch.bool)] * 3)
    torch.testing.assert_close(dropped * own, whole * own)  # the own block of every query stays
    factor = (dropped / whole).unflatten(-1, (3, 4))[..., :3]  # of each block, for each query and head
    for query, block in ((4, 0), (8, 0), (11, 1)):
        torch.testing.assert_close(factor[:, :, query, block], factor[:, :, query, block, :1].expand(-1, -1, 3))
    earlier = torch.stack([factor[:, :, i, b, 0].round(decimals=3) for i in range(4, 12) for b in range(i // 4)], -1)
    assert set(earlier.flatten().tolist()) == {0.0, 2.0}
    assert 0.4 < (earlier > 0).float().mean() < 0.6
    # Each query, head and block draws on its own: two agree in half of all cases.
    one, other = earlier[..., :-1], earlier[..., 1:]
    for a, b in ((earlier[:, 0], earlier[:, 1]), (one, other)):
        assert 0.4 < (a == b).float().mean() < 0.6


def test_counts():
    cost = attlas.mixer("landmark", 8, 2, causal=True, mem_freq=3).attend.cost(1, 8)
    seen = [1, 2, 3, 3, 3 + 1, 3 + 2, 3 + 3, 3 + 3]
    assert cost.pairs == 2 * sum(seen)
    assert cost.flops == 2 * 2 * 4 * (2 * sum(seen) + 4 * 1)  # four queries score one landmark each


def test_bad_inputs():
    with pytest.raises(BadInput, match=r"mem_freq counts .* got 0"):
        attlas.mixer("landmark", 8, 2, causal=True, mem_freq=0)
    with pytest.raises(BadInput, match="group_dropout"):
        attlas.mixer("landmark", 8, 2, causal=True, group_dropout=1.0)
    q, k, v = tensors(5)
    layer = attlas.make_attend("landmark", 2, 4, causal=True)
    with pytest.raises(BadInput, match="5 queries and 4 keys"):
        layer(q, k[:, :, 1:], v[:, :, 1:])
