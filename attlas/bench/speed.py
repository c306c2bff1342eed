"""Time, memory and FLOPs of one layer at one size.

What is timed is one call of the layer, in eval mode, on random tokens, after warm-up, with a fixed number of
threads. Reported are the median and the quartiles of single calls; mechanisms of one size take turns. Before
that the layer must agree with its oracle in float64 along the path that is timed, and must fit into memory.

B batch, N tokens, C channels.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import attlas
from attlas.bench import machine
from attlas.bench.memory import peak_memory
from attlas.bench.records import Failure, Measure, Record, SpeedJob, SpeedResult, Times
from attlas.core.errors import AttlasError, BadInput
from attlas.core.mechanism import Cost, Mechanism, Mixer
from attlas.ops.dispatch import record_choices
from attlas.ops.flops import flop_counter

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
"""Tokens of the default sweep."""

MATERIALISED = ("softmax", "oracle")
FUSED = ("softmax", "torch")
BASELINES = (MATERIALISED, FUSED)
"""(mechanism, backend) of softmax attention: all scores in memory, and PyTorch's fused kernel."""

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 5e-3,
}
"""Relative RMS error against the float64 oracle up to which a speed is reported."""

SECONDS = 0.6
"""Time given to the timed calls of one job."""

TURNS = 3
"""Parts that this time is cut into: noise that comes and goes hits every mechanism of a size."""

TOGETHER = 8
"""Layers that are alive at once and take turns."""

LONG = 5.0
"""Seconds from which on a call is timed once, without warm-up."""

CHECKED = 128
"""Tokens at which a layer is held against its oracle, at most."""

WEIGHED = 512
"""Tokens from which the memory of a longer call is predicted."""

SEGMENT = 1024
"""Tokens at a time that fill the state for decoding."""


Before = TypeVar("Before")
After = TypeVar("After")


class OracleMismatch(AttlasError):
    """A layer disagrees with its oracle: nothing is reported about its speed."""


class OutOfMemory(AttlasError):
    """A call would not fit into memory and was not tried."""


def speed_jobs(
    mechanisms: Iterable[str],
    sizes: Iterable[int | Sequence[int]] = LENGTHS,
    *,
    measures: Iterable[Measure] = ("forward",),
    dtypes: Iterable[str] = ("float32",),
    causal: Iterable[bool] = (False,),
    backend: str = "auto",
    params: Mapping[str, Mapping[str, Any]] | None = None,
    batch: int = 1,
    dim: int = 512,
    heads: int = 8,
    threads: int | None = None,
) -> list[SpeedJob]:
    """Every combination, the two baselines with each; what a mechanism cannot do becomes a failed record.

    Jobs that differ in nothing but the mechanism follow one another, so that `sweep` can take them in turns.

    Args:
        mechanisms: names for `attlas.mixer`.
        sizes: tokens of a sequence, or shapes of a grid, ascending.
        measures, dtypes, causal: see `SpeedJob`.
        backend: of the mechanisms; the baselines have their own.
        params: mechanism -> its settings.
        batch, dim, heads: see `SpeedJob`.
        threads: torch threads, by default those in use.
    """
    settings = {} if params is None else params
    rows: list[tuple[str, str, dict[str, Any]]] = [(name, chosen, {}) for name, chosen in BASELINES]
    rows += [(name, backend, dict(settings.get(name, {}))) for name in mechanisms]
    count = torch.get_num_threads() if threads is None else threads
    grids = [(size,) if isinstance(size, int) else tuple(size) for size in sizes]
    return [
        SpeedJob(name, chosen, pattern, measure, grid, batch, dim, heads, dtype, count, own)
        for dtype in dtypes
        for measure in measures
        for pattern in causal
        for grid in grids
        for name, chosen, own in rows
    ]


def sweep(jobs: Iterable[SpeedJob], *, max_seconds: float = LONG) -> Iterator[Record]:
    """Measure jobs; one record for each, whatever happens.

    Neighbours that differ in nothing but the mechanism are timed in turns. Once a call of a mechanism takes
    longer than `max_seconds`, its larger sizes are recorded as over the time limit and not tried.
    """
    here = machine.describe()
    slow: dict[SpeedJob, tuple[int, float]] = {}
    for _, group in groupby(jobs, lambda job: replace(job, mechanism="", backend="", params={})):
        waiting = []
        for job in group:
            tokens, seconds = slow.get(replace(job, grid=()), (math.prod(job.grid), 0.0))
            if tokens < math.prod(job.grid):
                reason = f"over the time limit of {max_seconds:g} s: {seconds:.3g} s at {tokens} tokens"
                yield Record(job, None, Failure("OverTime", reason), here)
            else:
                waiting.append(job)
        for start in range(0, len(waiting), TOGETHER):
            few = waiting[start : start + TOGETHER]
            for job, result in zip(few, _measure(few), strict=True):
                if isinstance(result, Exception):
                    yield Record(job, None, Failure(type(result).__name__, str(result)), here)
                    continue
                if result.times.median > max_seconds:
                    slow.setdefault(replace(job, grid=()), (math.prod(job.grid), result.times.median))
                yield Record(job, result, None, here)


