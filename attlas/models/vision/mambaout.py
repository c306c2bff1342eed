"""MambaOut: a pyramid of gated convolutions, the Mamba block without its state-space model.

    y = x + mixer(norm x)

There is no MLP: the mixer widens and gates the channels itself. The stem is two 3 x 3 convolutions of stride 2, before
the other stages stands one, each with a LayerNorm behind; the head is an MLP of the mean over places, with a LayerNorm
in front and one behind its GELU.

Source: Yu and Wang, "MambaOut: Do We Really Need Mamba for Vision?", 2024 (arXiv:2405.07992), official code
yuweihao/MambaOut. With another mechanism inside, heads have 32 channels where it has heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from attlas.blocks.embed import Downsample
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.norms import MapLayerNorm
from attlas.models.backbone import Head, classifier, start_published
from attlas.models.key_maps import rename
from attlas.models.mixers import Mixers, Settings, doubling, map_sizes, token_stages
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.stages import check_stages

HEAD_DIM = 32
EPS = 1e-6

SIZES: Mapping[str, Mapping[str, Any]] = {
    "femto": {"depths": (3, 3, 9, 3), "dims": (48, 96, 192, 288), "drop_path": 0.025},
    "kobe": {"depths": (3, 3, 15, 3), "dims": (48, 96, 192, 288), "drop_path": 0.025},
    "tiny": {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 576), "drop_path": 0.2},
    "small": {"depths": (3, 4, 27, 3), "dims": (96, 192, 384, 576), "drop_path": 0.4},
    "base": {"depths": (3, 4, 27, 3), "dims": (128, 256, 512, 768), "drop_path": 0.6},
    "micro": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48), "img_size": 64},
}


def from_timm(state: State, model: nn.Module) -> State:
    """The names of timm."""
    return rename(
        state,
        (
            (r"^stem\.conv1\.", "downsamples.0.0.conv."),
            (r"^stem\.norm1\.", "downsamples.0.0.after."),
            (r"^stem\.conv2\.", "downsamples.0.2.conv."),
            (r"^stem\.norm2\.", "downsamples.0.2.after."),
            (r"^stages\.(\d)\.downsample\.conv\.", r"downsamples.\1.conv."),
            (r"^stages\.(\d)\.downsample\.norm\.", r"downsamples.\1.after."),
            (r"(blocks\.\d+)\.norm\.", r"\1.norm1."),
            (r"(blocks\.\d+)\.(fc1|conv|fc2)\.", r"\1.mixer.\2."),
            (r"^head\.fc\.", "head.4."),
            (r"^head\.norm\.", "head.0.after."),
            (r"^head\.pre_logits\.fc\.", "head.1."),
            (r"^head\.pre_logits\.norm\.", "head.3."),
        ),
    )


def from_official(state: State, model: nn.Module) -> State:
    """The names of yuweihao/MambaOut."""
    return from_timm(
        rename(
            state,
            (
                (r"^downsample_layers\.0\.", "stem."),
                (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
                (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
                (r"^head\.fc2\.", "head.fc."),
                (r"^head\.fc1\.", "head.pre_logits.fc."),
                (r"^head\.norm\.", "head.pre_logits.norm."),
                (r"^norm\.", "head.norm."),
            ),
        ),
        model,
    )


@published(
    {f"mambaout_{size}": settings for size, settings in SIZES.items()},
    title="MambaOut: Do We Really Need Mamba for Vision?",
    year=2024,
    paper="arXiv:2405.07992",
    key_maps={"timm": from_timm, "official": from_official},
)
def mambaout(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    mixer: Mixers = "mambaout",
    mixer_settings: Settings = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """A pyramid of blocks that are a mixer and nothing else.

    Args:
        depths, dims: blocks and channels of each stage.
        mixer: the mechanism, one for all stages or one for each.
        mixer_settings: of the mechanisms, for all stages or for each.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features, without the head's MLP.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    check_stages(depths=depths, dims=dims)
    strides = doubling(4, len(dims))
    norm, map_norm = partial(nn.LayerNorm, eps=EPS), partial(MapLayerNorm, eps=EPS)
    stem = nn.Sequential(
        Downsample(in_chans, dims[0] // 2, 3, 2, after=map_norm),
        nn.GELU(),
        Downsample(dims[0] // 2, dims[0], 3, 2, after=map_norm),
    )
    downsamples = [stem, *(Downsample(dims[i - 1], dims[i], 3, 2, after=map_norm) for i in range(1, len(dims)))]
    stages = token_stages(
        mixer,
        depths,
        dims,
        [max(1, dim // HEAD_DIM) for dim in dims],
        map_sizes(img_size, strides),
        lambda each, rate: MetaFormerBlock(each, None, norm=norm, drop_path=rate),
        settings=mixer_settings,
        drop_path=drop_path,
    )
    dim = dims[-1]
    head: nn.Module = Head(dim, 0, after=norm)
    if num_classes:
        head = nn.Sequential(head, nn.Linear(dim, 4 * dim), nn.GELU(), norm(4 * dim), classifier(4 * dim, num_classes))
    net = Pyramid(downsamples, stages, head, in_chans=in_chans, channels=dims, strides=strides)
    return start_published(net, kinds=(nn.Linear, nn.Conv2d), own=["mambaout"])
