import errno
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import joblib
import pytest
from rich.console import Console

from attlas.bench import runner
from attlas.bench.extras import MissingExtra
from attlas.bench.records import Failure, Record, SpeedJob, key
from attlas.bench.runner import compare_jobs, control, run
from attlas.bench.store import Store, StoreError, StoreWarning
from attlas.bench.tasks import TASKS
from attlas.core.errors import BadInput, UnknownName, Unsupported
from tests.bench.jobs import JOB, jobs, made_up

fork = multiprocessing.get_context("fork")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def done(monkeypatch):
    """Training is made up; the list of jobs that were given to it."""
    given = []

    def perform(job, progress=None):
        given.append(job)
        return made_up(job)

    monkeypatch.setattr(runner, "perform", perform)
    return given


# -- which jobs --------------------------------------------------------------------------------------------


def test_a_comparison_has_three_seeds_the_baseline_and_its_noise_control():
    found = compare_jobs(["pool", "softmax:gqa"], ["recall", "digits"], params={"pool": {"size": 5}})
    rows = Counter((job.task, job.label, job.mechanism) for job in found)
    names = {"softmax": "softmax", "pool": "pool", "softmax:gqa": "softmax:gqa", "softmax (again)": "softmax"}
    assert rows == {(task, label, name): 3 for task in ("recall", "digits") for label, name in names.items()}
    seeds = {label: {job.seed for job in found if job.label == label} for label in names}
    assert seeds["softmax"] == seeds["pool"] == {0, 1, 2}
    assert seeds[control("softmax")] == {3, 4, 5}
    assert {job.label: job.params for job in found}["pool"] == {"size": 5}
    assert len({key(job) for job in found}) == len(found)
    for job in found:
        setting = TASKS[job.task].setting
        assert (job.steps, job.length, job.learning_rate) == (setting.steps, setting.length, setting.learning_rate)
    # A seed of all mechanisms comes before the next, so that an interrupted run has something to show.
    assert [job.seed for job in found if job.task == "recall" and job.label == "pool"] == [0, 1, 2]
    assert {job.seed for job in found[:3]} == {0}


def test_the_budget_is_what_the_baseline_takes_at_the_tasks_ratio():
    (job, *_) = compare_jobs([], ["text"], sizes={"dim": 32, "length": 16, "layers": 1})
    embedding = 256 * 32 + (3 * 32 * 32 + 32) + 16 * 32
    layer = 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 2 * 2 * 32
    head = 2 * 32 + 32 * 256 + 256
    assert job.parameters == embedding + layer + head
    assert {job.parameters for job in compare_jobs(["pool"], ["text"], parameters=77_777)} == {77_777}


def test_what_cannot_be_compared_is_refused_at_once():
    with pytest.raises(UnknownName, match="did you mean 'pool'"):
        compare_jobs(["pol"], ["text"])
    with pytest.raises(UnknownName, match="did you mean 'text'"):
        compare_jobs(["pool"], ["txt"])
    with pytest.raises(BadInput, match="settings for agent, but compared are softmax, pool"):
        compare_jobs(["pool"], ["text"], params={"agent": {}})
    with pytest.raises(BadInput, match=r"sizes are steps, batch.*got stepz"):
        compare_jobs(["pool"], ["text"], sizes={"stepz": 3})
    with pytest.raises(BadInput, match="at least 1, got 0"):
        compare_jobs(["pool"], ["text"], seeds=0)
    with pytest.raises(Unsupported, match="criss_cross does not serve"):
        compare_jobs(["pool"], ["text"], baseline="criss_cross")


# -- running them ------------------------------------------------------------------------------------------


def test_records_of_all_jobs_come_back_and_the_run_is_written_down(tmp_path, console, done):
    store = Store(tmp_path)
    assert run(jobs(3), store, workers=1, command="attlas compare", console=console) == list(map(made_up, jobs(3)))
    assert "3/3" in console.file.getvalue()
    assert [entry["command"] for entry in store.runs()] == ["attlas compare"]


def test_a_second_run_does_only_what_is_missing(tmp_path, console, done):
    store = Store(tmp_path)
    run(jobs(2), store, workers=1, console=console)
    done.clear()
    assert run([*jobs(4), *jobs(4)], store, workers=1, console=console) == list(map(made_up, jobs(4)))
    assert [job.seed for job in done] == [2, 3]
    (tmp_path / "records" / f"{key(JOB)}.json").write_text("{")
    done.clear()
    with pytest.warns(StoreWarning):
        assert len(run(jobs(4), store, workers=1, console=console)) == 4
    assert done == [JOB]


