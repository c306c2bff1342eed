"""OverLoCK: an overview of the picture first, then a closer look that is guided by it; and with any other mechanism.

    x = base(picture),    c = overview(x)                             strides 16 and 32
    z = [x, conv c],  z ← focus(z) at stride 16, then at stride 32     the context is carried on beside x

    y = x + DWConv(x),    x ← s y + MLP(SE(BN(conv_K(norm y))))       a block of base and overview
    z ← [x, s₁ c + s₂ c₀],    z ← z + DWConv(z),    z ← s₃ z + mixer(norm z)
    z ← z + DWConv(z),    z ← s₄ z + MLP(norm z)

The last lines are a block of the focus: c₀ is the context as the overview gave it, the s are one per channel, with a
bias. Here the residual path is scaled and not the branch. The mixer is `overlock`, whose kernels the context chooses.
conv_K is a large depthwise convolution with small dilated ones beside it; `attlas.blocks.conv_norm.fuse` makes them
one, as in the published counts. The overview's own classifier, which helps in training, is left out.

Feature maps are those after the two first stages, what the focus makes at stride 16 (with its context) and at 32.

Source: Lou and Yu, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", 2025
(arXiv:2502.20087), official code LMMMEng/OverLoCK.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.drop_path import DropPath, rising
from attlas.blocks.embed import Downsample
from attlas.blocks.metaformer import ConvPosition
from attlas.blocks.stage import TokenStage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.models.backbone import Backbone, classifier
from attlas.models.key_maps import linear, rename
from attlas.models.mixers import Mixers, Settings, map_sizes, per_stage, settings_per_stage, stage_mixers
from attlas.models.registry import State, published
from attlas.ops.batch_norm import TokenBatchNorm
from attlas.ops.channel_attention import ChannelAttention
from attlas.ops.dilated_reparam import BRANCHES, DilatedReparam
from attlas.ops.global_response_norm import GlobalResponseNorm
from attlas.ops.maps import to_map, to_tokens
from attlas.ops.precision import wide

STRIDES = (4, 8, 16, 32)
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)
ENDS = ((0, "conv"), (1, "after"))

SIZES: Mapping[str, Mapping[str, Any]] = {
    "xt": {"depths": (2, 2, 3, 2), "focus": (6, 2), "dims": (56, 112, 256, 336), "heads": (4, 6)},
    "t": {"depths": (4, 4, 6, 2), "focus": (12, 2), "dims": (64, 128, 256, 512), "heads": (4, 8)},
    "s": {"depths": (6, 6, 8, 3), "focus": (16, 3), "dims": (64, 128, 320, 512), "heads": (8, 16)},
    "b": {"depths": (8, 8, 10, 4), "focus": (20, 4), "dims": (80, 160, 384, 576), "heads": (6, 9)},
    "micro": {
        "depths": (1, 1, 1, 1),
        "focus": (1, 1),
        "dims": (16, 24, 32, 48),
        "heads": (2, 3),
        "kernels": (7, 5, 5, 5),
        "projection": 64,
        "img_size": 64,
    },
}


class Affine(nn.Module):
    """A factor and a bias per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Scale and shift."""
        return x_BNC * self.weight + self.bias


class ResponseMlp(nn.Module):
    """W₂ GRN(h + DWConv(h)) with h = gelu(W₁ x)."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, out)
        self.position, self.norm = ConvPosition(hidden), GlobalResponseNorm(hidden)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Mix channels, and each hidden channel over the neighbouring places."""
        return self.fc2(self.norm(self.position(F.gelu(self.fc1(x_BNC)), grid)))


class RepConvBlock(nn.Module):
    """A block of base and overview.

    Args:
        dim, kernel: channels, taps of the large convolution on each axis.
        scaled: whether the residual path has a factor.
        drop_path: the share of pictures for which the branch is dropped in training.
    """

    def __init__(self, dim: int, kernel: int, scaled: bool, drop_path: float) -> None:
        super().__init__()
        self.position, self.norm = ConvPosition(dim), LAYER_NORM(dim)
        self.conv, self.bn = DilatedReparam(dim, kernel), TokenBatchNorm(dim)
        self.attention = ChannelAttention(dim, max(16, dim // 8), nn.GELU)
        self.mlp = ResponseMlp(dim, 4 * dim, dim)
        self.scale = Affine(dim) if scaled else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Mix places, then channels."""
        x_BNC = self.position(x_BNC, grid)
        y_BNC = self.attention(self.bn(self.conv(self.norm(x_BNC), grid)))
        return self.scale(x_BNC) + self.drop_path(self.mlp(y_BNC, grid))


