"""Compiling on first use: safe, cached, and clear about why not."""

import os
import subprocess
import sys

import pytest

from attlas.kernels.cpu import build

LOAD = "from attlas.kernels.cpu import build; import json; print(json.dumps(build.status('decay')))"


def start(code=LOAD, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_that_start_together_compile_once(tmp_path):
    processes = [start(ATTLAS_CACHE=tmp_path) for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert out.startswith("[true"), out + err
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 1
    assert not list((tmp_path / "kernels").glob("*.unfinished"))

    (library,) = (tmp_path / "kernels").glob("*.so")
    library.write_bytes(b"broken off in the middle")
    out, _ = start(ATTLAS_CACHE=tmp_path).communicate(timeout=120)
    assert "does not load" in out


def test_why_not_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    asked = [
        ("no C++ compiler was found", start(ATTLAS_CACHE=tmp_path, CXX="no-such-compiler")),
        ("no C++ compiler was found", start(ATTLAS_CACHE=tmp_path, PATH=tmp_path)),
        ("compiling failed", start(ATTLAS_CACHE=tmp_path, CXX="false")),
        ("turned off by ATTLAS_NO_KERNELS", start(ATTLAS_CACHE=tmp_path, ATTLAS_NO_KERNELS=1)),
        ("cannot be written", start(ATTLAS_CACHE=tmp_path / "file")),
    ]
    for reason, process in asked:
        out, err = process.communicate(timeout=120)
        assert out.startswith("[false"), out + err
        assert reason in out
    assert not list(tmp_path.glob("kernels/*.unfinished"))


def test_a_failed_compilation_leaves_the_torch_backend(tmp_path):
    code = (
        "import attlas, torch\n"
        "layer = attlas.mixer('lightning', 16, 2, causal=True)\n"
        "print(attlas.explain(layer, torch.zeros(1, 4, 16)))\n"
        "attlas.mixer('lightning', 16, 2, causal=True, backend='cpu')(torch.zeros(1, 4, 16))"
    )
    out, err = start(code, ATTLAS_CACHE=tmp_path, CXX="false").communicate(timeout=120)
    assert "decayed_linear_attention: torch" in out
    assert "not cpu: compiling failed" in out
    assert "BackendUnavailable" in err.splitlines()[-1], "a backend that is named must not fall back"


def test_importing_compiles_nothing(tmp_path):
    code = "import attlas; attlas.mixer('lightning', 16, 2, causal=True)"
    _, err = start(code, ATTLAS_CACHE=tmp_path).communicate(timeout=120)
    assert not err
    assert not list(tmp_path.iterdir())


def test_an_unknown_kernel_is_named():
    with pytest.raises(build.KernelUnavailable, match="only decay"):
        build.load("decoy")
