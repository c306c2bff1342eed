"""Training one small model on one task, the same way for every mechanism."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from attlas.bench.network import build, count_parameters
from attlas.bench.records import QualityJob, QualityResult
from attlas.bench.tasks import task_named
from attlas.bench.tasks.base import Batch, loss
from attlas.core.errors import AttlasError, BadInput
from attlas.core.mechanism import auxiliary_loss

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""
LOWEST = 0.1
"""Where it ends, as a share of its highest."""
CLIP = 1.0
"""Largest norm of a gradient."""
POINTS = 100
"""Points that a curve keeps."""

Progress = Callable[[int], None]
"""Told how many steps are done."""


class Diverged(AttlasError, ArithmeticError):
    """The loss is no longer a number."""


def train(job: QualityJob, progress: Progress | None = None) -> QualityResult:
    """Train, then measure on held-out data; the same job gives the same numbers on the same machine.

    AdamW; a linear warm-up, then a cosine down; clipped gradients. The loss is the task's plus the auxiliary
    loss of the mixers, whatever they are.

    Args:
        job: what to train.
        progress: called after every step.

    Raises:
        Diverged: the loss is not finite.
        BadInput: sizes that have no meaning, or a budget that leaves no MLP.
        AttlasError: a task or mechanism that does not exist, or a mechanism that does not serve the task.
    """
    if min(job.steps, job.batch, job.dim, job.heads, job.layers, job.threads) < 1:
        raise BadInput(f"steps, batch, dim, heads, layers and threads are at least 1, got {job}")
    task = task_named(job.task)(job.length)
    with reproducibly(job.seed, job.threads):
        model = build(task, job)
        optimizer = torch.optim.AdamW(
            model.parameters(), job.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        start = time.perf_counter()
        losses = descend(model, optimizer, task.batches(job.seed, job.batch), job, progress)
        seconds = time.perf_counter() - start
        model.eval()
        value, details = task.evaluate(model)
        return QualityResult(
            metric=task.metric.name,
            value=value,
            higher_is_better=task.metric.higher_is_better,
            curve=_curve(losses),
            parameters=count_parameters(model),
            mixer_parameters=sum(map(count_parameters, model.mixers)),
            state_bytes=model.state_bytes(),
            seconds=seconds,
            tokens_per_second=job.steps * job.batch * job.length / seconds,
            details=details,
        )


def descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    job: QualityJob,
    progress: Progress | None,
) -> list[float]:
    """Train for the job's steps; the task's loss at each."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, job.steps))
    losses: list[float] = []
    for step in range(1, job.steps + 1):
        batch = next(batches)
        task_loss = loss(model(batch.inputs), batch.targets)
        total = task_loss + auxiliary_loss(model)
        if not math.isfinite(total.item()):
            raise Diverged(
                f"{job.mechanism} on {job.task}, seed {job.seed}: the loss is {total.item()} at step {step}; "
                f"try a learning rate below {job.learning_rate}"
            )
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(task_loss.item())
        if progress is not None:
            progress(step)
    return losses


def rate(step: int, steps: int) -> float:
    """The learning rate of a step (from 0) as a share of its highest."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    fall = (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
    return LOWEST + (1 - LOWEST) * fall


def _curve(losses: list[float]) -> list[tuple[int, float]]:
    """(step, mean loss since the point before), at most POINTS of them."""
    size = -(-len(losses) // POINTS)
    blocks = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [(min((i + 1) * size, len(losses)), sum(block) / len(block)) for i, block in enumerate(blocks)]


@contextmanager
def reproducibly(seed: int, threads: int) -> Iterator[None]:
    """Torch's generator and threads set, and put back behind."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
