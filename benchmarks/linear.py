"""How fast the C++ kernels of linear attention are: `python benchmarks/linear.py [--threads 2]`.

Five recurrences at B1 H8 D64: a constant decay per head, the causal feature product with its normaliser, gates per key
channel in one direction and in both, and the gated delta rule. Each against the torch backend, against causal SDPA,
against a matrix product of as many FLOPs (4 N D^2 per head and direction are counted, whatever a kernel does), and
against itself at other lengths; then one token of a model of 12 layers, against reading its weights and states.

Everything is measured in one run and in rounds: a round times every contestant once, within seconds, and a ratio is
the median of the rounds' ratios, so that a machine that others use too slows both sides alike.

Results of 32 MiB come fresh from the kernel of the operating system at every call, and what that costs changes from
minute to minute on a virtual machine. So glibc is told to keep freed memory, for all contestants, as the allocators
that people use for training do; `--fresh-memory` leaves it alone.

Nothing is reported while an oracle check is red. The result goes to benchmarks/results/ under a name that says the
conditions.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attlas
from attlas.adapt import decoding as decoding_adapter
from attlas.bench import machine
from attlas.bench.efficiency import efficiency_length, scaling_exponent
from attlas.bench.records import Times
from attlas.bench.rounds import in_rounds, quartiles
from attlas.core.mechanism import Mixer
from attlas.core.state import state_bytes
from attlas.ops.decay import decayed_linear_attention
from attlas.ops.delta import gated_delta_rule
from attlas.ops.gated import bidirectional_gated_attention, gated_linear_attention
from attlas.ops.linear import weighted_average
from attlas.ops.slopes import alibi_slopes

HEADS, SIZE, TOKENS = 8, 64, 16384
LENGTHS = (4096, 16384, 65536, 262144)
SHORT = (64, 128, 256, 512, 1024)
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
FAILED = "the oracle check is red, nothing is measured: {}"
LAYERS, DIM = 12, 512
DECODED = ("lightning", "linear", "gla", "gated_delta")
READ = 64 << 20
"""Elements of the tensor whose sum says how fast memory is read."""

Run = Callable[[str, list[Tensor]], Tensor]


def constant_decay(backend: str, inputs: list[Tensor]) -> Tensor:
    """The slopes are those of ALiBi."""
    o, _ = decayed_linear_attention(*inputs[:3], alibi_slopes(HEADS), backend=backend)
    return o


def causal_features(backend: str, inputs: list[Tensor]) -> Tensor:
    """With its normaliser; the features are positive."""
    _, _, v, gates, _, _ = inputs
    o, _ = weighted_average(-gates, -gates, v.to(gates.dtype), causal=True, backend=backend)
    return o.to(v.dtype)


def channel_gates(backend: str, inputs: list[Tensor]) -> Tensor:
    """One direction."""
    q, k, v, gates, _, _ = inputs
    o, _ = gated_linear_attention(q, k, v, gates, backend=backend)
    return o


def both_directions(backend: str, inputs: list[Tensor]) -> Tensor:
    """Both directions in one call."""
    q, k, v, gates, _, _ = inputs
    return bidirectional_gated_attention(q, k, v, gates, gates, backend=backend)


def delta_rule(backend: str, inputs: list[Tensor]) -> Tensor:
    """Keys of norm 1, a decay per head."""
    q, k, v, _, decay, beta = inputs
    o, _ = gated_delta_rule(q, F.normalize(k, dim=-1), v, beta, decay, backend=backend)
    return o


RUNS: dict[str, tuple[Run, int]] = {  # and how many directions it counts
    "constant decay": (constant_decay, 1),
    "causal features": (causal_features, 1),
    "channel gates": (channel_gates, 1),
    "both directions": (both_directions, 2),
    "delta rule": (delta_rule, 1),
}


def tensors(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, gates by channel, decay per head, beta."""
    torch.manual_seed(0)
    rows = [torch.randn(1, HEADS, tokens, SIZE).mul(0.3).to(dtype) for _ in range(3)]
    return [
        *rows,
        -0.1 * torch.rand(1, HEADS, tokens, SIZE),
        *(-0.1 * torch.rand(1, HEADS, tokens), torch.rand(1, HEADS, tokens)),
    ]


def leaves(inputs: list[Tensor]) -> list[Tensor]:
    """The same, wanting gradients."""
    return [x.detach().requires_grad_() for x in inputs]


