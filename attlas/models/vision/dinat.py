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

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Downsample
from attlas.blocks.factory import mixer as make_mixer
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.norms import MapLayerNorm
from attlas.blocks.stage import TokenStage
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.models.backbone import Head
from attlas.models.isotropic import Isotropic
from attlas.models.key_maps import in_stages, rename
from attlas.models.mixers import Mixers, map_sizes, per_stage
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.rules import BETWEEN, CLASSIFIER, LAST_NORM, unfused
from attlas.models.stages import check_stages
from attlas.models.vision import swin

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
    **{size: swin.SIZES[size] for size in ("tiny", "small", "base")},
    "large": {**swin.SIZES["large"], "drop_path": 0.35},
}
ISOTROPIC: Mapping[str, Mapping[str, Any]] = {
    "small": {"dim": 384, "depth": 12, "heads": 12, "drop_path": 0.1},
    "base": {"dim": 768, "depth": 12, "heads": 24, "drop_path": 0.4},
    "micro": {"dim": 24, "depth": 4, "heads": 2, "window": 3, "img_size": 112},
}
SOURCE: Mapping[str, Any] = {
    "title": "Dilated Neighborhood Attention Transformer",
    "year": 2022,
    "paper": "arXiv:2209.15001",
}


def from_official(state: State, model: nn.Module) -> State:
    """The names of SHI-Labs/Neighborhood-Attention-Transformer, where a stage ends with the way to the next one."""
    state = rename(
        unfused(state),
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
    between = ((r"^(downsamples\.[123]\.)reduction\.", r"\1conv."), (r"^(downsamples\.[123]\.)norm\.", r"\1after."))
    return rename(
        state,
        (
            *BETWEEN,
            *(between if overlapping else ()),
            (r"^patch_embed\.proj\.(\d)\.", r"downsamples.0.\1.conv."),
            (r"^patch_embed\.proj\.", "downsamples.0.conv."),
            (r"^patch_embed\.norm\.", "downsamples.0.1.after." if overlapping else "downsamples.0.after."),
            (r"^(levels|layers)\.", "stages."),
            LAST_NORM,
            CLASSIFIER,
        ),
    )


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
        mixer: the mechanism of each stage, whose layers are counted from the start of the stage.
        mixer_settings: of the mechanisms.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on.
    """
    check_stages(depths=depths, heads=heads)
    names = per_stage(mixer, len(depths))
    rates = rising(drop_path, depths)
    dims = [dim * 2**i for i in range(len(depths))]
    stages = []
    for i, size in enumerate(map_sizes(img_size, STRIDES[: len(dims)])):
        mixers = _mixers(names[i], depths[i], dims[i], heads[i], Grid(size), window, dilated, mixer_settings)
        stages.append(
            TokenStage(
                MetaFormerBlock(each, Mlp(dims[i], expansion * dims[i]), scale=scale, drop_path=rate)
                for each, rate in zip(mixers, rates[i], strict=True)
            )
        )
    if not overlapping:
        return swin.swin_pyramid(stages, dims, in_chans, num_classes)
    stem = Downsample(in_chans, dim // 2, 3, 2), Downsample(dim // 2, dim, 3, 2, after=MapLayerNorm)
    between = [Downsample(width, 2 * width, 3, 2, after=MapLayerNorm, bias=False) for width in dims[:-1]]
    head = Head(dims[-1], num_classes, before=MapLayerNorm)
    downsamples = [nn.Sequential(*stem), *between]
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
    mixers = _mixers(mixer, depth, dim, heads, grid, window, dilated, mixer_settings)
    blocks = [
        MetaFormerBlock(each, Mlp(dim, 4 * dim), drop_path=rate) for each, rate in zip(mixers, rates, strict=True)
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


def _mixers(
    name: str,
    depth: int,
    dim: int,
    heads: int,
    grid: Grid,
    window: int,
    dilated: bool,
    settings: Mapping[str, Any] | None,
) -> list[Mixer]:
    """The layers of a stage; neighborhoods fit the shorter side of their map."""
    mixers = []
    for layer in range(depth):
        own: dict[str, Any] = {}
        if name == "neighborhood":
            side = min(grid.shape)
            fitting = min(window, side - 1 + side % 2)
            apart = dilated and layer % 2 == 1
            own = {"window": fitting, "dilation": side // fitting if apart else 1, "relative_bias": True}
        every = {**own, **(settings or {})}
        mixers.append(make_mixer(name, dim, heads, grid=grid, layer=layer, layers=depth, **every))
    return mixers
