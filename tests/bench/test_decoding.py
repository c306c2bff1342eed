"""`attlas bench --decode`: its figures, and that it refuses to give any while a kernel is wrong."""

import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from attlas import cli
from attlas.bench import decoding
from attlas.bench.rounds import in_rounds, quartiles


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(decoding, "SUMMED", 1 << 14)
    monkeypatch.setattr(decoding, "PREFILLS", ((2, 4096, 16, torch.bfloat16, True),))


def test_every_comparison_has_its_ratios(small):
    result = decoding.measure(1, rounds=3, scale=0.01)
    assert len(result["comparisons"]) == len(decoding.DECODES) + 2
    for work, found in result["comparisons"].items():
        assert all(len(seconds) == 3 for seconds in found["seconds"].values())
        for lower, median, upper in found["ratios"].values():
            assert 0 < lower <= median <= upper
        assert ("SDPA" in found["seconds"]) == ("int8" not in work)
    # The share of the bandwidth, from the seconds.
    case = decoding.DECODES[0]
    found = result["comparisons"][f"decode {case}"]
    read = 2 * 8 * int(case.keys * 0.01) * 64 * 4
    for what, ratio in (("kernel", "C++ alone, share of the read bandwidth"), ("op", "called from Python, share")):
        share = quartiles(
            (read / seconds) / (4 * int(decoding.SUMMED * 0.01) / total)
            for seconds, total in zip(found["seconds"][what], found["seconds"]["sum"], strict=True)
        )
        assert found["ratios"][ratio] == pytest.approx(share)
    console = Console(file=io.StringIO(), width=200)
    decoding.show(result, console)
    assert "decode B1 H32 G8 N16384 D128 int8" in console.file.getvalue()


@pytest.mark.parametrize("name", ["softmax_decode", "softmax_attention", "sigmoid_attention"])
def test_nothing_is_reported_while_the_oracle_check_is_red(name, monkeypatch, small):
    right = getattr(decoding, name)

    def wrong(*args, backend, **kwargs):
        result = right(*args, backend=backend, **kwargs)
        if backend == "oracle":
            return result
        return (1.1 * result[0], result[1]) if isinstance(result, tuple) else 1.1 * result

    monkeypatch.setattr(decoding, name, wrong)
    monkeypatch.setattr(decoding, "in_rounds", lambda *args: pytest.fail("something was measured"))
    with pytest.raises(decoding.OracleRed, match=r"is off by 1\.0e-01"):
        decoding.measure(1, rounds=3, scale=0.01)


def test_the_command_writes_what_it_shows(small, tmp_path):
    arguments = ["bench", "--decode", "--rounds", "3", "--scale", "0.01", "--threads", "1", "--store", str(tmp_path)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "decode.json").read_text())
    assert written["threads"] == 1
    assert written["machine"]
    assert "decode B4 H32 G4" in result.output


def test_rounds_take_turns():
    order = []
    times = in_rounds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "a", "b", "b"] * 3
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
