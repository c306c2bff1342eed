"""How much memory a call takes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch.autograd.profiler import profile


@dataclass
class Peak:
    """Bytes above what stood before, known once the block is left."""

    bytes: int = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watch the allocations inside the block.

    The profiler reports every allocation of PyTorch's allocator in order, those inside of operators too; scratch memory
    that a library takes elsewhere is not seen.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # or the profiler writes its progress to stderr
    peak = Peak()
    with profile(profile_memory=True) as profiler:
        yield peak
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = np.cumsum([0, *(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))])
    peak.bytes = int(taken.max())