def measure(job: SpeedJob) -> SpeedResult:
    """Measure one job.

    Raises:
        BadInput: a measure or dtype that is not known.
        Unsupported: the mechanism does not serve the pattern, the grid or streaming.
        OracleMismatch: the layer disagrees with its oracle.
        OutOfMemory: a call would not fit into memory.
    """
    (result,) = _measure([job])
    if isinstance(result, Exception):
        raise result
    return result


def _measure(jobs: Sequence[SpeedJob]) -> list[SpeedResult | Exception]:
    """Results, or what went wrong, of jobs that share the number of threads."""
    with machine.threads(jobs[0].threads):
        trials = _each(_Trial, jobs)
        with _no_collection():
            for _ in range(TURNS):
                trials = _each(_Trial.turn, trials)
    return _each(_Trial.result, trials)


def _each(step: Callable[[Before], After], items: Sequence[Before | Exception]) -> list[After | Exception]:
    """What `step` makes of every item, or what went wrong, in this step or before: failures are data."""

    def attempt(item: Before) -> After | Exception:
        try:
            return step(item)
        except Exception as problem:
            return problem

    return [item if isinstance(item, Exception) else attempt(item) for item in items]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the timings."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class _Trial:
    """A job that passed its checks, warm, with what was timed so far."""

    def __init__(self, job: SpeedJob) -> None:
        self.error = oracle_error(job)
        check_memory(job)
        self.call = _call(job)
        self.steps = 0
        self.samples: list[float] = []
        self.once = self._warm_up()
        self.observed = observe(self.call)
        self.steps = 0

    def _time(self) -> float:
        if not self.steps:
            self.call.rewind()
            self.steps = self.call.steps
        self.steps -= 1
        start = time.perf_counter()
        self.call.step()
        return time.perf_counter() - start

    def _warm_up(self) -> bool:
        """Call until it gets no faster; whether one call was so long that it is the only sample."""
        fastest = spent = self._time()
        if fastest > LONG:
            self.samples.append(fastest)
            return True
        while spent < SECONDS / 2:
            seconds = self._time()
            spent += seconds
            if seconds > 0.95 * fastest:
                break
            fastest = seconds
        return False

    def turn(self) -> _Trial:
        """Time calls for this trial's share of a turn, at least one."""
        end = time.perf_counter() + SECONDS / TURNS
        while not self.once:
            self.samples.append(self._time())
            if time.perf_counter() >= end:
                break
        return self

    def result(self) -> SpeedResult:
        """What was found out."""
        lower, median, upper = np.quantile(self.samples, [0.25, 0.5, 0.75]).tolist()
        call, cost = self.call, self.call.cost()
        return SpeedResult(
            times=Times(median, lower, upper, len(self.samples)),
            flops=cost.flops,
            executed=self.observed.executed,
            pairs=cost.pairs,
            state_bytes=attlas.state_bytes(call.state),
            peak_bytes=self.observed.peak_bytes,
            gemm_rate=machine.gemm_rate(call.x_BNC.dtype, call.job.threads),
            bandwidth=machine.bandwidth(call.job.threads),
            oracle_error=self.error,
            backends=self.observed.backends,
        )


@dataclass(frozen=True)
class Observed:
    """What one call did: matrix-product FLOPs, bytes above what stood before, op -> backend."""

    executed: int
    peak_bytes: int
    backends: dict[str, str]


def observe(call: _Call) -> Observed:
    """Watch one call."""
    call.rewind()
    before = vars(call).copy()  # stays alive: the profiler cannot count the release of what it saw no start of
    with record_choices() as choices, flop_counter() as counter, peak_memory() as peak:
        call.step()
    del before
    backends = {choice.op: choice.backend for choice in choices}
    return Observed(counter.get_total_flops(), peak.bytes, backends)


def predicted_bytes(job: SpeedJob) -> float:
    """Peak bytes of a call, by the parabola through two sizes of about `WEIGHED` tokens and the origin.

    Each sequence of a batch counts as the first.
    """
    sizes = _halvings(job.grid, WEIGHED)[-2:]
    tokens = [math.prod(grid) for grid in sizes]
    each = [_peak_bytes(replace(job, grid=grid, batch=1)) / math.prod(grid) for grid in sizes]
    square = max(0.0, (each[0] - each[-1]) / (tokens[0] - tokens[-1])) if len(sizes) > 1 else 0.0
    linear = max(0.0, each[-1] - square * tokens[-1])
    wanted = math.prod(job.grid)
    return job.batch * wanted * (square * wanted + linear)


