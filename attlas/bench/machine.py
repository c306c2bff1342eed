"""The machine: what it is, how fast it can multiply and read, and how much memory is left."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

import attlas

X86 = frozenset({"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8"})
ARM = frozenset({"asimd", "fphp", "sve", "sve2", "bf16", "i8mm"})
"""Names in /proc/cpuinfo of the instruction sets that decide the speed of attention."""


def describe() -> dict[str, str]:
    """What stands in every record: processor, cores, instructions, memory, system, versions, threads."""
    cpuinfo = _read(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.M)
    instructions = sorted((X86 | ARM).intersection(flags[1].split())) if flags else []
    return {
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "instructions": " ".join(instructions) or torch.backends.cpu.get_cpu_capability(),
        "memory": f"{_physical_memory() / 2**30:.1f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attlas": attlas.__version__,
        "threads": str(torch.get_num_threads()),
    }


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take before the system, or the container that it runs in, ends it.

    Args:
        root: where /proc and /sys are. Without them the answer is the physical memory.
    """
    free = re.search(r"^MemAvailable:\s*(\d+) kB$", _read(root / "proc/meminfo"), re.M)
    available = int(free[1]) * 1024 if free else _physical_memory()
    group = root / "sys/fs/cgroup"
    limit = _read(group / "memory.max").strip()
    if limit.isdigit():
        # Files that were read count as used but give way.
        files = re.search(r"^inactive_file (\d+)$", _read(group / "memory.stat"), re.M)
        used = int(_read(group / "memory.current")) - (int(files[1]) if files else 0)
        available = min(available, int(limit) - used)
    return available


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run PyTorch with `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def gemm_rate(dtype: torch.dtype, count: int) -> float:
    """FLOP/s that the product of two 512 x 512 matrices reaches with `count` threads, measured once."""
    size = 512
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    with threads(count):
        return 2 * size**3 / _fastest(lambda: a @ a)


@cache
def bandwidth(count: int) -> float:
    """Bytes/s that the sum of a 256 MiB tensor reads with `count` threads, measured once."""
    x = torch.ones(2**26)
    with threads(count):
        return x.nbytes / _fastest(x.sum)


def _fastest(call: Callable[[], object], seconds: float = 0.3) -> float:
    """Seconds of the fastest call within about `seconds`: a rate is reached when nothing interferes."""
    call()
    fastest, end = float("inf"), time.perf_counter() + seconds
    while fastest == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
