"""Softmax attention over the leaves of a tree, tied in blocks.

    Q = argmin Σ_i KL(Q_i ‖ softmax_j s_ij),   s_ij = scale q_i · k_j

over all Q whose rows sum to one and in which siblings B ≠ C share one number: Q_ij = a_BC for every leaf i below B
and every leaf j below C. The optimum has a closed form that one walk up the tree and one down compute. With q̄, k̄, v̄
the means over the leaves of a node, |C| their number, and F_i = s_ii for a leaf,

    E_BC = scale q̄_B · k̄_C + log |C|           to the sibling C
    Z_B = log(exp F_B + Σ_C exp E_BC)           over the siblings C of B
    F_A = Σ_B |B| / |A| Z_B                     over the children B of A

and w_BB = exp(F_B - Z_B) of B's attention stays inside B, w_BC = exp(E_BC - Z_B) goes to C and is shared evenly there.
Then mean_i log Σ_j exp s_ij - F_root = mean_i KL(Q_i ‖ softmax s_i), and a tree of one family is softmax itself.

B batch, H heads, N leaves, D head size, E value size, F families of b children each, M nodes of one level.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.ops.dispatch import Backend, Op
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import blank_padding


@dataclass(frozen=True, eq=False)
class Tree:
    """Which leaves belong together, from the leaves up.

    Attributes:
        leaves: how many.
        levels: of each level its families, those of equal size in one (F, b) table of places among the nodes of the
            level below. The nodes of a level are its families, table after table; the last level has one, the root.
            A node that waits for its siblings to grow is a family of one.
    """

    leaves: int
    levels: tuple[tuple[Tensor, ...], ...]

    @classmethod
    def nested(cls, branches: Sequence[Any]) -> Tree:
        """A tree written as nested sequences of leaf numbers, as in [[[0, 1], [2, 3, 4]], [[5, 6], 7]].

        Raises:
            BadInput: an empty branch, a leaf that is no whole number, leaves that are not 0 to N - 1, each once, or a
                tree that is deeper than Python recurses.
        """
        children: dict[int, list[int]] = {}
        try:
            found = sorted(_leaves(branches))
            if found != list(range(len(found))) or not found:
                raise BadInput(f"the leaves of a tree are the numbers from 0 on, each once, got {found}")
            heights = [0] * len(found)
            root = _file(branches, heights, children)
        except RecursionError:
            raise BadInput("a tree is at most some hundred levels deep, got a deeper one: join levels") from None
        nodes, levels = list(range(len(found))), []
        for height in range(1, heights[root] + 1):
            place = {node: index for index, node in enumerate(nodes)}
            grown = {node: [place[c] for c in family] for node, family in children.items() if heights[node] == height}
            joined = {child for node in grown for child in children[node]}
            grown |= {node: [place[node]] for node in nodes if node not in joined}
            sizes = sorted({len(family) for family in grown.values()})
            levels.append(tuple(torch.tensor([f for f in grown.values() if len(f) == size]) for size in sizes))
            nodes = [node for size in sizes for node, family in grown.items() if len(family) == size]
        return cls(len(found), tuple(levels))

    @classmethod
    def blocks(
        cls,
        shape: Sequence[int],
        sizes: int | Sequence[int | Sequence[int]],
        *,
        prefix: int = 0,
        device: torch.device | str = "cpu",
    ) -> Tree:
        """Blocks of a grid, blocks of those blocks, and so on; the last on an axis may be smaller.

        Args:
            shape: positions on each axis, in raster order.
            sizes: length of a block on every axis, until one block is left; or the lengths level by level from below,
                one number or one for each axis, after which what is left has one parent.
            prefix: leaves in front of the grid that are children of the root.
            device: of the tables.

        Raises:
            BadInput: lengths below one, a repeated length of one, or lengths for other axes than the grid's.
        """
        place = prefix + torch.arange(math.prod(shape), device=device).view(*shape)
        front, levels = torch.arange(prefix, device=device), []
        for size in _block_sizes(shape, sizes):
            runs = [_runs(length, width) for length, width in zip(place.shape, size, strict=True)]
            coarse = tuple(sum(count for _, count, _ in run) for run in runs)
            number = torch.arange(math.prod(coarse), device=device).view(*coarse)
            tables, order = ([front.unsqueeze(1)], []) if prefix else ([], [])
            for piece in itertools.product(*runs):
                part, parents, split = place, number, []
                for axis, (first, count, width) in enumerate(piece):
                    part = part.narrow(axis, first, count * width)
                    parents = parents.narrow(axis, first // size[axis], count)
                    split += [count, width]
                counts, widths = range(0, len(split), 2), range(1, len(split), 2)
                tables.append(part.reshape(split).permute(*counts, *widths).flatten(len(shape)).flatten(0, -2))
                order.append(parents.flatten())
            levels.append(tuple(tables))
            place = prefix + torch.cat(order).argsort().view(*coarse)
        top = torch.cat([front, place.flatten()])
        if len(top) > 1 or not levels:
            levels.append((top.unsqueeze(0),))
        return cls(prefix + math.prod(shape), tuple(levels))

    def families(self) -> list[tuple[int, int]]:
        """(how many, of how many children) for every table."""
        return [(len(table), table.shape[1]) for level in self.levels for table in level]

    def to(self, device: torch.device) -> Tree:
        """The tree with its tables on `device`."""
        return Tree(self.leaves, tuple(tuple(table.to(device) for table in level) for level in self.levels))


def _is_branch(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _whole(value: Any, what: str) -> int:
    if not isinstance(value, Tensor):
        with suppress(TypeError):
            return operator.index(value)
    raise BadInput(f"{what}, written in ints, got {value!r}")


def _leaves(branch: Any) -> Iterator[int]:
    if not _is_branch(branch):
        yield _whole(branch, "a tree is nested sequences of leaf numbers")
        return
    if not len(branch):
        raise BadInput("every branch of a tree holds a leaf, got an empty one")
    for each in branch:
        yield from _leaves(each)


def _file(branch: Any, heights: list[int], children: dict[int, list[int]]) -> int:
    """The number of a node, its height and children written down."""
    if not _is_branch(branch):
        return operator.index(branch)
    own = [_file(each, heights, children) for each in branch]
    heights.append(1 + max(heights[each] for each in own))
    children[len(heights) - 1] = own
    return len(heights) - 1


def _block_sizes(shape: Sequence[int], sizes: int | Sequence[int | Sequence[int]]) -> list[tuple[int, ...]]:
    """Length of a block on each axis, level by level."""
    what = "blocks are one length for all levels, or those of each level"
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        sizes = _whole(sizes, what)
        if sizes < 2:
            raise BadInput(f"blocks that are repeated up to the root are at least 2 long, got {sizes}")
        levels = 1
        while sizes**levels < max(shape):
            levels += 1
        return [(sizes,) * len(shape)] * levels
    each = [
        tuple(_whole(length, what) for length in size) if _is_branch(size) else (_whole(size, what),) * len(shape)
        for size in sizes
    ]
    for size in each:
        if len(size) != len(shape):
            raise BadInput(f"a block of {size} is for {len(size)} axes, the grid has {len(shape)}")
        if min(size) < 1:
            raise BadInput(f"a block holds at least one position on every axis, got {size}")
    return each


def _runs(length: int, width: int) -> list[tuple[int, int, int]]:
    """(first place, blocks, places of a block): the whole blocks of an axis, and what is left."""
    whole, rest = divmod(length, width)
    return [run for run in ((0, whole, width), (whole * width, 1, rest)) if run[1] * run[2]]


def _check(q: Tensor, k: Tensor, tree: Tree) -> None:
    if not q.shape[2] == k.shape[2] == tree.leaves:
        raise BadInput(
            f"every leaf of the tree is a query and a key: {tree.leaves} leaves, got {q.shape[2]} queries and "
            f"{k.shape[2]} keys"
        )


def hierarchical_weights(
    q_BHND: Tensor, k_BHND: Tensor, tree: Tree, *, keep: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Q (B, H, N, N), family by family, and F of the root (B, H); rows and columns of padding are 0."""
    _check(q_BHND, k_BHND, tree)
    batch, heads, leaves, size = q_BHND.shape
    scale = size**-0.5 if scale is None else scale
    q_BHND, k_BHND = (wide(x) for x in (q_BHND, k_BHND))
    both, roots = [], []
    for b in range(batch):
        real = [n for n in range(leaves) if keep is None or keep[b, n]]
        below = [[n] if n in real else [] for n in range(leaves)]  # the real leaves of each node
        free_MH = [scale * (q_BHND[b, :, n] * k_BHND[b, :, n]).sum(-1) for n in range(leaves)]
        rows_HNN = torch.diag_embed(q_BHND.new_tensor([[float(n in real) for n in range(leaves)]] * heads))
        for level in tree.levels:
            grown, free = [], []
            for family in (family for table in level for family in table.tolist()):
                alive = [node for node in family if below[node]]
                union = [n for node in alive for n in below[node]]
                total_H = q_BHND.new_zeros(heads)
                for node in alive:
                    inside, others = below[node], [other for other in alive if other != node]
                    q_H1D = q_BHND[b][:, inside].mean(1, keepdim=True)
                    energy = [free_MH[node]]
                    for other in others:
                        k_HD = k_BHND[b][:, below[other]].mean(1)
                        energy.append(scale * (q_H1D[:, 0] * k_HD).sum(-1) + math.log(len(below[other])))
                    energy_HK = torch.stack(energy, -1)
                    total_H = total_H + len(inside) / len(union) * energy_HK.logsumexp(-1)
                    w_HK = energy_HK.softmax(-1)
                    rows_HNN[:, inside] = rows_HNN[:, inside] * w_HK[:, 0, None, None]
                    for other, w_H in zip(others, w_HK[:, 1:].unbind(1), strict=True):
                        to = torch.zeros_like(rows_HNN[0])
                        to[torch.tensor(inside).unsqueeze(1), torch.tensor(below[other])] = 1 / len(below[other])
                        rows_HNN = rows_HNN + w_H[:, None, None] * to
                grown.append(union)
                free.append(total_H)
            below, free_MH = grown, free
        both.append(rows_HNN)
        roots.append(free_MH[0])
    return torch.stack(both), torch.stack(roots)


