"""ViT and DeiT: patches as tokens, a class token, learned places, softmax attention; and with any other mechanism.

    y = x + mixer(norm x),    z = y + MLP(norm y)

Sources: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020 (arXiv:2010.11929); Touvron et al., "Training
data-efficient image transformers", 2020 (arXiv:2012.12877), official code facebookresearch/deit. The distilled DeiT,
which has a second prefix token, is not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Patches
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.models.backbone import start_published
from attlas.models.isotropic import Isotropic
from attlas.models.key_maps import QKV, in_stages, rename, split, tables
from attlas.models.mixers import patch_grid, stage_mixers
from attlas.models.registry import State, published

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"dim": 192, "depth": 12, "heads": 3},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "base": {"dim": 768, "depth": 12, "heads": 12},
}
LARGE = {"dim": 1024, "depth": 24, "heads": 16}
MICRO = {"dim": 64, "depth": 4, "heads": 2, "patch": 8, "img_size": 64}


def from_timm(state: State, model: nn.Module) -> State:
    """The names of timm's VisionTransformer, which are those of the DeiT checkpoints too."""
    state = split(state, "attn.qkv", tuple(f"mixer.{name}" for name in QKV))
    state = rename(
        state,
        (
            (r"^patch_embed\.proj\.", "embed.conv."),
            (r"^cls_token$", "prefix"),
            (r"^pos_embed$", "places.weight"),
            (r"\.attn\.proj\.", ".mixer.out_proj."),
        ),
    )
    assert isinstance(model, Isotropic)
    return in_stages(tables(state, "prefix", "places.weight"), model.depths)


@published(
    {f"deit_{size}": {**settings, "drop_path": 0.1} for size, settings in SIZES.items()},
    title="Training data-efficient image transformers & distillation through attention",
    year=2020,
    paper="arXiv:2012.12877",
    key_maps={"timm": from_timm, "official": from_timm},
)
@published(
    {f"vit_{size}": settings for size, settings in SIZES.items()} | {"vit_large": LARGE, "vit_micro": MICRO},
    title="An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
    year=2020,
    paper="arXiv:2010.11929",
    key_maps={"timm": from_timm, "official": from_timm},
)
def vit(
    *,
    dim: int,
    depth: int,
    heads: int,
    patch: int = 16,
    mixer: str = "softmax",
    mixer_settings: Mapping[str, Any] | None = None,
    pool: str = "token",
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Isotropic:
    """A ViT with any mechanism.

    Args:
        dim, depth, heads: channels, blocks, heads of each.
        patch: side of a patch in pixels.
        mixer: the mechanism.
        mixer_settings: of the mechanism.
        pool: "token" with a class token in front; "mean" without, for mechanisms that take no prefix tokens.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, a multiple of the patch.
    """
    grid = patch_grid(img_size, patch, prefix=int(pool == "token"))
    norm = partial(nn.LayerNorm, eps=1e-6)
    mixers = stage_mixers(mixer, depth, dim, heads, grid, mixer_settings)
    (rates,) = rising(drop_path, [depth])
    blocks = [
        MetaFormerBlock(each, Mlp(dim, 4 * dim), norm=norm, drop_path=rate)
        for each, rate in zip(mixers, rates, strict=True)
    ]
    net = Isotropic(
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
    return start_published(net)
