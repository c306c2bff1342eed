"""The jobs of a comparison, and how a list of jobs is run.

Training jobs are independent and go through joblib: processes on this machine, or whatever cluster the caller
has registered with `joblib.parallel_config`. Speed jobs run one after another in this process, with nothing
beside them. A record is written as soon as it is there; what is already in the store is not run again.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from attlas.bench import machine, networks
from attlas.bench.extras import extra
from attlas.bench.network import Network, PictureNetwork, count_parameters, is_network
from attlas.bench.records import Failure, Job, NetworkJob, QualityJob, Record, SpeedJob, key
from attlas.bench.speed import sweep
from attlas.bench.store import Claim, Store
from attlas.bench.tasks import task_named
from attlas.bench.tasks.base import Setting, Task
from attlas.bench.training import train
from attlas.blocks.factory import resolve
from attlas.core.errors import BadInput


def compare_jobs(
    mechanisms: Iterable[str],
    tasks: Iterable[str],
    *,
    seeds: int = 3,
    baseline: str = "softmax",
    parameters: int | None = None,
    params: Mapping[str, Mapping[str, Any]] | None = None,
    sizes: Mapping[str, Any] | None = None,
    threads: int = 1,
) -> list[QualityJob]:
    """Every mechanism on every task with every seed, the baseline, and the baseline again as noise control.

    What a mechanism cannot do is found out when its job runs, and becomes a failed record.

    Args:
        mechanisms: names for `attlas.mixer`; on tasks of pictures also of image networks.
        tasks: names of tasks.
        seeds: how many.
        baseline: what the others are held against. The control is the same under `control(baseline)`, with
            as many other seeds.
        parameters: the budget of every model; by default what the baseline takes at the task's MLP ratio. Image
            networks are as large as they are, also as a baseline.
        params: mechanism -> its settings.
        sizes: fields of `Setting` that replace the tasks' own.
        threads: torch threads per job.

    Raises:
        UnknownName: a mechanism or task that does not exist.
        BadInput: settings for a mechanism that is not compared, or sizes without a meaning.
        Unsupported: the baseline cannot do a task.
    """
    names = list(dict.fromkeys([baseline, *mechanisms]))
    own = {} if params is None else params
    for name in names:
        if not is_network(name):
            resolve(name)
    if strangers := set(own) - set(names):
        raise BadInput(f"settings for {', '.join(sorted(strangers))}, but compared are {', '.join(names)}")
    if seeds < 1:
        raise BadInput(f"seeds counts the runs of each mechanism, at least 1, got {seeds}")
    rows = [(name, name, range(seeds)) for name in names]
    rows.append((baseline, control(baseline), range(seeds, 2 * seeds)))
    jobs = []
    for task_name in dict.fromkeys(tasks):
        setting, task = _setting(task_name, sizes or {})
        budget = parameters or _budget(task, setting, baseline, own.get(baseline, {}))
        jobs += [
            QualityJob(
                mechanism=name,
                task=task_name,
                seed=row_seeds[index],
                label=label,
                steps=setting.steps,
                batch=setting.batch,
                length=setting.length,
                dim=setting.dim,
                heads=setting.heads,
                layers=setting.layers,
                parameters=budget,
                threads=threads,
                params=dict(own.get(name, {})),
                learning_rate=setting.learning_rate,
            )
            for index in range(seeds)
            for name, label, row_seeds in rows
        ]
    return jobs


def control(baseline: str) -> str:
    """The label of the noise control."""
    return f"{baseline} (again)"


def _setting(task: str, sizes: Mapping[str, Any]) -> tuple[Setting, Task]:
    cls = task_named(task)
    try:
        setting = replace(cls.setting, **sizes)
    except TypeError:
        known = ", ".join(Setting.__dataclass_fields__)
        raise BadInput(f"sizes are {known}, got {', '.join(sizes)}") from None
    return setting, cls(setting.length)


def _budget(task: Task, setting: Setting, baseline: str, params: Mapping[str, Any]) -> int:
    if is_network(baseline):
        return count_parameters(PictureNetwork(task, baseline, params))
    model = Network(
        task,
        baseline,
        dim=setting.dim,
        heads=setting.heads,
        layers=setting.layers,
        params=params,
        hidden=setting.ratio * setting.dim,
    )
    return count_parameters(model)


def run(
    jobs: Iterable[Job],
    store: Store,
    *,
    workers: int = -1,
    retry_failed: bool = False,
    command: str | None = None,
    console: Console | None = None,
) -> list[Record]:
    """Do all jobs that the store has no record of, and return the records of all.

    A job that raises becomes a failed record. Jobs that another run is at are left to it and read when it is
    done; if it ends without, they are done here.

    Args:
        jobs: what to do; training comes before speed.
        store: where records are kept.
        workers: jobs at a time, as joblib counts them: -1 is all cores. With 1 they run in this process.
        retry_failed: also do jobs again whose record is a failure.
        command: the command line to write down, by default that of this process.
        console: where progress is shown.

    Raises:
        StoreError: a record cannot be written. What was written before stays.
        KeyboardInterrupt: on Ctrl-C, after all workers have ended. What was written before stays.
    """
    wanted = list({key(job): job for job in jobs}.values())
    to_train = [job for job in wanted if isinstance(job, QualityJob)]
    to_measure = [job for job in wanted if isinstance(job, SpeedJob)]
    whole = [job for job in wanted if isinstance(job, NetworkJob)]
    console = console or Console(stderr=True)
    store.begin_run(shlex.join(sys.argv) if command is None else command, machine.describe())
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, speed_estimate_period=600) as bars:
        try:
            training = _Share(store, to_train, retry_failed, bars)
            training.do(lambda todo: _train(todo, workers, bars), "training", alone=False)
            _Share(store, to_measure, retry_failed, bars).do(_measure, "measuring speed", alone=True)
            _Share(store, whole, retry_failed, bars).do(_measure_networks, "measuring networks", alone=True)
        except KeyboardInterrupt:
            console.print(
                f"Interrupted. Finished results are in {store.path}; the same command goes on from them.",
                soft_wrap=True,
            )
            raise
    records = (store.get(job) for job in wanted)
    return [record for record in records if record is not None]


OneKind = TypeVar("OneKind", SpeedJob, QualityJob, NetworkJob)


class _Share(Generic[OneKind]):
    """What of a list of jobs falls to this run, beside others that may be at the same list."""

    def __init__(self, store: Store, jobs: Sequence[OneKind], retry_failed: bool, bars: Progress) -> None:
        self.store = store
        self.jobs: Sequence[OneKind] = jobs
        self.retry_failed = retry_failed
        self.bars = bars
        self.claims: dict[str, Claim] = {}
        self.problem: Exception | None = None

    def do(self, perform: Callable[[Iterator[OneKind]], Generator[Record]], title: str, *, alone: bool) -> None:
        """Do the jobs that are not done, with the machine alone or shared.

        `perform` turns jobs into records and asks for a job only when it is about to do it.
        """
        if not self.jobs:
            return
        bar = self.bars.add_task(title, total=len(self.jobs))
        todo = [job for job in self.jobs if not self._done(job)]
        self.bars.advance(bar, len(self.jobs) - len(todo))
        if not todo:
            return
        with self._waiting(bar, title):
            here = self.store.machine(alone=alone)
        with here:
            while todo:
                busy: list[OneKind] = []
                try:
                    with closing(perform(self._claimed(todo, busy, bar))) as records:
                        for record in records:
                            self.store.put(record)
                            self.claims.pop(key(record.job)).release()
                            self.bars.advance(bar)
                finally:
                    while self.claims:
                        self.claims.popitem()[1].release()
                if self.problem is not None:
                    raise self.problem
                if busy:
                    with self._waiting(bar, title):
                        self.store.wait(busy[0])
                todo = busy

    def _claimed(self, jobs: Iterable[OneKind], busy: list[OneKind], bar: TaskID) -> Iterator[OneKind]:
        """The jobs that nobody else is at or has done, each claimed when it is asked for."""
        try:
            for job in jobs:
                claim = self.store.claim(job)
                if claim is None:
                    busy.append(job)
                elif self._done(job):
                    claim.release()
                    self.bars.advance(bar)
                else:
                    self.claims[key(job)] = claim
                    yield job
        except Exception as problem:  # joblib asks from a thread of its own, where it would be lost
            self.problem = problem

    def _done(self, job: OneKind) -> bool:
        record = self.store.get(job)
        return record is not None and not (self.retry_failed and record.failure)

    @contextmanager
    def _waiting(self, bar: TaskID, title: str) -> Iterator[None]:
        self.bars.update(bar, description=f"{title} (waiting for another run)")
        yield
        self.bars.update(bar, description=title)


def _train(jobs: Iterator[QualityJob], workers: int, bars: Progress) -> Generator[Record]:
    """Records of training jobs as they come."""
    if workers == 1:
        yield from _train_here(jobs, bars)
        return
    joblib = extra("joblib", "training several models at a time")
    out: dict[str, QualityJob] = {}

    def calls() -> Iterator[Any]:
        for job in jobs:
            out[key(job)] = job
            yield joblib.delayed(_perform_for)(os.getpid(), job)

    def records(calls: Iterable[Any]) -> Iterator[Record]:
        parallel = joblib.Parallel(workers, return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
        with _interrupts_ignored():  # by the workers, which are started here; this process ends them
            results = parallel(calls)
        try:
            for record in results:
                out.pop(key(record.job))
                yield record
        finally:
            with warnings.catch_warnings(action="ignore"):  # joblib's, about jobs that end half done
                results.close()

    while True:
        try:
            yield from records(calls())
            return
        except BrokenProcessPool:
            # A worker died, and nobody knows over which job: each that was out is done again alone.
            for job in list(out.values()):
                try:
                    yield from records([joblib.delayed(_perform_for)(os.getpid(), job)])
                except BrokenProcessPool as problem:
                    out.pop(key(job))
                    yield Record(job, None, _failure(problem), machine.describe())


def _measure(jobs: Iterator[SpeedJob]) -> Generator[Record]:
    """Records of speed jobs as they come."""
    yield from sweep(jobs)


def _measure_networks(jobs: Iterator[NetworkJob]) -> Generator[Record]:
    """The same of whole networks."""
    yield from networks.sweep(jobs)


def _train_here(jobs: Iterator[QualityJob], bars: Progress) -> Iterator[Record]:
    """The same in this process, with a bar over the steps."""
    for job in jobs:
        bar = bars.add_task(f"  {job.label}, {job.task}, seed {job.seed}", total=job.steps)
        yield perform(job, lambda step, bar=bar: bars.update(bar, completed=step))  # type: ignore[misc]
        bars.remove_task(bar)


def perform(job: QualityJob, progress: Callable[[int], None] | None = None) -> Record:
    """Train; what goes wrong becomes the record."""
    try:
        return Record(job, train(job, progress), None, machine.describe())
    except Exception as problem:
        return Record(job, None, _failure(problem), machine.describe())


def _perform_for(caller: int, job: QualityJob) -> Record:
    """`perform` in a worker; one that is a child of its caller ends with it."""
    if os.getppid() == caller:
        _end_with(caller)
    return perform(job)


@cache
def _end_with(parent: int) -> None:
    """End this process within a second of its parent's end, even if that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _failure(problem: Exception) -> Failure:
    return Failure(type(problem).__name__, str(problem))


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C does nothing inside the block, nor ever in a process that is started there."""
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
