"""Hierarchical self-attention: the attention closest to softmax among those that a tree ties in blocks.

    o_i = Σ_j Q_ij v_j,   Q = argmin Σ_i KL(Q_i ‖ softmax_j(q_i · k_j / √D))

over all Q with rows that sum to one and in which two siblings of the tree share one number: all leaves of B look at
all leaves of C alike. The optimum is found exactly. From the leaves up, with means q̄, k̄, v̄ over the leaves of a
node, |C| of them, and F_i = q_i · k_i / √D at a leaf,

    E_BC = q̄_B · k̄_C / √D + log |C|,   Z_B = log(exp F_B + Σ_C exp E_BC),   F_A = Σ_{B in A} |B| / |A| Z_B

and from the root down: exp(F_B - Z_B) of the attention that reached B stays inside B, exp(E_BC - Z_B) of it goes to
the sibling C and takes v̄_C. One family of all tokens is softmax attention; so is every tree whose blocks hold equal
queries and equal keys.

The tree is that of the tokens' own grid, blocks of `blocks` positions on every axis and blocks of those blocks, or
any `tree` of sections, paragraphs and sentences that is given. Prefix tokens are children of the root. Padding has no
weight in means and sizes, and a block of padding alone is seen by nobody.

q, k (B, H, N, D), v (B, H, N, E). With b children to a family: time O(N b D H), memory O(N (D + b) H).

Source: Amizadeh et al., "Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale
Problems", 2025 (arXiv:2509.15448), without official code. A reconstruction: the paper states the minimum and that
dynamic programming finds it; the recursion here is derived from that, and checked to be the minimum. It has no causal
form. Blocks of a grid are ours.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.hierarchy import Tree, hierarchical_attention

SHELL_PARAMETERS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="hsa",
    title="Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale Problems",
    year=2025,
    paper="arXiv:2509.15448",
    equation="o = Q v, Q = argmin over block-tied Q of Σᵢ KL(Qᵢ ‖ softmax(qᵢ kᵀ / √D))",
    complexity="O(N b D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    reconstruction=True,
    examples=(
        Example(grid=(9,), params={"blocks": 2}, parameters=SHELL_PARAMETERS),
        Example(grid=(3, 4), prefix=1, params={"blocks": (2,)}, parameters=SHELL_PARAMETERS),
        Example(grid=(2, 2, 3), params={"blocks": ((1, 2, 2), 2)}, parameters=SHELL_PARAMETERS),
        Example(grid=(8,), params={"tree": [[[0, 1], [2, 3, 4]], [[5, 6], 7]]}, parameters=SHELL_PARAMETERS),
    ),
)


@register(SPEC)
class HSA(Attend):
    """Hierarchical self-attention.

    Args:
        site: where it is installed.
        backend: of `hierarchical_attention`.
        blocks: positions of a block on every axis, of blocks in the next block and so on, until one is left; or such
            lengths level by level from below, each one number or one for each axis, above which comes the root. 8 by
            default.
        tree: the hierarchy itself as nested sequences of token numbers (prefix tokens count), instead of blocks.
        scale: of the scores; D ** -0.5 by default.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        blocks: int | Sequence[int | Sequence[int]] | None = None,
        tree: Sequence[Any] | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(site, backend)
        if tree is not None and blocks is not None:
            raise BadInput("blocks make a tree, and a tree is given, too: pass one of the two")
        self.blocks, self.scale = 8 if blocks is None else blocks, scale
        self.tree = None if tree is None else Tree.nested(tree)
        if site.grid is not None:
            self._tree(site.grid, "cpu")
        elif tree is None:
            levels = self.blocks if isinstance(self.blocks, Sequence) else ()
            axes = next((len(level) for level in levels if isinstance(level, Sequence)), 1)
            Tree.blocks((1,) * axes, self.blocks)

    def _tree(self, grid: Grid, device: torch.device | str) -> Tree:
        if self.tree is None:
            return Tree.blocks(grid.shape, self.blocks, prefix=grid.prefix, device=device)
        if self.tree.leaves != grid.tokens:
            raise BadInput(f"the tree has {self.tree.leaves} leaves, the {grid} has {grid.tokens} tokens")
        return self.tree

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Run the op."""
        tree, keep = self._tree(call.grid, q_BHND.device), call.mask.keys
        return hierarchical_attention(q_BHND, k_BGMD, v_BGME, tree, keep=keep, scale=self.scale, backend=self.backend)

    oracle = compute  # the op's own oracle backend

    def count(self, sizes: Sizes) -> Cost:
        """Two products for every pair of siblings and for every leaf with itself; torch also multiplies nodes alone."""
        heads, size = sizes.batch * self.site.heads, self.site.head_dim
        families = [(count, width) for count, width in self._tree(sizes.grid, "cpu").families() if width > 1]
        siblings = sum(count * width * (width - 1) for count, width in families)
        multiplied = sum(count * width**2 for count, width in families)
        flops, executed = (4 * heads * size * pairs for pairs in (siblings + sizes.queries, multiplied))
        return Cost(flops, executed, heads * sizes.queries**2)
