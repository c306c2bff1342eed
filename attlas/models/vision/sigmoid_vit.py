"""SigmoidAttn ViT: a ViT whose attention is sigmoid attention, with what keeps its outputs small at first.

    y = x + s₁ ⊙ W_o σ(q kᵀ / √D - log n) v,    z = y + s₂ ⊙ MLP(norm y)

q, k, v are projections of norm x without biases, q and k behind a norm over the head size; n is the number of tokens
of the grid that it is trained on, and stays at other sizes; s starts at 1e-4. The hybrid norm of the paper's larger
language models, a norm of the output before its projection, is `mixer_settings={"output_norm": "rms"}`.

Source: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", 2024 (arXiv:2409.04431),
official code of the layer apple/ml-sigmoid-attention. Reconstruction: the code of the vision models is not public;
class token, learned places and MLP are those of ViT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Patches
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.models.isotropic import Isotropic
from attlas.models.mixers import patch_grid, stage_mixers
from attlas.models.registry import published

SIZES: Mapping[str, Mapping[str, Any]] = {
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "large": {"dim": 1024, "depth": 24, "heads": 16},
    "micro": {"dim": 64, "depth": 4, "heads": 2, "patch": 8, "img_size": 64},
}


@published(
    {f"sigmoid_vit_{size}": settings for size, settings in SIZES.items()},
    title="Theory, Analysis, and Best Practices for Sigmoid Self-Attention",
    year=2024,
    paper="arXiv:2409.04431",
    reconstruction=True,
)
def sigmoid_vit(
    *,
    dim: int,
    depth: int,
    heads: int,
    patch: int = 16,
    scale: float | None = 1e-4,
    mixer: str = "sigmoid",
    mixer_settings: Mapping[str, Any] | None = None,
    pool: str = "token",
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Isotropic:
    """A ViT with sigmoid attention, or another mechanism under the same recipe.

    Args:
        dim, depth, heads: channels, blocks, heads of each.
        patch: side of a patch in pixels.
        scale: starting value of the layer scales; None for none.
        mixer: the mechanism.
        mixer_settings: of the mechanism; `{"shift": 0.0}` takes -log n away.
        pool: "token" with a class token in front, or "mean" without.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, a multiple of the patch.
    """
    grid = patch_grid(img_size, patch, prefix=int(pool == "token"))
    norm = partial(nn.LayerNorm, eps=1e-6)
    own = {"shift": -math.log(grid.tokens)} if mixer == "sigmoid" else {}
    mixers = stage_mixers(mixer, depth, dim, heads, grid, {**own, **(mixer_settings or {})})
    (rates,) = rising(drop_path, [depth])
    blocks = [
        MetaFormerBlock(each, Mlp(dim, 4 * dim), norm=norm, scale=scale, drop_path=rate)
        for each, rate in zip(mixers, rates, strict=True)
    ]
    return Isotropic(
        Patches(in_chans, dim, patch),
        blocks,
        dim=dim,
        grid=grid,
        stride=patch,
        norm=norm(dim),
        num_classes=num_classes,
        in_chans=in_chans,
        pool=pool,
    )
