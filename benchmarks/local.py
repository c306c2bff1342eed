"""How fast attention over some of the pairs is: `python benchmarks/local.py [--threads 2]`.

Neighbourhoods of a plane and of a video, a sliding window, chosen blocks, and blocks that VMoBA and BiFormer choose
from what the tokens say (their choosing included), each against dense SDPA on the same tokens. The plane also against
NATTEN where it is installed, the sliding window also against FlexAttention, compiled. Then time against visible pairs
over densities and windows, the memory that a forward takes beyond its inputs, and what retrieval by landmarks reads.

Everything is measured in one run and in rounds: a round times every contestant once, within seconds, and a ratio is
the median of the rounds' ratios, so that a machine that others use too slows both sides alike. Nothing is reported
while an oracle check is red. The result goes to benchmarks/results/ under a name that says the conditions.
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import attlas
from attlas.adapt.retrieval import Reader
from attlas.bench import machine
from attlas.bench.rounds import Times, in_rounds, quartiles
from attlas.core.axis import Axis
from attlas.ops.block_sparse import block_sparse_attention
from attlas.ops.neighborhood import neighborhood_attention

ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
PLANE = (Axis(56, 7), Axis(56, 7))
VIDEO = (Axis(16, 3), Axis(28, 7), Axis(28, 7))
SLIDING = (Axis(16384, 256),)
BLOCKS, BLOCK, DENSITY = 8192, 64, 0.125
DENSITIES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
WINDOWS = (64, 128, 256, 512, 1024, 2048)
CHOSEN = 16384
CHOOSERS = {
    "vmoba": ((16, 32, 32), {"blocks": ((4, 8, 8),)}),
    "biformer": ((128, 128), {"regions": 16, "top": 16, "kernel": 0}),
}

Call = Callable[[], object]


def tensors(heads: int, tokens: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k and v."""
    torch.manual_seed(0)
    return [torch.randn(1, heads, tokens, size).to(dtype) for _ in range(3)]


def chosen(blocks: int, share: float) -> Tensor:
    """For each of eight heads, as many random blocks per row as the share says."""
    order = torch.rand(1, 8, blocks, blocks, generator=torch.Generator().manual_seed(1)).argsort(-1)
    return order.argsort(-1) < round(share * blocks)


def without_gradient(call: Call) -> Call:
    """The same call, no graph."""

    def run() -> None:
        with torch.no_grad():
            call()

    return run


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """All pairs, forward."""
    return without_gradient(lambda: F.scaled_dot_product_attention(q, k, v))


def neighborhood(axes: tuple[Axis, ...], arrays: list[Tensor], backend: str = "cpu") -> Call:
    """Forward."""
    return without_gradient(lambda: neighborhood_attention(*arrays, axes, backend=backend))


def sparse(arrays: list[Tensor], choice: Tensor, backend: str = "cpu") -> Call:
    """Forward."""
    options = {"rows": BLOCK, "columns": BLOCK, "backend": backend}
    return without_gradient(lambda: block_sparse_attention(*arrays, choice, **options))


def backward(forward: Callable[[list[Tensor]], Tensor], arrays: list[Tensor]) -> Call:
    """The gradients alone, of a graph that is there."""
    arrays = [x.detach().requires_grad_() for x in arrays]
    o = forward(arrays)
    seed = torch.randn_like(o)
    return lambda: torch.autograd.grad(o, arrays, seed, retain_graph=True)


