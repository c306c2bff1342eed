"""Records that look like a real run, made up with known truths, for the tests of the report."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from attlas.bench.records import (
    Failure,
    QualityJob,
    QualityResult,
    Record,
    SpeedJob,
    SpeedResult,
    Times,
)

MACHINE = {
    "processor": "Some Processor with 2 cores",
    "cores": "2",
    "memory": "7.8 GiB",
    "system": "Linux 6.1",
    "python": "3.11.2",
    "torch": "2.15.0",
    "attlas": "0.1.0",
}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
REACHED = {"lightning": 0.6, "linear": 0.45, "flow": 0.2, "neighborhood": 0.3, "pool": 0.9}
GEMM, BANDWIDTH = 190e9, 31e9
DIM = 512


def quality(
    task: str,
    label: str,
    mean: float,
    *,
    mechanism: str | None = None,
    seeds: int = 3,
    noise: float = 0.01,
    state: int = 0,
    seconds: float = 10.0,
    higher: bool = False,
    failure: Failure | None = None,
) -> Iterator[Record]:
    """The runs of one row: values scatter around `mean` by `noise`, losses fall as a power of the step."""
    draw = random.Random(f"{task}{label}")
    steps = 150
    for seed in range(seeds):
        job = QualityJob(mechanism or label, task, seed, label, steps, 16, 128, 64, 4, 2, parameters=120_000, threads=1)
        if failure is not None:
            yield Record(job, None, failure, MACHINE)
            continue
        value = mean + draw.gauss(0, noise)
        floor = 1 - mean if higher else mean * math.log(2)
        curve = [
            (step, floor + (5.5 - floor) * (1 + step / 4) ** -0.9 + abs(draw.gauss(0, 0.02)))
            for step in range(1, steps + 1, 3)
        ]
        took = seconds * draw.uniform(0.96, 1.05)
        result = QualityResult(
            metric="accuracy" if higher else "bits per byte",
            value=min(value, 1.0) if higher else value,
            higher_is_better=higher,
            curve=curve,
            parameters=120_000 + draw.randrange(-400, 400),
            mixer_parameters=33_000 + draw.randrange(-400, 400),
            state_bytes=state,
            seconds=took,
            tokens_per_second=steps * 16 * 128 / took,
        )
        yield Record(job, result, None, MACHINE)


def text_task() -> Iterator[Record]:
    """Softmax leads, flow is within noise of it, agent cannot be causal."""
    yield from quality("text", "softmax", 2.31, state=131_072, seconds=11)
    yield from quality("text", "softmax (again)", 2.312, mechanism="softmax", state=131_072, seconds=11.1)
    yield from quality("text", "lightning", 2.36, state=8_192, seconds=8.6)
    yield from quality("text", "linear", 2.47, state=8_448, seconds=9.4)
    yield from quality("text", "flow", 2.313, state=9_000, seconds=12.6)
    yield from quality("text", "neighborhood", 2.40, state=14_336, seconds=9.9)
    yield from quality("text", "pool", 2.95, state=1_024, seconds=6.2)
    why = Failure("Unsupported", "agent does not serve causal use. Mechanisms that do: <linear> & softmax")
    yield from quality("text", "agent", 0.0, failure=why)


def recall_task() -> Iterator[Record]:
    """Accuracy rises with the state."""
    for label, mechanism, mean, state in (
        ("softmax", "softmax", 0.985, 65_536),
        ("softmax (again)", "softmax", 0.982, 65_536),
        ("lightning", "lightning", 0.71, 8_192),
        ("linear", "linear", 0.55, 8_448),
        ("flow", "flow", 0.62, 9_000),
        ("neighborhood", "neighborhood", 0.41, 7_168),
        ("pool", "pool", 0.12, 512),
    ):
        yield from quality("recall", label, mean, mechanism=mechanism, state=state, higher=True, noise=0.02)


def speed(mechanism: str, backend: str, measure: str, tokens: int, seconds: float) -> Record:
    """One measurement, with a spread of a few percent."""
    draw = random.Random(f"{mechanism}{backend}{measure}{tokens}")
    took = seconds * draw.uniform(0.97, 1.03)
    job = SpeedJob(mechanism, backend, True, measure, (tokens,), dim=DIM)
    state = 2 * tokens * DIM * 4 if mechanism == "softmax" else 8 * 64 * 64 * 4
    scores = 8 * tokens * tokens * 4 if backend == "oracle" else 0
    result = SpeedResult(
        times=Times(took, took * 0.96, took * 1.07, 20),
        flops=flops(mechanism, measure, tokens),
        executed=2 * flops(mechanism, measure, tokens),
        pairs=pairs(mechanism, tokens),
        state_bytes=0 if measure.startswith("forward") else state,
        peak_bytes=(6 + len(mechanism)) * tokens * DIM * 4 + scores,
        gemm_rate=GEMM,
        bandwidth=BANDWIDTH,
        oracle_error=3e-7,
        backends={f"{mechanism}_attention": "torch" if backend == "auto" else backend},
    )
    return Record(job, result, None, MACHINE)


def pairs(mechanism: str, tokens: int) -> int:
    return 8 * tokens * (tokens + 1) // 2 if mechanism == "softmax" else 8 * tokens * 64


def flops(mechanism: str, measure: str, tokens: int) -> int:
    """Projections and two products per pair; pooling has no projections."""
    projections = 0 if mechanism == "pool" else 8 * tokens * DIM * DIM
    whole = projections + 4 * pairs(mechanism, tokens) * 64
    return {"forward+backward": 3 * whole, "decode": whole // tokens}.get(measure, whole)


def speed_sweep() -> Iterator[Record]:
    """Softmax is quadratic, materialised it runs out of memory; the others are linear."""
    for measure in ("forward", "forward+backward", "prefill", "decode"):
        streamed = measure == "decode"
        for n in LENGTHS:
            cache = 2 * n * DIM * 4 if streamed else 0
            for backend, reached in (("torch", 0.85), ("oracle", 0.12)):
                job = SpeedJob("softmax", backend, True, measure, (n,), dim=DIM)
                if backend == "oracle" and n > 4096 and not streamed:
                    why = Failure("OutOfMemory", f"{8 * n * n * 4 / 2**30:.1f} GiB of scores do not fit")
                    yield Record(job, None, why, MACHINE)
                    continue
                took = flops("softmax", measure, n) / GEMM / reached + cache / BANDWIDTH / reached
                yield speed("softmax", backend, measure, n, 1e-4 + took)
            for name, reached in REACHED.items():
                took = flops(name, measure, n) / GEMM / reached
                yield speed(name, "auto", measure, n, 3e-4 + took)


def everything() -> list[Record]:
    """Two tasks and a speed sweep."""
    return [*text_task(), *recall_task(), *speed_sweep()]
