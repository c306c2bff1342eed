"""Compiles the C++ kernels beside this file for this processor, the first time one is wanted.

A library is found in the cache by a hash of its sources, the flags and what the compiler says about itself and about
`-march=native`, so a change of any of these compiles anew, and machines may share a home directory. The cache is
`$ATTLAS_CACHE/kernels`, else `$XDG_CACHE_HOME/attlas/kernels`, else `~/.cache/attlas/kernels`. The compiler is
`$CXX`, else g++, c++ or clang++. `ATTLAS_NO_KERNELS=1` turns all kernels off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch  # noqa: F401  brings its OpenMP runtime, which the kernels then share

from attlas.core.errors import AttlasError

FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fopenmp",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
)

_SOURCES = Path(__file__).parent


class KernelUnavailable(AttlasError, RuntimeError):
    """A kernel that cannot be compiled, loaded or used here; the message says why."""


def names() -> tuple[str, ...]:
    """The kernels that exist."""
    return tuple(sorted(source.stem for source in _SOURCES.glob("*.cpp")))


def load(name: str) -> ctypes.CDLL:
    """The library of a kernel, compiled now if it was not before, which takes seconds.

    Raises:
        KernelUnavailable: it cannot be had. The outcome of the first attempt in this process stands.
    """
    if os.environ.get("ATTLAS_NO_KERNELS") == "1":
        raise KernelUnavailable("kernels are turned off by ATTLAS_NO_KERNELS=1")
    library = _attempt(name)
    if isinstance(library, str):
        raise KernelUnavailable(library)
    return library


def status(name: str) -> tuple[bool, str]:
    """Whether a kernel is usable here, and its file or the reason why not. Compiles it like `load`."""
    try:
        return True, f"compiled as {load(name)._name}"
    except KernelUnavailable as reason:
        return False, str(reason)


# Dynamo asks once and does not look inside. This is what torch.compiler.assume_constant_result does, after importing
# all of Dynamo, which takes longer than importing Attlas.
status._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _attempt(name: str) -> ctypes.CDLL | str:
    try:
        return ctypes.CDLL(str(_library(name)))
    except KernelUnavailable as reason:
        return str(reason)
    except OSError as error:
        return f"the compiled kernel does not load: {error}"


def _library(name: str) -> Path:
    if name not in names():
        raise KernelUnavailable(f"there is no kernel {name!r}, only {', '.join(names())}")
    if os.name != "posix":
        raise KernelUnavailable("kernels are compiled on Linux and macOS only")
    compiler = _compiler()
    digest = hashlib.sha256(repr(FLAGS).encode())
    # The predefined macros are the compiler's version and what -march=native stands for on this processor.
    digest.update(_run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]).encode())
    for source in [*sorted(_SOURCES.glob("*.h")), _SOURCES / f"{name}.cpp"]:
        digest.update(source.read_bytes())
    cache = _cache()
    library = cache / f"{name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        try:
            _compile(compiler, name, library)
        except OSError as error:
            raise KernelUnavailable(
                f"the kernel cache {cache} cannot be written ({error.strerror}); set ATTLAS_CACHE to another folder"
            ) from error
    return library


def _compile(compiler: list[str], name: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with _alone(library.with_name(f"{name}.lock")):
        if library.exists():  # another process was faster
            return
        handle, unfinished = tempfile.mkstemp(dir=library.parent, prefix=f"{name}-", suffix=".unfinished")
        os.close(handle)
        try:
            _run([*compiler, *FLAGS, str(_SOURCES / f"{name}.cpp"), "-o", unfinished])
            os.replace(unfinished, library)
        finally:
            Path(unfinished).unlink(missing_ok=True)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Inside, no other process is: the system drops the lock of a process that dies. The file stays for the next."""
    import fcntl  # POSIX only

    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cache() -> Path:
    try:
        if root := os.environ.get("ATTLAS_CACHE"):
            return Path(root).expanduser() / "kernels"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attlas" / "kernels"
    except RuntimeError as error:
        raise KernelUnavailable("there is no home directory for the kernel cache; set ATTLAS_CACHE") from error


def _compiler() -> list[str]:
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    asked = f"$CXX={shlex.join(wanted)} is" if wanted else "g++, c++ and clang++ are"
    raise KernelUnavailable(f"no C++ compiler was found ({asked} not on the path)")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line.lower()), lines[0])
        raise KernelUnavailable(f"compiling failed: {first.strip()}")
    return done.stdout
