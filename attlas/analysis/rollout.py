"""Attention rollout: what each token of the last layer holds of each token of the input.

    S̄_l = ½ mean_h S_l + ½ E,    Ŝ = S̄_L S̄_{L−1} … S̄_1

S_l are the attention maps of layer l and E the identity, which stands for the residual. Rows of Ŝ sum to one
where those of the maps do.

B batch, H heads, N tokens.

Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020 (arXiv:2005.00928).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attlas.core.errors import BadInput


def rollout(maps: Sequence[Tensor], residual: float = 0.5) -> Tensor:
    """The product of the layers' maps, (B, N, N): row n says where token n comes from.

    >>> import torch
    >>> rollout([torch.eye(3).expand(1, 2, 3, 3)] * 4)[0].tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]

    Args:
        maps: attention weights, first layer first: (B, H, N, N), or (B, N, N) with heads averaged.
        residual: share of the identity in every layer.
    """
    if not maps:
        raise BadInput("rollout multiplies the maps of at least one layer, got none")
    if not 0 <= residual <= 1:
        raise BadInput(f"residual is the share of the identity, 0 to 1, got {residual}")
    flow: Tensor | None = None
    for layer, weights in enumerate(maps):
        if weights.ndim not in (3, 4) or weights.shape[-1] != weights.shape[-2]:
            raise BadInput(f"maps are (batch, heads, N, N) or (batch, N, N), layer {layer} has {tuple(weights.shape)}")
        mean_BNN = weights.mean(1) if weights.ndim == 4 else weights
        identity_NN = torch.eye(mean_BNN.shape[-1], dtype=mean_BNN.dtype, device=mean_BNN.device)
        step_BNN = (1 - residual) * mean_BNN + residual * identity_NN
        if flow is not None and flow.shape != step_BNN.shape:
            raise BadInput(
                f"all maps need one batch and one number of tokens, layer {layer} has {tuple(weights.shape)}"
            )
        flow = step_BNN if flow is None else step_BNN @ flow
    assert flow is not None
    return flow
