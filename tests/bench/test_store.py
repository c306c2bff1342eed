import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from attlas.bench.records import Failure, Record, SpeedJob, SpeedResult, Times, key
from attlas.bench.store import Store, StoreError, StoreWarning
from tests.bench.jobs import JOB, jobs, made_up

fork = multiprocessing.get_context("fork")


def files(store: Store, folder: str) -> list[Path]:
    return sorted((store.path / folder).iterdir())


def test_records_come_back_as_they_went_in(tmp_path):
    store = Store(tmp_path / "new" / "store")
    speed_job = SpeedJob("pool", "auto", False, "forward", (14, 14), params={"size": 5})
    times = Times(1e-3, 9e-4, 2e-3, 40)
    speed = SpeedResult(times, 10, 12, 0, 0, 4096, 1e11, 3e10, 1e-7, {"op": "torch"})
    records = [
        made_up(JOB),
        Record(speed_job, speed, None, {"python": "3"}),
        Record(jobs(2)[1], None, Failure("Diverged", "the loss is nan"), {}),
    ]
    for record in records:
        store.put(record)
    again = Store(store.path)
    assert sorted(again.records(), key=repr) == sorted(records, key=repr)
    assert [again.get(record.job) for record in records] == records
    assert again.get(jobs(3)[2]) is None


def test_a_later_record_takes_the_place_of_an_earlier_one(tmp_path):
    store = Store(tmp_path)
    store.put(Record(JOB, None, Failure("MemoryError", ""), {}))
    store.put(made_up(JOB))
    assert store.records() == [made_up(JOB)]


def test_runs_are_written_down(tmp_path):
    store = Store(tmp_path)
    store.begin_run("attlas compare --tasks 'text'", {"torch": "2"})
    (run,) = store.runs()
    assert run["command"] == "attlas compare --tasks 'text'"
    assert run["machine"] == {"torch": "2"}
    assert run["start"].endswith("+00:00")


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"job": {"kind": "quality"}}', "[1, 2]", "null", '"text"', "\x00\x00", '{"job": {"kind": "other"}}'],
)
def test_a_file_that_cannot_be_read_is_set_aside_and_its_job_is_not_done(tmp_path, text):
    store = Store(tmp_path)
    for job in jobs(2):
        store.put(made_up(job))
    broken = tmp_path / "records" / f"{key(JOB)}.json"
    broken.write_text(text)
    with pytest.warns(StoreWarning, match=rf"(?s){key(JOB)}.*moved to .*corrupt.*run the same command again"):
        assert store.get(JOB) is None
    (kept,) = files(store, "corrupt")
    assert kept.read_text() == text
    assert store.records() == [made_up(jobs(2)[1])]
    store.put(made_up(JOB))
    assert store.get(JOB) == made_up(JOB)


def test_a_record_under_the_name_of_another_job_is_not_believed(tmp_path):
    store = Store(tmp_path)
    first, second = jobs(2)
    store.put(made_up(first))
    os.rename(tmp_path / "records" / f"{key(first)}.json", tmp_path / "records" / f"{key(second)}.json")
    with pytest.warns(StoreWarning, match="another job"):
        assert store.records() == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_loses_nothing(tmp_path, monkeypatch, code):
    store = Store(tmp_path)
    first, second = jobs(2)
    store.put(made_up(first))

    def full(_descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"free some space.*Finished results are kept; the same command goes on"):
            store.put(made_up(second))
        with pytest.raises(StoreError, match="free some space"):
            store.put(Record(first, None, Failure("MemoryError", ""), {}))
    assert [file.name for file in files(store, "records")] == [f"{key(first)}.json"]
    assert store.records() == [made_up(first)]
    store.put(made_up(second))
    assert store.get(second) == made_up(second)


def test_paths_that_cannot_be_a_store_are_refused_untouched(tmp_path, monkeypatch):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(StoreError, match=r"notes.txt is a file"):
        Store(file)
    with pytest.raises(StoreError, match=r"holds something else \(notes.txt\)"):
        Store(tmp_path)
    with pytest.raises(StoreError, match="no results store"):
        Store(tmp_path / "missing", create=False)
    with pytest.raises(StoreError, match="cannot be used"):
        Store(file / "below")
    assert os.listdir(tmp_path) == ["notes.txt"]

    def denied(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(StoreError, match="you may not write there; give a folder of your own"):
        Store(tmp_path / "denied")


def test_a_claim_excludes_others_until_released(tmp_path):
    first, second = Store(tmp_path), Store(tmp_path)
    claim = first.claim(JOB)
    assert claim is not None
    assert second.claim(JOB) is None
    assert second.claim(jobs(2)[1]) is not None
    claim.release()
    assert second.claim(JOB) is not None


def test_a_killed_process_lets_go_of_its_claims(tmp_path):
    store = Store(tmp_path)

    def hold(claimed) -> None:
        _claim = Store(tmp_path).claim(JOB)
        (tmp_path / "records" / f".{key(JOB)}.json.half").write_text('{"job"')  # killed in the middle of a write
        claimed.set()
        signal.pause()

    claimed = fork.Event()
    process = fork.Process(target=hold, args=(claimed,))
    process.start()
    assert claimed.wait(10)
    assert store.claim(JOB) is None
    process.kill()
    store.wait(JOB)
    assert store.claim(JOB) is not None
    assert store.records() == []
    process.join()


def test_the_machine_is_shared_by_training_and_held_alone_by_speed(tmp_path):
    store = Store(tmp_path)
    order, training = fork.SimpleQueue(), fork.Event()

    def measure() -> None:
        training.wait(10)
        with Store(tmp_path).machine(alone=True):
            order.put("measures")

    process = fork.Process(target=measure)
    process.start()  # before the locks, which a fork would share
    with store.machine(alone=False), store.machine(alone=False):
        training.set()
        process.join(0.3)
        assert process.is_alive()
        order.put("trained")
    process.join(10)
    assert [order.get(), order.get()] == ["trained", "measures"]


def test_many_processes_may_make_one_store_at_once(tmp_path):
    path = tmp_path / "store"

    def fill(seed: int) -> None:
        Store(path).put(made_up(jobs(8)[seed]))

    processes = [fork.Process(target=fill, args=(seed,)) for seed in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert sorted(record.job.seed for record in Store(path).records()) == list(range(8))
    assert not [file for file in files(Store(path), "records") if file.suffix != ".json"]


def test_records_are_plain_json(tmp_path):
    store = Store(tmp_path)
    store.put(made_up(JOB))
    (file,) = files(store, "records")
    assert json.loads(file.read_text())["result"]["details"] == {"4 pairs": 0.75}
