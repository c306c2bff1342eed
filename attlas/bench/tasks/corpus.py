"""Real text that every machine with Python already has: the source of the standard library."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from attlas.core.errors import AttlasError, BadInput

EXCLUDED = frozenset({"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__"})
"""Tests, tools that later versions dropped, and tables rather than prose or code."""


def stdlib() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_path("stdlib"))


def source_files() -> list[Path]:
    """The .py files of the standard library, sorted, relative to its folder."""
    root = stdlib()
    modules = sorted(sys.stdlib_module_names - EXCLUDED)
    found = [root / f"{module}.py" for module in modules if not module.startswith("_sysconfigdata")]
    for module in modules:
        found += (root / module).rglob("*.py")
    inside = (path.relative_to(root) for path in found if path.is_file())
    files = sorted(path for path in inside if not EXCLUDED & set(path.parts))
    if not files:
        raise AttlasError(f"the text tasks read Python's own source, but {root} holds none: use a full Python")
    return files


def is_held_out(file: Path) -> bool:
    """Whether a file is for evaluation: one in ten, by a hash of its name, so that none is in both parts."""
    return hashlib.sha256(file.as_posix().encode()).digest()[0] < 256 // 10


@cache
def corpus() -> tuple[Tensor, Tensor]:
    """The bytes of the training files and those of the held-out files, uint8."""
    parts: tuple[bytearray, bytearray] = (bytearray(), bytearray())
    for file in source_files():
        parts[is_held_out(file)].extend((stdlib() / file).read_bytes())
    train, held_out = (torch.frombuffer(part, dtype=torch.uint8) for part in parts)
    return train, held_out


def random_windows(seed: int, batch: int, length: int) -> Iterator[Tensor]:
    """Endless (batch, length) int64 stretches of the training files."""
    train, _ = corpus()
    _check(train, length)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length)
    while True:
        starts = torch.randint(len(train) - length, (batch, 1), generator=generator)
        yield train[starts + offsets].long()


def even_windows(count: int, length: int) -> Tensor:
    """(count, length) int64 stretches, evenly spaced over the held-out files."""
    _, held_out = corpus()
    _check(held_out, length)
    starts = torch.linspace(0, len(held_out) - length, count).long()
    return held_out[starts[:, None] + torch.arange(length)].long()


def unigram_bits() -> float:
    """Bits per byte of the held-out files under the byte frequencies of the training files."""
    train, held_out = (torch.bincount(part.long(), minlength=256).double() for part in corpus())
    code_length = -((train + 1) / (train + 1).sum()).log2()
    return float(held_out @ code_length / held_out.sum())


def _check(part: Tensor, length: int) -> None:
    if length >= len(part):
        raise BadInput(f"a sequence of {length} bytes does not fit into {len(part)} bytes of text")
