"""Byte-level language modelling of the Python standard library's source."""

from __future__ import annotations

from collections.abc import Iterator

from attlas.bench.tasks.base import Batch, Metric, Setting, Task, bits
from attlas.bench.tasks.corpus import even_windows, random_windows, unigram_bits


class Text(Task):
    """Predict each next byte; held out are whole files."""

    name = "text"
    description = "next byte of the Python standard library's source"
    causal = True
    metric = Metric("bits per byte", False, bits)
    vocabulary = 256
    classes = 256
    setting = Setting(steps=300, batch=4, length=128)

    def chance(self) -> float:
        """Bits per byte of the byte frequencies."""
        return unigram_bits()

    def batches(self, seed: int, batch: int) -> Iterator[Batch]:
        """Random stretches of the training files."""
        for text in random_windows(seed, batch, self.length + 1):
            yield Batch(text[:, :-1], text[:, 1:])

    def held_out(self) -> dict[str, list[Batch]]:
        """128 stretches, evenly spaced over the held-out files."""
        return {"all": [Batch(text[:, :-1], text[:, 1:]) for text in even_windows(128, self.length + 1).split(32)]}