def check() -> None:
    """Exit unless every kernel equals the float64 oracle, forward and backward, in both dtypes."""
    for name, (run, _) in RUNS.items():
        for dtype, allowed in ALLOWED.items():
            inputs = leaves(tensors(333, dtype))
            doubles = leaves([x.double() for x in inputs])
            seed = torch.randn(1, HEADS, 333, SIZE, dtype=torch.float64).to(dtype)
            got, expected = run("cpu", inputs), run("oracle", doubles)
            pairs = [(got, expected)]
            for a, b in zip(
                torch.autograd.grad(got, inputs, seed, allow_unused=True),
                torch.autograd.grad(expected, doubles, seed.double(), allow_unused=True),
                strict=True,
            ):
                pairs += [(a, b)] if b is not None else []
            error = max(float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs)
            print(f"  {name}, {dtype}: relative RMS error {error:.1e}, allowed {allowed:.0e}")
            if not error <= allowed:
                sys.exit(FAILED.format(f"{name} in {dtype}"))


def forward(run: Run, backend: str, inputs: list[Tensor]) -> Callable[[], object]:
    """A call without gradients."""

    def call() -> None:
        with torch.no_grad():
            run(backend, inputs)

    return call


def training(run: Run, backend: str, inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and backward."""
    inputs = leaves(inputs)
    seed = torch.randn_like(inputs[2])
    return lambda: torch.autograd.grad(run(backend, inputs), inputs, seed, allow_unused=True)


def sdpa(backend: str, inputs: list[Tensor]) -> Tensor:
    """What most people use."""
    q, k, v = inputs[:3]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Model(nn.Module):
    """Norm, mixer, norm, MLP, `LAYERS` times."""

    def __init__(self, mechanism: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2 * LAYERS))
        self.mixers = nn.ModuleList(
            attlas.mixer(mechanism, DIM, heads=HEADS, causal=True, length=4096, layer=i, layers=LAYERS)
            for i in range(LAYERS)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.SiLU(), nn.Linear(4 * DIM, DIM)) for _ in range(LAYERS)
        )
        self.states = [mixer.initial_state(1) for mixer in self.mixers if isinstance(mixer, Mixer)]

    def step(self, x: Tensor) -> Tensor:
        """One token, from the states so far."""
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            assert isinstance(mixer, Mixer)
            y, self.states[i] = mixer.extend(self.norms[2 * i](x), self.states[i])
            x = x + y
            x = x + mlp(self.norms[2 * i + 1](x))
        return x

    @property
    def bytes(self) -> int:
        """Of weights and states."""
        return sum(x.nbytes for x in self.parameters()) + sum(map(state_bytes, self.states))


def decoding(rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of a token, and the share of the rate at which memory is read."""
    models, token = {name: Model(name).eval() for name in DECODED}, torch.randn(1, 1, DIM)
    summed = torch.randn(READ)
    usual = Model(DECODED[0]).eval()

    def step(model: Model) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                model.step(token)

        return call

    calls = {"sum": summed.sum, "torch's linear layers": step(usual)}
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(decoding_adapter.applied(model))
        times = in_rounds(calls | {name: step(model) for name, model in models.items()}, rounds, "decoding")
    shares = {
        f"decoding, times faster than with torch's linear layers: {DECODED[0]}": ratios(
            times, "torch's linear layers", DECODED[0]
        )
    }
    shares |= {
        f"decoding, share of the read bandwidth: {name}": [
            model.bytes / summed.nbytes * x for x in ratios(times, "sum", name)
        ]
        for name, model in models.items()
    }
    return times, shares


def ratios(times: dict[str, list[float]], slower: str, faster: str) -> list[float]:
    """Quartiles of the rounds' ratios."""
    return quartiles(x / y for x, y in zip(times[slower], times[faster], strict=True))


def memory(what: str) -> int:
    """Bytes of this process now (VmRSS) or at most (VmHWM)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def peak_growth(name: str, tokens: int) -> int:
    """Bytes by which the memory of a fresh process grows in a forward of so many tokens."""
    run, _ = RUNS[name]
    inputs = tensors(tokens)
    with torch.no_grad():
        run("cpu", tensors(64))  # loads the library and starts the threads
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the largest memory so far
        run("cpu", inputs)
    return memory("VmHWM") - before


def main() -> None:
    """Measure, print the ratios, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fresh-memory", action="store_true", help="freed memory goes back to the system")
    arguments = parser.parse_args()
    if not arguments.fresh_memory and not KEEP_MEMORY.items() <= os.environ.items():  # glibc reads them at its start
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    torch.set_num_threads(arguments.threads)
    print("oracle check")
    check()
    here = machine.describe()
    print("\n" + "\n".join(f"{name}: {value}" for name, value in here.items()))

    found: dict[str, list[float]] = {}
    seconds: dict[str, dict[str, list[float]]] = {}
    a, b = torch.randn(2, 1024, 1024)  # 2 * 1024^3 FLOP = 4 N D^2 of 8 heads of 16384 tokens
    inputs, half = tensors(TOKENS), tensors(TOKENS, torch.bfloat16)
    causal = forward(sdpa, "", inputs)
    for name, (run, directions) in RUNS.items():
        calls = {"kernel": forward(run, "cpu", inputs), "torch": forward(run, "torch", inputs)}
        calls |= {"bfloat16": forward(run, "cpu", half), "GEMM": lambda: a @ b}
        times = in_rounds(calls, arguments.rounds, name)
        both = {which: training(run, which, inputs) for which in ("cpu", "torch")}
        trained = in_rounds(both, max(3, arguments.rounds // 3), f"{name}, with backward")
        seconds |= {f"{name}, forward": times, f"{name}, forward and backward": trained}
        found[f"{name}: forward, times faster than the torch backend"] = ratios(times, "torch", "kernel")
        found[f"{name}: forward and backward, likewise"] = ratios(trained, "torch", "cpu")
        found[f"{name}: share of the GEMM rate"] = [directions * x for x in ratios(times, "GEMM", "kernel")]
        found[f"{name}: bfloat16 forward, times faster than float32"] = ratios(times, "kernel", "bfloat16")
    one = {"SDPA": causal} | {name: forward(run, "cpu", inputs) for name, (run, _) in RUNS.items()}
    seconds["against causal SDPA"] = times = in_rounds(one, max(3, arguments.rounds // 5), "causal SDPA")
    found |= {f"{name}: forward, times faster than causal SDPA": ratios(times, "SDPA", name) for name in RUNS}
    del inputs, half, causal, one

    costs: dict[str, dict[int, Times]] = {name: {} for name in ("SDPA", *RUNS)}
    for tokens in SHORT:
        few = tensors(tokens)
        calls = {"SDPA": forward(sdpa, "", few)} | {name: forward(run, "cpu", few) for name, (run, _) in RUNS.items()}
        for name, values in in_rounds(calls, 10 * arguments.rounds, f"{tokens} tokens").items():
            lower, median, upper = quartiles(values)
            costs[name][tokens] = Times(median, lower, upper, len(values))
    pays_off = {name: efficiency_length(costs[name], costs["SDPA"]) for name in RUNS}

    long: dict[str, dict[int, Times]] = {name: {} for name in RUNS}
    for name, (run, _) in RUNS.items():
        sizes = {tokens: tensors(tokens) for tokens in LENGTHS}
        calls = {str(tokens): forward(run, "cpu", some) for tokens, some in sizes.items()}
        for tokens, values in in_rounds(calls, max(3, arguments.rounds // 3), f"{name}, lengths").items():
            lower, median, upper = quartiles(values)
            long[name][int(tokens)] = Times(median, lower, upper, len(values))
        del sizes, calls
    exponents = {name: scaling_exponent(curve, len(LENGTHS)) for name, curve in long.items()}

    seconds["decoding"], shares = decoding(10 * arguments.rounds)
    found |= shares

    print(f"\n{'ratios of this run':72} {'median':>8}   quartiles")
    for what, (lower, median, upper) in found.items():
        print(f"  {what:70} {median:8.3f}   {lower:.3f} to {upper:.3f}")
    for name in RUNS:
        print(f"  {name}: cheaper than causal SDPA from {pays_off[name]} tokens; time ~ N^{exponents[name]:.3f}")
    for variable in KEEP_MEMORY:
        os.environ.pop(variable, None)  # kept memory would hide what a forward takes
    over_output: dict[str, float] = {}
    for name in ("constant decay", "channel gates", "delta rule"):
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            over_output[name] = fresh.apply(peak_growth, (name, TOKENS)) / (HEADS * TOKENS * SIZE * 4)
        print(f"  {name}: memory that a forward takes, over its output: {over_output[name]:.3f}")
    kind = "fresh" if arguments.fresh_memory else "kept"
    version = torch.__version__.split("+")[0]
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": here,
        "ratios, quartiles": found,
        "pays off from": {
            name: ["never" if math.isinf(tokens) else tokens for tokens in (x.lower, x.length, x.upper)]
            for name, x in pays_off.items()
        },
        "exponents": exponents,
        "memory over output": over_output,
        "seconds of the lengths": {
            name: {tokens: [t.lower, t.median, t.upper] for tokens, t in curve.items()}
            for name, curve in (costs | {f"{name}, long": curve for name, curve in long.items()}).items()
        },
        "seconds": {what: {name: quartiles(s) for name, s in times.items()} for what, times in seconds.items()},
    }
    path = Path(__file__).parent / "results" / f"linear-threads{arguments.threads}-{kind}-memory-torch{version}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
