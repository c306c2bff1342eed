"""What only hierarchical self-attention holds: where it is softmax, what it costs, which trees it takes."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput


def tensors(tokens, heads=2, size=4):
    return [torch.randn(2, heads, tokens, size, dtype=torch.float64) for _ in "qkv"]


@pytest.mark.parametrize("settings", [{"tree": list(range(12))}, {"blocks": 12}, {"blocks": ()}])
def test_one_family_is_softmax(settings):
    inputs = [x.requires_grad_() for x in tensors(12)]
    got, expected = attlas.attend(*inputs, "hsa", **settings), attlas.attend(*inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    seed = torch.randn_like(got)
    grads = zip(*(torch.autograd.grad(y, inputs, seed) for y in (got, expected)), strict=True)
    for a, b in grads:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_blocks_of_equal_queries_and_keys_are_softmax():
    q, k, v = tensors(12)
    q, k = (x[:, :, ::4].repeat_interleave(4, 2) for x in (q, k))
    got = attlas.attend(q, k, v, "hsa", blocks=(2, 2))
    torch.testing.assert_close(got, attlas.attend(q, k, v), rtol=0, atol=1e-12)


def test_a_deep_tree_is_not_softmax():
    q, k, v = tensors(12)
    assert (attlas.attend(q, k, v, "hsa", blocks=2) - attlas.attend(q, k, v)).abs().max() > 0.01


def test_leaves_of_a_block_get_the_same_from_outside():
    """What a block gives another is one number for all pairs; gradients of the values show the weights."""
    layer = attlas.make_attend("hsa", 1, 4, grid=(4, 4), blocks=(2,))
    q, k, v = (torch.randn(1, 1, 16, 4, dtype=torch.float64) for _ in "qkv")
    weights = torch.autograd.functional.jacobian(lambda x: layer(q, k, x, grid=(4, 4)).sum(-1), v)[0, 0, :, 0, 0, :, 0]
    home = torch.tensor([2 * (n // 8) + n % 4 // 2 for n in range(16)])
    for own in range(4):
        for other in range(4):
            block = weights[home == own][:, home == other]
            assert (block.std() < 1e-15) == (own != other)


def test_cost_is_linear_in_the_tokens():
    cost = [attlas.mixer("hsa", 16, 2, blocks=8).attend.cost(1, n) for n in (512, 4096)]
    assert cost[1].flops < 8.2 * cost[0].flops
    assert cost[1].executed < 8.2 * cost[0].executed
    softmax = attlas.mixer("softmax", 16, 2).attend.cost(1, 4096)
    assert 100 * cost[1].flops < softmax.flops
    assert cost[1].pairs == softmax.pairs


def test_every_level_may_have_its_own_blocks():
    q, k, v = tensors(12)
    frames = attlas.attend(q, k, v, "hsa", grid=(3, 2, 2), blocks=((1, 2, 2),))
    expected = attlas.attend(q, k, v, "hsa", tree=[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]])
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-12)


def test_the_tree_of_a_layer_counts_its_prefix_tokens():
    layer = attlas.mixer("hsa", 16, 2, grid=attlas.Grid((3,), prefix=1), tree=[0, [1, 2], 3])
    assert layer(torch.randn(1, 4, 16)).shape == (1, 4, 16)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"blocks": 1}, "at least 2 long"),
        ({"blocks": (0,), "grid": (4,)}, "at least one position"),
        ({"blocks": ((2, 2),), "grid": (4,)}, "2.* axes, the grid has 1"),
        ({"tree": [0, [2]]}, "numbers from 0 on"),
        ({"tree": [0, [1, 2]], "grid": (4,)}, "3 leaves, the grid 4 has 4 tokens"),
        ({"tree": [0, 1], "blocks": 8}, "pass one of the two"),
        ({"blocks": (0,)}, "at least one position"),
        ({"blocks": ((1, 0), 2)}, "at least one position"),
        ({"blocks": 2.5}, "written in ints, got 2.5"),
        ({"blocks": (2.0,)}, "written in ints, got 2.0"),
    ],
)
def test_what_has_no_meaning_is_refused_at_construction(settings, words):
    with pytest.raises(BadInput, match=words):
        attlas.mixer("hsa", 16, 2, **settings)


def test_every_token_is_a_query():
    layer = attlas.make_attend("hsa", 2, 4)
    q, k, v = tensors(6)
    with pytest.raises(BadInput, match="every leaf of the tree is a query and a key"):
        layer(q[:, :, :3], k, v)
