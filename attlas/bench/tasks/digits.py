"""Handwritten digits on their 8 x 8 grid of pixels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from attlas.bench.extras import extra
from attlas.bench.tasks.base import ACCURACY, Batch, Setting, Task
from attlas.core.errors import BadInput

SIDE = 8


class Digits(Task):
    """Name the digit; every pixel is a token. A fifth of the images of each digit is held out."""

    name = "digits"
    description = "handwritten digits of scikit-learn, 8 x 8 pixels as tokens"
    causal = False
    metric = ACCURACY
    features = 1
    classes = 10
    per_sequence = True
    setting = Setting(steps=300, batch=16, length=SIDE * SIDE, ratio=4)

    def __init__(self, length: int = SIDE * SIDE) -> None:
        if length != SIDE * SIDE:
            raise BadInput(f"the digits have {SIDE} x {SIDE} = {SIDE * SIDE} pixels, got length={length}")
        super().__init__(length)
        extra("sklearn", "the digits task")  # before any work

    @property
    def grid(self) -> tuple[int, ...]:
        """Rows and columns of pixels."""
        return (SIDE, SIDE)

    def chance(self) -> float:
        """One of ten."""
        return 1 / self.classes

    def batches(self, seed: int, batch: int) -> Iterator[Batch]:
        """Random training images."""
        images, digits = split()[0]
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(images), (batch,), generator=generator)
            yield Batch(images[chosen], digits[chosen])

    def held_out(self) -> dict[str, list[Batch]]:
        """All held-out images."""
        return {"all": [split()[1]]}


@cache
def split() -> tuple[Batch, Batch]:
    """The training images and the held-out ones."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    train, held_out = train_test_split(range(len(data.target)), test_size=0.2, stratify=data.target, random_state=0)
    pixels = torch.tensor(data.data, dtype=torch.float32).unsqueeze(-1) / 8 - 1
    digits = torch.tensor(data.target, dtype=torch.int64)

    def part(rows: list[int]) -> Batch:
        return Batch(pixels[rows], digits[rows])

    return part(train), part(held_out)
