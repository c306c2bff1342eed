"""Dependency trees."""

from itertools import product

import pytest
import torch

import attlas
from attlas.analysis.trees import branches, dependency_tree, edges
from attlas.core.errors import BadInput


def reaches_root(parents):
    """Whether every token comes to the one root."""
    for token in range(len(parents)):
        steps = 0
        while parents[token] != -1:
            token, steps = parents[token], steps + 1
            if steps > len(parents):
                return False
    return list(parents).count(-1) == 1


def planted(tokens, seed):
    """A random tree over tokens in random order, and strengths that hold it under noise."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tokens, generator=generator).tolist()
    parents, strength = [-1] * tokens, 0.4 * torch.rand(tokens, tokens, generator=generator)
    for place in range(1, tokens):
        above = order[int(torch.randint(place, (), generator=generator))]
        parents[order[place]] = above
        strength[above, order[place]] += 0.5
    strength[order[0], order[0]] += tokens
    return parents, strength


@pytest.mark.parametrize("tokens", [1, 2, 7, 50])
def test_a_planted_tree_is_found(tokens):
    for seed in range(10):
        parents, strength = planted(tokens, seed)
        assert dependency_tree(strength) == parents


def test_is_the_best_of_all_trees():
    for seed in range(30):
        weights = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed))
        best, root = -1.0, int(weights.sum(1).argmax())
        choices = [[-1] if child == root else [p for p in range(5) if p != child] for child in range(5)]
        for parents in product(*choices):
            if reaches_root(parents):
                best = max(best, sum(float(weights[p, c]) for c, p in enumerate(parents) if p >= 0))
        found = dependency_tree(weights)
        assert reaches_root(found)
        assert sum(float(weights[p, c]) for c, p in enumerate(found) if p >= 0) == pytest.approx(best, abs=1e-6)


def test_has_no_cycle_and_one_root_whatever_the_strengths():
    for seed in range(20):
        weights = torch.rand(40, 40, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
        assert reaches_root(dependency_tree(weights))
    assert reaches_root(dependency_tree(torch.zeros(6, 6)))
    assert dependency_tree(torch.rand(6, 6), root=4)[4] == -1


def test_branches_are_the_parts_under_the_root():
    assert branches([-1, 0, 0, 1, 3, 2]) == [0, 1, 2, 1, 1, 2]


def test_edges_of_a_layer_sum_to_what_each_child_sends():
    layer = attlas.mixer("dependency_vit", 16, 4).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    keep = torch.arange(6).expand(2, -1) < 4
    found = edges(layer, x, mask=keep)
    sent = layer.attend.message(x) * keep
    assert torch.allclose(found.sum(1), sent, rtol=0, atol=1e-12)
    assert not found[:, 4:].any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="edges come from a dependency_vit layer, got Attention"):
        edges(attlas.mixer("softmax", 8, 2), torch.randn(1, 3, 8))
    with pytest.raises(BadInput, match=r"a square, got \(2, 3\)"):
        dependency_tree(torch.rand(2, 3))
    with pytest.raises(BadInput, match="finite"):
        dependency_tree(torch.full((2, 2), torch.nan))
    with pytest.raises(BadInput, match="one of 3 tokens, got 3"):
        dependency_tree(torch.rand(3, 3), root=3)
    with pytest.raises(BadInput, match=r"has no parent and says -1, got \[0, 0\]"):
        branches([0, 0])
    with pytest.raises(BadInput, match=r"no cycles, got \[-1, 2, 1\]"):
        branches([-1, 2, 1])
