"""How sharply queries choose, and whether a longer query chooses more sharply.

Softmax sharpens as |q| grows, because scores grow with it. In linear attention with a feature map that takes factors
out, phi(c q) = c phi(q), a normaliser divides the length of the query away, and rows are the same for every length.

Source: "NaLaFormer: Norm-Aware Linear Attention for Transformer Models", 2025 (arXiv:2506.21137).

B batch, H heads, N queries, M keys, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attlas.analysis.implied import implied_matrix, listen
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer


def row_entropy(weights_BHNM: Tensor, *, causal: bool = False) -> Tensor:
    """Mean entropy of the rows (B, H), as a share of that of even rows: 0 picks one key, 1 sees all alike.

    A row is read as probabilities, |w| / sum |w|. A causal row is held against the keys that it may see; the first,
    which has no choice, is left out. A row of zeros chooses nothing and counts as 1, and so does a matrix of one key.
    """
    p = weights_BHNM.abs()
    if p.shape[-1] == 1:
        return p.new_ones(p.shape[:2])
    total = p.sum(-1, keepdim=True)
    p = p / total.where(total > 0, 1)
    entropy_BHN = -p.xlogy(p).sum(-1)
    queries, keys = p.shape[-2:]
    if causal:
        even_N = torch.arange(keys - queries + 1, keys + 1, dtype=p.dtype, device=p.device).log()
    else:
        even_N = p.new_full((queries,), math.log(keys))
    share_BHN = (entropy_BHN / even_N.where(even_N > 0, 1)).where(total.squeeze(-1) > 0, 1)
    return share_BHN[..., even_N > 0].mean(-1)


@torch.no_grad()
def entropy_by_norm(
    layer: Mixer, x_BNC: Tensor, norms: Sequence[float], *, grid: Grid | Sequence[int] | None = None
) -> list[float]:
    """The row entropy of a layer, mean over heads, with every query rescaled to each of these lengths.

    Raises:
        Unsupported: the mechanism has no implied matrix.
    """
    if not norms or min(norms) <= 0:
        raise BadInput(f"norms of queries are positive, got {list(norms)}")
    heard = listen(layer, x_BNC, grid=grid)
    directions = torch.nn.functional.normalize(heard.q, dim=-1)
    causal = layer.site.causal
    return [
        float(row_entropy(implied_matrix(heard._replace(q=norm * directions)), causal=causal).mean()) for norm in norms
    ]
