"""Positions in a kernel attention: what transforms save, what they round, and what unit norms are good for.

*Length.* The sums of kernel attention with a relative bias, Σ_j c_{j−i} φ(q_i)·φ(k_j) v_j, over every pair and by
Fourier transforms, and softmax with the same bias: seconds of one forward pass of one head, and how far the first
two, in float32, are from the sums in float64. The pairs grow fourfold with twice the length, the transforms a
little more than twofold, from a higher start: they win from some thousand tokens on, and both round alike.
A causal layer transforms half by half of the sequence, so that its small first sums do not get the rounding of the
largest: its error is the third.

*Features.* The relative error of the estimate of softmax with that bias, for queries and keys of three norms. With
norm 1 it halves with four times the features; with norm 4 features do not help, which is why they are normalised.

Luo et al., 2021 (arXiv:2106.12566).
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.ops.linear import with_ones
from attlas.ops.random_features import exponents, orthogonal_gaussian
from attlas.ops.toeplitz import toeplitz_attention, toeplitz_matrix
from examples.shared import main

BACKENDS = {"kernel, all pairs": "torch", "kernel, transforms": "fft"}
WAYS = ("softmax", *BACKENDS)


class Result(NamedTuple):
    """Seconds and errors by way and length, and errors by norm and number of features."""

    seconds: dict[str, dict[int, float]]
    rounding: dict[str, dict[int, float]]
    estimate: dict[float, dict[int, float]]


def kernel(q: Tensor, k: Tensor, v: Tensor, b: Tensor, w: Tensor, backend: str, causal: bool = False) -> Tensor:
    """Attention with the features of `w` and the bias b."""
    phi_q, phi_k = exponents(q, w).exp(), exponents(k, w).exp()
    sums = toeplitz_attention(phi_q, phi_k, with_ones(v), b.exp(), causal=causal, backend=backend)
    return sums[..., :-1] / sums[..., -1:]


def softmax(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
    """What the features estimate."""
    return F.scaled_dot_product_attention(q, k, v, toeplitz_matrix(b).unsqueeze(0), scale=1.0)


def inputs(tokens: int, size: int, norm: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys of one norm, values, and a bias for every offset, of one head."""
    q, k = (norm * F.normalize(torch.randn(1, 1, tokens, size), dim=-1) for _ in range(2))
    return q, k, torch.randn(1, 1, tokens, size), torch.randn(1, 2 * tokens - 1)


def relative(got: Tensor, expected: Tensor) -> float:
    """The error of all outputs together."""
    return float((got - expected).norm() / expected.norm())


def fastest(function: Callable[[], Tensor], repeats: int = 3) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def grow(lengths: Sequence[int], size: int, features: int) -> tuple[dict[str, dict[int, float]], ...]:
    """Seconds and rounding at every length."""
    seconds: dict[str, dict[int, float]] = {way: {} for way in WAYS}
    rounding: dict[str, dict[int, float]] = {way: {} for way in (*BACKENDS, "kernel, transforms, causal")}
    w = orthogonal_gaussian(features, size)
    for tokens in lengths:
        q, k, v, b = inputs(tokens, size, 1.0)
        q2, k2, v2, b2, w2 = (t.double() for t in (q, k, v, b, w))
        exact = kernel(q2, k2, v2, b2, w2, "fft")
        seconds["softmax"][tokens] = fastest(partial(softmax, q, k, v, b))
        for way, backend in BACKENDS.items():
            seconds[way][tokens] = fastest(partial(kernel, q, k, v, b, w, backend))
            rounding[way][tokens] = relative(kernel(q, k, v, b, w, backend), exact)
        exact = kernel(q2, k2, v2, b2, w2, "fft", causal=True)
        rounding["kernel, transforms, causal"][tokens] = relative(kernel(q, k, v, b, w, "fft", causal=True), exact)
    return seconds, rounding


def estimate(
    counts: Sequence[int], norms: Sequence[float], draws: int, tokens: int, size: int
) -> dict[float, dict[int, float]]:
    """Mean relative errors against softmax."""
    errors: dict[float, dict[int, float]] = {norm: dict.fromkeys(counts, 0.0) for norm in norms}
    for norm in norms:
        for draw in range(draws):
            torch.manual_seed(draw)
            q, k, v, b = (t.double() for t in inputs(tokens, size, norm))
            exact = softmax(q, k, v, b)
            for count in counts:
                w = orthogonal_gaussian(count, size)
                errors[norm][count] += relative(kernel(q, k, v, b, w, "torch"), exact) / draws
    return errors


@torch.no_grad()
def run(
    lengths: Sequence[int] = (256, 512, 1024, 2048, 4096, 8192),
    features: int = 32,
    size: int = 32,
    counts: Sequence[int] = (16, 64, 256, 1024),
    norms: Sequence[float] = (1.0, 2.0, 4.0),
    draws: int = 10,
) -> Result:
    """Measure both and print the tables."""
    seconds, rounding = grow(lengths, size, features)
    print(f"{'tokens':28}" + "".join(f"{tokens:>9}" for tokens in lengths))
    for way, by_length in seconds.items():
        print(f"{way + ', ms':28}" + "".join(f"{1e3 * s:9.1f}" for s in by_length.values()))
    for way, by_length in rounding.items():
        print(f"{way:28}" + "".join(f"{error:9.0e}" for error in by_length.values()))
    errors = estimate(counts, norms, draws, tokens=128, size=16)
    print(f"\n{'features':28}" + "".join(f"{count:>9}" for count in counts))
    for norm, by_count in errors.items():
        print(f"{f'error at norm {norm:g}':28}" + "".join(f"{error:9.2f}" for error in by_count.values()))
    return Result(seconds, rounding, errors)


def draw(result: Result, path: Path) -> None:
    """Time, rounding and the error of the estimate."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    panels = (
        (result.seconds, "seconds of a forward pass", "tokens"),
        (result.rounding, "error by rounding, float32", "tokens"),
        ({f"norm {norm:g}": e for norm, e in result.estimate.items()}, "error against softmax", "features"),
    )
    colours = dict(zip((*WAYS, "kernel, transforms, causal"), ("grey", "tab:red", "tab:blue", "tab:cyan"), strict=True))
    for axis, (lines, title, label) in zip(axes, panels, strict=True):
        for name, line in lines.items():
            axis.plot(list(line), list(line.values()), marker="o", label=name, color=colours.get(name))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set(title=title, xlabel=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
