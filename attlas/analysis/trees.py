"""Dependency trees out of an attention map: which token depends on which.

N tokens; `edges` (N, N) holds at [j, i] how strongly child i depends on parent j.

Source: Ding et al., "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", 2023
(arXiv:2304.03282), without official code: how edges become a tree is a reconstruction. The tree itself is the
maximum spanning arborescence of Chu and Liu, 1965, and Edmonds, 1967.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask


def edges(layer: nn.Module, x_BNC: Tensor, *, mask: Mask | Tensor | None = None, grid: Any = None) -> Tensor:
    """How strongly each child depends on each parent in a `dependency_vit` layer, (B, N parents, N children).

    The edges of several layers are added before they become one tree.
    """
    attend: Any = getattr(layer, "attend", None)
    if not hasattr(attend, "edges"):
        raise BadInput(f"edges come from a dependency_vit layer, got {type(layer).__name__}")
    found: list[Tensor] = []

    def catch(attend: Any, args: tuple[Tensor, ...], given: dict[str, Any], output: Tensor) -> None:
        found.append(attend.edges(*args[:2], mask=given["mask"], grid=given["grid"], tokens=given["tokens"]))

    handle = attend.register_forward_hook(catch, with_kwargs=True)
    try:
        layer(x_BNC, mask=mask, grid=grid)
    finally:
        handle.remove()
    return found[0]


def dependency_tree(edges_NN: Tensor, root: int | None = None) -> list[int]:
    """The parent of each token in the strongest tree, -1 for the root.

    >>> import torch
    >>> dependency_tree(torch.tensor([[1.0, 0.9, 0.1], [0.2, 0.0, 0.8], [0.1, 0.1, 0.0]]))
    [-1, 0, 1]

    Args:
        edges_NN: strengths, [parent, child]; a token's own entry counts only for the choice of the root.
        root: which token has no parent; by default the one that receives most, from itself included.
    """
    if edges_NN.ndim != 2 or edges_NN.shape[0] != edges_NN.shape[1] or not len(edges_NN):
        raise BadInput(f"edges are (parents, children) of one sequence, a square, got {tuple(edges_NN.shape)}")
    weights = edges_NN.detach().double().cpu().numpy().copy()
    if not np.isfinite(weights).all():
        raise BadInput("edges must be finite")
    root = int(weights.sum(1).argmax()) if root is None else root
    if not 0 <= root < len(weights):
        raise BadInput(f"root is one of {len(weights)} tokens, got {root}")
    np.fill_diagonal(weights, -np.inf)
    parents = _arborescence(weights, root)
    parents[root] = -1
    return parents.tolist()


def branches(parents: Sequence[int]) -> list[int]:
    """For each token the child of the root that it stands under, its part of the image; the root under itself."""
    if list(parents).count(-1) != 1:
        raise BadInput(f"one token of a tree has no parent and says -1, got {list(parents)}")
    root = list(parents).index(-1)
    found = []
    for token in range(len(parents)):
        steps = 0
        while token != root and parents[token] != root:
            token, steps = parents[token], steps + 1
            if steps > len(parents):
                raise BadInput(f"a tree has no cycles, got {list(parents)}")
        found.append(token)
    return found


def _arborescence(weights: np.ndarray, root: int) -> np.ndarray:
    """The parents of the heaviest tree; the root's entry means nothing."""
    parents = weights.argmax(0)
    cycle = _cycle(parents, root)
    if not cycle.any():
        return parents
    outside, inside = np.flatnonzero(~cycle), np.flatnonzero(cycle)
    # One new node stands for the cycle: to enter it at a node costs the edge of the cycle that leads there.
    new = len(outside)
    small = np.full((new + 1, new + 1), -np.inf)
    small[:new, :new] = weights[np.ix_(outside, outside)]
    entering = weights[np.ix_(outside, inside)] - weights[parents[inside], inside]
    leaving = weights[np.ix_(inside, outside)]
    small[:new, new], small[new, :new] = entering.max(1), leaving.max(0)
    chosen = _arborescence(small, int(np.flatnonzero(outside == root)[0]))
    for place, node in enumerate(outside):
        above = chosen[place]
        parents[node] = inside[leaving[:, place].argmax()] if above == new else outside[above]
    door = chosen[new]
    parents[inside[entering[door].argmax()]] = outside[door]
    return parents


def _cycle(parents: np.ndarray, root: int) -> np.ndarray:
    """The nodes of one cycle as a mask; none where all roads lead to the root."""
    cycle = np.zeros(len(parents), dtype=bool)
    road = np.full(len(parents), -1)
    road[root] = root
    for start in range(len(parents)):
        node = start
        while road[node] == -1:
            road[node] = start
            node = parents[node]
        if node != root and road[node] == start:
            while not cycle[node]:
                cycle[node] = True
                node = parents[node]
            return cycle
    return cycle
