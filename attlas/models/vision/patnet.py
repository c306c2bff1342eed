"""PATNet: FasterNet, whose channels that no convolution touches get a cheap attention.

    [u | w] = x, a quarter and three,     mixer(x) = [conv₃ u | attend w]
    stages 1 to 3:  y = x + MLP(mixer(x)),       attend w = BN(w ⊙ h(BN(W [mean w, std w]))),  h a hard sigmoid
    stage 4:        z = x + mixer(x),  y = z + MLP(z),     attend w = softmax attention of LN w with a bias by distance

mean and std are over the places of a channel, W mixes channels; the bias is a number for each head and rounded distance
of two places. Where `spatial` is set an MLP ends in a gate for each place: [BN(a ⊙ h(v · a)) | W BN(b)] of the halves
[a | b]. The MLP is 1 x 1, batch norm, activation, 1 x 1. A stem of 4 x 4 patches, 2 x 2 patches between the stages,
a batch norm behind each; in the head a mean, 1280 channels, an activation.

Source: Huang et al., "Partial Convolution Meets Visual Attention", 2025 (arXiv:2503.03148), with the blocks of
haiduo/PartialNet, code of the same authors. Its settings have spatial gates in T1 alone; four heads are those of T0,
six those of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.drop_path import DropPath, rising
from attlas.blocks.embed import Downsample
from attlas.blocks.norms import MapLayerNorm
from attlas.blocks.positions import Position
from attlas.blocks.stage import Stage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.models.backbone import classifier
from attlas.models.key_maps import QKV, rename, split
from attlas.models.mixers import sizes_after, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.ops.maps import to_map, to_tokens

STRIDES = (4, 8, 16, 32)
PATCHES = ((4, 4, 0), (2, 2, 0), (2, 2, 0), (2, 2, 0))
"""Kernel, stride and padding of the stem and of each step between two stages."""
HIDDEN = 1280
NEAR, MOST, FAR = 20, 40, 160
"""Distances that have a number each, numbers in all for one sign, and the distance that has the last one."""

SIZES: Mapping[str, Mapping[str, Any]] = {
    "t0": {"dim": 32, "depths": (1, 2, 8, 2), "activation": nn.GELU, "heads": 4},
    "t1": {"dim": 48, "depths": (1, 2, 8, 2), "activation": nn.GELU, "spatial": True, "drop_path": 0.02},
    "t2": {"dim": 64, "depths": (2, 2, 6, 4), "drop_path": 0.05},
    "s": {"dim": 96, "depths": (2, 2, 9, 4), "drop_path": 0.1},
    "m": {"dim": 128, "depths": (2, 3, 16, 4), "drop_path": 0.2},
    "l": {"dim": 160, "depths": (2, 3, 20, 4), "drop_path": 0.3},
    "micro": {"dim": 16, "depths": (1, 1, 1, 1), "heads": 2, "spatial": True, "hidden": 64, "img_size": 64},
}


class DistanceTable(Position):
    """A number for each head and distance of two places, rounded, and on a log scale where they are far apart.

    Source: Wu et al., "Rethinking and Improving Relative Position Encoding for Vision Transformer", 2021
    (arXiv:2107.14222): method euclidean, mode bias, whose table has as many numbers again that no distance meets.
    """

    biases = True

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(heads, 2 * MOST + 1))

    def bias(self, grid: Grid) -> Tensor:
        """(H, N, N)."""
        places = grid.places(self.table.device).double()
        apart = (places[:, None] - places).square().sum(-1).sqrt().round()
        slow = NEAR + (apart.clamp(min=NEAR) / NEAR).log() / math.log(FAR / NEAR) * (MOST - NEAR)
        return self.table[:, MOST + torch.where(apart <= NEAR, apart, slow.round().clamp(max=MOST)).long()]


class StyleGate(nn.Module):
    """BN(w ⊙ gate) with a gate for each channel, made of all channels' means and standard deviations."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(dim, dim, (1, 2), bias=False)
        self.gate_norm, self.norm = nn.BatchNorm2d(dim), nn.BatchNorm2d(dim)

    def forward(self, w_BCHW: Tensor) -> Tensor:
        """Gate.

        Raises:
            BadInput: one picture in training, of which a batch norm has no statistics.
        """
        if self.training and len(w_BCHW) < 2:
            raise BadInput("gates are normalised over the pictures of a batch: train with 2 at least, or call eval()")
        w_BCN = w_BCHW.flatten(2)
        spread = w_BCN.std(-1, correction=min(1, w_BCN.shape[-1] - 1))
        style = torch.stack([w_BCN.mean(-1), spread], -1).unsqueeze(2)
        return self.norm(w_BCHW * F.hardsigmoid(self.gate_norm(self.mix(style))))


