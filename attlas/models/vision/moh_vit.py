"""MoH-ViT: a pyramid in which every token picks the heads of its attention.

    y = x + mixer(norm x),    z = y + W₂ (GELU(conv(W₁ u)) ⊙ W₃ u),  u = norm y

TransNeXt with gates on its heads: aggregated attention in the first three stages, with a coarse map 8, 4 and 2 times
smaller, and cosine attention in the last (see the mechanisms `moh_aggregated` and `moh_cosine`). A stem of 7 x 7,
stride 4, and 3 x 3 convolutions of stride 2, each with a norm behind, as every stage has. A number in a name says how
many percent of the heads are active in the mean; stages whose heads are all shared have gates, too. In training add
`attlas.auxiliary_loss(net)`, which keeps the heads in even use.

Source: Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024 (arXiv:2410.11842), official code
SkyworkAI/MoH; Shi, "TransNeXt", 2023 (arXiv:2311.17132).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Downsample
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import ConvGLU
from attlas.blocks.norms import MapLayerNorm
from attlas.blocks.stage import TokenStage
from attlas.core.grid import Grid
from attlas.models.backbone import Head
from attlas.models.key_maps import linear, rename, split
from attlas.models.mixers import Mixers, Settings, map_sizes, per_stage, settings_per_stage, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.stages import check_stages

STRIDES = (4, 8, 16, 32)
OWN = ("moh_aggregated", "moh_aggregated", "moh_aggregated", "moh_cosine")
RATIOS = (8, 8, 4, 4)
"""How many times wider than the channels an MLP without a gate would be; one with a gate has two thirds of that."""
REDUCTIONS = (8, 4, 2, 1)

SMALL = {"depths": (5, 5, 22, 5), "dims": (72, 144, 288, 576), "heads": (3, 6, 12, 24), "drop_path": 0.45}
BASE = {"depths": (5, 5, 23, 5), "dims": (96, 192, 384, 768), "heads": (4, 8, 16, 32), "drop_path": 0.6}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "small_75": {**SMALL, "shared": (3, 6, 3, 4), "active": (0, 0, 6, 12)},
    "small_80": {**SMALL, "shared": (3, 6, 3, 8), "active": (0, 0, 6, 12)},
    "base_50": {**BASE, "shared": (2, 2, 2, 4), "active": (2, 4, 6, 8)},
    "base_75": {**BASE, "shared": (4, 8, 4, 5), "active": (0, 0, 8, 16)},
    "micro": {
        "depths": (1, 1, 1, 1),
        "dims": (16, 16, 32, 32),
        "heads": (2, 2, 4, 4),
        "shared": (2, 2, 1, 1),
        "active": (0, 0, 2, 2),
        "img_size": 64,
    },
}


def from_official(state: State, model: nn.Module) -> State:
    """The names of SkyworkAI/MoH, MoH-ViT."""
    stages = [
        rule
        for i in range(len(STRIDES))
        for rule in (
            (rf"^patch_embed{i + 1}\.proj\.", f"downsamples.{i}.conv."),
            (rf"^patch_embed{i + 1}\.norm\.", f"downsamples.{i}.after."),
            (rf"^block{i + 1}\.", f"stages.{i}.0.blocks."),
            (rf"^norm{i + 1}\.", f"stages.{i}.1."),
        )
    ]
    return rename(
        split(linear(state, r"attn\.sr\.weight"), "mlp.fc1", ("mlp.gate", "mlp.value")),
        (
            *stages,
            (r"\.mlp\.dwconv\.dwconv\.", ".mlp.conv."),
            (r"\.mlp\.fc2\.", ".mlp.out."),
            (r"\.attn\.query_embedding$", ".attn.query"),
            (r"\.attn\.learnable_tokens$", ".attn.taps"),
            (r"\.attn\.learnable_bias$", ".attn.tap_bias"),
            (r"\.attn\.relative_pos_bias_local$", ".attn.window_bias"),
            (r"\.attn\.cpb_fc", ".attn.bias.fc"),
            (r"\.attn\.sr\.", ".attn.coarse_proj."),
            (r"\.attn\.norm\.", ".attn.coarse_norm."),
            (r"\.attn\.proj\.", ".attn.out_proj."),
            (r"\.attn\.(qkv|q|kv)\.", r".attn.\1_proj."),
            (r"\.attn\.wg\.", ".attn.router.pick."),
            (r"\.attn\.wg_0\.", ".attn.router.split."),
            (r"\.attn\.wg_1\.", ".attn.router.weigh."),
            (r"\.attn\.", ".mixer."),
            (r"^head\.(weight|bias)$", r"head.classifier.\1"),
        ),
    )


@published(
    {f"moh_vit_{size}": settings for size, settings in SIZES.items()},
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    year=2024,
    paper="arXiv:2410.11842",
    key_maps={"official": from_official},
)
def moh_vit(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    heads: Sequence[int],
    shared: Sequence[int],
    active: Sequence[int],
    balance: float = 0.01,
    mixer: Mixers = OWN,
    mixer_settings: Settings = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """The network, with its own or any other mechanism, one for all stages or one for each.

    Args:
        depths, dims, heads: blocks, channels and heads of each stage.
        shared, active: heads of each stage that are always on, and how many of the others a token picks.
        balance: coefficient of the balance loss, the mean over blocks in which heads are picked.
        mixer: the mechanism of each stage.
        mixer_settings: of the mechanisms, for all stages or for each.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, the ruler of distances.
    """
    check_stages(depths=depths, dims=dims, heads=heads, shared=shared, active=active)
    names, rates, sizes = per_stage(mixer, len(depths)), rising(drop_path, depths), map_sizes(img_size, STRIDES)
    given = settings_per_stage(mixer_settings, len(depths))
    picking = sum(depth for depth, count in zip(depths, active, strict=True) if count)
    norm = partial(nn.LayerNorm, eps=1e-6)
    downsamples, stages = [], []
    for i, dim in enumerate(dims):
        before, kernel, stride = (dims[i - 1], 3, 2) if i else (in_chans, 7, 4)
        downsamples.append(Downsample(before, dim, kernel, stride, after=MapLayerNorm))
        own: dict[str, Any] = {}
        if names[i] in OWN:
            own = {"shared_heads": shared[i], "active_heads": active[i]}
            own["balance"] = balance * depths[i] / max(1, picking)  # the mechanism divides by its stage
        if names[i] == OWN[0]:
            own["reduction"] = REDUCTIONS[i]
        mixers = stage_mixers(
            names[i],
            depths[i],
            dim,
            heads[i],
            Grid(sizes[i]),
            {**own, **given[i]},
        )
        blocks = [
            MetaFormerBlock(each, ConvGLU(dim, 2 * RATIOS[i] * dim // 3), norm=norm, drop_path=rate)
            for each, rate in zip(mixers, rates[i], strict=True)
        ]
        stages.append(nn.Sequential(TokenStage(blocks), MapLayerNorm(dim, eps=1e-6)))
    return Pyramid(downsamples, stages, Head(dims[-1], num_classes), in_chans=in_chans, channels=dims, strides=STRIDES)