def check() -> None:
    """Exit unless kernel and choosers equal the float64 oracle, forward and backward, in both dtypes."""
    few = (Axis(9, 7), Axis(20, 7))
    table = torch.randn(8, 13, 13, generator=torch.Generator().manual_seed(3))
    choice = chosen(5, 0.5)
    per_query = torch.rand(1, 8, 180, 5, generator=torch.Generator().manual_seed(2)) < 0.3

    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, backend: str) -> Tensor:
        return neighborhood_attention(q, k, v, few, bias=bias, backend=backend)

    kinds: dict[str, Callable[..., Tensor]] = {
        "neighbourhood": functools.partial(neighborhood_attention, axes=few),
        "neighbourhood, bias": biased,
        "neighbourhood, prefix": functools.partial(neighborhood_attention, axes=(Axis(8, 7), Axis(22, 7)), prefix=4),
        "causal window": functools.partial(neighborhood_attention, axes=(Axis(180, 31, causal=True),)),
        "blocks": functools.partial(block_sparse_attention, chosen=choice, rows=36, columns=36),
        "blocks, causal": functools.partial(block_sparse_attention, chosen=choice, rows=36, columns=36, causal=True),
        "blocks by query": functools.partial(block_sparse_attention, chosen=per_query, rows=1, columns=36),
        "vmoba": functools.partial(attlas.attend, name="vmoba", grid=(5, 6, 6), blocks=((2, 3, 3),)),
        "biformer": functools.partial(attlas.attend, name="biformer", grid=(9, 20), regions=3, top=4, kernel=0),
    }
    for name, run in kinds.items():
        for dtype, allowed in ALLOWED.items():
            further = [table.clone()] if run is biased else []
            arrays = [x.requires_grad_() for x in tensors(8, 180, 32, dtype) + further]
            exact = [x.detach().double().requires_grad_() for x in arrays]
            got, expected = run(*arrays, backend="cpu"), run(*exact, backend="oracle")
            seed = torch.randn_like(got)
            pairs = [(got, expected)]
            pairs += zip(
                torch.autograd.grad(got, arrays, seed), torch.autograd.grad(expected, exact, seed.double()), strict=True
            )
            error = max(float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs)
            print(f"  {name}, {dtype}: relative RMS error {error:.1e}, allowed {allowed:.0e}")
            if not error <= allowed:
                sys.exit(f"the oracle check is red, nothing is measured: {name} in {dtype}")


def natten(arrays: list[Tensor]) -> dict[str, Call]:
    """The plane by NATTEN, if it is installed and agrees."""
    if importlib.util.find_spec("natten") is None:
        print("  NATTEN is not installed and not measured: pip install natten")
        return {}
    from natten.functional import na2d

    laid_out = [x.transpose(1, 2).unflatten(1, (56, 56)).contiguous() for x in arrays]
    run = functools.partial(na2d, *laid_out, kernel_size=7)
    difference = run().flatten(1, 2).transpose(1, 2) - neighborhood_attention(*arrays, PLANE)
    if not difference.abs().max() < 1e-4:
        sys.exit("NATTEN and the kernel disagree, nothing is measured")
    return {"NATTEN": without_gradient(run)}


def flex(arrays: list[Tensor]) -> Call:
    """The sliding window by FlexAttention, compiled; windows are cut at the ends, which makes 0.4 % fewer pairs."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= query - 128) & (key < query + 128)

    tokens = arrays[0].shape[2]
    mask = create_block_mask(near, None, None, tokens, tokens, device="cpu")
    run = torch.compile(flex_attention)
    difference = run(*arrays, block_mask=mask) - neighborhood_attention(*arrays, (Axis(tokens, 256),))
    if not difference[:, :, 256:-256].abs().max() < 1e-4:
        sys.exit("FlexAttention and the kernel disagree, nothing is measured")
    return without_gradient(lambda: run(*arrays, block_mask=mask))


def ratio(times: Times, slower: str, faster: str) -> list[float]:
    """Quartiles of the rounds' ratios."""
    return quartiles(x / y for x, y in zip(times[slower], times[faster], strict=True))


def fit(pairs: list[int], times: Times) -> tuple[float, list[float]]:
    """R² of the medians' straight line over pairs, and the seconds per million pairs at each."""
    medians = [statistics.median(values) for values in times.values()]
    return statistics.correlation(pairs, medians) ** 2, [1e6 * t / n for n, t in zip(pairs, medians, strict=True)]