class Attended(nn.Module):
    """Any mechanism behind a norm, on a map."""

    def __init__(self, mixer: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm = MapLayerNorm(dim, eps=1e-6)
        self.mixer = mixer

    def forward(self, w_BCHW: Tensor) -> Tensor:
        """Attend."""
        w_BNC, grid = to_tokens(self.norm(w_BCHW))
        return to_map(self.mixer(w_BNC, grid=grid), grid)


class SpatialGate(nn.Module):
    """[BN(a ⊙ gate) | W BN(b)] of the two halves of the channels, with a gate for each place."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.gate = nn.Conv2d(dim - half, 1, 1, bias=False)
        self.norm, self.mix_norm = nn.BatchNorm2d(dim - half), nn.BatchNorm2d(half)
        self.mix = nn.Conv2d(half, half, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Gate one half, mix the other."""
        a, b = x_BCHW.split([self.mix.in_channels + x_BCHW.shape[1] % 2, self.mix.in_channels], 1)
        return torch.cat([self.norm(a * F.hardsigmoid(self.gate(a))), self.mix(self.mix_norm(b))], 1)


class PatBlock(nn.Module):
    """One block.

    Args:
        dim: C.
        attend: what three quarters of the channels get.
        activation: of the MLP.
        spatial: whether the MLP ends in a `SpatialGate`.
        apart: whether mixer and MLP have a residual path each, or one around both.
        drop_path: the share of pictures for which the MLP's branch is dropped in training.
    """

    def __init__(
        self,
        dim: int,
        attend: nn.Module,
        activation: Callable[[], nn.Module],
        *,
        spatial: bool,
        apart: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.apart, quarter = apart, dim // 4
        self.conv = nn.Conv2d(quarter, quarter, 3, padding=1, bias=False)
        self.attend = attend
        self.mlp = nn.Sequential(
            nn.Conv2d(dim, 2 * dim, 1, bias=False),
            nn.BatchNorm2d(2 * dim),
            activation(),
            nn.Conv2d(2 * dim, dim, 1, bias=False),
            SpatialGate(dim) if spatial else nn.Identity(),
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Mix places, then channels."""
        u, w = x_BCHW.tensor_split([self.conv.in_channels], 1)
        mixed = torch.cat([self.conv(u), self.attend(w)], 1)
        if self.apart:
            x_BCHW = mixed = x_BCHW + mixed
        return x_BCHW + self.drop_path(self.mlp(mixed))


class WideHead(nn.Sequential):
    """Mean over places, more channels, an activation, a linear map."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[], nn.Module], num_classes: int) -> None:
        super().__init__()
        self.widen = nn.Linear(dim, hidden, bias=False)
        self.activation = activation()
        self.classifier = classifier(hidden, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        return super().forward(x_BCHW.mean((2, 3)))


def from_official(state: State, model: nn.Module) -> State:
    """The names of haiduo/PartialNet."""
    mixer = r".attend.mixer."
    state = rename(
        split(state, "attn.qkv", tuple(f"attn.{name}" for name in QKV)),
        (
            (r"^patch_embed\.proj\.", "downsamples.0.conv."),
            (r"^patch_embed\.norm\.", "downsamples.0.after."),
            *((rf"^stages\.{2 * i - 1}\.reduction\.", f"downsamples.{i}.conv.") for i in (1, 2, 3)),
            *((rf"^stages\.{2 * i - 1}\.norm\.", f"downsamples.{i}.after.") for i in (1, 2, 3)),
            *((rf"^stages\.{2 * i}\.", f"stages.{i}.") for i in (1, 2, 3)),
            (r"\.spatial_mixing\.partial_conv3\.", ".conv."),
            (r"\.spatial_mixing\.attn\.cfc1\.", ".attend.mix."),
            (r"\.spatial_mixing\.attn\.bn\.", ".attend.gate_norm."),
            (r"\.spatial_mixing\.norm\.", ".attend.norm."),
            (r"\.spatial_mixing\.attn\.rpe_k\.lookup_table_bias$", f"{mixer}position.table"),
            (r"\.spatial_mixing\.attn\.proj\.", f"{mixer}out_proj."),
            (r"\.spatial_mixing\.attn\.", mixer),
            (r"\.mlp\.4\.conv_attn\.", ".mlp.4.gate."),
            (r"\.mlp\.4\.conv\.", ".mlp.4.mix."),
            (r"\.mlp\.4\.norm2\.", ".mlp.4.mix_norm."),
            (r"^avgpool_pre_head\.1\.", "head.widen."),
            (r"^head\.(weight|bias)$", r"head.classifier.\1"),
        ),
    )
    return {key: value.flatten(1) if key == "head.widen.weight" else value for key, value in state.items()}


@published(
    {f"patnet_{size}": settings for size, settings in SIZES.items()},
    title="Partial Convolution Meets Visual Attention",
    year=2025,
    paper="arXiv:2503.03148",
    key_maps={"official": from_official},
)
def patnet(
    *,
    dim: int,
    depths: Sequence[int],
    heads: int = 6,
    activation: Callable[[], nn.Module] = nn.ReLU,
    spatial: bool = False,
    hidden: int = HIDDEN,
    mixer: str = "softmax",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """The network, with any mechanism in its last stage.

    Args:
        dim: channels of the first stage, twice as many in each next one.
        depths: blocks of each stage.
        heads: of the last stage.
        activation: of the MLPs and the head.
        spatial: whether the MLPs end in a gate for each place.
        hidden: channels in the head.
        mixer: the mechanism of the last stage.
        mixer_settings: of the mechanism.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    dims = [dim * 2**i for i in range(len(depths))]
    rates, sizes = rising(drop_path, depths), sizes_after(img_size, PATCHES[: len(dims)])
    downsamples = [
        Downsample(dims[i - 1], dims[i], 2, 2, after=nn.BatchNorm2d, bias=False)
        if i
        else Downsample(in_chans, dim, 4, 4, after=nn.BatchNorm2d, bias=False)
        for i in range(len(dims))
    ]
    stages = []
    for i, width in enumerate(dims):
        last, rest = i == len(dims) - 1, width - width // 4
        attends: list[nn.Module] = [StyleGate(rest) for _ in range(depths[i])]
        if last:
            attends = []
            for layer in range(depths[i]):
                own = published_shell(heads) if mixer == "softmax" else {}
                (each,) = stage_mixers(
                    mixer,
                    1,
                    rest,
                    heads,
                    Grid(sizes[i]),
                    {**own, **(mixer_settings or {})},
                    first=layer,
                    layers=depths[i],
                )
                attends.append(Attended(each, rest))
        stages.append(
            Stage(
                PatBlock(width, attend, activation, spatial=spatial, apart=last, drop_path=rate)
                for attend, rate in zip(attends, rates[i], strict=True)
            )
        )
    head = WideHead(dims[-1], hidden, activation, num_classes)
    net = Pyramid(downsamples, stages, head, in_chans=in_chans, channels=dims, strides=STRIDES)
    net.num_features = hidden
    return net


def published_shell(heads: int) -> dict[str, Any]:
    """What stands around the softmax attention of the last stage; each block has a table of its own."""
    return {"bias": False, "position": DistanceTable(heads), "weight_dropout": 0.1, "dropout": 0.1}
