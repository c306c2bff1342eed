"""LookupViT: all patches of a picture are kept, but only a few compressed tokens are thought about.

    (l, p) ← block(l, p)                    lookup tokens l, one for each patch; compressed tokens p, m x m of them

(`LookupBlock`). p starts as l, its learned places included, resized bilinearly to m x m; from there on both are
streams of their own. The same weights serve every m: `network.embed.size = 5` sets another one, which trades
accuracy for time. The second feature map has m x m places whatever the picture is; its stride in `strides` is that
of the height as built, rounded up. Each stream votes with a linear map of its mean, and the logits are the mean of the
votes.

Source: Koner et al., "LookupViT: Compressing visual information to a limited number of tokens", 2024
(arXiv:2407.12753), which has no official code. A reconstruction: the widths are those of ViT-B; that both streams
vote, and resizing without aliasing, are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Patches, Places
from attlas.blocks.lookup import LookupBlock, TwoWayAttention
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.models.backbone import start_published
from attlas.models.mixers import patch_grid, stage_mixers
from attlas.models.registry import published
from attlas.models.two_branch import BranchHead, Grids, Pair, PairStage, TwoBranch
from attlas.ops.maps import to_map, to_tokens

BASE: Mapping[str, Any] = {"dim": 768, "heads": 12, "depth": 12}
MICRO: Mapping[str, Any] = {"dim": 48, "heads": 2, "depth": 3, "patch": 8, "size": 4, "img_size": 64}


class TwoResolutions(nn.Module):
    """Pictures to lookup and compressed tokens, and how both lie.

    Args:
        patches: pictures to a map.
        places: of the lookup tokens.
        size: m.
    """

    def __init__(self, patches: nn.Module, places: Places, size: int) -> None:
        super().__init__()
        if size < 1:
            raise BadInput(f"size is the side of the compressed tokens' grid, at least 1, got {size}")
        self.patches, self.places = patches, places
        self.size = size

    def forward(self, image_BCHW: Tensor) -> tuple[Pair, Grids]:
        """Lookup tokens, and the same resized."""
        x_BNC, grid = to_tokens(self.patches(image_BCHW))
        lookup_BNC = self.places(x_BNC, grid)
        map_BCHW, sides = to_map(lookup_BNC, grid), (self.size, self.size)
        if grid.shape != sides:
            map_BCHW = F.interpolate(map_BCHW.float(), sides, mode="bilinear", antialias=True).to(lookup_BNC.dtype)
        compressed_BMC, coarse = to_tokens(map_BCHW)
        return (lookup_BNC, compressed_BMC), (grid, coarse)


@published(
    {f"lookupvit_base_{size}x{size}": {**BASE, "size": size} for size in (3, 5, 7, 10)} | {"lookupvit_micro": MICRO},
    title="LookupViT: Compressing visual information to a limited number of tokens",
    year=2024,
    paper="arXiv:2407.12753",
    reconstruction=True,
)
def lookupvit(
    *,
    dim: int,
    heads: int,
    depth: int,
    size: int,
    patch: int = 16,
    bottleneck: int = 2,
    mixer: str = "softmax",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> TwoBranch:
    """Lookup tokens, and compressed tokens mixed by any mechanism.

    Args:
        dim, heads, depth: channels, heads and blocks.
        size: m, the side of the compressed tokens' grid.
        patch: side of a patch in pixels.
        bottleneck: how many times narrower than C the MLP of the lookup tokens is.
        mixer: the mechanism of the compressed tokens.
        mixer_settings: of the mechanism.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, a multiple of the patch.
    """
    if not 1 <= bottleneck <= dim:
        raise BadInput(f"bottleneck divides the {dim} channels, got {bottleneck}")
    grid = patch_grid(img_size, patch)
    norm = partial(nn.LayerNorm, eps=1e-6)
    embed = TwoResolutions(Patches(in_chans, dim, patch), Places(dim, grid), size)
    (rates,) = rising(drop_path, [depth])
    blocks = [
        LookupBlock(
            TwoWayAttention(dim, heads),
            MetaFormerBlock(each, Mlp(dim, 4 * dim), norm=norm, drop_path=rate),
            Mlp(dim, dim // bottleneck),
            norm=norm,
            drop_path=rate,
        )
        for each, rate in zip(
            stage_mixers(mixer, depth, dim, heads, Grid((size, size)), mixer_settings), rates, strict=True
        )
    ]
    head = BranchHead((dim, dim), num_classes, pool="mean")
    net = TwoBranch(
        embed,
        [PairStage(blocks)],
        [norm(dim), norm(dim)],
        head,
        in_chans=in_chans,
        channels=(dim, dim),
        strides=(patch, -(-patch * grid.shape[0] // size)),
        num_features=head.num_features,
    )
    return start_published(net)
