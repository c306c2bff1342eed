"""`attlas compare`, `bench` and `report` from end to end, and what happens when they are disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attlas import cli

TINY = ["compare", "softmax,pool", "--task", "digits", "--steps", "2", "--dim", "16", "--layers", "1", "--no-speed"]


@pytest.fixture
def attlas(monkeypatch, capsys):
    """Run a command line in this process; returns (exit code, what was printed)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["attlas", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, " ".join((out + err).split())

    monkeypatch.setattr(cli, "console", cli.Console(width=160))
    return run


def records(store: Path) -> dict[str, dict]:
    return {file.name: json.loads(file.read_text()) for file in (store / "records").glob("*.json")}


def test_compare_trains_reports_and_resumes(attlas, tmp_path):
    store = tmp_path / "store"
    code, text = attlas(*TINY, "--workers", 1, "--store", store)
    assert code == 0
    for expected in ("accuracy", "softmax (again)", "baseline", "pool", "parameters", "report:"):
        assert expected in text
    page = (store / "report.html").read_text()
    assert "attlas compare softmax,pool" in page
    first = records(store)
    assert len(first) == 3 * 3  # softmax, its control and pool, three seeds each
    assert all(record["failure"] is None for record in first.values())

    victim = store / "records" / min(first)
    victim.write_text("{ not json")
    times = {file.name: file.stat().st_mtime_ns for file in (store / "records").iterdir()}
    with pytest.warns(UserWarning, match=victim.name):
        code, _ = attlas(*TINY, "--workers", 1, "--store", store)
    assert code == 0
    again = records(store)
    assert again[victim.name]["result"]["value"] == first[victim.name]["result"]["value"]
    changed = {n for n, t in times.items() if (store / "records" / n).stat().st_mtime_ns != t}
    assert changed == {victim.name}, "finished jobs were run again"
    assert any((store / "corrupt").iterdir()), "the unreadable file was thrown away"

    code, text = attlas("report", store, "--html", tmp_path / "other.html")
    assert code == 0
    assert (tmp_path / "other.html").exists()


def test_what_fails_is_a_row_with_its_reason(attlas, tmp_path):
    arguments = ["compare", "softmax,criss_cross", "--task", "text", "--steps", 1, "--no-speed", "--workers", 1]
    code, text = attlas(*arguments, "--length", 16, "--seeds", 1, "--store", tmp_path)
    assert code == 0
    assert "criss_cross does not serve" in text


def test_bench_measures_and_refuses(attlas, tmp_path):
    arguments = ["bench", "linear,criss_cross", "--sizes", "64..128", "--dim", 32, "--heads", 2, "--threads", 1]
    code, text = attlas(*arguments, "--measures", "forward,decode", "--pattern", "causal", "--store", tmp_path)
    assert code == 0
    for expected in ("linear", "SDPA", "materialised", "forward at 128 tokens", "decode at 128 tokens"):
        assert expected in text
    failures = {r["job"]["mechanism"] for r in records(tmp_path).values() if r["failure"]}
    assert failures == {"criss_cross"}


def test_mistakes_are_named_before_any_work(attlas, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for arguments, message in [
        (["compare", "sofmax"], "did you mean 'softmax'"),
        (["compare", "--task", "txt"], "did you mean 'text'"),
        (["compare", "--seeds", "0"], "at least 1"),
        (["compare", "--set", "window=3"], "mechanism.name=value"),
        (["compare", "softmax", "--set", "pool.size=5"], "settings for pool"),
        (["bench", "--sizes", "12y"], "written as 4096, 14x14"),
        (["bench", "--sizes", "14x14..28x28"], "ranges are of one axis, got '14x14..28x28': write 14x14,28x28"),
        (["bench", "--sizes", "512..256"], "a range rises, got '512..256'"),
        (["bench", "--sizes", "4..inf"], "positive and finite"),
        (["bench", "--sizes", ""], "names at least one"),
        (["bench", "--measures", ","], "names at least one"),
        (["bench", "linear", "--set", "pool.size=5"], "settings for pool, but asked for are linear"),
        (["bench", "--pattern", "sideways"], "pattern is one of"),
        ([*TINY, "--store", tmp_path / "file"], "is a file"),
        ([*TINY, "--store", tmp_path / "other"], "holds something else"),
        (["report", tmp_path / "nowhere"], "no store at"),
    ]:
        code, text = attlas(*arguments)
        assert code == 2, arguments
        assert message in text
        assert "Traceback" not in text


def test_ctrl_c_loses_nothing_and_the_same_command_goes_on(tmp_path):
    long = ["compare", "softmax", "--task", "digits", "--steps", "30", "--dim", "16", "--layers", "1", "--no-speed"]
    store = ["--workers", "1", "--store", str(tmp_path / "store")]
    command = [sys.executable, "-c", "from attlas.cli import main; main()", *long, *store]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("store/records/*.json")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no record came"
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    if process.returncode == 0:  # all were done before the signal came
        assert len(records(tmp_path / "store")) == 6
        return
    assert process.returncode == 130
    assert "the same command goes on from them" in " ".join(text.split())
    done = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("store/records/*.json")}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert len(records(tmp_path / "store")) == 6
    assert all((tmp_path / "store/records" / name).stat().st_mtime_ns == when for name, when in done.items())


def test_bench_models_measures_networks_once(attlas, tmp_path):
    sizes = ["--side", 32, "--batch", 2, "--threads", 1, "--store", tmp_path]
    code, text = attlas("bench", "models", "vit_micro", *sizes)
    assert code == 0
    assert "vit_micro" in text
    assert "images/s" in text
    before = records(tmp_path)
    assert attlas("bench", "models", "vit_micro", *sizes)[0] == 0
    assert records(tmp_path) == before
    assert attlas("bench", "softmax", "vit_micro")[1].endswith("separate them by commas: softmax,vit_micro")
    assert "--side: only of networks" in attlas("bench", "softmax", "--side", 64)[1]
    assert "--dim, --set: only of mechanisms" in attlas("bench", "models", "vit_micro", "--dim", 8, "--set", "a=1")[1]
    assert "at least 1" in attlas("bench", "models", "vit_micro", "--batch", 0)[1]
    code, text = attlas("bench", "models", "vit_large", *sizes)
    assert code == 2
    assert "left out, with more than 60 M parameters (--largest): vit_large" in text


def test_compare_trains_networks_on_pictures(attlas, tmp_path):
    code, text = attlas(
        *("compare", "poolformer_micro", "--task", "images", "--steps", 1, "--seeds", 1, "--workers", 1),
        *("--store", tmp_path),
    )
    assert code == 0
    assert "vit_micro (again)" in text
    kinds = {record["job"]["kind"] for record in records(tmp_path).values()}
    assert kinds == {"quality"}, "no lengths are swept for networks"
    assert "poolformer_micro" in attlas("compare", "poolformer_mikro", "--task", "images")[1]
    assert "--dim: only of mechanisms" in attlas("compare", "vit_micro", "--task", "images", "--dim", 8)[1]
    assert "on _micro" in attlas("compare", "vit_t*", "--task", "images")[1]
