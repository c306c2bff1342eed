"""DaViT: a pyramid of two blocks in turn, attention over the places of a window and attention over channels.

    y = x + conv(x),    z = y + mixer(norm y),    u = z + conv(z),    v = u + MLP(norm u)

with depthwise convolutions of 3 x 3 places, in both kinds of block; a depth counts pairs of them. A stem of 7 x 7,
stride 4, with a norm behind it, and 2 x 2 convolutions between the stages with a norm before them; a norm after the
mean over places. Where strides do not divide, zeros follow the last row and column. The official code also fills
windows up with zeros, which take part as keys; here they hold what is left of the map, so the two agree on maps that
windows divide, as 224 pixels give.

Source: Ding et al., "DaViT: Dual Attention Vision Transformers", 2022 (arXiv:2204.03645), official code dingmyu/davit.
`large`, `huge` and `giant` were trained on more data than ImageNet-1K; the last two have the sizes of timm, and the
official `large` works on 384 pixels with `mixer_settings={"window": 12}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Downsample
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
from attlas.models.rules import unfused
from attlas.models.stages import check_stages

STRIDES = (4, 8, 16, 32)
HEAD_DIM = 32

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"depths": (1, 1, 3, 1), "dim": 96, "drop_path": 0.1},
    "small": {"depths": (1, 1, 9, 1), "dim": 96, "drop_path": 0.2},
    "base": {"depths": (1, 1, 9, 1), "dim": 128, "drop_path": 0.4},
    "large": {"depths": (1, 1, 9, 1), "dim": 192, "drop_path": 0.4},
    "huge": {"depths": (1, 1, 9, 1), "dim": 256, "drop_path": 0.4},
    "giant": {"depths": (1, 1, 12, 3), "dim": 384, "drop_path": 0.4},
    "micro": {"depths": (1, 1), "dim": 32, "img_size": 32},
}


def from_timm(state: State, model: nn.Module) -> State:
    """The names of timm."""
    return _blocks(
        rename(
            state,
            (
                (r"^stem\.conv\.", "downsamples.0.conv."),
                (r"^stem\.norm\.", "downsamples.0.after."),
                (r"^stages\.(\d)\.downsample\.norm\.", r"downsamples.\1.before."),
                (r"^stages\.(\d)\.downsample\.conv\.", r"downsamples.\1.conv."),
                (r"\.cpe([12])\.proj\.", r".position\1.conv."),
                (r"^head\.norm\.", "head.after."),
                (r"^head\.fc\.", "head.classifier."),
            ),
        )
    )


def from_official(state: State, model: nn.Module) -> State:
    """The names of dingmyu/davit."""
    return _blocks(
        rename(
            state,
            (
                (r"^patch_embeds\.(\d)\.proj\.", r"downsamples.\1.conv."),
                (r"^patch_embeds\.0\.norm\.", "downsamples.0.after."),
                (r"^patch_embeds\.(\d)\.norm\.", r"downsamples.\1.before."),
                (r"^main_blocks\.(\d)\.", r"stages.\1.blocks."),
                (r"\.cpe\.0\.proj\.", ".position1.conv."),
                (r"\.cpe\.1\.proj\.", ".position2.conv."),
                (r"^head\.", "head.classifier."),
                (r"^norms\.", "head.after."),
            ),
        )
    )


def _blocks(state: State) -> State:
    """Block 1 of pair 3, stages.2.blocks.3.1, is stages.2.blocks.7 here."""
    flat: State = {}
    for key, value in unfused(state).items():
        parts = key.replace(".attn.proj.", ".mixer.out_proj.").split(".")
        if parts[0] == "stages":
            parts[3:5] = [str(2 * int(parts[3]) + int(parts[4]))]
        flat[".".join(parts)] = value
    return flat


@published(
    {f"davit_{size}": settings for size, settings in SIZES.items()},
    title="DaViT: Dual Attention Vision Transformers",
    year=2022,
    paper="arXiv:2204.03645",
    key_maps={"timm": from_timm, "official": from_official},
)
def davit(
    *,
    depths: Sequence[int],
    dim: int,
    mixer: Mixers = "davit_window",
    mixer_settings: Mapping[str, Any] | None = None,
    channel_mixer: Mixers = "davit_channel",
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """A DaViT with any mechanisms in its two kinds of block.

    Args:
        depths: pairs of blocks of each stage.
        dim: channels of the first stage, a multiple of 32, which are those of a head; doubled in each that follows.
        mixer: the mechanism of the first block of every pair, by stage; its layers are the pairs of the stage.
        mixer_settings: of those mechanisms.
        channel_mixer: the mechanism of the second block of every pair, by stage.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    check_stages(depths=depths)
    spatial, channel = per_stage(mixer, len(depths)), per_stage(channel_mixer, len(depths))
    rates = rising(drop_path, [2 * depth for depth in depths])
    dims = [dim * 2**i for i in range(len(depths))]
    downsamples = [Downsample(in_chans, dim, 7, 4, after=MapLayerNorm, fill=True)]
    downsamples += [Downsample(width, 2 * width, 2, 2, before=MapLayerNorm, fill=True) for width in dims[:-1]]
    stages = []
    for i, size in enumerate(map_sizes(img_size, STRIDES[: len(dims)])):
        heads = max(1, dims[i] // HEAD_DIM)
        pairs = zip(
            stage_mixers(spatial[i], depths[i], dims[i], heads, Grid(size), mixer_settings),
            stage_mixers(channel[i], depths[i], dims[i], heads, Grid(size)),
            strict=True,
        )
        mixers = [each for pair in pairs for each in pair]
        stages.append(
            TokenStage(
                MetaFormerBlock(each, Mlp(dims[i], 4 * dims[i]), drop_path=rate, positions=(True, True))
                for each, rate in zip(mixers, rates[i], strict=True)
            )
        )
    head = Head(dims[-1], num_classes, after=nn.LayerNorm)
    return Pyramid(downsamples, stages, head, in_chans=in_chans, channels=dims, strides=STRIDES)
