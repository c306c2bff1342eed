"""Multi-query associative recall: pairs of a key and its value, then questions for the value of a key.

    k3 v1 k7 v4 k1 v4 | k7 k1 k1 k3 k7 ...
    asked:               v4 v4 v4 v1 v4 ...

A mechanism with a state of fixed size must hold all pairs in it, so accuracy falls with their number;
a cache of keys and values does not forget. Source: Arora et al., Zoology, 2023 (arXiv:2312.04927); there
questions come at power-law gaps between filler, here every position after the pairs is one, so that a
small model learns within seconds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.bench.tasks.base import ACCURACY, IGNORED, Batch, Setting, Task
from attlas.core.errors import BadInput

KEYS = 32
VALUES = 32
PAIRS = (4, 8, 16)


class Recall(Task):
    """Answer each key with the value that it was shown with; sequences of 4, 8 and 16 pairs in turn."""

    name = "recall"
    description = f"associative recall of {', '.join(map(str, PAIRS))} key-value pairs"
    causal = True
    metric = ACCURACY
    vocabulary = KEYS + VALUES
    classes = VALUES
    setting = Setting(steps=300, batch=16, length=64)

    def __init__(self, length: int) -> None:
        if length <= 2 * max(PAIRS):
            raise BadInput(f"{max(PAIRS)} pairs and a question need a length above {2 * max(PAIRS)}, got {length}")
        super().__init__(length)

    def chance(self) -> float:
        """Guessing among the values of the sequence, on average over the held-out questions."""
        questions = [self.length - 2 * pairs for pairs in PAIRS]
        return sum(asked / pairs for asked, pairs in zip(questions, PAIRS, strict=True)) / sum(questions)

    def batches(self, seed: int, batch: int) -> Iterator[Batch]:
        """Fresh sequences for ever, all of a batch with one number of pairs."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for pairs in PAIRS:
                yield self._draw(pairs, batch, generator)

    def held_out(self) -> dict[str, list[Batch]]:
        """128 sequences for each number of pairs, of a generator that no training seed reaches."""
        generator = torch.Generator().manual_seed(-1)
        return {f"{pairs} pairs": [self._draw(pairs, 128, generator)] for pairs in PAIRS}

    def _draw(self, pairs: int, batch: int, generator: torch.Generator) -> Batch:
        keys = torch.rand(batch, KEYS, generator=generator).argsort(-1)[:, :pairs]
        values = torch.randint(VALUES, keys.shape, generator=generator)
        chosen = torch.randint(pairs, (batch, self.length - 2 * pairs), generator=generator)
        shown = torch.stack([keys, KEYS + values], -1).flatten(1)
        silent = torch.full_like(shown, IGNORED)
        inputs = torch.cat([shown, keys.gather(1, chosen)], 1)
        return Batch(inputs, torch.cat([silent, values.gather(1, chosen)], 1))
