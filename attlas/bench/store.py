"""Results on disk: one file per job, written as it comes.

    store/
      attlas-store.txt            says what this folder is
      records/<key>.json          a job and what it gave
      claims/<key>.lock           held by the run that is at the job; the system lets go when the run ends
      claims/<host>.machine       shared by runs that train, held alone by a run that measures speed
      corrupt/<key>-<time>.json   what could not be read; its job counts as not done
      runs/<time>-<pid>.json      command line, machine and start of each run

A file appears whole or not at all, so that a run may end at any moment, and several may share a store. Locks
are those of POSIX systems.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TypeVar

from attlas.bench.records import Job, Record, from_json, key, to_json
from attlas.core.errors import AttlasError

MARKER = "attlas-store.txt"
FOLDERS = ("records", "claims", "corrupt", "runs")

CURES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "your quota is used up; free some space",
    errno.EACCES: "you may not write there; give a folder of your own",
    errno.EPERM: "you may not write there; give a folder of your own",
    errno.EROFS: "it is read-only; give a folder elsewhere",
    errno.ENOLCK: "it cannot lock files; give a folder on a local disk",
    errno.ENOTSUP: "it cannot lock files; give a folder on a local disk",
}

Parsed = TypeVar("Parsed")


class StoreError(AttlasError):
    """The store cannot be used, or can no longer be written."""


class StoreWarning(UserWarning):
    """A file of the store could not be read and was set aside."""


class Claim:
    """A right that others do not have, until it is released or the process ends."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def release(self) -> None:
        """Let others have it."""
        self.file.close()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Store:
    """The results in one folder.

    Args:
        path: the folder.
        create: make it where it is missing.

    Raises:
        StoreError: the path is a file, holds something else, is missing, or cannot be written.
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{self.path} is a file, and a store is a folder; give another path")
        if not create and not (self.path / MARKER).exists():
            raise StoreError(f"{self.path} is no results store: there is no {MARKER} in it")
        with self._guarded():
            self.path.mkdir(parents=True, exist_ok=True)
            # The marker comes before anything else, so that a store in the making is never taken for a stranger.
            strangers = [name for name in os.listdir(self.path) if not name.startswith(f".{MARKER}")]
            if not (self.path / MARKER).exists():
                if strangers:
                    raise StoreError(f"{self.path} holds something else ({strangers[0]}); give a new folder")
                _write(self.path / MARKER, "Results of attlas, one file per job under records/.\n")
            for folder in FOLDERS:
                (self.path / folder).mkdir(exist_ok=True)

    def get(self, job: Job) -> Record | None:
        """The record of a job; None where there is none, or none that can be read."""
        return self._read(self._file(job), _record)

    def put(self, record: Record) -> None:
        """Keep a record, in place of an earlier one of the same job.

        Raises:
            StoreError: it cannot be written; what was kept before is as it was.
        """
        with self._guarded():
            _write(self._file(record.job), json.dumps(to_json(record)))

    def records(self) -> list[Record]:
        """All records that can be read."""
        return self._all("records", _record)

    def claim(self, job: Job) -> Claim | None:
        """The right to do a job; None if another run has it."""
        try:
            return self._lock(f"{key(job)}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None

    def wait(self, job: Job) -> None:
        """Sleep until no other run is at the job."""
        self._lock(f"{key(job)}.lock", fcntl.LOCK_EX).release()

    def machine(self, *, alone: bool) -> Claim:
        """This machine, alone or shared with other runs on this store, as soon as they leave it so."""
        return self._lock(f"{socket.gethostname()}.machine", fcntl.LOCK_EX if alone else fcntl.LOCK_SH)

    def begin_run(self, command: str, machine: dict[str, str]) -> None:
        """Write down that a run begins: its exact command line, the machine and its versions, the time."""
        start = datetime.now(UTC)
        entry = {"command": command, "start": start.isoformat(timespec="seconds"), "machine": machine}
        with self._guarded():
            _write(self.path / "runs" / f"{start:%Y%m%dT%H%M%S}-{os.getpid()}.json", json.dumps(entry))

    def runs(self) -> list[dict[str, Any]]:
        """What `begin_run` wrote: command, start, machine; oldest first."""
        return self._all("runs", lambda entry, _: dict(entry))

    def _file(self, job: Job) -> Path:
        return self.path / "records" / f"{key(job)}.json"

    def _all(self, folder: str, parse: Callable[[Any, str], Parsed]) -> list[Parsed]:
        found = (self._read(file, parse) for file in sorted((self.path / folder).glob("*.json")))
        return [each for each in found if each is not None]

    def _read(self, file: Path, parse: Callable[[Any, str], Parsed]) -> Parsed | None:
        """What the file says; None if it is missing or had to be set aside."""
        with self._guarded():
            try:
                return parse(json.loads(file.read_text()), file.stem)
            except FileNotFoundError:
                return None
            except (ValueError, TypeError, KeyError) as problem:
                self._set_aside(file, f"{type(problem).__name__}: {problem}")
                return None

    def _set_aside(self, file: Path, reason: str) -> None:
        kept = self.path / "corrupt" / f"{file.stem}-{datetime.now(UTC):%Y%m%dT%H%M%S%f}.json"
        with suppress(FileNotFoundError):  # another run was faster
            os.replace(file, kept)
        warnings.warn(
            f"{file} cannot be read ({reason}). It was moved to {kept}; what it held counts as not done: run the "
            "same command again",
            StoreWarning,
            stacklevel=4,
        )

    def _lock(self, name: str, operation: int) -> Claim:
        with self._guarded():
            claim = Claim(open(self.path / "claims" / name, "a"))  # noqa: SIM115  (the claim closes it)
            try:
                fcntl.flock(claim.file, operation)
            except BaseException:
                claim.release()
                raise
            return claim

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Say what a failing system call means for the store."""
        try:
            yield
        except BlockingIOError:  # no failure: another run holds the lock
            raise
        except OSError as problem:
            cure = CURES.get(problem.errno or 0, str(problem))
            raise StoreError(
                f"the store {self.path} cannot be used: {cure}. Finished results are kept; the same command goes "
                "on from them"
            ) from problem


def _record(data: Any, name: str) -> Record:
    record = from_json(data)
    if key(record.job) != name:
        raise ValueError("it holds another job than its name says")
    return record


def _write(file: Path, text: str) -> None:
    """Write so that the file is there whole or not at all, also after a power cut."""
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with open(draft, "x") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(draft, file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
