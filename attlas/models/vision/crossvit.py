"""CrossViT: two ViTs look at one picture in patches of two sizes, and their class tokens visit each other.

    x ← encoders(x),  y ← encoders(y)                             each branch by itself
    x_0, y_0 ← what the class token of x asked of y's patches, and that of y of x's       (`CrossBranch`)

three times over; the logits are the mean of a linear map of each class token. The second branch sees the picture
resized, bicubic, from 240 to 224 pixels: to the multiple of its patch that is nearest to 14 / 15 of the picture's
side, which is 384 at 408 as published. The dagger stands for patches made by three convolutions with ReLU.

Source: Chen et al., "CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification", 2021
(arXiv:2103.14899), official code IBM/CrossViT, which resizes to 240 for the first branch too; here, as in timm, a
picture is a multiple of the first branch's patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.cross_branch import CrossBranch
from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Patches, Places, check_patches, prefix_tokens, with_prefix
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.stage import Stage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.models.backbone import start_published
from attlas.models.key_maps import QKV, rename, split, tables
from attlas.models.mixers import Mixers, Settings, patch_grid, per_stage, picture_size, settings_per_stage, stage_mixers
from attlas.models.registry import State, published
from attlas.models.two_branch import BranchHead, Grids, Pair, TwoBranch
from attlas.ops.maps import to_tokens

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"dims": (96, 192), "heads": (3, 3), "encoders": (1, 4)},
    "small": {"dims": (192, 384), "heads": (6, 6), "encoders": (1, 4)},
    "base": {"dims": (384, 768), "heads": (12, 12), "encoders": (1, 4)},
    "9": {"dims": (128, 256), "heads": (4, 4), "encoders": (1, 3), "ratio": 3},
    "15": {"dims": (192, 384), "heads": (6, 6), "encoders": (1, 5), "ratio": 3},
    "18": {"dims": (224, 448), "heads": (7, 7), "encoders": (1, 6), "ratio": 3},
}
DAGGER: Mapping[str, Mapping[str, Any]] = {
    f"{size}_dagger": {**SIZES[size], "convolutions": True} for size in ("9", "15", "18")
}
FINER: Mapping[str, Mapping[str, Any]] = {
    f"{size}_408": {**DAGGER[size], "img_size": 408} for size in ("15_dagger", "18_dagger")
}
MICRO: Mapping[str, Any] = {
    "dims": (32, 48),
    "heads": (2, 2),
    "encoders": (1, 2),
    "depth": 2,
    "ratio": 2,
    "patches": (8, 12),
    "img_size": 64,
}
SHRINK = 14 / 15
NORM = partial(nn.LayerNorm, eps=1e-6)


class ConvPatches(nn.Module):
    """Patches made by three convolutions with ReLU between them, 7 x 7 and twice 3 x 3.

    Args:
        in_chans: channels of the pictures.
        dim: C.
        size: of a patch, 12 or 16 pixels.
    """

    def __init__(self, in_chans: int, dim: int, size: int) -> None:
        super().__init__()
        steps = {12: ((3, 0), (1, 1)), 16: ((2, 1), (2, 1))}
        if size not in steps:
            raise BadInput(f"patches by convolutions have 12 or 16 pixels, got {size}")
        (first, border), (second, last_border) = steps[size]
        self.convs = nn.Sequential(
            nn.Conv2d(in_chans, dim // 4, 7, 4, 3),
            nn.ReLU(),
            nn.Conv2d(dim // 4, dim // 2, 3, first, border),
            nn.ReLU(),
            nn.Conv2d(dim // 2, dim, 3, second, last_border),
        )
        self.size = size

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """A map (B, C, H / size, W / size)."""
        check_patches(image_BCHW, self.size)
        return self.convs(image_BCHW)


class Branch(nn.Module):
    """Patches as tokens that know their places, a class token in front."""

    def __init__(self, patches: nn.Module, dim: int, grid: Grid) -> None:
        super().__init__()
        self.patches = patches
        self.prefix = prefix_tokens(grid.prefix, dim)
        self.places = Places(dim, grid)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Grid]:
        """Tokens, and how they lie."""
        x_BNC, grid = to_tokens(self.patches(image_BCHW))
        grid = Grid(grid.shape, prefix=len(self.prefix))
        return self.places(with_prefix(self.prefix, x_BNC), grid), grid


class TwoSizes(nn.Module):
    """A picture in patches of one size, and resized in patches of another.

    Args:
        branches: from a picture to tokens.
        patch: of the second branch, in pixels.
    """

    def __init__(self, branches: tuple[Branch, Branch], patch: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.patch = patch

    def forward(self, image_BCHW: Tensor) -> tuple[Pair, Grids]:
        """Both branches, and how their tokens lie."""
        height, width = image_BCHW.shape[2:]
        sides = shrunk((height, width), self.patch)
        resized = image_BCHW
        if sides != (height, width):
            resized = F.interpolate(image_BCHW, sides, mode="bicubic", align_corners=False)
        first, second = self.branches
        (x, x_grid), (y, y_grid) = first(image_BCHW), second(resized)
        return (x, y), (x_grid, y_grid)


class MultiScale(nn.Module):
    """The encoders of each branch, then the visits of the class tokens."""

    def __init__(self, branches: tuple[Stage, Stage], exchange: CrossBranch) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.exchange: CrossBranch | None = exchange

    def forward(self, pair: Pair, grids: Grids) -> Pair:
        """Both branches."""
        first, second = self.branches
        assert isinstance(first, Stage)
        assert isinstance(second, Stage)
        pair = first.run(pair[0], grids[0]), second.run(pair[1], grids[1])
        return pair if self.exchange is None else self.exchange(*pair)


class CrossViT(TwoBranch):
    """Two branches whose class tokens meet.

    A place of the second map is 16 pixels of the picture resized, and so 17.14 of the picture: `strides` says 17.
    """

    def headless(self) -> None:
        """Without the last visits either, from which only the class tokens return."""
        super().headless()
        last = self.stages[-1]
        assert isinstance(last, MultiScale)
        last.exchange = None


def shrunk(sides: tuple[int, int], patch: int) -> tuple[int, int]:
    """What the second branch sees of a picture of these sides."""
    height, width = (patch * max(1, round(side * SHRINK / patch)) for side in sides)
    return height, width


def from_timm(state: State, model: nn.Module) -> State:
    """The names of timm, and of the official checkpoints, which write a dot before the number of a branch."""
    state = split(state, "attn.qkv", tuple(f"mixer.{name}" for name in QKV))
    state = rename(
        state,
        (
            (r"^patch_embed\.(\d)\.proj\.(\d)", r"embed.branches.\1.patches.convs.\2"),
            (r"^patch_embed\.(\d)\.proj\.", r"embed.branches.\1.patches.conv."),
            (r"^cls_token[._](\d)$", r"embed.branches.\1.prefix"),
            (r"^pos_embed[._](\d)$", r"embed.branches.\1.places.weight"),
            (r"^blocks\.(\d)\.projs\.(\d)\.", r"stages.\1.exchange.visits.\2.go."),
            (r"^blocks\.(\d)\.revert_projs\.(\d)\.", r"stages.\1.exchange.visits.\2.come_back."),
            (r"^blocks\.(\d)\.fusion\.(\d)\.norm1\.", r"stages.\1.exchange.visits.\2.norm."),
            (r"^blocks\.(\d)\.fusion\.(\d)\.attn\.w([qkv])\.", r"stages.\1.exchange.visits.\2.ask.\3_proj."),
            (r"^blocks\.(\d)\.fusion\.(\d)\.attn\.proj\.", r"stages.\1.exchange.visits.\2.ask.out_proj."),
            (r"^blocks\.(\d)\.blocks\.(\d)\.(\d)\.", r"stages.\1.branches.\2.blocks.\3."),
            (r"\.attn\.proj\.", ".mixer.out_proj."),
            (r"^norm\.", "norms."),
            (r"^head\.", "head.classifiers."),
        ),
    )
    return tables(state, *(key for key in state if key.endswith((".prefix", "places.weight"))))


@published(
    {f"crossvit_{size}": {**settings, "drop_path": 0.1} for size, settings in {**SIZES, **DAGGER, **FINER}.items()}
    | {"crossvit_micro": MICRO},
    title="CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification",
    year=2021,
    paper="arXiv:2103.14899",
    key_maps={"timm": from_timm, "official": from_timm},
)
def crossvit(
    *,
    dims: tuple[int, int],
    heads: tuple[int, int],
    encoders: tuple[int, int],
    depth: int = 3,
    ratio: int = 4,
    patches: tuple[int, int] = (12, 16),
    convolutions: bool = False,
    mixer: Mixers = "softmax",
    mixer_settings: Settings = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 240,
) -> CrossViT:
    """Two ViTs with any mechanism whose class tokens ask each other's patches.

    Args:
        dims, heads: channels and heads of each branch.
        encoders: blocks of each branch between two exchanges.
        depth: how many exchanges.
        ratio: how many times wider the MLPs are.
        patches: sides of the patches in pixels.
        convolutions: whether three convolutions make a patch.
        mixer: the mechanism of the encoders, or one for each branch; there is a class token in front.
        mixer_settings: of the mechanisms, for both branches or for each.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, a multiple of the first patch.
    """
    names, settings = per_stage(mixer, 2), settings_per_stage(mixer_settings, 2)
    if min(patches) < 1:
        raise BadInput(f"patches are the sides of patches in pixels, at least 1, got {patches}")
    sides = picture_size(img_size)
    pictures = (sides, shrunk(sides, patches[1]))
    make = ConvPatches if convolutions else Patches
    grids = [patch_grid(picture, patch, prefix=1) for picture, patch in zip(pictures, patches, strict=True)]
    embeds = [Branch(make(in_chans, dims[own], patches[own]), dims[own], grids[own]) for own in range(2)]
    rates = rising(drop_path, [max(encoders)] * depth)

    def encode(own: int, level: int) -> Stage:
        mixers = stage_mixers(
            names[own],
            encoders[own],
            dims[own],
            heads[own],
            grids[own],
            settings[own],
            first=level * encoders[own],
            layers=depth * encoders[own],
        )
        return Stage(
            MetaFormerBlock(each, Mlp(dims[own], ratio * dims[own]), norm=NORM, drop_path=rate)
            for each, rate in zip(mixers, rates[level], strict=False)
        )

    stages = [
        MultiScale((encode(0, level), encode(1, level)), CrossBranch(dims, heads, drop_path=rates[level][-1]))
        for level in range(depth)
    ]
    head = BranchHead(dims, num_classes)
    net = CrossViT(
        TwoSizes((embeds[0], embeds[1]), patches[1]),
        stages,
        [NORM(dim) for dim in dims],
        head,
        in_chans=in_chans,
        channels=dims,
        strides=(patches[0], round(patches[1] / SHRINK)),
        num_features=head.num_features,
    )
    return start_published(net, own=["crossvit"])
