"""VOLO: outlookers on a fine map, transformers on a map of half its sides, and class attention at the end.

    y = x + mixer(norm x),    z = y + MLP(norm y)                 `volo` (outlook attention), then softmax attention
    logits = W c + ½ max over places of W_a x                     c the class token, x the places, both behind a norm

The stem, three convolutions and patches, makes a map of stride 8; after the first stage it is halved, and learned
places are added only then. The class token meets the places in two blocks of class attention.

W_a is what token labelling trains: `VoloHead.votes` gives its logits of every place beside those of the class token.
The mixing of two pictures' patches belongs to that training and is not part of the network. Outlookers are never
dropped, as in the official code, whose first stage gets no rate.

Source: Yuan et al., "VOLO: Vision Outlooker for Visual Recognition", 2021 (arXiv:2106.13112), official code
sail-sg/volo, whose names are also timm's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from attlas.blocks.class_attention import ClassBlock
from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Downsample, Places, check_room, prefix_tokens, with_prefix
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.stage import Stage, TokenStage
from attlas.core.grid import Grid
from attlas.models.backbone import classifier, start_published
from attlas.models.key_maps import QKV, rename, split, tables
from attlas.models.mixers import Mixers, Settings, per_stage, settings_per_stage, sizes_after, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.stages import check_stages
from attlas.ops.maps import to_map, to_tokens

SIZES: Mapping[str, Mapping[str, Any]] = {
    "d1": {"depths": (4, 4, 8, 2), "dims": (192, 384), "heads": (6, 12), "drop_path": 0.1},
    "d2": {"depths": (6, 4, 10, 4), "dims": (256, 512), "heads": (8, 16), "drop_path": 0.2},
    "d3": {"depths": (8, 8, 16, 4), "dims": (256, 512), "heads": (8, 16), "drop_path": 0.5},
    "d4": {"depths": (8, 8, 16, 4), "dims": (384, 768), "heads": (12, 16)},
    "d5": {"depths": (12, 12, 20, 4), "dims": (384, 768), "heads": (12, 16), "ratio": 4, "stem_dim": 128},
    "micro": {"depths": (1, 1, 1, 1), "dims": (24, 48), "heads": (2, 4), "ratio": 2, "stem_dim": 16, "img_size": 64},
}
CLASS_BLOCKS = 2


class Stem(nn.Module):
    """Three convolutions, the first of stride 2, then patches of 4 x 4."""

    def __init__(self, in_chans: int, hidden: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for chans, kernel, stride in ((in_chans, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            layers += [
                nn.Conv2d(chans, hidden, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU(),
            ]
        self.convs = nn.Sequential(*layers)
        self.patches = nn.Conv2d(hidden, dim, 4, 4)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """A map 8 times smaller."""
        x_BCHW = self.convs(image_BCHW)
        check_room(x_BCHW, 4, 0)
        return self.patches(x_BCHW)


class PlacedDownsample(Downsample):
    """A strided convolution, and a learned vector for every place of the map that it makes."""

    def __init__(self, dim: int, out: int, kernel: int, stride: int, grid: Grid) -> None:
        super().__init__(dim, out, kernel, stride)
        self.places = Places(out, grid)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A smaller map that knows its places."""
        x_BNC, grid = to_tokens(super().forward(x_BCHW))
        return to_map(self.places(x_BNC, grid), grid)