def test_what_fails_is_a_row_with_its_reason_and_is_retried_when_asked(tmp_path, console):
    store = Store(tmp_path)
    unable = replace(JOB, mechanism="criss_cross", label="criss_cross")
    failed, trained = run([unable, JOB], store, workers=1, console=console)
    assert failed.result is None
    assert failed.failure.error == "Unsupported"
    assert "criss_cross does not serve" in failed.failure.message
    assert trained.result.parameters == pytest.approx(JOB.parameters, abs=20)
    assert "python" in failed.machine
    before = os.stat(tmp_path / "records" / f"{key(unable)}.json").st_mtime_ns
    run([unable], store, workers=1, console=console)
    assert os.stat(tmp_path / "records" / f"{key(unable)}.json").st_mtime_ns == before
    store.put(Record(unable, None, Failure("MemoryError", ""), {}))
    (again,) = run([unable], store, workers=1, retry_failed=True, console=console)
    assert again.failure.error == "Unsupported"


def test_speed_jobs_follow_training_in_order_and_alone(tmp_path, console, done, monkeypatch):
    store = Store(tmp_path)
    speed = [SpeedJob("pool", "auto", False, "forward", (length,)) for length in (64, 128)]

    def sweep(given):
        for job in given:
            assert len(done) == 2
            holds = fork.Process(target=lambda: sys.exit(_is_free(store, alone=False)))
            holds.start()
            holds.join()
            assert holds.exitcode == 0
            yield Record(job, None, Failure("OverTime", ""), {})

    monkeypatch.setattr(runner, "sweep", sweep)
    records = run([speed[0], *jobs(2), speed[1]], store, workers=1, console=console)
    assert [record.job for record in records] == [speed[0], *jobs(2), speed[1]]
    assert "measuring speed" in console.file.getvalue()


