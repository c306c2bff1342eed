"""The build of the kernels, with compilers that are shell scripts."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attlas.core.errors import BackendUnavailable
from attlas.kernels.cpu import build
from attlas.kernels.cpu.build import KernelUnavailable
from attlas.ops.decay import decayed_linear_attention

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """An empty cache, and nothing remembered from earlier attempts."""
    monkeypatch.setenv("ATTLAS_CACHE", str(tmp_path / "cache"))
    for name in ("ATTLAS_NO_KERNELS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    build._attempt.cache_clear()
    yield
    build._attempt.cache_clear()


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Installs a compiler that logs every compilation and then runs `script` with the output file as $output."""
    log = tmp_path / "log"
    log.touch()

    def install(script):
        path = tmp_path / "compiler"
        path.write_text(
            "#!/bin/sh\n"
            'case "$*" in *-dM*) echo "#define __VERSION__ 1"; exit 0;; esac\n'
            f"echo compiled >> {log}\nfor output; do :; done\n{script}\n"
        )
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return lambda: len(log.read_text().splitlines())

    return install


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Some shared library, so that compiling is copying."""
    path = tmp_path_factory.mktemp("library") / "some.so"
    subprocess.run(["g++", "-shared", "-x", "c++", os.devnull, "-o", path], check=True)
    return path


def _load_at_once(barrier, results):
    barrier.wait()
    results.put(build.status("decay"))


def test_many_processes_compile_once(compiler, library):
    compilations = compiler(f'sleep 0.3; cp {library} "$output"')
    barrier, results = FORK.Barrier(6), FORK.Queue()
    processes = [FORK.Process(target=_load_at_once, args=(barrier, results)) for _ in range(6)]
    for process in processes:
        process.start()
    seen = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    ((usable, detail),) = seen
    assert usable
    assert Path(detail.removeprefix("compiled as ")).read_bytes() == library.read_bytes()
    assert compilations() == 1
    assert not list(build._cache().glob("*.unfinished"))


def _hold_forever(lock, held):
    with build._alone(lock):
        held.set()
        signal.pause()


def test_the_lock_of_a_killed_process_is_free(compiler, library):
    compiler(f'cp {library} "$output"')
    cache = build._cache()
    cache.mkdir(parents=True)
    held = FORK.Event()
    process = FORK.Process(target=_hold_forever, args=(cache / "decay.lock", held))
    process.start()
    assert held.wait(10)
    process.kill()
    process.join()
    assert build.status("decay")[0]


def test_the_cache_is_used_again_until_something_changes(compiler, library, monkeypatch, tmp_path):
    compilations = compiler(f'cp {library} "$output"')

    def compiled():
        build._attempt.cache_clear()
        build.load("decay")
        return compilations()

    assert [compiled(), compiled()] == [1, 1]
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    assert compiled() == 2
    sources = tmp_path / "sources"
    shutil.copytree(build._SOURCES, sources)
    monkeypatch.setattr(build, "_SOURCES", sources)
    assert compiled() == 2
    with open(sources / "simd.h", "a") as header:
        header.write("// changed\n")
    assert compiled() == 3
    script = Path(os.environ["CXX"])
    script.write_text(script.read_text().replace("__VERSION__ 1", "__VERSION__ 2"))
    assert compiled() == 4


@pytest.mark.parametrize(
    ("cxx", "reason"),
    [("", "g++, c++ and clang++ are not on the path"), ("ccache nothing++", "$CXX=ccache nothing++ is not on")],
)
def test_no_compiler(monkeypatch, tmp_path, cxx, reason):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", cxx)
    usable, detail = build.status("decay")
    assert not usable
    assert reason in detail
    with pytest.raises(KernelUnavailable, match="no C\\+\\+ compiler was found"):
        build.load("decay")


def test_a_failed_compilation_is_explained_and_remembered(compiler):
    compilations = compiler('echo "In file x:" >&2; echo "decay.cpp:7:1: error: boom" >&2; echo more >&2; exit 1')
    for _ in range(3):
        assert build.status("decay") == (False, "compiling failed: decay.cpp:7:1: error: boom")
    assert compilations() == 1
    assert [path.name for path in build._cache().iterdir()] == ["decay.lock"]


def test_a_library_that_does_not_load_is_explained(compiler, library):
    compiler(f'cp {library} "$output"')
    cached = build._library("decay")
    cached.write_bytes(b"broken off in the middle")
    usable, detail = build.status("decay")
    assert not usable
    assert detail.startswith("the compiled kernel does not load:")
    assert str(cached) in detail


def test_a_cache_that_cannot_be_written_leaves_the_torch_backend(compiler, library, monkeypatch, tmp_path):
    compilations = compiler(f'cp {library} "$output"')
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTLAS_CACHE", str(tmp_path / "file"))
    usable, detail = build.status("decay")
    assert not usable
    assert f"the kernel cache {tmp_path}/file/kernels cannot be written (Not a directory)" in detail
    assert compilations() == 0

    x = torch.randn(1, 2, 9, 4)
    slopes = torch.tensor([0.1, 1.0])
    _, choice = decayed_linear_attention.choose("auto", x, x, x, slopes)
    assert choice.backend == "torch"
    assert choice.passed_over == (("cpu", detail),)
    torch.testing.assert_close(
        decayed_linear_attention(x, x, x, slopes), decayed_linear_attention(x, x, x, slopes, backend="oracle")
    )
    with pytest.raises(BackendUnavailable, match="cannot be written"):
        decayed_linear_attention(x, x, x, slopes, backend="cpu")


def test_kernels_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("ATTLAS_NO_KERNELS", "1")
    assert build.status("decay") == (False, "kernels are turned off by ATTLAS_NO_KERNELS=1")


def test_a_kernel_that_does_not_exist():
    assert "decay" in build.names()
    with pytest.raises(KernelUnavailable, match=r"there is no kernel 'decoy', only .*decay"):
        build.load("decoy")


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("ATTLAS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build._cache() == tmp_path / "attlas" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert build._cache() == Path("/home/somebody/.cache/attlas/kernels")


def test_importing_compiles_nothing(compiler):
    compilations = compiler("exit 1")
    subprocess.run([sys.executable, "-c", "import attlas, attlas.ops.decay"], check=True)
    assert compilations() == 0
    assert not build._cache().exists()
