"""SG-Former: attention that finds out what matters, then attention whose keys are merged by that.

    y = x + hybrid(norm x), which gives S too,    z = y + MLP(norm y)
    u = z + guided(norm z, S),                    w = u + MLP(norm u),    MLP(x) = W₂ σ(h + conv(h)),  h = W₁ x

Such pairs of blocks make the first three stages; they are the two halves of the mechanism `sg_former`, here with norms
and MLPs between them. The last stage has softmax attention. Beside every attention stands a 3 x 3 convolution of a
projection of x.

The stem is three 3 x 3 convolutions and a norm; learned vectors that start as sines and cosines tell the places. A
1 x 1 convolution, a depthwise 3 x 3 one of stride 2 and another 1 x 1 one lead to the next stage. All of them have
no bias, and a norm of one group. A layer norm follows every stage.

The official network needs pictures of 224 k pixels; cells, windows and groups at the border are smaller here. A map
that is smaller than a window at `img_size` is one; pictures with smaller maps than windows are refused at the call.

Source: Ren et al., "SG-Former: Self-guided Transformer with Evolving Token Reallocation", 2023 (arXiv:2308.12216),
official code OliverRensu/SG-Former.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attlas.blocks.conv_stem import ConvStem
from attlas.blocks.drop_path import DropPath, rising
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import ConvMlp
from attlas.blocks.norms import MapLayerNorm
from attlas.blocks.placed import Placed
from attlas.blocks.stage import TokenStage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.mechanisms.local_sparse.sg_former import SGFormer
from attlas.models.backbone import Head
from attlas.models.key_maps import rename, split
from attlas.models.mixers import Mixers, map_sizes, per_stage, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.rules import CLASSIFIER
from attlas.models.stages import check_stages, enhanced_softmax

STRIDES = (4, 8, 16, 32)
EPS = 1e-6

SIZES: Mapping[str, Mapping[str, Any]] = {
    "small": {"depths": (2, 4, 16, 1), "dims": (64, 128, 256, 512), "heads": (2, 4, 8, 16), "drop_path": 0.1},
    "medium": {"depths": (2, 6, 28, 2), "dims": (64, 128, 256, 512), "heads": (2, 4, 8, 16), "drop_path": 0.2},
    "base": {"depths": (4, 6, 24, 2), "dims": (96, 192, 384, 768), "heads": (4, 6, 12, 24), "drop_path": 0.4},
    "micro": {"depths": (2, 2, 2, 1), "dims": (24, 24, 48, 48), "heads": (2, 2, 2, 2), "window": 4, "img_size": 64},
}


def single_group(dim: int) -> nn.GroupNorm:
    """A norm over all channels and places of a map."""
    return nn.GroupNorm(1, dim)


class Merging(nn.Module):
    """W₂ conv(W₁ x) with norms behind each and activations between, to half the sides."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, out, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 2, 1, groups=out, bias=False)
        self.conv3 = nn.Conv2d(out, out, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = (single_group(out) for _ in range(3))
        self.activation = nn.GELU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A smaller map."""
        x = self.activation(self.norm1(self.conv1(x_BCHW)))
        return self.norm3(self.conv3(self.activation(self.norm2(self.conv2(x)))))


class Half(nn.Module):
    """What is around one of the two attentions.

    Args:
        mixer: `HybridScale` or `SelfGuided`.
        dim: channels.
        drop_path: the share of pictures for which a branch is dropped in training.
    """

    def __init__(self, mixer: nn.Module, dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, EPS), nn.LayerNorm(dim, EPS)
        self.mixer = mixer
        self.mlp = ConvMlp(dim, 4 * dim, residual=True)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BNC: Tensor, mixed_BNC: Tensor, grid: Grid) -> Tensor:
        """Both residual steps, the first one with what was mixed."""
        x_BNC = x_BNC + self.drop_path(mixed_BNC)
        return x_BNC + self.drop_path(self.mlp(self.norm2(x_BNC), grid))


class Pair(nn.Module):
    """A block with hybrid-scale attention and the block that its significance guides.

    Args:
        mixer: whose two attentions they are.
        drop_paths: of the two.
    """

    def __init__(self, mixer: SGFormer, drop_paths: Sequence[float]) -> None:
        super().__init__()
        dim = mixer.site.dim
        self.window = mixer.hybrid.window
        self.hybrid = Half(mixer.hybrid, dim, drop_paths[0])
        self.guided = Half(mixer.guided, dim, drop_paths[1])

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Look, then look again where it matters.

        Raises:
            BadInput: a map that is smaller than a window.
        """
        if min(grid.shape) < self.window:
            raise BadInput(
                f"windows of {self.window} places are larger than the map, a {grid}: build the network with img_size= "
                "of the smallest picture, where windows fit; the weights are the same"
            )
        mixed_BNC, significance_BN = self.hybrid.mixer(self.hybrid.norm1(x_BNC), grid)
        x_BNC = self.hybrid(x_BNC, mixed_BNC, grid)
        mixed_BNC = self.guided.mixer(self.guided.norm1(x_BNC), significance_BN, grid)
        return self.guided(x_BNC, mixed_BNC, grid)


class NormedStage(TokenStage):
    """A stage with a layer norm behind its last block."""

    def __init__(self, blocks: Sequence[nn.Module], dim: int) -> None:
        super().__init__(blocks)
        self.norm = nn.LayerNorm(dim, EPS)

    def run(self, x: Tensor, *rest: Any) -> Tensor:
        """All blocks, and the norm."""
        return self.norm(super().run(x, *rest))


def from_official(state: State, model: nn.Module) -> State:
    """The names of OliverRensu/SG-Former."""
    assert isinstance(model, Pyramid)
    blocks = []
    for i, stage in enumerate(model.stages):
        assert isinstance(stage, TokenStage)
        for j, block in enumerate(stage.blocks):
            if isinstance(block, Pair):
                blocks.append((rf"^block{i + 1}\.{2 * j}\.", f"stages.{i}.blocks.{j}.hybrid."))
                blocks.append((rf"^block{i + 1}\.{2 * j + 1}\.", f"stages.{i}.blocks.{j}.guided."))
            else:
                blocks.append((rf"^block{i + 1}\.{j}\.", f"stages.{i}.blocks.{j}."))
    state = rename(
        state,
        (
            *blocks,
            (r"^pos_embed$", "downsamples.0.places.weight"),
            (r"^patch_embed1\.norm\.", "downsamples.0.embed.after."),
            *((rf"^patch_embed1\.conv\.{2 * i}\.c\.", f"downsamples.0.embed.convs.{i}.") for i in range(3)),
            *((rf"^patch_embed1\.conv\.{2 * i}\.bn\.", f"downsamples.0.embed.norms.{i}.") for i in range(3)),
            *((rf"^patch_embed{i + 1}\.conv(\d)\.c\.", rf"downsamples.{i}.conv\1.") for i in (1, 2, 3)),
            *((rf"^patch_embed{i + 1}\.conv(\d)\.bn\.", rf"downsamples.{i}.norm\1.") for i in (1, 2, 3)),
            *((rf"^norm{i + 1}\.", f"stages.{i}.norm.") for i in range(4)),
            CLASSIFIER,
            (r"\.mlp\.dwconv\.dwconv\.", ".mlp.conv."),
            (r"(\.hybrid|\.guided)\.attn\.lepe_linear\.", r"\1.attn.local.proj."),
            (r"(\.hybrid|\.guided)\.attn\.lepe_conv\.", r"\1.attn.local.conv."),
            (r"(\.hybrid|\.guided)\.attn\.proj\.", r"\1.attn.local.out_proj."),
            (r"\.guided\.attn\.f([123])\.", r".guided.attn.merge.f\1."),
            (r"\.hybrid\.attn\.sr\.", ".hybrid.attn.reduce."),
            (r"\.hybrid\.attn\.norm\.", ".hybrid.attn.reduce_norm."),
            (r"\.attn\.lepe_linear\.", ".attn.local_proj."),
            (r"\.attn\.lepe_conv\.", ".attn.conv."),
            (r"\.attn\.proj\.", ".attn.out_proj."),
            (r"\.attn\.q\.", ".attn.q_proj."),
            (r"\.attn\.", ".mixer."),
            *((rf"\.merge\.f{part + 1}\.", f".merge.{part}.") for part in range(3)),
        ),
    )
    state["downsamples.0.places.weight"] = state["downsamples.0.places.weight"].flatten(0, 1)
    # One half of the heads reads tokens that are the same here as those of the other half.
    for n in (1, 2):
        state = split(state, f"guided.mixer.kv{n}", (f"guided.mixer.k{n}", f"guided.mixer.v{n}"))
    state = split(state, "hybrid.mixer.kv1", ("hybrid.mixer.cell_k", "hybrid.mixer.cell_v"))
    state = split(state, "hybrid.mixer.kv2", ("hybrid.mixer.k_proj", "hybrid.mixer.v_proj"))
    state = split(state, "mixer.kv", ("mixer.k_proj", "mixer.v_proj"))
    for key in [key for key in state if re.search(r"mixer\.[qkv]1\.", key)]:
        first, second = state.pop(key), state.pop(re.sub(r"1(\.\w+)$", r"2\1", key))
        state[re.sub(r"1(\.\w+)$", r"_proj\1", key)] = torch.cat([first, second])
    return state


@published(
    {f"sg_former_{size}": settings for size, settings in SIZES.items()},
    title="SG-Former: Self-guided Transformer with Evolving Token Reallocation",
    year=2023,
    paper="arXiv:2308.12216",
    key_maps={"official": from_official},
)
def sg_former(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    heads: Sequence[int],
    window: int = 7,
    reductions: Sequence[int] = (8, 4, 2, 1),
    mixer: Mixers = ("sg_former", "sg_former", "sg_former", "softmax"),
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """An SG-Former, with any mechanism.

    Args:
        depths, dims, heads: blocks, channels and heads of each stage; two blocks are one pair.
        window: places of a window on either axis, where the mixer is `sg_former`.
        reductions: places of a cell on either axis in each stage, where the mixer is `sg_former`.
        mixer: the mechanism of each stage. "softmax" in the last one has the convolution beside it.
        mixer_settings: of the mechanisms; that softmax attention has them where every stage has softmax attention.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on.
    """
    check_stages(dims=dims, depths=depths, heads=heads, reductions=reductions[: len(dims)])
    names, rates, last = per_stage(mixer, len(dims)), rising(drop_path, depths), len(dims) - 1
    shared = mixer_settings if set(names) == {"softmax"} else None
    stages = []
    for i, size in enumerate(map_sizes(img_size, STRIDES[: len(dims)])):
        dim, grid, depth = dims[i], Grid(size), depths[i]
        blocks: list[nn.Module]
        if names[i] == "sg_former":
            if depth % 2:
                raise BadInput(f"blocks of sg_former come in pairs, got {depth} in stage {i}: take an even number")
            own = {"reduction": reductions[i], "window": min(window, *size)}
            mixers = stage_mixers(names[i], depth // 2, dim, heads[i], grid, {**own, **(mixer_settings or {})})
            pairs = zip(mixers, rates[i][::2], rates[i][1::2], strict=True)
            blocks = [_pair(each, drop_paths) for each, *drop_paths in pairs]
        else:
            if names[i] == "softmax" and i == last:
                mixers = enhanced_softmax(depth, dim, heads[i], grid, shared, of="projection", kernel=3)
            else:
                mixers = stage_mixers(names[i], depth, dim, heads[i], grid, mixer_settings)
            blocks = [
                MetaFormerBlock(
                    each, ConvMlp(dim, 4 * dim, residual=True), norm=partial(nn.LayerNorm, eps=EPS), drop_path=rate
                )
                for each, rate in zip(mixers, rates[i], strict=True)
            ]
        stages.append(NormedStage(blocks, dim))
    stem = ConvStem(in_chans, (dims[0],) * 3, (2, 1, 2), norm=single_group, after=MapLayerNorm, bias=False)
    placed = Placed(stem, dims[0], Grid(map_sizes(img_size, STRIDES)[0]), waves=True)
    between = [Merging(dims[i], dims[i + 1]) for i in range(last)]
    head = Head(dims[-1], num_classes)
    return Pyramid([placed, *between], stages, head, in_chans=in_chans, channels=dims, strides=STRIDES)


def _pair(mixer: Mixer, drop_paths: Sequence[float]) -> Pair:
    assert isinstance(mixer, SGFormer)
    return Pair(mixer, drop_paths)
