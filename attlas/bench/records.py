"""What is measured: jobs, and the records that come of them.

A job says everything that decides a result; its key is a hash of that. A record is a job with a result or
with the reason why there is none: a mechanism that fails is data, not a crash.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Measure = Literal["forward", "forward+backward", "prefill", "decode"]


@dataclass(frozen=True)
class SpeedJob:
    """Time, memory and FLOPs of one layer at one size.

    Attributes:
        mechanism: a name for `attlas.mixer`, with a variant behind a colon.
        backend: of its ops; `auto`, or `oracle` for the materialised softmax baseline.
        causal: which self-attention pattern.
        measure: `forward` (no grad), `forward+backward`, `prefill` (the sequence into a fresh state) or
            `decode` (one token behind a state of that many tokens).
        grid: the shape of the positions; (N,) for a sequence.
        batch, dim, heads: sizes of the layer's input.
        dtype: "float32", "bfloat16", ...
        threads: torch threads.
        params: settings of the mechanism.
    """

    mechanism: str
    backend: str
    causal: bool
    measure: Measure
    grid: tuple[int, ...]
    batch: int = 1
    dim: int = 512
    heads: int = 8
    dtype: str = "float32"
    threads: int = 2
    params: dict[str, Any] = field(default_factory=dict, hash=False)
    kind: Literal["speed"] = "speed"


@dataclass(frozen=True)
class QualityJob:
    """One training run of one small model on one task.

    Attributes:
        mechanism: a name for `attlas.mixer`, with a variant behind a colon; on tasks of pictures also one for
            `attlas.models.create`.
        task: name of the task.
        seed: of weights and data order.
        label: how the row is called; the noise control is the baseline under another label and seed.
        steps, batch, length: of the training.
        dim, heads, layers: of the model.
        parameters: the budget that the model is fitted to; image networks are as large as they are.
        threads: torch threads.
        params: settings of the mechanism.
        learning_rate: the highest of the schedule.
    """

    mechanism: str
    task: str
    seed: int
    label: str
    steps: int
    batch: int
    length: int
    dim: int
    heads: int
    layers: int
    parameters: int
    threads: int = 1
    params: dict[str, Any] = field(default_factory=dict, hash=False)
    learning_rate: float = 6e-3
    kind: Literal["quality"] = "quality"


@dataclass(frozen=True)
class NetworkJob:
    """Time and memory of one image network.

    Attributes:
        network: a name for `attlas.models.create`.
        side: of the pictures, in pixels.
        batch: pictures at a time, beside one.
        dtype: of weights and pictures.
        threads: torch threads.
    """

    network: str
    side: int = 224
    batch: int = 8
    dtype: str = "float32"
    threads: int = 2
    kind: Literal["network"] = "network"


Job = SpeedJob | QualityJob | NetworkJob


def key(job: Job) -> str:
    """A short name for a job, the same in every process."""
    text = json.dumps(asdict(job), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Times:
    """Seconds of one call: median and quartiles over `runs` calls."""

    median: float
    lower: float
    upper: float
    runs: int


@dataclass(frozen=True)
class SpeedResult:
    """What a `SpeedJob` gave.

    Attributes:
        times: of one call.
        flops: what the mathematics needs, FLOP = 2 MAC, for this measure (see `attlas.core.Cost`).
        executed: matrix-product FLOPs that ran, as FlopCounterMode counts.
        pairs: visible pairs of one forward, 0 where there are none.
        state_bytes: of the state carried behind the sequence, in prefill and decode; else 0.
        peak_bytes: of memory that the call allocates above what stood before it.
        gemm_rate, bandwidth: FLOP/s and bytes/s that this machine reached in the same run.
        oracle_error: relative RMS error of this layer against its oracle at a small size.
        backends: op -> backend that ran.
    """

    times: Times
    flops: int
    executed: int
    pairs: int
    state_bytes: int
    peak_bytes: int
    gemm_rate: float
    bandwidth: float
    oracle_error: float
    backends: dict[str, str]


@dataclass(frozen=True)
class QualityResult:
    """What a `QualityJob` gave.

    Attributes:
        metric: name of the task's measure, such as "bits per byte" or "accuracy".
        value: of the measure on held-out data, at the end.
        higher_is_better: which way the measure runs.
        curve: (step, training loss) pairs, in nats.
        parameters: of the model as built.
        mixer_parameters: of the mixers alone.
        state_bytes: per sequence at the task's length, over all layers; 0 where it does not stream.
        seconds: of training.
        tokens_per_second: of training.
        details: the measure on named parts of the held-out data, where there are several.
    """

    metric: str
    value: float
    higher_is_better: bool
    curve: list[tuple[int, float]]
    parameters: int
    mixer_parameters: int
    state_bytes: int
    seconds: float
    tokens_per_second: float
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class NetworkResult:
    """What a `NetworkJob` gave.

    Attributes:
        parameters: of the network.
        macs: multiply-accumulates of one picture, as its mathematics needs them.
        single: of a forward of one picture.
        batched: of a forward of the whole batch.
        peak_bytes: that a forward of one picture allocates above weights and picture.
        oracle_error: of the smallest size of its family, relative.
    """

    parameters: int
    macs: int
    single: Times
    batched: Times
    peak_bytes: int
    oracle_error: float


@dataclass(frozen=True)
class Failure:
    """Why a job gave nothing."""

    error: str
    message: str


@dataclass(frozen=True)
class Record:
    """A job, what it gave, and on which machine."""

    job: Job
    result: SpeedResult | QualityResult | NetworkResult | None
    failure: Failure | None
    machine: dict[str, str]


def to_json(record: Record) -> dict[str, Any]:
    """The record as plain JSON data."""
    return asdict(record)


def from_json(data: dict[str, Any]) -> Record:
    """The record that `to_json` wrote.

    Raises:
        KeyError, TypeError, ValueError: the data is not a record.
    """
    kind = data["job"]["kind"]
    job_type, result_type = {
        "speed": (SpeedJob, SpeedResult),
        "quality": (QualityJob, QualityResult),
        "network": (NetworkJob, NetworkResult),
    }[kind]
    job, result = dict(data["job"]), data["result"]
    if "grid" in job:
        job["grid"] = tuple(job["grid"])
    if result is not None:
        result = dict(result)
        for times in result.keys() & {"times", "single", "batched"}:
            result[times] = Times(**result[times])
        if "curve" in result:
            result["curve"] = [(int(step), float(loss)) for step, loss in result["curve"]]
        result = result_type(**result)
    failure = None if data["failure"] is None else Failure(**data["failure"])
    return Record(job_type(**job), result, failure, dict(data["machine"]))