class VoloHead(nn.Module):
    """Class attention, norm, and the votes of the class token and of all places.

    Args:
        stage: of class blocks.
        dim: C.
        num_classes: K; 0 gives the class token.
    """

    def __init__(self, stage: Stage, dim: int, num_classes: int) -> None:
        super().__init__()
        self.prefix = prefix_tokens(1, dim)
        self.stage = stage
        self.norm = nn.LayerNorm(dim)
        self.num_classes = num_classes
        self.classifier, self.place_classifier = classifier(dim, num_classes), classifier(dim, num_classes)

    def votes(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the class token (B, K), and of every place (B, H W, K)."""
        x_BNC, grid = to_tokens(x_BCHW)
        x_BNC = self.norm(self.stage.run(with_prefix(self.prefix, x_BNC), Grid(grid.shape, prefix=1)))
        return self.classifier(x_BNC[:, 0]), self.place_classifier(x_BNC[:, 1:])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        own_BK, places_BNK = self.votes(x_BCHW)
        return own_BK + 0.5 * places_BNK.amax(1) if self.num_classes else own_BK


def from_timm(state: State, model: nn.Module) -> State:
    """The names of timm and of the official checkpoints."""
    state = split(state, "attn.qkv", tuple(f"mixer.{name}" for name in QKV))
    # The class token's q is a matrix of its own, k and v are one.
    state = split(state, "attn.kv", ("mixer.k_proj", "mixer.v_proj"))
    renamed = rename(
        state,
        (
            (r"^cls_token$", "head.prefix"),
            (r"^pos_embed$", "downsamples.1.places.weight"),
            (r"^patch_embed\.conv\.", "downsamples.0.convs."),
            (r"^patch_embed\.proj\.", "downsamples.0.patches."),
            (r"^network\.1\.proj\.", "downsamples.1.conv."),
            (r"^network\.0\.", "stages.0.blocks."),
            (r"^network\.2\.", "stages.1.blocks."),
            (r"^network\.3\.", "stages.2.blocks."),
            (r"^network\.4\.", "stages.3.blocks."),
            (r"\.attn\.([qv])\.", r".mixer.\1_proj."),
            (r"\.attn\.attn\.", ".mixer.weight_proj."),
            (r"\.attn\.proj\.", ".mixer.out_proj."),
            (r"^head\.(weight|bias)$", r"head.classifier.\1"),
            (r"^aux_head\.", "head.place_classifier."),
            (r"^norm\.", "head.norm."),
            (r"^post_network\.", "head.stage.blocks."),
        ),
    )
    return tables(renamed, "head.prefix", "downsamples.1.places.weight")


@published(
    {f"volo_{size}": settings for size, settings in SIZES.items()},
    title="VOLO: Vision Outlooker for Visual Recognition",
    year=2021,
    paper="arXiv:2106.13112",
    key_maps={"timm": from_timm, "official": from_timm},
)
def volo(
    *,
    depths: Sequence[int],
    dims: tuple[int, int],
    heads: tuple[int, int],
    ratio: int = 3,
    stem_dim: int = 64,
    mixer: Mixers = ("volo", "softmax", "softmax", "softmax"),
    mixer_settings: Settings = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """A fine stage and coarser ones of any mechanisms, then class attention.

    Args:
        depths: blocks of each stage.
        dims, heads: channels and heads of the first stage and of the others.
        ratio: how many times wider the MLPs are.
        stem_dim: channels of the stem's convolutions.
        mixer: the mechanism of all stages, or one for each.
        mixer_settings: of the mechanisms, for all stages or for each; softmax attention has no biases of queries, keys
            and values by default.
        drop_path: rate of the last block; the first stage has none.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on.
    """
    check_stages(least=2, depths=depths)
    names, given = per_stage(mixer, len(depths)), settings_per_stage(mixer_settings, len(depths))
    width, widths = dims[1], [dims[0], *[dims[1]] * (len(depths) - 1)]
    strides = [8, *[16] * (len(depths) - 1)]
    # Patches do not overlap, so what is left of a side is cut off.
    _, *sizes = sizes_after(img_size, [(7, 2, 3), (4, 4, 0), (2, 2, 0)])
    fine, coarse = (Grid(size) for size in sizes)
    grids = [fine, *[coarse] * (len(depths) - 1)]
    downsamples = [Stem(in_chans, stem_dim, dims[0]), PlacedDownsample(*dims, 2, 2, coarse)]
    stages = []
    for i, rates in enumerate(rising(drop_path, depths)):
        settings = {**({"bias": False} if names[i] == "softmax" else {}), **given[i]}
        mixers = stage_mixers(
            names[i],
            depths[i],
            widths[i],
            heads[min(i, 1)],
            grids[i],
            settings,
        )
        stages.append(
            TokenStage(
                MetaFormerBlock(each, Mlp(widths[i], ratio * widths[i]), drop_path=rate if i else 0.0)
                for each, rate in zip(mixers, rates, strict=True)
            )
        )
    class_mixers = stage_mixers(
        "crossvit", CLASS_BLOCKS, width, heads[1], Grid(coarse.shape, prefix=1), {"bias": False}
    )
    head = VoloHead(Stage(ClassBlock(each, Mlp(width, ratio * width)) for each in class_mixers), width, num_classes)
    net = Pyramid(
        [*downsamples, *[nn.Identity() for _ in depths[2:]]],
        stages,
        head,
        in_chans=in_chans,
        channels=widths,
        strides=strides,
    )
    return start_published(net, own=["volo", "crossvit"])
