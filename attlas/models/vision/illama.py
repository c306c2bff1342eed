"""iLLaMA: a vision transformer out of the parts of a LLaMA decoder.

    y = x + attention(RMSNorm x),    z = y + W₂ (silu(W₁ u) ⊙ W₃ u),  u = RMSNorm y

A token gets no value from later ones, so the class token stands behind the patches, where it sees them all; in front
it would see itself alone. Positions are said twice, by a learned place for every token and by rotary positions along
the sequence. In training the mask is soft: `net.soften(ρ)` with ρ falling from 1, attention over everything, to 0.

Source: Wang et al., "Adapting LLaMA Decoder to Vision Transformer", 2024 (arXiv:2404.06773), official code
techmonsterwang/iLLaMA, whose mask multiplies weights behind the softmax, see the mechanism `illama`. The strictly
causal network is `mixer="softmax", mixer_settings={"causal": True}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Patches, with_prefix
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import SwiGLU, llama_width
from attlas.blocks.positions import Rotary
from attlas.blocks.stage import Stage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.mechanisms.softmax.illama import ILlama
from attlas.models.backbone import start_published
from attlas.models.isotropic import Isotropic
from attlas.models.key_maps import QKV, in_stages, rename, split, tables
from attlas.models.mixers import patch_grid, stage_mixers
from attlas.models.registry import State, published
from attlas.ops.maps import to_map, to_tokens

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"dim": 192, "depth": 12, "heads": 3},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "large": {"dim": 1024, "depth": 24, "heads": 16},
    "micro": {"dim": 48, "depth": 4, "heads": 2, "patch": 8, "img_size": 64},
}


class Decoder(Isotropic):
    """The isotropic skeleton with the class token behind the patches."""

    def forward_features(self, image_BCHW: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """All tokens after the last norm (B, H W + 1, C), the class token last."""
        assert self.prefix is not None
        assert self.places is not None
        x_BNC, grid = to_tokens(self.embed(image_BCHW))
        x_BNC = self.drop(self.places(with_prefix(self.prefix, x_BNC), Grid(grid.shape, 1))).roll(-1, 1)
        for stage in self.stages:
            assert isinstance(stage, Stage)
            x_BNC = stage.run(x_BNC, Grid(x_BNC.shape[1:2]))
            if maps is not None:
                maps.append(to_map(x_BNC[:, :-1], grid))
        return self.norm(x_BNC)

    def forward_head(self, x_BNC: Tensor) -> Tensor:
        """Classify by the last token."""
        return self.head(x_BNC[:, -1])

    def soften(self, softness: float) -> None:
        """Set ρ of the mask in all blocks.

        Raises:
            BadInput: no share in [0, 1], or a network with another mechanism.
        """
        attends = [module for module in self.modules() if isinstance(module, ILlama)]
        if not attends or not 0 <= softness <= 1:
            raise BadInput(f"softness is a share in [0, 1] for networks with the mechanism illama, got {softness}")
        for attend in attends:
            attend.softness = softness


def from_official(state: State, model: nn.Module) -> State:
    """The names of techmonsterwang/iLLaMA, whose rotary positions turn neighbouring features."""
    assert isinstance(model, Isotropic)
    state = rename(
        split(state, "attn.qkv", tuple(f"mixer.{name}" for name in QKV)),
        (
            (r"^patch_embed\.proj\.", "embed.conv."),
            (r"^cls_token$", "prefix"),
            (r"^pos_embed$", "places.weight"),
            (r"\.attn\.proj\.", ".mixer.out_proj."),
            (r"\.mlp\.fc1\.", ".mlp.gate."),
            (r"\.mlp\.fc2\.", ".mlp.out."),
            (r"\.mlp\.fc3\.", ".mlp.value."),
        ),
    )
    state = tables(state, "prefix", "places.weight")
    if "places.weight" in state:
        state["places.weight"] = state["places.weight"].roll(1, 0)
    turned = next((module.head_dim for module in model.modules() if isinstance(module, Rotary)), 0)
    for key, value in state.items():
        if turned and ("q_proj" in key or "k_proj" in key):
            if len(value) % turned:
                raise BadInput(f"{key} has heads of {turned} channels, got the shape {tuple(value.shape)}")
            state[key] = value.unflatten(0, (-1, turned // 2, 2)).transpose(1, 2).flatten(0, 2)
    return in_stages(state, model.depths)


@published(
    {f"illama_{size}": settings for size, settings in SIZES.items()},
    title="Adapting LLaMA Decoder to Vision Transformer",
    year=2024,
    paper="arXiv:2404.06773",
    key_maps={"official": from_official},
)
def illama(
    *,
    dim: int,
    depth: int,
    heads: int,
    patch: int = 16,
    mixer: str = "illama",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Decoder:
    """The network, with its own or another mechanism on sequences that takes rotary positions.

    Args:
        dim, depth, heads: channels, blocks, heads of each.
        patch: side of a patch in pixels.
        mixer: the mechanism.
        mixer_settings: of the mechanism.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, a multiple of the patch.
    """
    grid = patch_grid(img_size, patch, prefix=1)
    norm = partial(nn.RMSNorm, eps=1e-6)
    rotary = {"position": Rotary(dim // heads)}
    mixers = stage_mixers(mixer, depth, dim, heads, Grid((grid.tokens,)), {**rotary, **(mixer_settings or {})})
    (rates,) = rising(drop_path, [depth])
    blocks = [
        MetaFormerBlock(each, SwiGLU(dim, llama_width(dim)), norm=norm, drop_path=rate)
        for each, rate in zip(mixers, rates, strict=True)
    ]
    net = Decoder(
        Patches(in_chans, dim, patch),
        blocks,
        dim=dim,
        grid=grid,
        stride=patch,
        norm=norm(dim),
        num_classes=num_classes,
        in_chans=in_chans,
    )
    return start_published(net)