def check_memory(job: SpeedJob) -> None:
    """Raise `OutOfMemory` unless a call will fit: it would end the whole run, so this must be known before."""
    needed, available = predicted_bytes(job), machine.available_memory()
    if needed > 0.9 * available:
        raise OutOfMemory(
            f"a call at {math.prod(job.grid)} tokens needs about {needed / 2**30:.1f} GiB, "
            f"{available / 2**30:.1f} GiB are available"
        )


@cache
def _peak_bytes(job: SpeedJob) -> int:
    return observe(_call(job)).peak_bytes


def oracle_error(job: SpeedJob) -> float:
    """Relative RMS error of a job's layer at a small size, along the path that is timed.

    The reference is the oracle in float64; for the backend `oracle` itself it is the automatic backend. The error
    may reach the dtype's `TOLERANCE`, or twice that of the reference itself in this dtype: where a mechanism
    chooses, by a maximum say, rounding alone moves the choice.

    Raises:
        OracleMismatch: the error is larger.
    """
    error, allowed = _errors(replace(job, grid=_halvings(job.grid, CHECKED)[-1], batch=min(job.batch, 2)))
    if not error <= allowed:  # NaN is an error too
        raise OracleMismatch(
            f"refusing to report the {job.measure} speed of {job.mechanism!r} on backend {job.backend!r} in "
            f"{job.dtype}: its relative RMS error against backend {_reference(job)!r} in float64 is {error:.1e}, "
            f"allowed {allowed:.1e}"
        )
    return error


def _reference(job: SpeedJob) -> str:
    return "auto" if job.backend == "oracle" else "oracle"


@cache
def _errors(job: SpeedJob) -> tuple[float, float]:
    """The error, and what is allowed."""
    call = _call(job)
    reference = copy.deepcopy(call.layer)
    for module in reference.modules():
        if isinstance(module, Mechanism):
            module.backend = _reference(job)
    rounded = copy.deepcopy(reference)
    expected = call.expected(reference.double(), call.x_BNC.double())

    def error(got: list[Tensor]) -> float:
        return max(_relative_rms(*pair) for pair in zip(got, expected, strict=True))

    found, allowed = error(call.outputs()), TOLERANCE[call.x_BNC.dtype]
    if not found <= allowed:
        allowed = max(allowed, 2 * error(call.expected(rounded, call.x_BNC)))
    return found, allowed


def _relative_rms(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny))