def memory(what: str) -> int:
    """Bytes of this process now (VmRSS) or at most (VmHWM)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def growth(kind: str, tokens: int) -> float:
    """Memory by which a fresh process grows in a forward, over that of its output."""

    def call(tokens: int, arrays: list[Tensor]) -> Call:
        if kind == "sliding window":
            return neighborhood((Axis(tokens, 256),), arrays)
        return sparse(arrays, torch.eye(tokens // BLOCK, dtype=torch.bool).expand(1, 8, -1, -1))

    call(256, tensors(8, 256, 64))()  # loads the library and starts the threads
    run = call(tokens, tensors(8, tokens, 64))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the largest memory so far
    run()
    return (memory("VmHWM") - before) / (8 * tokens * 64 * 4)


def retrieval(tokens: int = 32768) -> tuple[float, float]:
    """Share of its store that a landmark layer reads for one token: as counted, and what the blocks weigh."""
    layer = attlas.mixer("landmark", 256, heads=4, causal=True, mem_freq=63).eval()
    reader = Reader(layer, top_k=4, blocks=tokens // 64)
    x = torch.randn(1, tokens + 1, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in x[:, :-1].split(1024, 1):
            reader(part)
        before = reader.bytes_read
        reader(x[:, -1:])
    assert reader.store is not None
    assert reader.chosen is not None
    blocks = len(reader.chosen.flatten())
    return (reader.bytes_read - before) / reader.store.nbytes, blocks * reader.store[
        0, 0, 0
    ].nbytes / reader.store.nbytes


def main() -> None:
    """Measure, print the ratios, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds, few = arguments.rounds, max(3, arguments.rounds // 3)
    print("oracle check")
    check()
    here = machine.describe()
    print("\n" + "\n".join(f"{name}: {value}" for name, value in here.items()))
    found: dict[str, list[float]] = {}
    seconds: dict[str, Times] = {}

    arrays = tensors(4, 56 * 56, 32)
    half = [x.bfloat16() for x in arrays]
    calls = {
        "SDPA": sdpa(*arrays),
        "kernel": neighborhood(PLANE, arrays),
        "torch": neighborhood(PLANE, arrays, "torch"),
        "bfloat16": neighborhood(PLANE, half),
    }
    what = "56x56, window 7, 4 heads of 32"
    seconds[what] = times = in_rounds(calls, 3 * rounds, what)
    found[f"{what}: times faster than dense SDPA"] = ratio(times, "SDPA", "kernel")
    found[f"{what}: times faster than the torch backend"] = ratio(times, "torch", "kernel")
    found[f"{what}: bfloat16, times faster than float32"] = ratio(times, "kernel", "bfloat16")
    if slow := natten(arrays):
        seconds["NATTEN"] = times = in_rounds(slow | {"kernel": calls["kernel"]}, 3, "NATTEN")
        found[f"{what}: times faster than NATTEN"] = ratio(times, "NATTEN", "kernel")

    arrays = tensors(4, 16 * 28 * 28, 32)
    what = "16x28x28, window 3x7x7, 4 heads of 32"
    seconds[what] = times = in_rounds({"SDPA": sdpa(*arrays), "kernel": neighborhood(VIDEO, arrays)}, rounds, what)
    found[f"{what}: times faster than dense SDPA"] = ratio(times, "SDPA", "kernel")

    arrays = tensors(8, 16384, 64)
    half = [x.bfloat16() for x in arrays]
    calls = {"kernel": neighborhood(SLIDING, arrays), "FlexAttention": flex(arrays)}
    calls["bfloat16"] = neighborhood(SLIDING, half)
    calls["backward"] = backward(lambda x: neighborhood_attention(*x, SLIDING, backend="cpu"), arrays)
    what = "sliding window 256 of 16384, 8 heads of 64"
    seconds[what] = times = in_rounds(calls, rounds, what)
    found[f"{what}: times faster than compiled FlexAttention"] = ratio(times, "FlexAttention", "kernel")
    found[f"{what}: backward over forward"] = ratio(times, "backward", "kernel")
    found[f"{what}: bfloat16, times faster than float32"] = ratio(times, "kernel", "bfloat16")

    arrays = tensors(8, BLOCKS, 64)
    choice = chosen(BLOCKS // BLOCK, DENSITY)
    calls = {"SDPA": sdpa(*arrays), "kernel": sparse(arrays, choice)}
    calls["backward"] = backward(
        lambda x: block_sparse_attention(*x, choice, rows=BLOCK, columns=BLOCK, backend="cpu"), arrays
    )
    what = "one in eight blocks of 64, of 8192, 8 heads of 64"
    seconds[what] = times = in_rounds(calls, rounds, what)
    found[f"{what}: times faster than dense SDPA"] = ratio(times, "SDPA", "kernel")
    found[f"{what}: backward over forward"] = ratio(times, "backward", "kernel")

    sweeps: dict[str, tuple[float, list[float]]] = {}
    calls = {f"{share:.4f}": sparse(arrays, chosen(BLOCKS // BLOCK, share)) for share in DENSITIES}
    seconds["densities"] = times = in_rounds(calls, few, "densities")
    sweeps["densities"] = fit([round(share * BLOCKS * BLOCKS) * 8 for share in DENSITIES], times)
    calls = {str(window): neighborhood((Axis(BLOCKS, window),), arrays) for window in WINDOWS}
    seconds["windows"] = times = in_rounds(calls, few, "windows")
    sweeps["windows"] = fit([8 * Axis(BLOCKS, window).pairs() for window in WINDOWS], times)

    arrays = tensors(8, CHOSEN, 64)
    calls = {"SDPA": sdpa(*arrays)}
    for name, (grid, settings) in CHOOSERS.items():
        calls[name] = without_gradient(functools.partial(attlas.attend, *arrays, name, grid=grid, **settings))
    seconds["choosers"] = times = in_rounds(calls, few, "choosers")
    for name, (grid, _) in CHOOSERS.items():
        what = f"{name} on {'x'.join(map(str, grid))}, choosing included"
        found[f"{what}: times faster than dense SDPA"] = ratio(times, "SDPA", name)

    print(f"\n{'ratios of this run':80} {'median':>8}   quartiles")
    for what, (lower, median, upper) in found.items():
        print(f"  {what:78} {median:8.2f}   {lower:.2f} to {upper:.2f}")
    for what, (straight, each) in sweeps.items():
        rates = ", ".join(f"{1e3 * x:.2f}" for x in each)
        print(f"  time over visible pairs, {what}: R² {straight:.4f}; milliseconds per million pairs: {rates}")
    over_output: dict[str, dict[int, float]] = {}
    for kind in ("sliding window", "blocks"):
        over_output[kind] = {}
        for tokens in (16384, 65536):
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                over_output[kind][tokens] = fresh.apply(growth, (kind, tokens))
            print(f"  memory of a forward over its output, {kind}, {tokens} tokens: {over_output[kind][tokens]:.2f}")
    read, chosen_bytes = retrieval()
    print(f"  landmark: share of the store read for one token: {read:.5f}; of the blocks chosen: {chosen_bytes:.5f}")
    version = torch.__version__.split("+")[0]
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": here,
        "ratios, quartiles": found,
        "R² of time over pairs, and seconds per million pairs": sweeps,
        "memory over output": over_output,
        "landmark, share of the store read for one token, and of the blocks chosen": [read, chosen_bytes],
        "seconds": {what: {name: quartiles(s) for name, s in times.items()} for what, times in seconds.items()},
    }
    path = Path(__file__).parent / "results" / f"local-threads{arguments.threads}-torch{version}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
