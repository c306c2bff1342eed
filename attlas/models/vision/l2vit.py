"""L2ViT: attention in windows and linear attention over the whole map, in turns.

    windows    u = x + conv(x),    y = u + attention(norm u),    v = y + conv(y),      z = v + MLP(norm v)
    global     u = x + conv(x),    y = u + mixer(norm u),        v = y + local(norm y),    z = v + MLP(norm v)

Every stage starts with windows of 7 x 7 places, without shift and without bias. Linear attention spreads wide; `local`
are the two large convolutions that concentrate it again. Two 3 x 3 convolutions of stride 2 with batch norms and a
layer norm make the stem, a layer norm and merging of 2 x 2 places lead to the next stage.

Windows at the border of a map hold what is left of it, where the official code lets zeros take part; the two agree on
maps that windows divide, as 224 pixels give.

Source: Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025 (arXiv:2501.16182), official code
ChuanyangZheng/L2ViT.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from attlas.blocks.conv_stem import ConvStem
from attlas.blocks.drop_path import DropPath, rising
from attlas.blocks.embed import Downsample
from attlas.blocks.local_concentration import LocalConcentration
from attlas.blocks.metaformer import ConvPosition, MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.norms import MapLayerNorm
from attlas.blocks.stage import TokenStage
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.models.backbone import Head
from attlas.models.key_maps import rename
from attlas.models.mixers import Mixers, map_sizes, per_stage, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.rules import CLASSIFIER, LAST_NORM, unfused
from attlas.models.stages import check_stages

STRIDES = (4, 8, 16, 32)

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768), "heads": (3, 6, 12, 24)},
    "small": {"depths": (2, 2, 18, 2), "dims": (96, 192, 384, 768), "heads": (3, 6, 12, 24)},
    "base": {
        "depths": (2, 2, 18, 2),
        "dims": (128, 256, 512, 1024),
        "heads": (4, 8, 16, 32),
        "drop_path": 0.3,
    },
    "micro": {"depths": (2, 2, 2, 2), "dims": (16, 24, 32, 48), "heads": (1, 2, 2, 3), "window": 2, "img_size": 64},
}


class GlobalBlock(nn.Module):
    """A block whose mixer sees the whole map, with local concentration behind it.

    Args:
        mixer: of tokens.
        drop_path: the share of pictures for which a branch is dropped in training.
    """

    def __init__(self, mixer: Mixer, drop_path: float) -> None:
        super().__init__()
        dim = mixer.site.dim
        self.position1 = ConvPosition(dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.mixer = mixer
        self.local = LocalConcentration(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Mix over the map, then nearby, then channels."""
        x_BNC = self.position1(x_BNC, grid)
        x_BNC = x_BNC + self.drop_path(self.mixer(self.norm1(x_BNC), grid=grid))
        x_BNC = x_BNC + self.drop_path(self.local(self.norm2(x_BNC), grid))
        return x_BNC + self.drop_path(self.mlp(self.norm3(x_BNC), grid))


def from_official(state: State, model: nn.Module) -> State:
    """The names of ChuanyangZheng/L2ViT, whose norm before the MLP is the second one in all blocks."""
    return rename(
        unfused(state),
        (
            *((rf"^downsample_layers\.0\.proj\.proj\.{3 * i}\.", f"downsamples.0.convs.{i}.") for i in range(2)),
            *((rf"^downsample_layers\.0\.proj\.proj\.{3 * i + 1}\.", f"downsamples.0.norms.{i}.") for i in range(2)),
            (r"^downsample_layers\.0\.norm\.", "downsamples.0.after."),
            (r"^downsample_layers\.(\d)\.norm\.", r"downsamples.\1.before."),
            (r"^downsample_layers\.(\d)\.proj\.", r"downsamples.\1.conv."),
            (r"^(stages\.\d\.\d*[13579]\.)norm2\.", r"\1third."),
            (r"^(stages\.\d\.\d+\.)norm3\.", r"\1norm2."),
            (r"\.third\.", ".norm3."),
            (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"\.attn\.temperature$", ".mixer.attend.temperature"),
            (r"\.attn\.proj\.", ".mixer.out_proj."),
            (r"\.cpe\.0\.proj\.", ".position1.conv."),
            (r"\.cpe\.1\.proj\.", ".position2.conv."),
            (r"\.local_mp\.bn\.", ".local.norm."),
            (r"\.local_mp\.", ".local."),
            LAST_NORM,
            CLASSIFIER,
        ),
    )


@published(
    {f"l2vit_{size}": settings for size, settings in SIZES.items()},
    title="The Linear Attention Resurrection in Vision Transformer",
    year=2025,
    paper="arXiv:2501.16182",
    key_maps={"official": from_official},
)
def l2vit(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    heads: Sequence[int],
    window: int = 7,
    mixer: Mixers = "l2vit",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """An L2ViT, with any mechanism in its global blocks.

    Args:
        depths, dims, heads: blocks, channels and heads of each stage.
        window: places of a window on either axis.
        mixer: the mechanism of the global blocks of each stage, which are the second, the fourth and so on.
        mixer_settings: of the mechanisms.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on.
    """
    check_stages(dims=dims, depths=depths, heads=heads)
    names, rates = per_stage(mixer, len(dims)), rising(drop_path, depths)
    stages = []
    for i, size in enumerate(map_sizes(img_size, STRIDES[: len(dims)])):
        depth, place = depths[i], (dims[i], heads[i], Grid(size))
        local = stage_mixers("davit_window", (depth + 1) // 2, *place, {"window": window})
        whole = stage_mixers(names[i], depth // 2, *place, mixer_settings)
        blocks: list[nn.Module] = []
        for j, rate in enumerate(rates[i]):
            if j % 2:
                blocks.append(GlobalBlock(whole[j // 2], rate))
            else:
                mlp = Mlp(dims[i], 4 * dims[i])
                blocks.append(MetaFormerBlock(local[j // 2], mlp, drop_path=rate, positions=(True, True)))
        stages.append(TokenStage(blocks))
    stem = ConvStem(in_chans, (dims[0] // 2, dims[0]), (2, 2), activation=nn.ReLU, after=MapLayerNorm)
    between = [Downsample(dim, out, 2, 2, before=MapLayerNorm, fill=True) for dim, out in itertools.pairwise(dims)]
    head = Head(dims[-1], num_classes, before=MapLayerNorm)
    return Pyramid([stem, *between], stages, head, in_chans=in_chans, channels=dims, strides=STRIDES)