def _oracle(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    tree: Tree,
    *,
    keep: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of every leaf to every leaf, tied by the tree; padding gives 0.

    Args:
        q_BHND, k_BHND, v_BHNE: queries, keys, values of the leaves.
        tree: which leaves belong together.
        keep: (B, N) bool, False where a leaf is padding: it has no weight in means, sizes and sums.
        scale: of the scores, D ** -0.5 by default.

    Returns:
        (B, H, N, E).

    Raises:
        BadInput: another number of tokens than leaves.
    """
    q_BHND, k_BHND, v_BHNE = blank_padding(keep, q_BHND, k_BHND, v_BHNE)
    with as_written(q_BHND):
        weights_BHNN, _ = hierarchical_weights(q_BHND, k_BHND, tree, keep=keep, scale=scale)
        return (weights_BHNN @ wide(v_BHNE)).to(v_BHNE.dtype)


Family = tuple[Tensor, Tensor]
"""Weights (B, H, F, b, b) and values (B, H, F, b, E) of the families of one table."""


def _torch(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    tree: Tree,
    *,
    keep: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    _check(q_BHND, k_BHND, tree)
    dtype, tree = v_BHNE.dtype, tree.to(q_BHND.device)
    q, k, v = (wide(x) for x in blank_padding(keep, q_BHND, k_BHND, v_BHNE))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with as_written(q):
        q = q * scale
        # A node's queries, keys, values, free energy and number of real leaves.
        count = q.new_ones(1, 1, tree.leaves) if keep is None else keep.unsqueeze(1).to(q)
        nodes: tuple[Tensor, ...] = (q, k, v, (q * k).sum(-1), count)
        families: list[list[Family | None]] = []
        for level in tree.levels:
            joined = [_join(nodes, table) for table in level]
            nodes = tuple(torch.cat(parts, 2) for parts in zip(*(parents for parents, _ in joined), strict=True))
            families.append([family for _, family in joined])
        # What is left of a leaf's attention when it has reached its own node, and what it brought from outside.
        stay, brought = torch.ones_like(nodes[3]), torch.zeros_like(nodes[2])
        for level, below in zip(reversed(tree.levels), reversed(families), strict=True):
            sizes = [len(table) for table in level]
            parts = [_part(*each) for each in zip(stay.split(sizes, 2), brought.split(sizes, 2), below, strict=True)]
            order = torch.cat([table.flatten() for table in level]).argsort()
            stay, brought = (torch.cat(each, 2).index_select(2, order) for each in zip(*parts, strict=True))
        o_BHNE = stay.unsqueeze(-1) * v + brought
        (o_BHNE,) = blank_padding(keep, o_BHNE)
    return o_BHNE.to(dtype)


def _join(nodes: tuple[Tensor, ...], table_Fb: Tensor) -> tuple[tuple[Tensor, ...], Family | None]:
    """The parents of one table's families, and what the way down needs of those that have more than one child."""
    q, k, v, free, count = (x.index_select(2, table_Fb.flatten()).unflatten(2, table_Fb.shape) for x in nodes)
    if table_Fb.shape[1] == 1:
        return tuple(x[:, :, :, 0] for x in (q, k, v, free, count)), None
    alone = torch.eye(table_Fb.shape[1], dtype=torch.bool, device=q.device)
    size = count.unsqueeze(-2)
    energy = (q @ k.mT + size.clamp(min=1).log()).masked_fill(size == 0, torch.finfo(q.dtype).min)
    energy = torch.where(alone, free.unsqueeze(-1), energy)
    share = count / count.sum(-1, keepdim=True).clamp(min=1)
    means = tuple((share.unsqueeze(-1) * x).sum(3) for x in (q, k, v))
    parents = (*means, (share * energy.logsumexp(-1)).sum(-1), count.sum(-1))
    return parents, (energy.softmax(-1), v)


def _part(stay: Tensor, brought: Tensor, family: Family | None) -> tuple[Tensor, Tensor]:
    """What reaches the children (B, H, F b) and what was brought to them, from what reached the parents."""
    if family is None:
        return stay, brought
    weights_BHFbb, v_BHFbE = family
    inside = weights_BHFbb.diagonal(dim1=-2, dim2=-1)
    to_siblings = (weights_BHFbb - torch.diag_embed(inside)) @ v_BHFbE
    brought = brought.unsqueeze(3) + stay[..., None, None] * to_siblings
    return (stay.unsqueeze(3) * inside).flatten(2, 3), brought.flatten(2, 3)


hierarchical_attention = Op("hierarchical_attention", Backend("torch", _torch), Backend("oracle", _oracle))
