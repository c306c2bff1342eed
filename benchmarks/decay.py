"""How fast the C++ kernel of decayed linear attention is: `python benchmarks/decay.py [--threads 2]`.

B1 H8 D64, against the torch backend and causal SDPA, all in one run and in turns, so that a noisy machine hits
none alone. Every figure is a ratio, of medians and of the fastest calls; the quartiles are printed beside. Nothing
is reported while the oracle check is red. The result goes to benchmarks/results/ under a name that says the conditions.
"""

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.bench import machine
from attlas.ops import decay
from attlas.ops.slopes import alibi_slopes

HEADS, SIZE = 8, 64
CHUNKS = (32, 64, 128, 256)
FAILED = "the oracle check is red: {}"


def tensors(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, leaves that want gradients."""
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, tokens, SIZE).mul(0.3).to(dtype).requires_grad_() for _ in range(3)]


def relative_rms(got: Tensor, expected: Tensor) -> float:
    """Against float64."""
    return float((got.double() - expected).norm() / expected.norm())


def check(slopes: Tensor) -> None:
    """Exit unless the kernel equals the float64 oracle, forward and backward, in both dtypes."""
    for dtype, allowed in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        inputs = tensors(333, dtype)
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        seed = torch.randn(1, HEADS, 333, SIZE, dtype=torch.float64)
        got, _ = decay.cpu(*inputs, slopes)
        expected, _ = decay.oracle(*doubles, slopes)
        errors = {"output": relative_rms(got, expected)}
        grads = torch.autograd.grad(got, inputs, seed.to(dtype))
        for name, a, b in zip("qkv", grads, torch.autograd.grad(expected, doubles, seed), strict=True):
            errors[f"gradient of {name}"] = relative_rms(a, b)
        for what, error in errors.items():
            print(f"  {dtype} {what}: relative RMS error {error:.1e}, allowed {allowed:.0e}")
            if not error <= allowed:
                sys.exit(FAILED.format(f"{what} in {dtype}"))


def forward(run: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """A call without gradients."""

    def call() -> None:
        with torch.no_grad():
            run(*inputs)

    return call


def training(run: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and backward."""
    seed = torch.randn_like(inputs[2])
    return lambda: torch.autograd.grad(run(*inputs), inputs, seed)


def in_turns(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of each; in a turn a contestant warms up with one call and is then timed for 0.2 s."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.disable()
    for _ in range(turns):
        for name, call in calls.items():
            call()
            end = time.perf_counter() + 0.2
            while (start := time.perf_counter()) < end:
                call()
                samples[name].append(time.perf_counter() - start)
    gc.enable()
    return {
        name: dict(zip(("lower", "median", "upper"), statistics.quantiles(times, n=4, method="inclusive"), strict=True))
        | {"fastest": min(times), "runs": len(times)}
        for name, times in samples.items()
    }


def show(title: str, times: dict[str, dict[str, float]]) -> None:
    """Medians and quartiles."""
    print(f"\n{title}")
    for name, t in times.items():
        print(f"  {name:34} {1e3 * t['median']:9.3f} ms  ({1e3 * t['lower']:.3f} to {1e3 * t['upper']:.3f})")


def memory(what: str) -> int:
    """Bytes of this process now (VmRSS) or at most (VmHWM)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def peak_growth(tokens: int) -> int:
    """Bytes by which the memory of a fresh process grows in a forward of so many tokens."""
    inputs, slopes = tensors(tokens), alibi_slopes(HEADS)
    with torch.no_grad():
        decay.cpu(*tensors(64), slopes)  # loads the library and starts the threads
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the largest memory so far
        decay.cpu(*inputs, slopes)
    return memory("VmHWM") - before


def main() -> None:
    """Measure, print the ratios, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=9, help="of each contestant")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    slopes = alibi_slopes(HEADS)
    print("oracle check")
    check(slopes)
    here = machine.describe()
    print("\n" + "\n".join(f"{name}: {value}" for name, value in here.items()))

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return decay.cpu(q, k, v, slopes)[0]

    def chunked(chunk: int) -> Callable[..., Tensor]:
        return lambda q, k, v: decay.chunked(q, k, v, slopes, chunk=chunk)[0]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    short, long = tensors(16384), tensors(65536)
    half = tensors(16384, torch.bfloat16)
    gemm, bandwidth = (
        machine.gemm_rate(torch.float32, arguments.threads),
        machine.bandwidth(arguments.threads),
    )
    print(f"\nfp32 GEMM {gemm / 1e9:.0f} GFLOP/s, read bandwidth {bandwidth / 1e9:.1f} GB/s")

    ahead = {"kernel": forward(kernel, short), "kernel, 65536 tokens": forward(kernel, long)}
    ahead |= {f"torch, chunk {chunk}": forward(chunked(chunk), short) for chunk in CHUNKS}
    ahead |= {"causal SDPA": forward(sdpa, short), "kernel, bfloat16": forward(kernel, half)}
    forward_times = in_turns(ahead, arguments.turns)
    show("forward, B1 H8 N16384 D64", forward_times)
    both = {"kernel": training(kernel, short), "kernel, 65536 tokens": training(kernel, long)}
    both |= {f"torch, chunk {chunk}": training(chunked(chunk), short) for chunk in CHUNKS}
    both |= {"kernel, bfloat16": training(kernel, half)}
    training_times = in_turns(both, arguments.turns)
    show("forward and backward", training_times)

    steps = {}
    for position in (100, 100_000):
        with torch.no_grad():
            _, state = decay.cpu(*tensors(position), slopes)
        token = [x.detach() for x in tensors(1)]
        steps[f"a step at {position:,}"] = lambda token=token, state=state: decay.cpu(*token, slopes, state)
    step_times = in_turns(steps, 3)
    show("decoding", step_times)

    again = machine.gemm_rate.__wrapped__(torch.float32, arguments.threads)
    if not 0.8 < again / gemm < 1.25:
        sys.exit(f"nothing is reported: the GEMM rate went from {gemm:.3g} to {again:.3g}, so the machine is busy")

    def ratios(which: str) -> dict[str, float]:
        """Every ratio by one statistic: the median, or the fastest call, which other processes disturb least."""
        ahead, both, step = (
            {name: t[which] for name, t in times.items()} for times in (forward_times, training_times, step_times)
        )
        one, two = ahead["kernel"], both["kernel"]
        backend = "torch, chunk 64"  # what `backend="torch"` runs
        return {
            "forward, times faster than the torch backend": ahead[backend] / one,
            "forward, times faster than torch at its best chunk": min(ahead[c] for c in chunks) / one,
            "forward and backward, times faster than the torch backend": both[backend] / two,
            "forward and backward, than torch at its best chunk": min(both[c] for c in chunks) / two,
            "forward, times faster than causal SDPA": ahead["causal SDPA"] / one,
            "forward, 64k tokens cost so many times 16k": ahead["kernel, 65536 tokens"] / one,
            "forward and backward, 64k tokens against 16k": both["kernel, 65536 tokens"] / two,
            "share of the GEMM rate, 4 N D^2 per head counted": 4 * HEADS * 16384 * SIZE**2 / one / gemm,
            "bfloat16 forward, times faster than float32": one / ahead["kernel, bfloat16"],
            "a step at 100,000 costs so many times one at 100": step["a step at 100,000"] / step["a step at 100"],
        }

    chunks = [f"torch, chunk {chunk}" for chunk in CHUNKS]
    medians, fastest = ratios("median"), ratios("fastest")
    print(f"\n{'ratios of this run':60} {'medians':>10} {'fastest':>10}")
    for what in medians:
        print(f"  {what:58} {medians[what]:10.3f} {fastest[what]:10.3f}")
    over_output = {}
    for tokens in (16384, 65536):
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            over_output[tokens] = fresh.apply(peak_growth, (tokens,)) / (HEADS * tokens * SIZE * 4)
        print(f"  memory that a forward of {tokens} tokens takes, over its output: {over_output[tokens]:.3f}")
    name = f"decay-b1-h{HEADS}-n16384-d{SIZE}-threads{arguments.threads}-torch{torch.__version__.split('+')[0]}.json"
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": here,
        "gemm": gemm,
        "bandwidth": bandwidth,
        "forward": forward_times,
        "forward+backward": training_times,
        "step": step_times,
        "ratios of medians": medians,
        "ratios of fastest": fastest,
        "memory over output": over_output,
    }
    path = Path(__file__).parent / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
