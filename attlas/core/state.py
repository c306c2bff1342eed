"""What a mechanism carries from one segment to the next.

A state is an immutable NamedTuple of tensors, numbers, `Rows` and other states. `extend` takes one and
returns the next; the old one stays valid, so that decoding can branch.

B batch, G key/value heads, M positions so far, D features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attlas.core.errors import BadInput


class _Storage:
    def __init__(self, data: Tensor, filled: int) -> None:
        self.data = data
        self.filled = filled


class Rows:
    """Rows of a growing tensor along dimension 2, appended in amortised constant time.

    Appending to the newest Rows writes in place behind the rows that others see; appending to an older
    one copies first. With gradients on, appending concatenates: rows that need gradients, and flags and
    numbers, which a graph may have kept.
    """

    def __init__(self, rows: Tensor) -> None:
        self._storage = _Storage(rows, rows.shape[2])
        self._length = rows.shape[2]

    @property
    def rows(self) -> Tensor:
        """All rows so far, (B, G, M, ...)."""
        return self._storage.data[:, :, : self._length]

    def append(self, new: Tensor) -> Rows:
        """These rows and `new` (B, G, n, ...) behind them."""
        kept = new.requires_grad or self._storage.data.requires_grad or not new.is_floating_point()
        if torch.is_grad_enabled() and kept:
            return Rows(torch.cat([self.rows, new], 2))
        storage, end = self._storage, self._length + new.shape[2]
        if storage.filled != self._length or end > storage.data.shape[2]:
            shape = list(storage.data.shape)
            shape[2] = max(2 * self._length, end, 16)
            grown = new.new_zeros(shape)
            grown[:, :, : self._length] = self.rows
            storage = _Storage(grown, self._length)
        storage.data[:, :, self._length : end] = new
        storage.filled = end
        appended = Rows.__new__(Rows)
        appended._storage, appended._length = storage, end
        return appended

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use (spare capacity not counted)."""
        return self.rows.nbytes


class KVCache(NamedTuple):
    """Keys (B, G, M, D), values (B, G, M, E), and which are real (B, 1, M), or None while all are."""

    k: Rows
    v: Rows
    keep: Rows | None

    @classmethod
    def empty(cls, batch: int, heads: int, size: int, value: int, like: Tensor) -> KVCache:
        """No positions yet, in the dtype and on the device of `like`."""
        return cls(Rows(like.new_empty(batch, heads, 0, size)), Rows(like.new_empty(batch, heads, 0, value)), None)

    @property
    def keys(self) -> Tensor | None:
        """Which keys are real, (B, M), as a mask takes it; None while all are."""
        return None if self.keep is None else self.keep.rows[:, 0]

    def append(self, k: Tensor, v: Tensor, keep: Tensor | None) -> KVCache:
        """The cache with a segment behind it; keep (B, n) or None for all real."""
        flags = self.keep
        if flags is None and keep is not None:
            flags = Rows(k.new_ones(k.shape[0], 1, self.k.rows.shape[2], dtype=torch.bool))
        if flags is not None:
            real = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
            flags = flags.append(real.unsqueeze(1))
        return KVCache(self.k.append(k), self.v.append(v), flags)


def state_bytes(state: Any) -> int:
    """Bytes that a state holds, over all its tensors."""
    if isinstance(state, Tensor | Rows):
        return state.nbytes
    if isinstance(state, tuple):
        return sum(state_bytes(part) for part in state)
    return 0


def check_keep(keep: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """`keep` itself if it is a (batch, tokens) bool tensor or None."""
    if keep is not None and (keep.dtype != torch.bool or keep.shape != (batch, tokens)):
        raise BadInput(
            f"keep marks the real tokens of this segment: a bool tensor ({batch}, {tokens}), "
            f"got {keep.dtype} {tuple(keep.shape)}"
        )
    return keep
