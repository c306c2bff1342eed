"""Speed and memory of whole image networks.

`attlas bench models` prints it. Every network is measured in the same run, on random pictures and random weights, after
the smallest size of its family has given the same logits with every mechanism as its oracle.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attlas.bench import machine
from attlas.bench.macs import macs
from attlas.bench.memory import peak_memory
from attlas.bench.network import count_parameters
from attlas.bench.records import Failure, NetworkJob, NetworkResult, Record, Times
from attlas.bench.speed import OracleMismatch, OutOfMemory
from attlas.core.errors import BadInput
from attlas.core.mechanism import Mechanism
from attlas.models import create, model, models

ALLOWED = 1e-3
"""Largest difference of logits between backends and oracles, relative to their norm."""

SECONDS = 1.0
"""Of calls that each figure is the median of, at least."""

LEAST = 3
"""Calls that each figure is the median of, at least."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def network_jobs(
    names: Iterable[str], *, side: int = 224, batch: int = 8, dtype: str = "float32", threads: int | None = None
) -> list[NetworkJob]:
    """One job for each network; what a network cannot do becomes a failed record.

    Args:
        names: for `attlas.models.create`.
        side: of the pictures, in pixels.
        batch: pictures at a time, beside one.
        dtype: "float32" or "bfloat16".
        threads: torch threads, by default those in use.

    Raises:
        BadInput: sizes without a meaning.
    """
    if dtype not in DTYPES:
        raise BadInput(f"networks are measured in {' or '.join(DTYPES)}, got {dtype!r}")
    count = torch.get_num_threads() if threads is None else threads
    if min(side, batch, count) < 1:
        raise BadInput(f"side, batch and threads are at least 1, got {side}, {batch} and {count}")
    return [NetworkJob(name, side, batch, dtype, count) for name in names]


def sweep(jobs: Iterable[NetworkJob]) -> Iterator[Record]:
    """Measure jobs; one record for each, whatever happens."""
    here = machine.describe()
    for job in jobs:
        try:
            yield Record(job, measure(job), None, here)
        except Exception as problem:
            yield Record(job, None, Failure(type(problem).__name__, str(problem)), here)


@torch.no_grad()
def measure(job: NetworkJob) -> NetworkResult:
    """Measure one network.

    Raises:
        OracleMismatch: its family disagrees with its oracles.
        OutOfMemory: it would not fit.
        AttlasError: what the network says where it does not serve such pictures.
    """
    with torch.device("meta"):
        net = create(job.network, img_size=job.side)
        parameters, needed = count_parameters(net), macs(net, torch.empty(1, 3, job.side, job.side))
    dtype = DTYPES[job.dtype]
    if 2 * 4 * parameters > machine.available_memory():
        raise OutOfMemory(f"{parameters:,} parameters do not fit into {machine.available_memory() / 2**30:.1f} GiB")
    with machine.threads(job.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        error = max(map(oracle_error, _smallest(job.network)))
        if not error <= ALLOWED:
            raise OracleMismatch(f"the family of {job.network} is off its oracles by {error:.1e}")
        net = create(job.network, img_size=job.side).eval().to(dtype)
        pictures = torch.randn(job.batch, 3, job.side, job.side).to(dtype)
        single = _times(lambda: net(pictures[:1]))
        with peak_memory() as peak:
            net(pictures[:1])
        return NetworkResult(parameters, needed, single, _times(lambda: net(pictures)), peak.bytes, error)


def _times(call: Callable[[], object]) -> Times:
    """Quartiles over calls, after one to warm up."""
    call()
    samples: list[float] = []
    while len(samples) < LEAST or sum(samples) < SECONDS:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    lower, median, upper = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    return Times(median, lower, upper, len(samples))


def _smallest(name: str) -> list[str]:
    """The sizes for tests of a network's family, which between them hold its mechanisms."""
    family = model(name).family
    return [each for each in models("*_micro") if model(each).family == family]


@cache
@torch.no_grad()
def oracle_error(name: str) -> float:
    """How far a network's output is from the same with every mechanism as its oracle, relative to its norm."""
    side = model(name).accepted["img_size"]
    net = create(name).eval()
    _move_vectors(net)
    pictures = torch.randn(1, 3, side, side)
    outputs: list[Tensor] = [net(pictures), with_oracles(net)(pictures)]
    return float((outputs[0] - outputs[1]).norm() / outputs[1].norm())


def with_oracles(net: nn.Module) -> nn.Module:
    """A copy whose mechanisms are computed by their formulas."""
    slow: Any = copy.deepcopy(net)
    for module in slow.modules():
        if isinstance(module, Mechanism):
            module.backend = "oracle"
    return slow


def _move_vectors(net: nn.Module) -> None:
    """Layer scales and norms off their starting values, which would hide the mechanisms."""
    for value in net.parameters():
        if value.ndim < 2:
            value.add_(0.1 * torch.randn_like(value))
