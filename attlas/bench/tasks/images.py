"""Handwritten digits on photographs: real pictures that are always there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.bench.extras import extra
from attlas.bench.tasks import digits
from attlas.bench.tasks.base import ACCURACY, Batch, Setting, Task
from attlas.core.errors import BadInput

SIDE, PATCH, DIGIT = 64, 4, 48
"""Pixels along a picture, a patch and a digit."""
PLACES = 2
"""Pictures that are made of each held-out digit."""
TRAINING_SHARE = 0.7
"""Columns of each photograph that backgrounds of the training are cut from; the others are held out."""


class Images(Task):
    """Name the digit that stands in white on a piece of a photograph.

    A picture is 64 x 64 pixels: a piece of one of scikit-learn's two photographs, darkened by half, and over it, at a
    random place, one of its handwritten digits, enlarged six times. Digits and columns of the photographs are held
    out. Networks of `attlas.models` see the pictures; mechanisms see patches of 4 x 4 pixels as tokens, on a grid of
    16 x 16.
    """

    name = "images"
    description = "handwritten digits on photographs, 64 x 64 pixels in colour"
    causal = False
    metric = ACCURACY
    features = 3 * PATCH * PATCH
    classes = 10
    per_sequence = True
    picture = (3, SIDE)
    setting = Setting(steps=400, batch=24, length=(SIDE // PATCH) ** 2, ratio=4, learning_rate=3e-3)

    def __init__(self, length: int = (SIDE // PATCH) ** 2) -> None:
        if length != (SIDE // PATCH) ** 2:
            raise BadInput(f"the pictures have {SIDE // PATCH} x {SIDE // PATCH} patches, got length={length}")
        super().__init__(length)
        extra("sklearn", "the images task")  # before any work
        extra("PIL", "the images task")

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns of patches."""
        return (SIDE // PATCH, SIDE // PATCH)

    def chance(self) -> float:
        """One of ten."""
        return 1 / self.classes

    def batches(self, seed: int, batch: int) -> Iterator[Batch]:
        """Random digits at random places on random pieces."""
        drawn, names = digits.split()[0]
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(drawn), (batch,), generator=generator)
            yield Batch(_patches(_compose(drawn[chosen], 0, generator)), names[chosen])

    def held_out(self) -> dict[str, list[Batch]]:
        """Every held-out digit at two places."""
        return {"all": [_held_out()]}

    def pictures(self, inputs_BNF: Tensor) -> Tensor:
        """The pictures (B, 3, 64, 64) that the tokens were cut from."""
        return F.fold(inputs_BNF.transpose(1, 2), SIDE, PATCH, stride=PATCH)


@cache
def _held_out() -> Batch:
    drawn, names = digits.split()[1]
    generator = torch.Generator().manual_seed(0)
    pictures = torch.cat([_compose(drawn, 1, generator) for _ in range(PLACES)])
    return Batch(_patches(pictures), names.repeat(PLACES))


@cache
def _photographs() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Each photograph (3, H, W) in [0, 1], of the training and held out."""
    from sklearn.datasets import load_sample_images

    whole = [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]
    cuts = [int(TRAINING_SHARE * image.shape[2]) for image in whole]
    pairs = list(zip(whole, cuts, strict=True))
    return tuple(image[..., :cut] for image, cut in pairs), tuple(image[..., cut:] for image, cut in pairs)


def _compose(drawn_BN1: Tensor, part: int, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, 64, 64) about zero of digits, their 64 pixels in [-1, 1]."""

    def random(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    ink_B1DD = (drawn_BN1.transpose(1, 2).unflatten(2, (digits.SIDE, digits.SIDE)) + 1) / 2
    ink_B1DD = F.interpolate(ink_B1DD, DIGIT, mode="bicubic").clamp(0, 1)
    photographs = _photographs()[part]
    pictures = []
    for ink in ink_B1DD:
        photograph = photographs[random(len(photographs))]
        top, left = (random(size - SIDE + 1) for size in photograph.shape[1:])
        picture = photograph[:, top : top + SIDE, left : left + SIDE] / 2
        y, x = random(SIDE - DIGIT + 1), random(SIDE - DIGIT + 1)
        place = picture[:, y : y + DIGIT, x : x + DIGIT]
        place.lerp_(torch.ones_like(place), ink.expand_as(place))
        pictures.append(picture)
    return (torch.stack(pictures) - 0.5) / 0.25


def _patches(pictures_BCHW: Tensor) -> Tensor:
    """Patches as tokens (B, 256, 48)."""
    return F.unfold(pictures_BCHW, PATCH, stride=PATCH).transpose(1, 2).contiguous()
