"""How fast the C++ kernel of decayed linear attention is: `python benchmarks/decay.py [--threads 2]`.

B1 H8 D64, against the torch backend and causal SDPA, all in one run and in rounds: a round times every contestant
once, within seconds, and a ratio is the median of the rounds' ratios, so that a machine that others use too slows both
sides alike. The quartiles are printed beside.

Results of 32 MiB come fresh from the kernel of the operating system at every call, and what that costs changes from
minute to minute on a virtual machine. So glibc is told to keep freed memory, for all contestants, as the allocators
that people use for training do; `--fresh-memory` leaves it alone.

Nothing is reported while the oracle check is red. The result goes to benchmarks/results/ under a name that says the
conditions.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.bench import machine
from attlas.bench.rounds import in_rounds, quartiles
from attlas.ops import decay
from attlas.ops.slopes import alibi_slopes

HEADS, SIZE = 8, 64
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
CHUNKS = (32, 64, 128, 256)
FAILED = "the oracle check is red: {}"


def tensors(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, leaves that want gradients."""
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, tokens, SIZE).mul(0.3).to(dtype).requires_grad_() for _ in range(3)]


def relative_rms(got: Tensor, expected: Tensor) -> float:
    """Against float64."""
    return float((got.detach().double() - expected.detach()).norm() / expected.detach().norm())


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


def show(title: str, times: dict[str, list[float]]) -> None:
    """Medians and quartiles."""
    print(f"\n{title}")
    for name, seconds in times.items():
        lower, median, upper = (1e3 * t for t in quartiles(seconds))
        print(f"  {name:34} {median:9.3f} ms  ({lower:.3f} to {upper:.3f})")


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
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--fresh-memory", action="store_true", help="freed memory goes back to the system")
    arguments = parser.parse_args()
    if not arguments.fresh_memory and not KEEP_MEMORY.items() <= os.environ.items():  # glibc reads them at its start
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
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
    a, b = torch.randn(2, 1024, 1024)

    ahead = {"kernel": forward(kernel, short), "kernel, 65536 tokens": forward(kernel, long)}
    ahead |= {f"torch, chunk {chunk}": forward(chunked(chunk), short) for chunk in CHUNKS}
    ahead |= {"causal SDPA": forward(sdpa, short), "kernel, bfloat16": forward(kernel, half)}
    ahead |= {"GEMM of as many FLOPs": lambda: a @ b}  # 2 * 1024^3 = 4 N D^2 of 8 heads
    one = in_rounds(ahead, arguments.rounds)
    show("forward, B1 H8 N16384 D64", one)
    both = {"kernel": training(kernel, short), "kernel, 65536 tokens": training(kernel, long)}
    both |= {f"torch, chunk {chunk}": training(chunked(chunk), short) for chunk in CHUNKS}
    both |= {"kernel, bfloat16": training(kernel, half)}
    two = in_rounds(both, arguments.rounds)
    show("forward and backward", two)

    steps = {}
    for position in (100, 100_000):
        with torch.no_grad():
            _, state = decay.cpu(*tensors(position), slopes)
        token = [x.detach() for x in tensors(1)]
        steps[f"{position:,}"] = lambda token=token, state=state: decay.cpu(*token, slopes, state)
    step = in_rounds(steps, 1000)
    show("a step at position", step)

    backend = "torch, chunk 64"  # what `backend="torch"` runs
    best_one, best_two = (
        min((f"torch, chunk {chunk}" for chunk in CHUNKS), key=lambda name: statistics.median(times[name]))
        for times in (one, two)
    )
    ratios = {
        what: quartiles(x / y for x, y in zip(slower, faster, strict=True))
        for what, slower, faster in (
            ("forward, times faster than the torch backend", one[backend], one["kernel"]),
            ("forward, times faster than torch at its best chunk", one[best_one], one["kernel"]),
            ("forward and backward, times faster than the torch backend", two[backend], two["kernel"]),
            ("forward and backward, than torch at its best chunk", two[best_two], two["kernel"]),
            ("forward, times faster than causal SDPA", one["causal SDPA"], one["kernel"]),
            ("forward, 64k tokens cost so many times 16k", one["kernel, 65536 tokens"], one["kernel"]),
            ("forward and backward, 64k tokens against 16k", two["kernel, 65536 tokens"], two["kernel"]),
            ("share of the GEMM rate, 4 N D^2 per head counted", one["GEMM of as many FLOPs"], one["kernel"]),
            ("bfloat16 forward, times faster than float32", one["kernel"], one["kernel, bfloat16"]),
            ("a step at 100,000 costs so many times one at 100", step["100,000"], step["100"]),
        )
    }
    print(f"\n{'ratios of this run':60} {'median':>8}   quartiles")
    for what, (lower, median, upper) in ratios.items():
        print(f"  {what:58} {median:8.3f}   {lower:.3f} to {upper:.3f}")
    for variable in KEEP_MEMORY:
        os.environ.pop(variable, None)  # kept memory would hide what a forward takes
    over_output = {}
    for tokens in (16384, 65536):
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            over_output[tokens] = fresh.apply(peak_growth, (tokens,)) / (HEADS * tokens * SIZE * 4)
        print(f"  memory that a forward of {tokens} tokens takes, over its output: {over_output[tokens]:.3f}")
    kind = "fresh" if arguments.fresh_memory else "kept"
    version = torch.__version__.split("+")[0]
    name = f"decay-b1-h8-n16384-d64-threads{arguments.threads}-{kind}-memory-torch{version}.json"
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": here,
        "seconds, forward": one,
        "seconds, forward and backward": two,
        "seconds, step": {position: quartiles(seconds) for position, seconds in step.items()},
        "ratios, quartiles": ratios,
        "memory over output": over_output,
    }
    path = Path(__file__).parent / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
