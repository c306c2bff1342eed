"""What the softmax kernels reach of this machine: decoding of its memory's speed, whole sequences of its GEMM.

`attlas bench --decode` prints it. Every figure is a ratio measured in one run, in rounds: against summing a large
float32 tensor, which reads memory as fast as PyTorch can, against matrix products of the same dtype, and against
`scaled_dot_product_attention` on the same work. Nothing is reported while a kernel differs from its oracle.

Decoding is measured twice: the C++ function with its arguments ready, and the operator as a user calls it. Reading a
cache drives the interpreter out of the processor's caches, so that the way from Python takes ten times as long as it
does alone: 0.1 to 0.25 ms, which shows beside a cache that is read in one or two.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attlas.bench import machine
from attlas.bench.rounds import Times, in_rounds, quartiles
from attlas.core.errors import AttlasError
from attlas.core.mask import Mask
from attlas.kernels.cpu.decode import prepare
from attlas.ops.decode import quantise_heads, softmax_decode
from attlas.ops.sigmoid import sigmoid_attention
from attlas.ops.softmax import softmax_attention

ALLOWED = {torch.float32: 5e-6, torch.bfloat16: 1e-2}
"""Largest error of a kernel against the float64 oracle, relative to the RMS of the output."""

SUMMED = 64 << 20
"""Elements of the tensor whose sum says how fast memory is read: 256 MiB, more than caches hold."""


class OracleRed(AttlasError, RuntimeError):
    """A kernel differs from its oracle, so that its speed means nothing."""


@dataclass(frozen=True)
class Decode:
    """One query per sequence over a cache."""

    batch: int
    heads: int
    groups: int
    keys: int
    size: int
    dtype: torch.dtype
    int8: bool = False

    def __str__(self) -> str:
        kind = "int8" if self.int8 else str(self.dtype).removeprefix("torch.")
        return f"B{self.batch} H{self.heads} G{self.groups} N{self.keys} D{self.size} {kind}"

    def tensors(self, keys: int) -> tuple[list[Tensor], dict[str, Any]]:
        """Query and cache, and the scales of an int8 cache."""
        torch.manual_seed(0)
        q = torch.randn(self.batch, self.heads, 1, self.size).to(self.dtype)
        caches = [torch.randn(self.batch, self.groups, keys, self.size).to(self.dtype) for _ in "kv"]
        if not self.int8:
            return [q, *caches], {}
        (k, k_scale), (v, v_scale) = (quantise_heads(x) for x in caches)
        return [q, k, v], {"scales": (k_scale, v_scale)}


DECODES = (
    Decode(1, 8, 8, 65536, 64, torch.float32),
    Decode(1, 1, 1, 262144, 128, torch.float32),
    Decode(1, 32, 8, 16384, 128, torch.bfloat16),
    Decode(1, 32, 8, 16384, 128, torch.bfloat16, int8=True),
    Decode(4, 32, 4, 16384, 128, torch.bfloat16),
)

PREFILLS = (
    (8, 4096, 64, torch.bfloat16, False),
    (8, 4096, 64, torch.bfloat16, True),
    (8, 4096, 64, torch.float32, False),
)
"""Heads, tokens, head size, dtype, causal."""


def check() -> None:
    """Compare the kernels with the oracles, at sizes that do not divide.

    Raises:
        OracleRed: one differs.
    """
    for case in DECODES:
        arrays, scales = case.tensors(777)
        wide = [arrays[0].double(), *(x if case.int8 else x.double() for x in arrays[1:])]
        got = softmax_decode(*arrays, backend="cpu", **scales)[0]
        _compare(f"decoding {case}", got, softmax_decode(*wide, backend="oracle", **scales)[0])
    for _, _, size, dtype, causal in PREFILLS:
        q, k, v = (torch.randn(1, 2, 333, size).to(dtype).requires_grad_() for _ in "qkv")
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        seed = torch.randn(1, 2, 333, size).to(dtype)
        for name, op in (("softmax", softmax_attention), ("sigmoid", sigmoid_attention)):
            got = op(q, k, v, Mask(causal=causal), backend="cpu")
            expected = op(*wide, Mask(causal=causal), backend="oracle")
            _compare(f"{name} in {dtype}", got, expected)
            grads = torch.autograd.grad(got, (q, k, v), seed)
            for letter, a, b in zip("qkv", grads, torch.autograd.grad(expected, wide, seed.double()), strict=True):
                _compare(f"gradient of {letter} of {name} in {dtype}", a, b)


def _compare(what: str, got: Tensor, expected: Tensor) -> None:
    error = float((got.detach().double() - expected.detach()).norm() / expected.detach().norm())
    if not error <= ALLOWED[got.dtype]:
        raise OracleRed(f"the oracle check is red, nothing is measured: {what} is off by {error:.1e}")


def measure(threads: int, rounds: int, scale: float = 1.0) -> dict[str, Any]:
    """All figures of this machine, after the oracle check.

    Args:
        threads: of PyTorch and the kernels.
        rounds: of each comparison; a ratio is their median.
        scale: of the numbers of keys and tokens, less than 1 for a quick look.

    Returns:
        `machine`, and per comparison the `seconds` of each round and the `ratios` as quartiles.
    """
    comparisons: dict[str, Any] = {}
    with machine.threads(threads):
        check()
        summed = torch.randn(max(1, int(SUMMED * scale)))
        for case in DECODES:
            arrays, scales = case.tensors(int(case.keys * scale))
            read = 2 * arrays[1].nbytes
            q, k, v = arrays
            of_keys, of_values = scales.get("scales", (None, None))
            kernel, *_kept = prepare(q, k, v, key_scales=of_keys, value_scales=of_values, scale=case.size**-0.5)
            calls: dict[str, Callable[[], object]] = {
                "sum": summed.sum,
                "op": functools.partial(softmax_decode, q, k, v, backend="cpu", **scales),
                "kernel": kernel,
            }
            if not case.int8:
                grouped = case.heads != case.groups
                calls["SDPA"] = functools.partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=grouped)
            with torch.no_grad():  # once, as around a whole text
                times = in_rounds(calls, rounds, f"decode {case}")
            speed = read / summed.nbytes
            ratios = {
                "C++ alone, share of the read bandwidth": [speed * x for x in _ratio(times, "sum", "kernel")],
                "called from Python, share": [speed * x for x in _ratio(times, "sum", "op")],
            }
            if "SDPA" in times:
                ratios["called from Python, times faster than SDPA"] = _ratio(times, "SDPA", "op")
            comparisons[f"decode {case}"] = {
                "GB/s": read / quartiles(times["op"])[1] / 1e9,
                "ratios": ratios,
                "seconds": times,
            }
        for heads, tokens, size, dtype, causal in PREFILLS:
            comparisons |= _prefill(heads, int(tokens * scale), size, dtype, causal, rounds)
    return {"machine": machine.describe(), "threads": threads, "rounds": rounds, "comparisons": comparisons}


def _prefill(
    heads: int, tokens: int, size: int, dtype: torch.dtype, causal: bool, rounds: int
) -> dict[str, dict[str, Any]]:
    q, k, v = (torch.randn(1, heads, tokens, size).to(dtype).requires_grad_() for _ in "qkv")
    seed = torch.randn(1, heads, tokens, size).to(dtype)
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    mask = Mask(causal=causal)
    runs: dict[str, Callable[[], Tensor]] = {
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
        "softmax": lambda: softmax_attention(q, k, v, mask, backend="cpu"),
        "sigmoid": lambda: sigmoid_attention(q, k, v, mask, shift=-math.log(tokens), backend="cpu"),
    }
    flops = 4 * mask.area(tokens, tokens, 1, heads) * size
    kept = {name: run() for name, run in runs.items()}
    passes: dict[str, tuple[float, dict[str, Callable[[], object]]]] = {
        "forward": (flops, {name: _frozen(run) for name, run in runs.items()}),
        "backward": (
            2.5 * flops,
            {
                name: (lambda o=o: torch.autograd.grad(o, (q, k, v), seed, retain_graph=True))  # type: ignore[misc]
                for name, o in kept.items()
            },
        ),
    }
    kind = f"{str(dtype).removeprefix('torch.')}{' causal' if causal else ''}"
    found = {}
    for what, (work, calls) in passes.items():
        title = f"{what} H{heads} N{tokens} D{size} {kind}"
        times = in_rounds({"GEMM": lambda: a @ b} | calls, rounds, title)
        ratios = {
            "softmax, times faster than SDPA": _ratio(times, "SDPA", "softmax"),
            "sigmoid, times faster than softmax": _ratio(times, "softmax", "sigmoid"),
            "softmax, share of the GEMM rate": [work / (2 * 1024**3) * x for x in _ratio(times, "GEMM", "softmax")],
        }
        rate = work / quartiles(times["softmax"])[1] / 1e9
        found[title] = {"GFLOP/s": rate, "ratios": ratios, "seconds": times}
    return found


def _frozen(run: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return run()

    return call


def _ratio(times: Times, slower: str, faster: str) -> list[float]:
    return quartiles(x / y for x, y in zip(times[slower], times[faster], strict=True))


def show(result: dict[str, Any], console: Console) -> None:
    """Print the ratios, with the quartiles over the rounds."""
    table = Table(title=f"Softmax kernels, {result['threads']} threads, medians of {result['rounds']} rounds")
    for heading in ("work", "rate", "ratio", "median", "quartiles"):
        table.add_column(heading, justify="right" if heading in ("rate", "median") else "left")
    for work, found in result["comparisons"].items():
        rate = next(f"{found[unit]:.3g} {unit}" for unit in ("GB/s", "GFLOP/s") if unit in found)
        for what, (lower, median, upper) in found["ratios"].items():
            table.add_row(work, rate, what, f"{median:.3g}", f"{lower:.3g} to {upper:.3g}")
            work = rate = ""
        table.add_section()
    console.print(table)


def write(result: dict[str, Any], path: Path, command: str) -> None:
    """Keep everything, the seconds of each round included, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command} | result, indent=1) + "\n")
