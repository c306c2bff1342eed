"""NAT and DiNAT: pyramids of neighborhood attention, in every second block with places between the neighbours.

    y = x + s₁ ⊙ mixer(norm x),    z = y + s₂ ⊙ MLP(norm y)

A window of 7 x 7 neighbours; in blocks 1, 3, 5 ... of a stage of DiNAT they lie ⌊side / 7⌋ places apart, so that the
window spans the map: 8, 4, 2, 1 at 224 pixels and 13, 6, 3, 1 at 384, as published. NAT has none of that. A stem of two
3 x 3 convolutions of stride 2 with a norm behind them, a 3 x 3 convolution of stride 2 with a norm between the stages,
a norm before the mean over places; s only where `scale` is given. `dinat_s` has the patches, the merging and the depths
of Swin. `dinat_isotropic` and `nat_isotropic` stay on one map of patches of 16 pixels.

The window spans what the map has at `img_size`; a smaller picture than that is refused. A network that is built for
pictures so small that a map has fewer than 7 rows or columns has the largest odd window that fits there.

Sources: Hassani et al., "Neighborhood Attention Transformer", 2022 (arXiv:2204.07143); Hassani and Shi, "Dilated
Neighborhood Attention Transformer", 2022 (arXiv:2209.15001), official code SHI-Labs/Neighborhood-Attention-Transformer.
`dinat_large` and `dinat_s_large` were trained on ImageNet-22K first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Downsample, PatchMerging
from attlas.blocks.factory import mixer as make_mixer
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.norms import MapLayerNorm
from attlas.blocks.stage import TokenStage
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.models.backbone import Head
from attlas.models.isotropic import Isotropic
from attlas.models.key_maps import QKV, in_stages, rename, split
from attlas.models.mixers import Mixers, map_sizes, per_stage
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published

STRIDES = (4, 8, 16, 32)
DEEP = (3, 4, 18, 5)
PATCH = 16

NAT: Mapping[str, Mapping[str, Any]] = {
    "mini": {"depths": (3, 4, 6, 5), "dim": 64, "heads": (2, 4, 8, 16), "expansion": 3, "drop_path": 0.2},
    "tiny": {"depths": DEEP, "dim": 64, "heads": (2, 4, 8, 16), "expansion": 3, "drop_path": 0.2},
    "small": {"depths": DEEP, "dim": 96, "heads": (3, 6, 12, 24), "expansion": 2, "drop_path": 0.3, "scale": 1e-5},
    "base": {"depths": DEEP, "dim": 128, "heads": (4, 8, 16, 32), "expansion": 2, "drop_path": 0.5, "scale": 1e-5},
}
DINAT: Mapping[str, Mapping[str, Any]] = {
    "mini": NAT["mini"],
    "tiny": NAT["tiny"],
    "small": {**NAT["small"], "scale": None},
    "base": NAT["base"],
    "large": {"depths": DEEP, "dim": 192, "heads": (6, 12, 24, 48), "expansion": 2, "drop_path": 0.35},
    "micro": {"depths": (1, 2), "dim": 32, "heads": (2, 4), "expansion": 2, "window": 3, "img_size": 32},
}
LIKE_SWIN: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"depths": (2, 2, 6, 2), "dim": 96, "heads": (3, 6, 12, 24), "drop_path": 0.2},
    "small": {"depths": (2, 2, 18, 2), "dim": 96, "heads": (3, 6, 12, 24), "drop_path": 0.3},
    "base": {"depths": (2, 2, 18, 2), "dim": 128, "heads": (4, 8, 16, 32), "drop_path": 0.5},
    "large": {"depths": (2, 2, 18, 2), "dim": 192, "heads": (6, 12, 24, 48), "drop_path": 0.35},
}
ISOTROPIC: Mapping[str, Mapping[str, Any]] = {
    "small": {"dim": 384, "depth": 12, "heads": 12, "drop_path": 0.1},
    "base": {"dim": 768, "depth": 12, "heads": 24, "drop_path": 0.4},
}
SOURCE: Mapping[str, Any] = {
    "title": "Dilated Neighborhood Attention Transformer",
    "year": 2022,
    "paper": "arXiv:2209.15001",
}


def from_official(state: State, model: nn.Module) -> State:
    """The names of SHI-Labs/Neighborhood-Attention-Transformer, where a stage ends with the way to the next one."""
    state = rename(
        split(state, "attn.qkv", tuple(f"mixer.{name}" for name in QKV)),
        (
            (r"\.attn\.rpb$", ".mixer.attend.relative_bias"),
            (r"\.attn\.proj\.", ".mixer.out_proj."),
            (r"\.gamma([12])$", r".scale\1.weight"),
        ),
    )
    if isinstance(model, Isotropic):
        state = rename(state, ((r"^patch_embed\.proj\.", "embed.conv."), (r"^patch_embed\.norm\.", "embed.after.")))
        return in_stages(state, model.depths, "layers")
    overlapping = any(key.startswith("levels.") for key in state)
    state = rename(
        state,
        (
            (r"^patch_embed\.proj\.(\d)\.", r"downsamples.0.\1.conv."),
            (r"^patch_embed\.proj\.", "downsamples.0.conv."),
            (r"^patch_embed\.norm\.", "downsamples.0.1.after." if overlapping else "downsamples.0.after."),
            (r"^levels\.(\d)\.downsample\.reduction\.", r"merging.\1.conv."),
            (r"^levels\.(\d)\.downsample\.norm\.", r"merging.\1.after."),
            (r"^layers\.(\d)\.downsample\.", r"merging.\1."),
            (r"^(levels|layers)\.", "stages."),
            (r"^norm\.", "head.before."),
            (r"^head\.(weight|bias)", r"head.classifier.\1"),
        ),
    )
    return {
        re.sub(r"^merging\.(\d)", lambda found: f"downsamples.{int(found[1]) + 1}", key): value
        for key, value in state.items()
    }


@published(
    {f"nat_{size}": {**settings, "dilated": False} for size, settings in NAT.items()},
    title="Neighborhood Attention Transformer",
    year=2022,
    paper="arXiv:2204.07143",
    key_maps={"official": from_official},
)
@published(
    {f"dinat_{size}": settings for size, settings in DINAT.items()}
    | {f"dinat_s_{size}": {**settings, "overlapping": False} for size, settings in LIKE_SWIN.items()},
    **SOURCE,
    key_maps={"official": from_official},
)
def dinat(
    *,
    depths: Sequence[int],
    dim: int,
    heads: Sequence[int],
    expansion: int = 4,
    window: int = 7,
    dilated: bool = True,
    overlapping: bool = True,
    scale: float | None = None,
    mixer: Mixers = "neighborhood",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """A NAT or DiNAT with any mechanism.

    Args:
        depths, heads: blocks of each stage and heads of its mixers.
        dim: channels of the first stage, doubled in each that follows.
        expansion: hidden channels of an MLP per channel.
        window, dilated: neighbours on either axis, an odd number, and whether they lie apart in every second block,
            where the mixer is `neighborhood`.
        overlapping: whether maps are made by 3 x 3 convolutions, instead of patches and merging as in Swin.
        scale: starting value of the layer scales; None for none.
        mixer: the mechanism of each stage.
        mixer_settings: of the mechanisms.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on.
    """
    names = per_stage(mixer, len(depths))
    rates = rising(drop_path, depths)
    dims = [dim * 2**i for i in range(len(depths))]
    downsamples: list[nn.Module]
    if overlapping:
        stem = Downsample(in_chans, dim // 2, 3, 2), Downsample(dim // 2, dim, 3, 2, after=MapLayerNorm)
        downsamples = [nn.Sequential(*stem)]
        downsamples += [Downsample(width, 2 * width, 3, 2, after=MapLayerNorm, bias=False) for width in dims[:-1]]
    else:
        downsamples = [Downsample(in_chans, dim, 4, 4, after=MapLayerNorm, fill=True)]
        downsamples += [PatchMerging(width, 2 * width) for width in dims[:-1]]
    stages = []
    for i, size in enumerate(map_sizes(img_size, STRIDES[: len(dims)])):
        mixers = [
            _mixer(names[i], dims[i], heads[i], Grid(size), window, dilated and j % 2 == 1, mixer_settings)
            for j in range(depths[i])
        ]
        stages.append(
            TokenStage(
                MetaFormerBlock(each, Mlp(dims[i], expansion * dims[i]), scale=scale, drop_path=rate)
                for each, rate in zip(mixers, rates[i], strict=True)
            )
        )
    head = Head(dims[-1], num_classes, before=MapLayerNorm)
    return Pyramid(downsamples, stages, head, in_chans=in_chans, channels=dims, strides=STRIDES)


@published(
    {f"dinat_isotropic_{size}": settings for size, settings in ISOTROPIC.items()}
    | {f"nat_isotropic_{size}": {**settings, "dilated": False} for size, settings in ISOTROPIC.items()},
    **SOURCE,
    key_maps={"official": from_official},
)
def isotropic(
    *,
    dim: int,
    depth: int,
    heads: int,
    window: int = 7,
    dilated: bool = True,
    mixer: str = "neighborhood",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Isotropic:
    """An isotropic NAT or DiNAT with any mechanism.

    Args:
        dim, depth, heads: channels, blocks, heads of each.
        window, dilated: as in the pyramid.
        mixer: the mechanism.
        mixer_settings: of the mechanism.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on.
    """
    grid = Grid(map_sizes(img_size, [PATCH])[0])
    (rates,) = rising(drop_path, [depth])
    blocks = [
        MetaFormerBlock(
            _mixer(mixer, dim, heads, grid, window, dilated and j % 2 == 1, mixer_settings),
            Mlp(dim, 4 * dim),
            drop_path=rate,
        )
        for j, rate in enumerate(rates)
    ]
    return Isotropic(
        Downsample(in_chans, dim, PATCH, PATCH, after=MapLayerNorm, fill=True),
        blocks,
        dim=dim,
        grid=grid,
        stride=PATCH,
        norm=nn.LayerNorm(dim),
        num_classes=num_classes,
        in_chans=in_chans,
        places=False,
        pool="mean",
    )


def _mixer(
    name: str, dim: int, heads: int, grid: Grid, window: int, apart: bool, settings: Mapping[str, Any] | None
) -> Mixer:
    """One layer of a mechanism; neighborhoods fit the shorter side of their map."""
    own: dict[str, Any] = {}
    if name == "neighborhood":
        side = min(grid.shape)
        fitting = min(window, side - 1 + side % 2)
        own = {"window": fitting, "dilation": side // fitting if apart else 1, "relative_bias": True}
    return make_mixer(name, dim, heads, grid=grid, **{**own, **(settings or {})})
