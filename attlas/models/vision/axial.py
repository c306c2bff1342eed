"""The Axial Transformers that model pictures of 32 and 64 pixels, channel by channel; see `attlas.models.axial`.

They read symbols (B, H, W, channels) and give the logits of each; they classify nothing.

Source: Ho et al., "Axial Attention in Multidimensional Transformers", 2019 (arXiv:1912.12180), official code
google-research/google-research, axial.
"""

from __future__ import annotations

from attlas.models.axial import PUBLISHED, AxialImageModel
from attlas.models.registry import published

MICRO = {"height": 5, "width": 5, "symbols": 4, "dim": 16, "heads": 2, "exterior": 2, "outer": 2, "inner": 2}


@published(
    {f"axial_{name}": settings for name, settings in PUBLISHED.items()} | {"axial_micro": MICRO},
    title="Axial Attention in Multidimensional Transformers",
    year=2019,
    paper="arXiv:1912.12180",
    task="generation",
)
def axial(
    *,
    height: int,
    width: int,
    channels: int = 3,
    symbols: int = 256,
    dim: int,
    heads: int,
    exterior: int = 8,
    outer: int = 8,
    inner: int = 8,
    dropout: float = 0.0,
) -> AxialImageModel:
    """The model of all channels; arguments as those of `AxialImageModel`."""
    return AxialImageModel(
        height,
        width,
        channels,
        symbols=symbols,
        dim=dim,
        heads=heads,
        exterior=exterior,
        outer=outer,
        inner=inner,
        dropout=dropout,
    )
