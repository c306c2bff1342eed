"""NaLaFormer: norm-aware linear attention on the large maps, gated softmax attention on the small ones.

    u = x + conv(x),    y = u + s₁ ⊙ mixer(norm u),    w = y + conv(y),    z = w + s₂ ⊙ MLP(norm w)

The layout is that of RAVLT, with a second convolution of x before the MLP; beside every attention stands a 5 x 5
convolution of the values, and the sum is normed over all channels and multiplied with SiLU of a gate.

Source: Meng et al., "NaLaFormer: Norm-Aware Linear Attention for Transformer Models", 2025 (arXiv:2506.21137), with
the sizes and the details of the official code, later titled "Norm x Direction".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attlas.models.mixers import Mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.vision import ravlt

SIZES: Mapping[str, Mapping[str, Any]] = {
    "xt": {"depths": (2, 2, 2, 2), "dims": (32, 64, 128, 384), "heads": (1, 2, 4, 12), "drop_path": 0.1},
    "tiny": {**ravlt.SIZES["tiny"], "mlp_ratio": 4},
    "small": ravlt.SIZES["small"],
    "base": {**ravlt.SIZES["base"], "mlp_ratio": 4},
    "large": ravlt.SIZES["large"],
    "micro": ravlt.SIZES["micro"],
}


def from_official(state: State, model: nn.Module) -> State:
    """The names of the official code."""
    state = {key: value[..., None, None] if key == "proj.weight" else value for key, value in state.items()}
    return ravlt.from_official(state, model)


@published(
    {f"nalaformer_{size}": settings for size, settings in SIZES.items()},
    title="NaLaFormer: Norm-Aware Linear Attention for Transformer Models",
    year=2025,
    paper="arXiv:2506.21137",
    key_maps={"official": from_official},
)
def nalaformer(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    heads: Sequence[int],
    mlp_ratio: float = 3.5,
    scales: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    features: int = 1024,
    mixer: Mixers = ("nalaformer", "nalaformer", "softmax", "softmax"),
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """A NaLaFormer, with any mechanism.

    Args:
        depths, dims, heads: blocks, channels and heads of each stage.
        mlp_ratio: hidden channels of an MLP per channel.
        scales: starting value of the layer scales in each stage.
        features: channels that the classifier reads.
        mixer: the mechanism of each stage. "softmax" has the turn, the convolution, the norm and the gate.
        mixer_settings: of the mechanisms; softmax attention has them where every stage has softmax attention.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on.
    """
    return ravlt.gated_pyramid(
        depths=depths,
        dims=dims,
        heads=heads,
        mlp_ratio=mlp_ratio,
        scales=scales,
        features=features,
        mixer=mixer,
        mixer_settings=mixer_settings,
        shell={"output_norm": "layer", "gate": "silu"},
        positions=(True, True),
        drop_path=drop_path,
        num_classes=num_classes,
        in_chans=in_chans,
        img_size=img_size,
    )
