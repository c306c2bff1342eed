"""Activator: patches as tokens that never meet, each through gated linear units, then their mean.

    y = x + W₃ (LN(GELU(W₁ u)) ⊙ LN(W₂ u)),  u = norm x,    z = y + MLP(norm y)

Both norms of a block are one module; the slim network has no MLP. There is no class token, no position encoding and no
norm before the mean: the logits do not change when the patches of a picture are shuffled. With another mechanism as
`mixer` the tokens do meet. The published networks are for pictures of 32 x 32 and 10 classes.

Source: Abdullah and Aydin, "Activator: GLU Activations as The Core Functions of a Vision Transformer", 2024
(arXiv:2405.15953), official code Abdullah-88/Activator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from attlas.models.isotropic import Isotropic
from attlas.models.mixers import patch_grid, stage_mixers
from attlas.models.registry import State, published
from attlas.models.vision.ninformer import mean_of_patches, one_norm

CIFAR = {"dim": 256, "depth": 4, "patch": 4, "hidden": 512, "drop": 0.5, "img_size": 32, "num_classes": 10}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "cifar": CIFAR,
    "slim_cifar": {**CIFAR, "mlp": False},
    "micro": {"dim": 64, "depth": 4, "patch": 8, "hidden": 128, "drop": 0.1, "img_size": 64},
}


def from_official(state: State, model: nn.Module) -> State:
    """The names of Abdullah-88/Activator with the classifier around it."""
    return one_norm(
        state,
        model,
        (
            (r"\.actgu\.proj_1\.", ".mixer.gate."),
            (r"\.actgu\.proj_2\.", ".mixer.value."),
            (r"\.actgu\.proj_3\.", ".mixer.out."),
            (r"\.actgu\.", ".mixer."),
        ),
    )


@published(
    {f"activator_{size}": settings for size, settings in SIZES.items()},
    title="Activator: GLU Activations as The Core Functions of a Vision Transformer",
    year=2024,
    paper="arXiv:2405.15953",
    key_maps={"official": from_official},
)
def activator(
    *,
    dim: int,
    depth: int,
    patch: int,
    hidden: int,
    drop: float,
    mlp: bool = True,
    mixer: str = "activator",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Isotropic:
    """The network, with its own or any other mechanism.

    Args:
        dim, depth: channels and blocks.
        patch: side of a patch in pixels.
        hidden: channels inside the gated units and the MLPs.
        drop: dropout of the MLPs.
        mlp: whether blocks have an MLP beside the mechanism.
        mixer: the mechanism; it has one head.
        mixer_settings: of the mechanism.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, a multiple of the patch.
    """
    grid = patch_grid(img_size, patch)
    own = {"hidden": hidden} if mixer == "activator" else {}
    mixers = stage_mixers(mixer, depth, dim, 1, grid, {**own, **(mixer_settings or {})})
    return mean_of_patches(
        mixers,
        grid=grid,
        patch=patch,
        hidden=hidden if mlp else None,
        drop=drop,
        drop_path=drop_path,
        num_classes=num_classes,
        in_chans=in_chans,
    )
