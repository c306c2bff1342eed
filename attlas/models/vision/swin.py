"""Swin Transformer: a pyramid of attention in windows, which lie half a window further in every second block.

    y = x + mixer(norm x),    z = y + MLP(norm y)

Patches of 4 x 4 with a norm; between stages four neighbouring places are merged into one; a norm before the mean over
places. A picture that patches or merging do not divide gets zeros at its right and lower border, as in the official
code for detection. Windows at the border of a map hold what is left of it, where that code lets zeros take part, so
the two agree on maps that windows divide, as 224 pixels give.

Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021 (arXiv:2103.14030),
official code microsoft/Swin-Transformer. `swin_large` was published after training on ImageNet-22K.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Downsample, PatchMerging
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.norms import MapLayerNorm
from attlas.blocks.stage import TokenStage
from attlas.core.grid import Grid
from attlas.models.backbone import Head
from attlas.models.key_maps import rename
from attlas.models.mixers import Mixers, doubling, map_sizes, per_stage, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.rules import BETWEEN, CLASSIFIER, LAST_NORM, unfused
from attlas.models.stages import check_stages

STRIDES = (4, 8, 16, 32)

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"depths": (2, 2, 6, 2), "dim": 96, "heads": (3, 6, 12, 24), "drop_path": 0.2},
    "small": {"depths": (2, 2, 18, 2), "dim": 96, "heads": (3, 6, 12, 24), "drop_path": 0.3},
    "base": {"depths": (2, 2, 18, 2), "dim": 128, "heads": (4, 8, 16, 32), "drop_path": 0.5},
    "large": {"depths": (2, 2, 18, 2), "dim": 192, "heads": (6, 12, 24, 48), "drop_path": 0.2},
    "micro": {"depths": (2, 2), "dim": 32, "heads": (2, 4), "window": 4, "img_size": 32},
}


COUNTED = ("relative_position_index", "attn_mask")
"""What others keep in checkpoints though it follows from the sizes."""


def from_timm(state: State, model: nn.Module) -> State:
    """The names of timm, where merging belongs to the stage behind it."""
    state = {key: value for key, value in state.items() if not key.endswith(COUNTED)}
    return _blocks(rename(state, ((r"^layers\.(\d)\.downsample\.", r"downsamples.\1."),)))


def from_official(state: State, model: nn.Module) -> State:
    """The names of microsoft/Swin-Transformer, where merging belongs to the stage before it."""
    state = {key: value for key, value in state.items() if not key.endswith(COUNTED)}
    return _blocks(rename(state, (*BETWEEN, CLASSIFIER)))


def _blocks(state: State) -> State:
    state = rename(
        unfused(state),
        (
            (r"^patch_embed\.proj\.", "downsamples.0.conv."),
            (r"^patch_embed\.norm\.", "downsamples.0.after."),
            (r"^layers\.", "stages."),
            (r"\.attn\.proj\.", ".mixer.out_proj."),
            (r"\.attn\.relative_position_bias_table", ".mixer.attend.relative_bias"),
            LAST_NORM,
            (r"^head\.fc\.", "head.classifier."),
        ),
    )
    return {key: _table(value) if key.endswith("relative_bias") else value for key, value in state.items()}


def _table(bias_OH: Tensor) -> Tensor:
    """A table of a square window, by offsets query - key in a row, as (H, rows, columns) by key - query."""
    side = round(len(bias_OH) ** 0.5)
    return bias_OH.T.unflatten(1, (side, side)).flip(1, 2)


@published(
    {f"swin_{size}": settings for size, settings in SIZES.items()},
    title="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    year=2021,
    paper="arXiv:2103.14030",
    key_maps={"timm": from_timm, "official": from_official},
)
def swin(
    *,
    depths: Sequence[int],
    dim: int,
    heads: Sequence[int],
    window: int = 7,
    mixer: Mixers = "swin",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """A Swin Transformer with any mechanism.

    Args:
        depths, heads: blocks of each stage and heads of its mixers.
        dim: channels of the first stage, doubled in each that follows.
        window: places of a window on either axis, where the mixer is `swin`.
        mixer: the mechanism of each stage, whose layers are counted from the start of the stage.
        mixer_settings: of the mechanisms.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on; a stage whose map is no larger than a window has windows of that size.
    """
    check_stages(depths=depths, heads=heads)
    names = per_stage(mixer, len(depths))
    rates = rising(drop_path, depths)
    dims = doubling(dim, len(depths))
    stages = []
    for i, size in enumerate(map_sizes(img_size, STRIDES[: len(dims)])):
        settings = {**({"window": window} if names[i] == "swin" else {}), **(mixer_settings or {})}
        mixers = stage_mixers(names[i], depths[i], dims[i], heads[i], Grid(size), settings)
        stages.append(
            TokenStage(
                MetaFormerBlock(each, Mlp(dims[i], 4 * dims[i]), drop_path=rate)
                for each, rate in zip(mixers, rates[i], strict=True)
            )
        )
    return swin_pyramid(stages, dims, in_chans, num_classes)


def swin_pyramid(stages: Sequence[nn.Module], dims: Sequence[int], in_chans: int, num_classes: int) -> Pyramid:
    """What Swin has around its stages, others too: patches of 4 x 4, merging, and a norm before the mean."""
    patches = Downsample(in_chans, dims[0], 4, 4, after=MapLayerNorm, fill=True)
    between = [PatchMerging(dim, out) for dim, out in itertools.pairwise(dims)]
    head = Head(dims[-1], num_classes, before=MapLayerNorm)
    return Pyramid([patches, *between], stages, head, in_chans=in_chans, channels=dims, strides=STRIDES)
