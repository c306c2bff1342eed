"""Trees, and attention tied by them: whose leaves belong together, and that nothing tied is closer to softmax."""

import pytest
import torch

from attlas.core.errors import BadInput
from attlas.ops.hierarchy import Tree, hierarchical_attention, hierarchical_weights

DEEP = [[[0, 1], [2, 3, 4]], [[5, 6], 7]]


def tensors(leaves, heads=2, size=4):
    return [torch.randn(2, heads, leaves, size, dtype=torch.float64) for _ in "qkv"]


def flatten(branch):
    return [branch] if isinstance(branch, int) else [leaf for each in branch for leaf in flatten(each)]


def families(branch):
    """Every inner node, as the leaves of each of its children."""
    if isinstance(branch, int):
        return []
    return [[flatten(each) for each in branch]] + [family for each in branch for family in families(each)]


def tied(branch, logits):
    """A row-stochastic matrix tied by the tree, from a square of logits for each of its `families`."""
    rows = torch.eye(len(flatten(branch)), dtype=torch.float64)
    for family, logit in reversed(list(zip(families(branch), logits, strict=True))):  # children before their parents
        members = [sum(torch.eye(len(rows), dtype=torch.float64)[leaf] for leaf in own) for own in family]
        w = logit.softmax(-1)
        for b, own in enumerate(members):
            rows = rows * (1 - own + own * w[b, b]).unsqueeze(1)
            for c, other in enumerate(members):
                if b != c:
                    rows = rows + w[b, c] * own.outer(other) / other.sum()
    return rows


def divergence(rows, scores):
    return (torch.special.xlogy(rows, rows) - rows * scores.log_softmax(-1)).sum(-1).mean(-1)


def test_a_nested_tree_has_its_families():
    wide = sorted((width, count) for count, width in Tree.nested(DEEP).families() if width > 1)
    assert wide == [(2, 1), (2, 2), (2, 2), (3, 1)]  # the root; its two children; those of the leaves


@pytest.mark.parametrize(
    ("blocks", "nested"),
    [
        (Tree.blocks((4, 4), (2,)), [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]),
        (Tree.blocks((5,), 2), [[[0, 1], [2, 3]], [[4]]]),
        (Tree.blocks((2, 3), ((1, 2),)), [[0, 1], [2], [3, 4], [5]]),
        (Tree.blocks((3,), (2,), prefix=2), [0, 1, [2, 3], [4]]),
        (Tree.blocks((3,), ()), [0, 1, 2]),
        (Tree.blocks((2, 2, 2), 2), list(range(8))),
        (Tree.blocks((1,), 4), [0]),
    ],
)
def test_blocks_of_a_grid_are_the_tree_that_one_would_draw(blocks, nested):
    q, k, v = tensors(blocks.leaves)
    drawn = hierarchical_attention(q, k, v, Tree.nested(nested))
    torch.testing.assert_close(hierarchical_attention(q, k, v, blocks), drawn, rtol=0, atol=1e-12)


@pytest.mark.parametrize("branches", [DEEP, [7, [3, [0, 6], 5], [[2], [1, 4]]], [[[[0], 1], 2], 3]])
def test_weights_are_tied_stochastic_and_those_of_the_recursion(branches):
    tree = Tree.nested(branches)
    q, k, v = tensors(tree.leaves)
    rows, _ = hierarchical_weights(q, k, tree)
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]), rtol=0, atol=1e-12)
    for family in families(branches):
        for own in family:
            for other in family:
                if own is not other:
                    block = rows[:, :, own][..., other]
                    assert (block.amax((2, 3)) - block.amin((2, 3))).max() < 1e-15
    torch.testing.assert_close(hierarchical_attention(q, k, v, tree), rows @ v, rtol=0, atol=1e-12)


