"""CrossFormer and CrossFormer++: a pyramid whose tokens see several scales, and near and far tokens in turn.

    y = x + mixer(norm x),    z = y + MLP(norm y)

Every map is made by convolutions of one stride and several kernels side by side, 4, 8, 16 and 32 pixels in the stem, 2
and 4 places between the stages; a norm before the mean over places. In every stage blocks attend to their window and
to tokens far apart in turn, windows first. CrossFormer++ has windows that grow from stage to stage, and after every
third block but a stage's last a convolution with a norm and no residual path, which keeps activations from growing.

The distance of tokens far apart is such that a group spans the map; at 224 pixels that is the published 8, 4, 2 and 1.
In CrossFormer++ it is as published on every map. Sides that strides do not divide are filled up with zeros.

Sources: Wang et al., "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention", 2021
(arXiv:2108.00154) and "CrossFormer++", 2023 (arXiv:2303.06908), official code cheerss/CrossFormer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attlas.blocks.crossformer import Cooling, CrossScale
from attlas.blocks.drop_path import rising
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.norms import MapLayerNorm
from attlas.blocks.stage import TokenStage
from attlas.core.grid import Grid
from attlas.models.backbone import Head
from attlas.models.key_maps import rename
from attlas.models.mixers import Mixers, map_sizes, per_stage, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.rules import BETWEEN, CLASSIFIER, LAST_NORM, unfused
from attlas.models.stages import check_stages

STRIDES = (4, 8, 16, 32)
STEM, MERGING = (4, 8, 16, 32), (2, 4)
COOLED = 3
"""Blocks from one cooling to the next."""

PLUS: Mapping[str, Any] = {"groups": (4, 4, 14, 7), "intervals": (4, 2, 1, 1), "cooling": True}

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"depths": (1, 1, 8, 6), "dim": 64, "heads": (2, 4, 8, 16), "drop_path": 0.1},
    "small": {"depths": (2, 2, 6, 2), "dim": 96, "heads": (3, 6, 12, 24), "drop_path": 0.2},
    "base": {"depths": (2, 2, 18, 2), "dim": 96, "heads": (3, 6, 12, 24), "drop_path": 0.3},
    "large": {"depths": (2, 2, 18, 2), "dim": 128, "heads": (4, 8, 16, 32), "drop_path": 0.5},
    "pp_small": {"depths": (2, 2, 18, 2), "dim": 64, "heads": (2, 4, 8, 16), "drop_path": 0.2, **PLUS},
    "pp_base": {"depths": (2, 2, 18, 2), "dim": 96, "heads": (3, 6, 12, 24), "drop_path": 0.3, **PLUS},
    "pp_large": {"depths": (2, 2, 18, 2), "dim": 128, "heads": (4, 8, 16, 32), "drop_path": 0.5, **PLUS},
    "pp_huge": {"depths": (6, 6, 18, 2), "dim": 128, "heads": (4, 8, 16, 32), "drop_path": 0.5, **PLUS},
    "micro": {"depths": (4, 2), "dim": 32, "heads": (2, 4), "groups": (4, 4), "cooling": True, "img_size": 32},
}


def from_official(state: State, model: nn.Module) -> State:
    """The names of cheerss/CrossFormer."""
    cooled = any(".ex_conv." in key for key in state)
    state = rename(
        unfused(state),
        (
            (r"^patch_embed\.projs\.", "downsamples.0.convs."),
            (r"^patch_embed\.norm\.", "downsamples.0.after."),
            *BETWEEN,
            (r"^(downsamples\.[123]\.)norm\.", r"\1before."),
            (r"^(downsamples\.[123]\.)reductions\.", r"\1convs."),
            (r"^layers\.", "stages."),
            (r"\.attn\.proj\.", ".mixer.out_proj."),
            (r"\.attn\.pos\.pos_proj\.", ".mixer.attend.position_bias.0."),
            (r"\.ex_conv\.", ".cooling.conv."),
            (r"\.ex_ln\.", ".cooling.norm."),
            LAST_NORM,
            CLASSIFIER,
        ),
    )
    return {_home(key, cooled): value for key, value in state.items()}


def _home(key: str, cooled: bool) -> str:
    """A cooling stands behind its block, the layers of the position bias in a row."""
    key = re.sub(
        r"\.attn\.pos\.pos(\d)\.(\d)\.",
        lambda found: f".mixer.attend.position_bias.{3 * int(found[1]) - 2 + int(found[2])}.",
        key,
    )
    if cooled:
        key = re.sub(r"\.blocks\.(\d+)", lambda found: f".blocks.{int(found[1]) + int(found[1]) // COOLED}", key)
        key = re.sub(r"\.blocks\.(\d+)\.cooling", lambda found: f".blocks.{int(found[1]) + 1}", key)
    return key


@published(
    {f"crossformer_{size}": settings for size, settings in SIZES.items()},
    title="CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention",
    year=2021,
    paper="arXiv:2108.00154",
    key_maps={"official": from_official},
)
def crossformer(
    *,
    depths: Sequence[int],
    dim: int,
    heads: Sequence[int],
    groups: Sequence[int] = (7, 7, 7, 7),
    intervals: Sequence[int] | None = None,
    cooling: bool = False,
    mixer: Mixers = "crossformer",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """A CrossFormer with any mechanism.

    Args:
        depths, heads: blocks of each stage and heads of its mixers.
        dim: channels of the first stage, a multiple of 16, doubled in each that follows.
        groups, intervals: of the mixer `crossformer` in each stage; without intervals a group spans the map.
        cooling: whether a convolution with a norm follows every third block but the last of a stage.
        mixer: the mechanism of each stage, whose layers are counted from the start of the stage.
        mixer_settings: of the mechanisms.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    check_stages(depths=depths, heads=heads, groups=groups[: len(depths)], intervals=intervals)
    names = per_stage(mixer, len(depths))
    rates = rising(drop_path, depths)
    dims = [dim * 2**i for i in range(len(depths))]
    downsamples = [CrossScale(in_chans, dim, STEM, STEM[0], after=MapLayerNorm)]
    downsamples += [CrossScale(width, 2 * width, MERGING, MERGING[0], before=MapLayerNorm) for width in dims[:-1]]
    stages = []
    for i, size in enumerate(map_sizes(img_size, STRIDES[: len(dims)])):
        own = {"group": groups[i], "interval": intervals and intervals[i]} if names[i] == "crossformer" else {}
        mixers = stage_mixers(names[i], depths[i], dims[i], heads[i], Grid(size), {**own, **(mixer_settings or {})})
        blocks: list[nn.Module] = []
        for j, (each, rate) in enumerate(zip(mixers, rates[i], strict=True)):
            blocks.append(MetaFormerBlock(each, Mlp(dims[i], 4 * dims[i]), drop_path=rate))
            if cooling and (j + 1) % COOLED == 0 and j + 1 < depths[i]:
                blocks.append(Cooling(dims[i]))
        stages.append(TokenStage(blocks))
    head = Head(dims[-1], num_classes, before=MapLayerNorm)
    return Pyramid(downsamples, stages, head, in_chans=in_chans, channels=dims, strides=STRIDES)
