"""Small jobs and made-up records for the tests of store and runner."""

from dataclasses import replace

from attlas.bench.records import QualityJob, QualityResult, Record

JOB = QualityJob(
    mechanism="softmax",
    task="recall",
    seed=0,
    label="softmax",
    steps=2,
    batch=2,
    length=40,
    dim=8,
    heads=2,
    layers=1,
    parameters=2_000,
)

RESULT = QualityResult(
    metric="accuracy",
    value=0.5,
    higher_is_better=True,
    curve=[(1, 3.0), (2, 2.5)],
    parameters=2_001,
    mixer_parameters=288,
    state_bytes=128,
    seconds=0.1,
    tokens_per_second=1600.0,
    details={"4 pairs": 0.75},
)


def jobs(count: int) -> list[QualityJob]:
    return [replace(JOB, seed=seed) for seed in range(count)]


def made_up(job: QualityJob) -> Record:
    return Record(job, replace(RESULT, value=float(job.seed)), None, {"python": "3"})
