"""TNT, Transformer in Transformer: words inside sentences, each stream with a transformer of its own.

    w ← inner(w),    s ← s + bridge(w),    s ← outer(s)         (`SentenceBlock`)

A sentence is a patch of 16 x 16 pixels, its 16 words are what a 7 x 7 convolution of stride 4 makes of it. A sentence
starts as a linear map of its words between two norms; a class token and learned places are added to sentences, one
table of 4 x 4 places to the words of all of them. The head reads the class token.

The official code and its weights (`tnt_s`, `tnt_b`) cut the picture before the convolution, so that words of different
sentences never meet, and have a norm on either side of each bridge. The paper's form (`tnt_ti`, `tnt_s_legacy`)
convolves the whole picture and has a norm of every word in front of each bridge; it is the mechanism `tnt`.

Source: Han et al., "Transformer in Transformer", 2021 (arXiv:2103.00112), official code
huawei-noah/Efficient-AI-Backbones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Places, check_patches, prefix_tokens, with_prefix
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.sentences import Bridge, SentenceBlock, by_sentence
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.models.backbone import start_published
from attlas.models.key_maps import in_stages, rename, split, tables
from attlas.models.mixers import Mixers, Settings, patch_grid, per_stage, settings_per_stage, stage_mixers
from attlas.models.registry import State, published
from attlas.models.two_branch import BranchHead, Grids, Pair, PairStage, TwoBranch
from attlas.ops.maps import to_tokens

STRIDE = 4

SIZES: Mapping[str, Mapping[str, Any]] = {
    "ti": {"dim": 192, "word_dim": 12, "heads": 3, "word_heads": 2, "paper_form": True},
    "s": {"dim": 384, "word_dim": 24, "heads": 6},
    "s_legacy": {"dim": 384, "word_dim": 24, "heads": 6, "paper_form": True},
    "b": {"dim": 640, "word_dim": 40, "heads": 10},
    "micro": {"dim": 48, "word_dim": 8, "heads": 2, "word_heads": 2, "depth": 4, "img_size": 64, "drop_path": 0.0},
}


class WordEmbed(nn.Module):
    """Pictures to words and sentences, and how they lie.

    Args:
        in_chans: channels of the pictures.
        word_dim, dim: of words and sentences.
        grid: of the sentences that it is trained on, with the class token.
        patch: side of a sentence in pixels.
        cut: whether the picture is cut into sentences before the convolution.
    """

    def __init__(self, in_chans: int, word_dim: int, dim: int, grid: Grid, patch: int, cut: bool) -> None:
        super().__init__()
        self.patch, self.side, self.cut = patch, patch // STRIDE, cut
        words = self.side**2
        self.conv = nn.Conv2d(in_chans, word_dim, 7, STRIDE, 3)
        self.word_places = nn.Parameter(torch.empty(words, word_dim))
        self.bridge = Bridge(words, word_dim, dim, bias=True)
        self.prefix = prefix_tokens(grid.prefix, dim)
        self.places = Places(dim, grid)
        nn.init.trunc_normal_(self.word_places, std=0.02)

    def forward(self, image_BCHW: Tensor) -> tuple[Pair, Grids]:
        """Words on the fine grid, sentences behind the class token on the coarse one."""
        check_patches(image_BCHW, self.patch)
        words_BcHW = self._cut(image_BCHW) if self.cut else self.conv(image_BCHW)
        coarse = tuple(side // self.patch for side in image_BCHW.shape[2:])
        table_cSS = self.word_places.T.unflatten(1, (self.side, self.side))
        words_BMc, fine = to_tokens(words_BcHW + table_cSS.repeat(1, *coarse))
        sentences_BNd = self.bridge(by_sentence(words_BMc, fine, self.side))
        sentences_BNd = with_prefix(self.prefix, sentences_BNd)
        grid = Grid(coarse, prefix=len(self.prefix))
        return (words_BMc, self.places(sentences_BNd, grid)), (fine, grid)

    def _cut(self, image_BCHW: Tensor) -> Tensor:
        """Convolve every sentence for itself, with zeros around it, and lay the words side by side."""
        height, width = image_BCHW.shape[2:]
        rows, columns = height // self.patch, width // self.patch
        tiles = image_BCHW.unflatten(3, (columns, self.patch)).unflatten(2, (rows, self.patch))
        words = self.conv(tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)).unflatten(0, (-1, rows, columns))
        return words.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def from_timm(state: State, model: nn.Module) -> State:
    """The names of timm."""
    return _blocks(
        rename(
            state,
            (
                (r"^pixel_embed\.proj\.", "embed.conv."),
                (r"^pixel_pos$", "embed.word_places"),
                (r"^patch_pos$", "embed.places.weight"),
                (r"norm1_proj\.", "proj_norm1."),
                (r"norm2_proj\.", "proj_norm2."),
                (r"\.norm_in\.", ".inner_norm1."),
                (r"\.norm_mlp_in\.", ".inner_norm2."),
                (r"\.norm_out\.", ".outer_norm1."),
                (r"\.norm_mlp\.", ".outer_norm2."),
                (r"\.(attn|mlp)_in\.", r".inner_\1."),
                (r"\.attn_out\.", ".outer_attn."),
                (r"\.mlp\.", ".outer_mlp."),
            ),
        ),
        model,
    )


def from_official(state: State, model: nn.Module) -> State:
    """The names of huawei-noah/Efficient-AI-Backbones, whose `outer_tokens` are zeros that nothing reads."""
    return _blocks(
        rename(
            {key: value for key, value in state.items() if key != "outer_tokens"},
            (
                (r"^patch_embed\.proj\.", "embed.conv."),
                (r"^inner_pos$", "embed.word_places"),
                (r"^outer_pos$", "embed.places.weight"),
            ),
        ),
        model,
    )


def _blocks(state: State, model: nn.Module) -> State:
    for stream in ("inner", "outer"):
        state = split(state, f"{stream}_attn.qk", (f"{stream}.mixer.q_proj", f"{stream}.mixer.k_proj"))
    state = rename(
        state,
        (
            (r"^cls_token$", "embed.prefix"),
            (r"^proj", "embed.proj"),
            (r"\.proj_norm1\.", ".bridge.before."),
            (r"\.proj_norm2\.", ".bridge.after."),
            (r"\.(inner|outer)_norm", r".\1.norm"),
            (r"\.(inner|outer)_mlp", r".\1.mlp"),
            (r"\.(inner|outer)_attn\.v\.", r".\1.mixer.v_proj."),
            (r"\.(inner|outer)_attn\.proj\.", r".\1.mixer.out_proj."),
            (r"(^embed|blocks\.\d+)\.proj\.", r"\1.bridge.proj."),
            (r"^norm\.", "norms.1."),
            (r"^head\.", "head.classifiers.0."),
        ),
    )
    words = state.get("embed.word_places")
    if words is not None and words.ndim == 4:  # (1, c, rows, columns)
        state["embed.word_places"] = words.flatten(2).mT
    state = tables(state, "embed.prefix", "embed.places.weight", "embed.word_places")
    assert isinstance(model, TwoBranch)
    return in_stages(state, [len(stage.blocks) for stage in model.stages])  # type: ignore[arg-type]


@published(
    {f"tnt_{size}": {"drop_path": 0.1, **settings} for size, settings in SIZES.items()},
    title="Transformer in Transformer",
    year=2021,
    paper="arXiv:2103.00112",
    key_maps={"timm": from_timm, "official": from_official},
)
def tnt(
    *,
    dim: int,
    word_dim: int,
    heads: int,
    word_heads: int = 4,
    depth: int = 12,
    patch: int = 16,
    paper_form: bool = False,
    mixer: Mixers = "softmax",
    mixer_settings: Settings = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> TwoBranch:
    """Two transformers, one in the other, with any mechanisms.

    Args:
        dim, heads: channels and heads of the sentences.
        word_dim, word_heads: channels and heads of the words.
        depth: blocks.
        patch: side of a sentence in pixels, a multiple of 4.
        paper_form: the stem and the bridges of the paper instead of those of the official weights.
        mixer: one mechanism, or one for the words and one for the sentences, which have a class token in front.
        mixer_settings: of the mechanisms, for both or for each; softmax attention has no biases of queries, keys
            and values by default.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, a multiple of the patch.
    """
    if patch < STRIDE or patch % STRIDE:
        raise BadInput(f"a sentence has whole words of {STRIDE} pixels, got patch={patch}")
    side, grid = patch // STRIDE, patch_grid(img_size, patch, prefix=1)
    (rates,) = rising(drop_path, [depth])

    names, given = per_stage(mixer, 2), settings_per_stage(mixer_settings, 2)

    def stream(which: int, dim: int, heads: int, grid: Grid) -> list[MetaFormerBlock]:
        own = {"bias": False} if names[which] == "softmax" else {}
        mixers = stage_mixers(names[which], depth, dim, heads, grid, {**own, **given[which]})
        return [
            MetaFormerBlock(each, Mlp(dim, 4 * dim), drop_path=rate) for each, rate in zip(mixers, rates, strict=True)
        ]

    blocks = [
        SentenceBlock(inner, Bridge(side**2, word_dim, dim, bias=paper_form, each=paper_form), outer, side)
        for inner, outer in zip(
            stream(0, word_dim, word_heads, Grid((side, side))),
            stream(1, dim, heads, grid),
            strict=True,
        )
    ]
    head = BranchHead((word_dim, dim), num_classes, reads=(1,))
    net = TwoBranch(
        WordEmbed(in_chans, word_dim, dim, grid, patch, cut=not paper_form),
        [PairStage(blocks)],
        [nn.Identity(), nn.LayerNorm(dim)],
        head,
        in_chans=in_chans,
        channels=(word_dim, dim),
        strides=(STRIDE, patch),
        num_features=head.num_features,
    )
    return start_published(net)