class FocusBlock(nn.Module):
    """A block of the focus, on tokens with their context behind.

    Args:
        mixer: of tokens with their context.
        hidden: channels of the MLP.
        context: channels of the context.
        first: whether the context is still the overview's.
        drop_path: the share of pictures for which a branch is dropped in training.
    """

    def __init__(self, mixer: Mixer, hidden: int, context: int, first: bool, drop_path: float) -> None:
        super().__init__()
        dim = mixer.site.dim
        self.parts = dim - context, context
        self.carried, self.given = (nn.Identity() if first else Affine(context) for _ in range(2))
        self.first, self.mixer = first, mixer
        self.position1, self.norm1, self.scale1 = ConvPosition(dim), LAYER_NORM(dim), Affine(dim)
        self.position2, self.norm2, self.scale2 = ConvPosition(dim), LAYER_NORM(dim), Affine(dim)
        self.mlp = ResponseMlp(dim, hidden, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, z_BNC: Tensor, context_BNC: Tensor, grid: Grid) -> Tensor:
        """Renew the context, mix tokens, then channels."""
        if not self.first:
            x_BNC, own_BNC = z_BNC.split(self.parts, -1)
            z_BNC = torch.cat([x_BNC, self.carried(own_BNC) + self.given(context_BNC)], -1)
        z_BNC = self.position1(z_BNC, grid)
        z_BNC = self.scale1(z_BNC) + self.drop_path(self.mixer(self.norm1(z_BNC), grid=grid))
        z_BNC = self.position2(z_BNC, grid)
        return self.scale2(z_BNC) + self.drop_path(self.mlp(self.norm2(z_BNC), grid))