def _is_free(store, *, alone):
    """Whether another process could have the machine now."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with store.machine(alone=alone):
        return True


def test_a_full_disk_stops_the_run_and_the_next_goes_on(tmp_path, console, done, monkeypatch):
    store = Store(tmp_path)
    put = store.put
    fsync = os.fsync

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_after_two(record):
        monkeypatch.setattr(os, "fsync", full if record.job.seed == 2 else fsync)
        put(record)

    monkeypatch.setattr(store, "put", fill_after_two)
    with pytest.raises(StoreError, match="the disk is full; free some space"):
        run(jobs(5), store, workers=1, console=console)
    monkeypatch.setattr(os, "fsync", fsync)
    assert len(store.records()) == 2
    done.clear()
    assert len(run(jobs(5), Store(tmp_path), workers=1, console=console)) == 5
    assert [job.seed for job in done] == [2, 3, 4]


def test_missing_joblib_is_said_before_any_work(tmp_path, console, done, monkeypatch):
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(MissingExtra, match=r"needs joblib: pip install 'attlas\[bench\]'"):
        run(jobs(2), Store(tmp_path), workers=2, console=console)
    assert len(run(jobs(2), Store(tmp_path), workers=1, console=console)) == 2


# -- beside others -----------------------------------------------------------------------------------------


def slow_perform(log: Path, seconds: float):
    """Made-up training that takes a while and writes down which process did which job."""

    def perform(job, progress=None):
        with log.open("a") as out:
            out.write(f"{os.getpid()} {job.seed}\n")
        time.sleep(seconds)
        return made_up(job)

    return perform


def start_run(path: Path, count: int) -> multiprocessing.Process:
    def target() -> None:
        records = run(jobs(count), Store(path), workers=1, console=Console(file=io.StringIO()))
        sys.exit(len(records))

    process = fork.Process(target=target)
    process.start()
    return process


def test_two_runs_at_once_do_no_job_twice_and_both_see_all_records(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setattr(runner, "perform", slow_perform(log, 0.1))
    processes = [start_run(tmp_path / "store", 12) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [12, 12]
    lines = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(seed) for _, seed in lines) == list(range(12))
    assert {int(pid) for pid, _ in lines} == {process.pid for process in processes}


def test_the_job_of_a_killed_run_is_done_by_one_that_waited_for_it(tmp_path, console, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setattr(runner, "perform", slow_perform(log, 60))
    killed = start_run(tmp_path / "store", 2)
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
    monkeypatch.setattr(runner, "perform", slow_perform(log, 0))
    waiting = start_run(tmp_path / "store", 2)
    while len(log.read_text().splitlines()) < 2:
        time.sleep(0.01)
    time.sleep(0.2)
    assert waiting.is_alive()
    killed.kill()
    waiting.join(20)
    assert waiting.exitcode == 2
    assert [line.split()[1] for line in log.read_text().splitlines()] == ["0", "1", "0"]
    killed.join()


def test_ctrl_c_says_how_to_go_on_and_keeps_what_is_done(tmp_path, console, monkeypatch):
    store = Store(tmp_path)

    def perform(job, progress=None):
        if job.seed == 2:
            signal.raise_signal(signal.SIGINT)
        return made_up(job)

    monkeypatch.setattr(runner, "perform", perform)
    with pytest.raises(KeyboardInterrupt):
        run(jobs(4), store, workers=1, console=console)
    assert f"Finished results are in {tmp_path}; the same command goes on from them." in console.file.getvalue()
    assert {record.job.seed for record in store.records()} == {0, 1}
    assert store.claim(jobs(3)[2]) is not None


# -- workers -----------------------------------------------------------------------------------------------


def test_jobs_go_to_whatever_is_registered_with_joblib(tmp_path, console, monkeypatch):
    threads = []

    def perform(job, progress=None):
        threads.append(threading.current_thread())
        return made_up(job)

    monkeypatch.setattr(runner, "perform", perform)
    with joblib.parallel_config(backend="threading"):
        records = run(jobs(5), Store(tmp_path), workers=2, console=console)
    assert records == list(map(made_up, jobs(5)))
    assert len(threads) == 5
    assert threading.main_thread() not in threads


def test_a_job_that_kills_its_worker_is_a_row_and_the_others_are_done(tmp_path, console, monkeypatch):
    def perform_for(caller, job):
        if job.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return made_up(job)

    monkeypatch.setattr(runner, "_perform_for", perform_for)
    records = run(jobs(4), Store(tmp_path), workers=2, console=console)
    assert [record.job.seed for record in records] == [0, 1, 2, 3]
    assert [record.failure is None for record in records] == [True, False, True, True]
    assert records[1].failure.error == "TerminatedWorkerError"


@pytest.mark.filterwarnings("error::UserWarning")
def test_workers_end_where_a_record_cannot_be_written(tmp_path, console, monkeypatch):
    def perform_for(caller, job):
        (tmp_path / f"{os.getpid()}.worker").touch()
        time.sleep(60 if job.seed else 0)
        return made_up(job)

    def full(_record):
        raise StoreError("the disk is full")

    store = Store(tmp_path / "store")
    monkeypatch.setattr(runner, "_perform_for", perform_for)
    monkeypatch.setattr(store, "put", full)
    with pytest.raises(StoreError, match="the disk is full"):
        run(jobs(4), store, workers=2, console=console)
    workers = [int(file.stem) for file in tmp_path.glob("*.worker")]
    assert workers
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert all(store.claim(job) for job in jobs(4))


SCRIPT = """
import sys
from attlas.bench.runner import run
from attlas.bench.store import Store
from tests.bench.jobs import jobs
from dataclasses import replace

found = [replace(job, steps=steps) for job, steps in zip(jobs(4), (1, 1, 10**9, 10**9))]
try:
    run(found, Store(sys.argv[1]), workers=2)
except KeyboardInterrupt:
    sys.exit(130)
"""


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("how", "finished"), [(signal.SIGINT, 0), (signal.SIGINT, 2), (signal.SIGKILL, 2)])
def test_an_end_from_outside_leaves_no_process_and_no_loss(tmp_path, how, finished):
    """The whole path: real training in workers, ended as a terminal (all processes) or a system (one) would."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tmp_path],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )
    # With nothing finished, it comes while the workers are being started.
    while len(list(tmp_path.glob("records/*.json" if finished else "claims/*.lock"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0 if finished else 0.5)
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
    _, shown = process.communicate(timeout=30)  # at the end of the last process that holds stderr
    deadline = time.monotonic() + 10
    while _is_alive(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert "the same command goes on" in shown
        assert "Traceback" not in shown
    store = Store(tmp_path)
    assert [record.job.steps for record in store.records()] == [1] * finished
    assert all(store.claim(replace(job, steps=10**9)) for job in jobs(4))