def test_the_free_energy_of_the_root_says_how_far_softmax_is():
    tree = Tree.nested(DEEP)
    q, k, _ = tensors(8)
    rows, root = hierarchical_weights(q, k, tree)
    scores = q @ k.mT / 2
    gap = scores.logsumexp(-1).mean(-1) - root
    assert (gap > 0).all()
    torch.testing.assert_close(gap, divergence(rows, scores), rtol=0, atol=1e-12)


def test_no_tied_weights_are_closer_to_softmax():
    torch.manual_seed(0)
    q, k = (1.5 * torch.randn(1, 1, 8, 4, dtype=torch.float64) for _ in "qk")
    scores = (q @ k.mT / 2)[0, 0]
    best, _ = hierarchical_weights(q, k, Tree.nested(DEEP))
    reached = divergence(best[0, 0], scores)
    logits = [torch.zeros(len(f), len(f), dtype=torch.float64, requires_grad=True) for f in families(DEEP)]
    optimizer = torch.optim.LBFGS(
        logits, max_iter=500, max_eval=1000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = divergence(tied(DEEP, logits), scores)
        value.backward()
        return value

    optimizer.step(loss)
    assert abs(float(loss().detach() - reached)) < 1e-9
    torch.testing.assert_close(tied(DEEP, logits).detach(), best[0, 0], rtol=0, atol=1e-4)
    for _ in range(20):
        other = tied(DEEP, [logit.detach() + 0.3 * torch.randn_like(logit) for logit in logits])
        assert divergence(other, scores) > reached


def test_padding_is_a_leaf_that_is_not_there():
    q, k, v = tensors(8)
    real = [0, 2, 4, 5, 7]
    keep = torch.zeros(2, 8, dtype=torch.bool)
    keep[:, real] = True
    got = hierarchical_attention(q, k, v, Tree.nested(DEEP), keep=keep)
    pruned = Tree.nested([[[0], [1, 2]], [[3], 4]])
    expected = hierarchical_attention(*(x[:, :, real] for x in (q, k, v)), pruned)
    torch.testing.assert_close(got[:, :, real], expected, rtol=0, atol=1e-12)
    assert not got[:, :, [1, 3, 6]].any()


def test_large_scores_stay_finite():
    tree = Tree.nested(DEEP)
    q, k, v = (x.float().requires_grad_() for x in tensors(8))
    o = hierarchical_attention(q, k, v, tree, keep=torch.tensor([[True] * 5 + [False] * 3] * 2), scale=1e4)
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert all(torch.isfinite(x).all() for x in (o, *grads))


@pytest.mark.parametrize("branches", [[0, [2]], [[0, 0], 1], [[], 0], [1, 2]])
def test_what_is_no_tree_is_refused(branches):
    with pytest.raises(BadInput, match=r"leaves of a tree|holds a leaf"):
        Tree.nested(branches)


@pytest.mark.parametrize("branches", [[0.7, 1.2], "01", ["0"], torch.arange(4), [torch.tensor(0), 1], None, [0, None]])
def test_leaves_are_whole_numbers(branches):
    with pytest.raises(BadInput, match="nested sequences of leaf numbers, written in ints, got"):
        Tree.nested(branches)


def test_a_tree_that_is_too_deep_is_refused():
    deep = [0]
    for leaf in range(1, 2000):
        deep = [deep, leaf]
    with pytest.raises(BadInput, match="at most some hundred levels deep"):
        Tree.nested(deep)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ("2", "in ints, got '2'"),
        (2.5, "in ints"),
        (1, "at least 2 long"),
        ((0,), "at least one position"),
        (((2, 2, 2),), "3.*axes|axes"),
    ],
)
def test_blocks_without_a_meaning_are_refused(sizes, words):
    with pytest.raises(BadInput, match=words):
        Tree.blocks((4, 4), sizes)


def test_every_leaf_is_a_token():
    q, k, v = tensors(7)
    with pytest.raises(BadInput, match="8 leaves, got 7 queries and 7 keys"):
        hierarchical_attention(q, k, v, Tree.nested(DEEP))
