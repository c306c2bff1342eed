"""KArAt ViT: a ViT whose softmax is a learned Kolmogorov-Arnold operator on every row of the scores.

    y = x + W_o (W Φ(q kᵀ / √D))ᵀ v,    z = y + MLP(norm y)

In a network named g1b an operator has G = 1 frequency and belongs to one head of one block (blockwise); in g3u it has
3, and head h of every block has the same one (universal). Φ and W have a row for every key, so pictures have one size.
All else is DeiT.

Source: Maity et al., "Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?", 2025
(arXiv:2503.10632), project page of MaitySubhajit/KArAt. Reconstruction: the code is not public; see the mechanism
`karat`. The published counts of Base and Tiny, 87.51, 85.95, 6.29 and 5.59 million, are those of heads of 10 classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attlas.mechanisms.softmax.karat import KArAt
from attlas.models.isotropic import Isotropic
from attlas.models.registry import published
from attlas.models.vision.vit import vit

HOSTS: Mapping[str, Mapping[str, Any]] = {
    "tiny_g3": {"dim": 192, "depth": 12, "heads": 3, "frequencies": 3},
    "small_g3": {"dim": 384, "depth": 12, "heads": 6, "frequencies": 3},
    "base_g1": {"dim": 768, "depth": 12, "heads": 12, "frequencies": 1},
}
MICRO = {"dim": 64, "depth": 4, "heads": 2, "patch": 8, "frequencies": 2, "rank": 4, "img_size": 64}


@published(
    {f"karat_vit_{host}b": settings for host, settings in HOSTS.items()}
    | {f"karat_vit_{host}u": {**settings, "universal": True} for host, settings in HOSTS.items()}
    | {"karat_vit_micro": MICRO},
    title="Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?",
    year=2025,
    paper="arXiv:2503.10632",
    reconstruction=True,
)
def karat_vit(
    *,
    dim: int,
    depth: int,
    heads: int,
    frequencies: int,
    rank: int = 12,
    universal: bool = False,
    patch: int = 16,
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Isotropic:
    """A ViT with Kolmogorov-Arnold attention; `vit_*` takes other mechanisms.

    Args:
        dim, depth, heads: channels, blocks, heads of each.
        frequencies: G, cosines and sines of a function.
        rank: r, functions for each key.
        universal: whether all blocks share the operators of the first.
        patch: side of a patch in pixels.
        mixer_settings: of the mechanism, such as another basis.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: of all pictures, a multiple of the patch.
    """
    model = vit(
        dim=dim,
        depth=depth,
        heads=heads,
        patch=patch,
        mixer="karat",
        mixer_settings={"frequencies": frequencies, "rank": rank, **(mixer_settings or {})},
        drop_path=drop_path,
        num_classes=num_classes,
        in_chans=in_chans,
        img_size=img_size,
    )
    assert isinstance(model, Isotropic)
    if universal:
        first, *others = (module for module in model.modules() if isinstance(module, KArAt))
        for each in others:
            each.operator = first.operator
    return model
