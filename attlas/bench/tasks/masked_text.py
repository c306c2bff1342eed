"""Masked byte modelling of the Python standard library's source.

Source of the recipe: Devlin et al., BERT, 2018 (arXiv:1810.04805).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attlas.bench.tasks.base import IGNORED, Batch, Metric, Setting, Task, bits
from attlas.bench.tasks.corpus import even_windows, random_windows, unigram_bits

SHARE = 0.15
MASK = 256


class MaskedText(Task):
    """Fill in the 15 % of bytes asked for: 80 % of them hidden, 10 % replaced, 10 % left as they are."""

    name = "masked_text"
    description = "hidden bytes of the Python standard library's source"
    causal = False
    metric = Metric("bits per masked byte", False, bits)
    vocabulary = 257
    classes = 256
    setting = Setting(steps=300, batch=4, length=128)

    def chance(self) -> float:
        """Bits per byte of the byte frequencies."""
        return unigram_bits()

    def batches(self, seed: int, batch: int) -> Iterator[Batch]:
        """Random stretches of the training files."""
        generator = torch.Generator().manual_seed(seed)
        for text in random_windows(seed, batch, self.length):
            yield hide(text, generator)

    def held_out(self) -> dict[str, list[Batch]]:
        """256 stretches, evenly spaced over the held-out files, always hidden alike."""
        generator = torch.Generator().manual_seed(0)
        return {"all": [hide(text, generator) for text in even_windows(256, self.length).split(32)]}


def hide(text: Tensor, generator: torch.Generator) -> Batch:
    """Choose bytes to ask for, at least one per sequence, and hide them."""
    draw = torch.rand(text.shape, generator=generator)
    chosen = draw <= torch.maximum(draw.amin(-1, keepdim=True), torch.tensor(SHARE))
    how = torch.rand(text.shape, generator=generator)
    other = torch.randint(256, text.shape, generator=generator)
    replaced = torch.where(how < 0.8, MASK, torch.where(how < 0.9, other, text))
    return Batch(torch.where(chosen, replaced, text), torch.where(chosen, text, IGNORED))
