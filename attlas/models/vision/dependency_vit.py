"""DependencyViT: tokens send instead of gathering, and what they may still send gets less from layer to layer.

    y = x + reversed(norm x; m),    z = y + MLP(norm y),    m ← m σ(w · norm x)

The mechanism is `dependency_vit`; m (B, N) is the share of its message that each token has left, 1 at first. A stem of
four 3 x 3 convolutions of stride 2 makes the tokens; learned places are added; the logits are a linear map of the mean
over tokens, behind a norm. There is no class token.

`dependency_vit_lite_*` prunes: after each of the first three quarters of the depth only the tokens with the most left
to say go on. A map has all places nevertheless: where a token was pruned stands its parent, the token that remained
to which it would have sent most.

Source: Ding et al., "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", 2023
(arXiv:2304.03282). The official repository holds no code. A reconstruction: of the sizes (those of DeiT), the stem and
the pooling; where and how many tokens are pruned, and the way back to a map, are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attlas.blocks.attention import Attention
from attlas.blocks.conv_stem import ConvStem
from attlas.blocks.drop_path import rising
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.stage import Stage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.mechanisms.softmax.dependency_vit import DependencyViT
from attlas.models.backbone import start_published
from attlas.models.isotropic import Isotropic
from attlas.models.mixers import map_sizes, stage_mixers
from attlas.models.registry import published
from attlas.ops.maps import to_map, to_tokens

STRIDE = 16
LITE = (0.7, 0.7, 0.7)

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"dim": 192, "heads": 3},
    "small": {"dim": 384, "heads": 6},
    "micro": {"dim": 64, "heads": 2, "depth": 4, "img_size": 96},
}

Sending = tuple[Tensor, Tensor | None]
"""Tokens (B, N, C), and the share of its message that each has left (B, N); None where all have all of it."""


class DependencyBlock(MetaFormerBlock):
    """A MetaFormer block that hands on what its mixer leaves of the messages, if the mixer is reversed attention."""

    @property
    def sender(self) -> DependencyViT | None:
        """The reversed attention."""
        attend = self.mixer.attend if isinstance(self.mixer, Attention) else None
        return attend if isinstance(attend, DependencyViT) else None

    def forward(self, sending: Sending, grid: Grid) -> Sending:  # type: ignore[override]
        """Tokens that have received, and what is left to send."""
        x_BNC, left_BN = sending
        sender = self.sender
        if sender is None:
            return super().forward(x_BNC, grid), None
        sender.incoming = left_BN
        still_BN = sender.message(self.norm1(x_BNC))
        x_BNC = super().forward(x_BNC, grid)
        sender.incoming = None
        return x_BNC, still_BN

    def parents(self, x_BNC: Tensor, grid: Grid, among_BN: Tensor) -> Tensor:
        """To whom each token would send most, of those that `among` marks: (B, N)."""
        sender, mixer = self.sender, self.mixer
        assert sender is not None
        assert isinstance(mixer, Attention)
        y_BNC = self.norm1(x_BNC)
        q_BHND, k_BHND, _ = mixer._project(y_BNC, None, 0)
        bias = mixer.position.bias(grid)
        mask = None if bias is None else Mask.biased(bias.to(q_BHND.dtype))
        edges_BNN = sender.edges(q_BHND, k_BHND, tokens=y_BNC, mask=mask, grid=grid)
        return edges_BNN.masked_fill(~among_BN.unsqueeze(-1), -1).argmax(1)


class DependencyNetwork(Isotropic):
    """The isotropic skeleton with messages and pruning.

    Args:
        keep: which share of its tokens each of the first stages hands on.
        **settings: of `Isotropic`.
    """

    def __init__(self, *parts: Any, keep: Sequence[float], **settings: Any) -> None:
        super().__init__(*parts, pool="mean", **settings)
        if len(keep) >= len(self.stages) or not all(0 < each <= 1 for each in keep):
            raise BadInput(
                f"keep holds shares in (0, 1] for the first of {len(self.stages)} stages, not for the last, got {keep}"
            )
        self.keep = tuple(keep)

    def forward_features(self, image_BCHW: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """The tokens that are left after the last norm (B, N, C)."""
        x_BNC, grid = to_tokens(self.embed(image_BCHW))
        assert self.places is not None
        sending: Sending = self.drop(self.places(x_BNC, grid)), None
        lie, home_BN = grid, None
        for index, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            sending = stage.run(sending, lie)  # type: ignore[arg-type, assignment]
            if maps is not None:
                maps.append(to_map(sending[0] if home_BN is None else _take(sending[0], home_BN), grid))
            if index < len(self.keep) and self.keep[index] < 1:
                kept_BK = self._most_to_say(sending, self.keep[index])
                if maps is not None:
                    step_BN = self._homes(sending[0], lie, kept_BK, self.stages[index + 1])
                    home_BN = step_BN if home_BN is None else step_BN.gather(1, home_BN)
                x_BNC, left_BN = sending
                assert left_BN is not None
                sending = _take(x_BNC, kept_BK), left_BN.gather(1, kept_BK)
                lie = Grid((kept_BK.shape[1],))
        return self.norm(sending[0])

    def _most_to_say(self, sending: Sending, share: float) -> Tensor:
        """Which tokens go on, in their order: (B, K)."""
        x_BNC, left_BN = sending
        if left_BN is None:
            raise BadInput("tokens are pruned by what they have left to send: take mixer='dependency_vit', or keep=()")
        return left_BN.topk(max(1, round(share * x_BNC.shape[1])), dim=1).indices.sort(1).values

    def _homes(self, x_BNC: Tensor, lie: Grid, kept_BK: Tensor, following: nn.Module) -> Tensor:
        """The place among those that are kept of each token, or of its parent: (B, N)."""
        among_BN = torch.zeros_like(x_BNC[..., 0], dtype=torch.bool).scatter(1, kept_BK, True)
        rank_BN = among_BN.cumsum(1) - 1
        assert isinstance(following, Stage)
        block = following.blocks[0]
        assert isinstance(block, DependencyBlock)
        return torch.where(among_BN, rank_BN, rank_BN.gather(1, block.parents(x_BNC, lie, among_BN)))


def _take(x_BNC: Tensor, index_BK: Tensor) -> Tensor:
    return x_BNC.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, x_BNC.shape[2]))


@published(
    {f"dependency_vit_{size}": settings for size, settings in SIZES.items()}
    | {f"dependency_vit_lite_{size}": {**settings, "keep": LITE} for size, settings in SIZES.items()},
    title="Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
    year=2023,
    paper="arXiv:2304.03282",
    reconstruction=True,
)
def dependency_vit(
    *,
    dim: int,
    heads: int,
    depth: int = 12,
    keep: Sequence[float] = (),
    mixer: str = "dependency_vit",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> DependencyNetwork:
    """An isotropic network of reversed attention, or of any other mechanism to compare with.

    Args:
        dim, heads, depth: channels, heads and blocks.
        keep: the share of tokens that goes on after each quarter of the depth but the last; () for all.
        mixer: the mechanism; only `dependency_vit` has messages to prune by.
        mixer_settings: of the mechanism.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on.
    """
    (size,) = map_sizes(img_size, [STRIDE])
    grid = Grid(size)
    (rates,) = rising(drop_path, [depth])
    blocks = [
        DependencyBlock(each, Mlp(dim, 4 * dim), drop_path=rate)
        for each, rate in zip(stage_mixers(mixer, depth, dim, heads, grid, mixer_settings), rates, strict=True)
    ]
    net = DependencyNetwork(
        ConvStem(in_chans, (dim // 8, dim // 4, dim // 2, dim), (2, 2, 2, 2)),
        blocks,
        dim=dim,
        grid=grid,
        stride=STRIDE,
        norm=nn.LayerNorm(dim),
        num_classes=num_classes,
        in_chans=in_chans,
        keep=keep,
    )
    return start_published(net)