def _halvings(grid: tuple[int, ...], tokens: int) -> list[tuple[int, ...]]:
    """The grid, and every axis halved again and again until at most `tokens` are left."""
    grids = [grid]
    while math.prod(grids[-1]) > tokens:
        grids.append(tuple(-(-size // 2) for size in grids[-1]))
    return grids


class _Call(ABC):
    """A layer and its input, for one measure.

    Attributes:
        steps: calls that may follow one `rewind`.
        state: what is carried behind the sequence, where something is.
    """

    steps = 1
    state: Any = None

    def __init__(self, job: SpeedJob, ahead: int = 0) -> None:
        dtype = getattr(torch, job.dtype, None)
        if dtype not in TOLERANCE:
            known = ", ".join(str(each).removeprefix("torch.") for each in TOLERANCE)
            raise BadInput(f"dtype is one of {known}, got {job.dtype!r}")
        self.job = job
        self.grid = (*job.grid[:-1], job.grid[-1] + ahead)
        tokens = math.prod(self.grid)
        with torch.random.fork_rng(devices=()), torch.no_grad():
            torch.manual_seed(0)
            layer = attlas.mixer(
                job.mechanism,
                job.dim,
                job.heads,
                causal=job.causal,
                length=tokens,
                grid=self.grid,
                backend=job.backend,
                **job.params,
            )
            for parameter in layer.parameters():
                if not parameter.any():  # zeros would hide from the oracle check what they multiply
                    parameter.normal_(std=0.02)
            x_BNC = torch.randn(job.batch, tokens, job.dim)
        self.layer: Mixer = layer.to(dtype).eval()
        self.x_BNC = x_BNC.to(dtype)

    def rewind(self) -> None:
        """Make ready for `steps` calls; not timed."""
        self.state = None

    @abstractmethod
    def step(self) -> None:
        """The call that is timed."""

    @abstractmethod
    def outputs(self) -> list[Tensor]:
        """What the timed path computes, to be compared with `expected`."""

    def expected(self, layer: Mixer, x_BNC: Tensor) -> list[Tensor]:
        """What a reference layer computes by one plain forward."""
        with torch.no_grad():
            return [layer(x_BNC, grid=self.grid)]

    def cost(self) -> Cost:
        """FLOPs and pairs of one call."""
        return self._cost(self.layer, self.grid)

    def _cost(self, part: Mechanism, grid: tuple[int, ...]) -> Cost:
        return part.cost(self.job.batch, math.prod(grid), grid=grid)


class _Forward(_Call):
    @torch.no_grad()
    def step(self) -> None:
        self.layer(self.x_BNC, grid=self.grid)

    def outputs(self) -> list[Tensor]:
        return self.expected(self.layer, self.x_BNC)


class _Training(_Call):
    """Forward and backward, with gradients of the input and of every parameter."""

    def __init__(self, job: SpeedJob) -> None:
        super().__init__(job)
        self.x_BNC.requires_grad_()
        seed_BNC = torch.randn(self.x_BNC.shape, generator=torch.Generator().manual_seed(1))
        self.seed_BNC = seed_BNC.to(self.x_BNC.dtype)

    def rewind(self) -> None:
        self.x_BNC.grad = None
        self.layer.zero_grad()

    def step(self) -> None:
        self.layer(self.x_BNC, grid=self.grid).backward(self.seed_BNC)

    def outputs(self) -> list[Tensor]:
        return self.expected(self.layer, self.x_BNC)

    def expected(self, layer: Mixer, x_BNC: Tensor) -> list[Tensor]:
        """The output, and all gradients as one vector."""
        y_BNC = layer(x_BNC, grid=self.grid)
        wanted = [x_BNC, *layer.parameters()]
        grads = torch.autograd.grad(y_BNC, wanted, self.seed_BNC.to(y_BNC), materialize_grads=True)
        return [y_BNC.detach(), torch.cat([grad.flatten() for grad in grads])]

    def cost(self) -> Cost:
        """Three times the forward: a product has two products as its gradient.

        What attends to pairs counts 3.5 times, as the field does: its scores are computed anew.
        """
        layer = self.layer
        whole = self._cost(layer, self.grid)
        core = self._cost(layer.attend if isinstance(layer, attlas.Attention) else layer, self.grid)
        return replace(whole, flops=3 * whole.flops + (core.flops // 2 if core.pairs else 0))


class _Prefill(_Call):
    """The whole sequence into a fresh state."""

    def __init__(self, job: SpeedJob, ahead: int = 0) -> None:
        if len(job.grid) != 1:
            raise BadInput(f"{job.measure} runs along one axis, got grid {job.grid}")
        super().__init__(job, ahead)
        self.fresh = self.layer.initial_state(job.batch, like=self.x_BNC)

    @torch.no_grad()
    def step(self) -> None:
        _, self.state = self.layer.extend(self.x_BNC, self.fresh)

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        return [self.layer.extend(self.x_BNC, self.fresh)[0]]


class _Decode(_Prefill):
    """Token after token behind a state of N tokens.

    States are chained, as in use, where a cache grows in place. After max(8, N / 32) tokens the chain starts
    again from the state behind N - 1 tokens. The first token, which copies a cache, is not timed.
    """

    def __init__(self, job: SpeedJob) -> None:
        self.steps = max(8, math.prod(job.grid) // 32)
        super().__init__(job, ahead=self.steps)
        first = math.prod(job.grid) - 1
        self.segments = self.x_BNC[:, :first].split(SEGMENT, 1) if first else ()
        self.tokens = self.x_BNC[:, first:].split(1, 1)
        _, self.before = self._extend(self.segments)
        self.rewind()  # from now on something stands behind `before`, so that every rewind copies

    @torch.no_grad()
    def _extend(self, pieces: Iterable[Tensor]) -> tuple[list[Tensor], Any]:
        outputs, state = [], self.fresh
        for piece_BnC in pieces:
            y_BnC, state = self.layer.extend(piece_BnC, state)
            outputs.append(y_BnC)
        return outputs, state

    def rewind(self) -> None:
        self.chained, self.taken = self.before, 0
        self.step()
        self.state = self.chained

    @torch.no_grad()
    def step(self) -> None:
        _, self.chained = self.layer.extend(self.tokens[self.taken], self.chained)
        self.taken += 1

    def outputs(self) -> list[Tensor]:
        outputs, _ = self._extend((*self.segments, *self.tokens))
        return [torch.cat(outputs, 1)]

    def cost(self) -> Cost:
        """What one more token adds."""
        before, after = (self._cost(self.layer, (self.job.grid[0] + more,)) for more in (0, 1))
        return Cost(after.flops - before.flops, after.executed - before.executed, after.pairs - before.pairs)


_CALLS: dict[str, Callable[[SpeedJob], _Call]] = {
    "forward": _Forward,
    "forward+backward": _Training,
    "prefill": _Prefill,
    "decode": _Decode,
}


def _call(job: SpeedJob) -> _Call:
    if job.measure not in _CALLS:
        raise BadInput(f"measure is one of {', '.join(_CALLS)}, got {job.measure!r}")
    return _CALLS[job.measure](job)
