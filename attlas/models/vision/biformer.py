"""BiFormer: a pyramid whose regions choose, by their means, the few regions that they attend to.

    u = x + conv(x),    y = u + mixer(norm u),    z = y + MLP(norm y)

The stem is two 3 x 3 convolutions of stride 2, another one goes before every further stage, each with a batch norm; so
is the norm before the mean over places. Each map is cut into 7 x 7 regions, of which a region attends to 1, 4 and 16
in the first three stages. The last stage has softmax attention of 8 heads whatever the width, without a bias of
queries, keys and values, with a depthwise 5 x 5 convolution of what it reads, not of its values, beside it.

`biformer_stl`, for comparisons, has the layout of Swin-T: patches of 4 x 4 pixels and of 2 x 2 places, no convolution
of x, wider MLPs.

Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", 2023 (arXiv:2303.08810), official
code rayleizhu/BiFormer. Where maps do not divide into regions see the mechanism `biformer`; the official code then
stops, or lets zeros take part.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from attlas.blocks.conv_stem import ConvStem
from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Downsample
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.stage import TokenStage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.models.backbone import Head
from attlas.models.key_maps import rename
from attlas.models.mixers import Mixers, map_sizes, per_stage, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.rules import CLASSIFIER, LAST_NORM, unfused
from attlas.models.stages import check_stages, enhanced_softmax

STRIDES = (4, 8, 16, 32)
HEAD_DIM = 32
LAST_HEADS = 8

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"depths": (2, 2, 8, 2), "dims": (64, 128, 256, 512), "drop_path": 0.1},
    "small": {"depths": (4, 4, 18, 4), "dims": (64, 128, 256, 512), "drop_path": 0.15},
    "base": {"depths": (4, 4, 18, 4), "dims": (96, 192, 384, 768), "drop_path": 0.4},
    "stl": {"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768), "mlp_ratio": 4, "layout": "swin"},
    "micro": {
        "depths": (1, 1, 2, 1),
        "dims": (32, 32, 64, 64),
        "regions": 2,
        "tops": (1, 2, 3, 4),
        "img_size": 64,
    },
}


def from_official(state: State, model: nn.Module) -> State:
    """The names of rayleizhu/BiFormer, of `biformer_stl` too."""
    state = rename(
        state,
        (
            (r"^stages\.(\d)\.(?:blocks\.)?(\d+)\.", r"stages.\1.blocks.\2."),
            (r"\.attn\.qkv\.qkv\.", r".attn.qkv."),
            (r"\.attn\.(wo|proj)\.", r".mixer.out_proj."),
            (r"^(stages\.[012].*)\.attn\.lepe\.", r"\1.mixer.attend.convolution."),
            (r"\.attn\.lepe\.", r".mixer.conv."),
            (r"\.pos_embed\.", r".position1.conv."),
            (r"\.mlp\.0\.", r".mlp.fc1."),
            (r"\.mlp\.[23]\.", r".mlp.fc2."),
            LAST_NORM,
            CLASSIFIER,
        ),
    )
    assert isinstance(model, Pyramid)
    if isinstance(model.downsamples[0], ConvStem):
        stem = tuple(
            (rf"^downsample_layers\.0\.{index}\.", f"downsamples.0.{name}.")
            for index, name in ((0, "convs.0"), (1, "norms.0"), (3, "convs.1"), (4, "norms.1"))
        )
        between = ((r"^downsample_layers\.(\d)\.0\.", r"downsamples.\1.conv."),)
        after = ((r"^downsample_layers\.(\d)\.1\.", r"downsamples.\1.after."),)
        state = rename(state, stem + between + after)
    else:
        state = rename(
            state,
            (
                (r"^downsample_layers\.0\.0\.", "downsamples.0.conv."),
                (r"^downsample_layers\.0\.1\.", "downsamples.0.after."),
                (r"^downsample_layers\.(\d)\.0\.", r"downsamples.\1.before."),
                (r"^downsample_layers\.(\d)\.1\.", r"downsamples.\1.conv."),
            ),
        )
    return unfused(state)


@published(
    {f"biformer_{size}": settings for size, settings in SIZES.items()},
    title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    year=2023,
    paper="arXiv:2303.08810",
    key_maps={"official": from_official},
)
def biformer(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    mlp_ratio: int = 3,
    layout: str = "conv",
    regions: int = 7,
    tops: Sequence[int] = (1, 4, 16, 49),
    mixer: Mixers = ("biformer", "biformer", "biformer", "softmax"),
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """A BiFormer, with any mechanism.

    Args:
        depths, dims: blocks and channels of each stage.
        mlp_ratio: hidden channels of an MLP per channel.
        layout: "conv", or "swin" with patches and without convolutions of x.
        regions: on each axis of a map; a map of fewer places has as many as places.
        tops: regions that a region attends to, in each stage, at most all.
        mixer: the mechanism of each stage. "softmax" in the last one has the convolution beside it.
        mixer_settings: of the mechanisms; that softmax attention has them where every stage has softmax attention.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on.
    """
    if layout not in ("conv", "swin"):
        raise BadInput(f"layout is 'conv' or 'swin', got {layout!r}")
    check_stages(dims=dims, depths=depths, tops=tops)
    names, rates, last = per_stage(mixer, len(dims)), rising(drop_path, depths), len(dims) - 1
    shared = mixer_settings if set(names) == {"softmax"} else None
    stages = []
    for i, size in enumerate(map_sizes(img_size, STRIDES[: len(dims)])):
        dim, grid = dims[i], Grid(size)
        mixers: list[Mixer]
        if names[i] == "softmax" and i == last:
            mixers = enhanced_softmax(depths[i], dim, LAST_HEADS, grid, shared, of="tokens", bias=False)
        else:
            count = min(regions, *size)
            own = {"regions": count, "top": min(tops[i], count**2)} if names[i] == "biformer" else {}
            settings = {**own, **(mixer_settings or {})}
            mixers = stage_mixers(names[i], depths[i], dim, max(1, dim // HEAD_DIM), grid, settings)
        stages.append(
            TokenStage(
                MetaFormerBlock(
                    each,
                    Mlp(dim, mlp_ratio * dim),
                    norm=partial(nn.LayerNorm, eps=1e-6),
                    drop_path=rate,
                    positions=(layout == "conv", False),
                )
                for each, rate in zip(mixers, rates[i], strict=True)
            )
        )
    head = Head(dims[-1], num_classes, before=nn.BatchNorm2d)
    downsamples = _downsamples(layout, in_chans, dims)
    return Pyramid(downsamples, stages, head, in_chans=in_chans, channels=dims, strides=STRIDES)


def _downsamples(layout: str, in_chans: int, dims: Sequence[int]) -> list[nn.Module]:
    """The stem, and what stands between the stages."""
    pairs = list(itertools.pairwise(dims))
    if layout == "conv":
        stem = ConvStem(in_chans, (dims[0] // 2, dims[0]), (2, 2))
        return [stem, *(Downsample(dim, out, 3, 2, after=nn.BatchNorm2d) for dim, out in pairs)]
    patches = Downsample(in_chans, dims[0], 4, 4, after=nn.BatchNorm2d, fill=True)
    return [patches, *(Downsample(dim, out, 2, 2, before=nn.BatchNorm2d, fill=True) for dim, out in pairs)]