class Head(nn.Module):
    """From the last map to logits."""

    def __init__(self, dim: int, projection: int, num_classes: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(dim, projection, 1, bias=False), nn.BatchNorm2d(projection)
        self.classifier = classifier(projection, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.classifier(F.silu(self.norm(self.conv(x_BCHW))).mean((2, 3)))


class OverLoCK(Backbone):
    """Base, overview and focus.

    Args:
        downsamples, stages: of base (three) and overview (one).
        focus: the two stages of the focus.
        dims: channels of the stages; a quarter of the last is the context's.
        projection: channels before the classifier.
        num_classes: K.
        in_chans: channels of the pictures.
    """

    def __init__(
        self,
        downsamples: Sequence[nn.Module],
        stages: Sequence[TokenStage],
        focus: Sequence[TokenStage],
        dims: Sequence[int],
        *,
        projection: int,
        num_classes: int,
        in_chans: int,
    ) -> None:
        context = dims[3] // 4
        super().__init__(in_chans, (*dims[:2], dims[2] + context, dims[3] + context), STRIDES)
        self.num_features, self.parts = projection, (dims[2], context)
        self.downsamples, self.stages = nn.ModuleList(downsamples), nn.ModuleList(stages)
        self.context, self.focus = nn.Conv2d(dims[3], context, 1), nn.ModuleList(focus)
        down = partial(Downsample, kernel=3, stride=2, after=nn.BatchNorm2d, bias=False)
        self.down, self.context_down = down(dims[2], dims[3]), down(context, context)
        self.head = Head(dims[3] + context, projection, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, image_BCHW: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """The last map, its context behind."""
        seen, x = [], image_BCHW
        for downsample, stage in zip(self.downsamples, self.stages, strict=True):
            x = stage(downsample(x))
            seen.append(x)
        coarse = self.context(x)
        fine = F.interpolate(wide(coarse), tuple(seen[2].shape[2:]), mode="bilinear").to(coarse.dtype)
        z = self._look(self.focus[0], torch.cat([seen[2], fine], 1), fine)
        x, own = z.split(self.parts, 1)
        last = self._look(self.focus[1], torch.cat([self.down(x), self.context_down(own)], 1), coarse)
        if maps is not None:
            maps += [*seen[:2], z, last]
        return last

    def _look(self, stage: nn.Module, z_BCHW: Tensor, context_BCHW: Tensor) -> Tensor:
        assert isinstance(stage, TokenStage)
        z_BNC, grid = to_tokens(z_BCHW)
        return to_map(stage.run(z_BNC, to_tokens(context_BCHW)[0], grid), grid)


def from_official(state: State, model: nn.Module) -> State:
    """The names of LMMMEng/OverLoCK, merged where the network is; its auxiliary head is left out."""
    state = {key: value for key, value in state.items() if not key.startswith("aux_head.")}
    flat = {key: value.flatten() if re.search(VECTORS, key) else value for key, value in state.items()}
    kernels = {key.removesuffix(".weight"): value.shape[-1] for key, value in flat.items() if "lk_origin.w" in key}
    named = {}
    for key, value in flat.items():
        large = f"{key.split('dil_')[0]}lk_origin"
        small = re.search(r"dil_(conv|bn)_k(\d+)_(\d+)", key)
        if small is not None:
            kind, branch = small[1], (int(small[2]), int(small[3]))
            branches = BRANCHES.get(kernels.get(large, 0), ())
            if branch not in branches:
                raise BadInput(f"{key} is no branch of {large}, which has {branches}")
            place = 1 + branches.index(branch)
            key = key.replace(small[0], f"{'convs' if kind == 'conv' else 'norms'}.{place}")
        elif "lk_origin" in key:
            merged = f"{key.rpartition('.')[0]}.bias" in flat
            key = key.replace("lk_origin", "merged" if merged else "convs.0")
        named[key.replace("origin_bn", "norms.0")] = value
    return linear(rename(named, RULES), r"(fc\d|squeeze|excite|_proj|classifier)\.weight$")


VECTORS = r"(_scale|\.ls\d?)\.weight$|\.(gamma|beta)$"
"""Entries with axes of length 1 that are plain vectors here."""
DYNAMIC = r"(focus\.\d\.blocks\.\d+)\."
PLAIN = r"(stages\.\d\.blocks\.\d+)\."
RULES = (
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"^patch_embed1\.", "downsamples.0."),
    *(
        (rf"^patch_embed{each}\.{index}\.", f"downsamples.{each - 1}.{name}.")
        for each in (2, 3, 4)
        for index, name in ENDS
    ),
    *((rf"^patch_embedx\.x_proj\.{index}\.", f"down.{name}.") for index, name in ENDS),
    *((rf"^patch_embedx\.h_proj\.{index}\.", f"context_down.{name}.") for index, name in ENDS),
    (r"^high_level_proj\.", "context."),
    (r"^head\.0\.", "head.conv."),
    (r"^head\.1\.", "head.norm."),
    (r"^head\.4\.", "head.classifier."),
    *((rf"^blocks{each + 1}\.", f"stages.{each}.blocks.") for each in range(4)),
    *((rf"^sub_blocks{each + 3}\.", f"focus.{each}.blocks.") for each in range(2)),
    (PLAIN + r"dwconv\.", r"\1.position.conv."),
    (PLAIN + r"proj\.0\.", r"\1.norm."),
    (PLAIN + r"proj\.1\.", r"\1.conv."),
    (PLAIN + r"proj\.2\.", r"\1.bn."),
    (PLAIN + r"proj\.3\.proj\.1\.", r"\1.attention.squeeze."),
    (PLAIN + r"proj\.3\.proj\.3\.", r"\1.attention.excite."),
    (PLAIN + r"proj\.4\.", r"\1.mlp.fc1."),
    (PLAIN + r"proj\.6\.", r"\1.mlp.position.conv."),
    (PLAIN + r"proj\.7\.", r"\1.mlp.norm."),
    (PLAIN + r"proj\.8\.", r"\1.mlp.fc2."),
    (PLAIN + r"ls\.", r"\1.scale."),
    (DYNAMIC + r"x_scale\.", r"\1.carried."),
    (DYNAMIC + r"h_scale\.", r"\1.given."),
    (DYNAMIC + r"dwconv(\d)\.", r"\1.position\2.conv."),
    (DYNAMIC + r"ls(\d)\.", r"\1.scale\2."),
    (DYNAMIC + r"mlp\.0\.", r"\1.mlp.fc1."),
    (DYNAMIC + r"mlp\.2\.", r"\1.mlp.position.conv."),
    (DYNAMIC + r"mlp\.3\.", r"\1.mlp.norm."),
    (DYNAMIC + r"mlp\.4\.", r"\1.mlp.fc2."),
    (DYNAMIC + r"proj\.0\.", r"\1.mixer.out_bn."),
    (DYNAMIC + r"proj\.1\.", r"\1.mixer.out_proj."),
    (DYNAMIC + r"fusion\.0\.", r"\1.mixer.fuse_conv."),
    (DYNAMIC + r"fusion\.1\.", r"\1.mixer.fuse_bn."),
    (DYNAMIC + r"fusion\.3\.", r"\1.mixer.fuse_proj."),
    (DYNAMIC + r"fusion\.4\.", r"\1.mixer.fuse_norm."),
    (DYNAMIC + r"weight_query\.0\.", r"\1.mixer.q_proj."),
    (DYNAMIC + r"weight_query\.1\.", r"\1.mixer.q_bn."),
    (DYNAMIC + r"weight_key\.1\.", r"\1.mixer.k_proj."),
    (DYNAMIC + r"weight_key\.2\.", r"\1.mixer.k_bn."),
    (DYNAMIC + r"weight_proj\.", r"\1.mixer.taps_proj."),
    (DYNAMIC + r"dyconv_proj\.0\.", r"\1.mixer.mixed_proj."),
    (DYNAMIC + r"dyconv_proj\.1\.", r"\1.mixer.mixed_bn."),
    (DYNAMIC + r"lepe\.0\.", r"\1.mixer.local."),
    (DYNAMIC + r"lepe\.1\.", r"\1.mixer.local_bn."),
    (DYNAMIC + r"se_layer\.proj\.1\.", r"\1.mixer.attention.squeeze."),
    (DYNAMIC + r"se_layer\.proj\.3\.", r"\1.mixer.attention.excite."),
    (DYNAMIC + r"gate\.0\.", r"\1.mixer.gate_proj."),
    (DYNAMIC + r"gate\.1\.", r"\1.mixer.gate_bn."),
    (DYNAMIC + r"rpb1$", r"\1.mixer.small_bias"),
    (DYNAMIC + r"rpb2$", r"\1.mixer.large_bias"),
)


@published(
    {f"overlock_{size}": settings for size, settings in SIZES.items()},
    title="OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels",
    year=2025,
    paper="arXiv:2502.20087",
    key_maps={"official": from_official},
)
def overlock(
    *,
    depths: Sequence[int],
    focus: Sequence[int],
    dims: Sequence[int],
    heads: Sequence[int],
    kernels: Sequence[int] = (17, 15, 13, 7),
    projection: int = 1024,
    mixer: Mixers = "overlock",
    mixer_settings: Settings = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> OverLoCK:
    """OverLoCK with any mechanism in its focus.

    Args:
        depths: blocks of the three stages of the base and of the overview.
        focus: blocks of the two stages of the focus.
        dims: channels of base and overview; in the focus a quarter of the last stands behind, the context.
        heads: of the two stages of the focus; other mechanisms than `overlock` have them where they divide.
        kernels: taps of the large convolutions of each stage on each axis.
        projection: channels before the classifier.
        mixer: the mechanism of the focus, one or one for each of its two stages.
        mixer_settings: of the mechanisms, for both stages or for each; context and kernel of `overlock` are as
            published where they say nothing.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    context, names, given = dims[3] // 4, per_stage(mixer, 2), settings_per_stage(mixer_settings, 2)
    *rates, first, second = rising(drop_path, [*depths, *focus])
    half = dims[0] // 2
    stem = nn.Sequential()
    for a, b, stride in ((in_chans, half, 2), (half, half, 1), (half, dims[0], 2), (dims[0], dims[0], 1)):
        stem.extend([nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.GELU()])
    downs = [Downsample(a, b, 3, 2, after=nn.BatchNorm2d, bias=False) for a, b in pairwise(dims)]
    stages = [
        TokenStage(RepConvBlock(dims[i], kernels[i], i > 1, rate) for rate in rates[i]) for i in range(len(depths))
    ]
    looks = []
    for i, size in enumerate(map_sizes(img_size, STRIDES[2:])):
        dim = dims[2 + i] + context
        own: dict[str, Any] = {"context": context, "kernel": kernels[2 + i]}
        count = heads[i]
        if names[i] != "overlock":
            own, count = {}, math.gcd(dim, count)
        mixers = stage_mixers(names[i], focus[i], dim, count, Grid(size), {**own, **given[i]})
        looks.append(
            TokenStage(
                FocusBlock(each, 3 * dims[2 + i], context, i == index == 0, rate)
                for index, (each, rate) in enumerate(zip(mixers, (first, second)[i], strict=True))
            )
        )
    return OverLoCK(
        [stem[:-1], *downs], stages, looks, dims, projection=projection, num_classes=num_classes, in_chans=in_chans
    )
