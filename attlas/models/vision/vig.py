"""ViG: patches as tokens, gated linear attention in both directions with a gate towards their surroundings.

    y = x + mixer(RMSNorm x),    z = y + W₂ (silu(W₁ u) ⊙ W₃ u),  u = RMSNorm y

Patches overlap: a convolution of 9 x 9, stride 8, a norm, SiLU, and one of 3 x 3, stride 2, with a norm. There are
learned places and no class token; the head reads the mean of all tokens. The cost grows in proportion to the tokens.

Source: Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention", 2024
(arXiv:2405.18425), official code hustvl/ViG. Its hierarchical networks are not among these.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Downsample
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import SwiGLU, llama_width
from attlas.blocks.norms import MapLayerNorm
from attlas.core.grid import Grid
from attlas.models.backbone import start_published
from attlas.models.isotropic import Isotropic
from attlas.models.key_maps import in_stages, rename, split, tables
from attlas.models.mixers import sizes_after, stage_mixers
from attlas.models.registry import State, published

STRIDE = 16
SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"dim": 192, "depth": 12, "heads": 3, "activation": "silu"},
    "small": {"dim": 384, "depth": 12, "heads": 6, "drop_path": 0.2},
    "base": {"dim": 768, "depth": 12, "heads": 12, "drop_path": 0.5},
    "micro": {"dim": 32, "depth": 4, "heads": 2, "img_size": 64},
}


def from_official(state: State, model: nn.Module) -> State:
    """The names of hustvl/ViG."""
    assert isinstance(model, Isotropic)
    state = rename(
        split(state, "mlp.gate_proj", ("mlp.gate", "mlp.value")),
        (
            (r"^patch_embed\.proj\.0\.", "embed.0.conv."),
            (r"^patch_embed\.proj\.1\.", "embed.0.after."),
            (r"^patch_embed\.proj\.3\.", "embed.2.conv."),
            (r"^patch_embed\.proj\.4\.", "embed.2.after."),
            (r"^pos_embed$", "places.weight"),
            (r"\.attn_norm\.", ".norm1."),
            (r"\.mlp_norm\.", ".norm2."),
            (r"\.mlp\.down_proj\.", ".mlp.out."),
            (r"\.attn\.in_proj\.0\.", ".mixer.convolution."),
            (r"\.attn\.gk_proj\.", ".mixer.decay_proj."),
            (r"\.attn\.g_norm\.", ".mixer.norm."),
            (r"\.attn\.l_norm\.", ".mixer.local_norm."),
            (r"\.attn\.g_proj\.", ".mixer.gate_proj."),
            (r"\.attn\.o_proj\.", ".mixer.out_proj."),
            (r"\.attn\.", ".mixer."),
        ),
    )
    return in_stages(tables(state, "places.weight"), model.depths)


@published(
    {f"vig_{size}": settings for size, settings in SIZES.items()},
    title="ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention",
    year=2024,
    paper="arXiv:2405.18425",
    key_maps={"official": from_official},
)
def vig(
    *,
    dim: int,
    depth: int,
    heads: int,
    activation: str | None = None,
    mixer: str = "vig",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Isotropic:
    """The network, with its own or any other mechanism.

    Args:
        dim, depth, heads: channels, blocks, heads of each.
        activation: of the mechanism `vig`, behind its convolution and before its last projection.
        mixer: the mechanism.
        mixer_settings: of the mechanism.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on.
    """
    grid = Grid(sizes_after(img_size, [(9, 8, 1), (3, 2, 1)])[-1])
    norm = partial(nn.RMSNorm, eps=1e-6)
    own = {"local_activation": activation, "output_activation": activation} if mixer == "vig" else {}
    mixers = stage_mixers(mixer, depth, dim, heads, grid, {**own, **(mixer_settings or {})})
    (rates,) = rising(drop_path, [depth])
    blocks = [
        MetaFormerBlock(each, SwiGLU(dim, llama_width(dim)), norm=norm, drop_path=rate)
        for each, rate in zip(mixers, rates, strict=True)
    ]
    net = Isotropic(
        nn.Sequential(
            Downsample(in_chans, dim // 2, 9, 8, padding=1, after=MapLayerNorm),
            nn.SiLU(),
            Downsample(dim // 2, dim, 3, 2, after=MapLayerNorm),
        ),
        blocks,
        dim=dim,
        grid=grid,
        stride=STRIDE,
        norm=norm(dim),
        num_classes=num_classes,
        in_chans=in_chans,
        pool="mean",
    )
    return start_published(net)
