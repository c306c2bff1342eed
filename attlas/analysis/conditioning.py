"""What an associative memory holds, how its errors add up, and what it has in common with an animal.

One head of linear attention stores m pairs of a key (the stimulus) and a value (the outcome) in M = sum_j v_j k_j^T and
reads M q. Asked for a stored key of length 1 it returns the value and the interference of all other pairs:

    M k_i = v_i + sum_{j != i} (k_j . k_i) v_j

Random keys overlap by 1 / sqrt(D), and on average overlaps cancel: the signal has D / (m - 1) times the power of the
interference, so that a number of pairs proportional to D is read well. Nothing makes them cancel: values of the worst
signs add up sum_j |k_j . k_i|, which exceeds the signal from about sqrt(pi D / 2) pairs on. Free of errors whatever the
values are, a memory holds a number of pairs proportional to sqrt(D).

A layer that errs with probability e gives a chain of L layers that is right with (1 - e)^L; r heads that vote err where
more than half of them do.

D key size, E value size, T trials, S test stimuli.

Source: "Understanding Transformers through the Lens of Pavlovian Conditioning", 2025 (arXiv:2508.08289), which has no
official code: the experiments are a reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mechanism import Attend


class Capacity(NamedTuple):
    """A Hebbian memory of `pairs` random keys of `size` features, asked for each of them.

    Attributes:
        size, pairs: of the memory.
        snr: power of the stored values over that of the interference.
        retrieved: share of the probes whose class of outcomes has the largest response.
        worst: interference of values with the worst signs, of the worst key; recall is certain below 1.
    """

    size: int
    pairs: int
    snr: float
    retrieved: float
    worst: float


def capacity_curve(
    sizes: Sequence[int], pairs: Sequence[int], *, classes: int = 16, memories: int = 16, seed: int = 0
) -> list[Capacity]:
    """Signal, retrieval and worst case of random memories, for every size with every number of pairs.

    Args:
        sizes: features of a key.
        pairs: how many are stored.
        classes: kinds of outcome, orthogonal to each other; each pair has a random one.
        memories: over how many memories to average.
        seed: of keys and outcomes.
    """
    at_least_one(classes=classes, memories=memories, size=min(sizes, default=0), pairs=min(pairs, default=0))
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for size in sizes:
        for count in pairs:
            noise = right = worst = 0.0
            for _ in range(memories):
                k_TD = random_keys(count, size, generator)
                kinds_T = torch.randint(classes, (count,), generator=generator)
                v_TE = F.one_hot(kinds_T, classes).to(k_TD.dtype)
                read_TE = k_TD @ (k_TD.T @ v_TE)
                noise += float((read_TE - v_TE).square().sum(-1).mean())
                right += float((read_TE.argmax(-1) == kinds_T).double().mean())
                worst += float(overlaps(k_TD).sum(-1).max())
            snr = memories / noise if count > 1 else math.inf
            curve.append(Capacity(size, count, snr, right / memories, worst / memories))
    return curve


def guaranteed_pairs(size: int, *, memories: int = 16, seed: int = 0) -> float:
    """How many random keys can be stored, on average, so that no signs of the values make any recall fail."""
    at_least_one(size=size, memories=memories)
    generator = torch.Generator().manual_seed(seed)
    most = 8 + 6 * math.isqrt(size)
    found = 0
    for _ in range(memories):
        among_first_TT = overlaps(random_keys(most, size, generator)).cumsum(1)
        worst_T = among_first_TT.triu().amax(0)  # of the first n + 1 keys, in column n
        found += int((worst_T < 1).int().cumprod(0).sum())
    return found / memories


def random_keys(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Directions (count, size) of length 1, evenly distributed."""
    return F.normalize(torch.randn(count, size, dtype=torch.float64, generator=generator), dim=-1)


def overlaps(k_TD: Tensor) -> Tensor:
    """|k_i . k_j| (T, T), 0 on the diagonal."""
    return (k_TD @ k_TD.T).abs().fill_diagonal_(0)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The p of the best y = c x^p, by least squares of the logarithms.

    >>> round(exponent([1, 2, 4], [3, 6, 12]), 6)
    1.0
    """
    if len(x) != len(y) or len(set(x)) < 2 or min(*x, *y) <= 0:
        raise BadInput(
            f"an exponent takes at least two pairs of positive numbers, of different x, got {list(x)} and {list(y)}"
        )
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def bit_error(size: int, pairs: int) -> float:
    """The probability that interference flips the sign of one feature of a value of random signs, for many pairs."""
    at_least_one(size=size, pairs=pairs)
    return 0.0 if pairs == 1 else 0.5 * math.erfc(math.sqrt(size / (2 * (pairs - 1))))


def chain(error: float, layers: int) -> float:
    """The probability that all layers are right, each wrong with probability `error`, independently: (1 - e)^L."""
    return (1 - _probability(error)) ** layers


def vote(error: float, heads: int) -> float:
    """The probability that more than half of the heads are wrong, each with probability `error`, independently."""
    _probability(error)
    if heads < 1 or heads % 2 == 0:
        raise BadInput(f"an odd number of heads votes, so that none is split, got {heads}")
    if error in (0, 1):
        return float(error)
    logs = (
        math.lgamma(heads + 1)
        - math.lgamma(wrong + 1)
        - math.lgamma(heads - wrong + 1)
        + wrong * math.log(error)
        + (heads - wrong) * math.log1p(-error)
        for wrong in range(heads // 2 + 1, heads + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))


class Design(NamedTuple):
    """A way to spend parameters, and how reliably its whole depth recalls."""

    layers: int
    heads: int
    size: int
    reliability: float


def trade_off(
    parameters: int, pairs: int, *, layers: Sequence[int], heads: Sequence[int], dim: int = 64
) -> list[Design]:
    """Every depth with every number of voting heads, the head size being what the parameters leave.

    A head of size D has four projections, 4 D dim parameters. Every layer recalls one sign out of `pairs` stored
    values. Designs that leave no feature for a head are left out. Heads that vote lose against one head as wide as
    all of them: a vote forgets how sure each was.
    """
    at_least_one(pairs=pairs, layers=min(layers, default=0), heads=min(heads, default=0), dim=dim)
    designs = []
    for depth in layers:
        for count in heads:
            size = parameters // (4 * dim * depth * count)
            if size:
                designs.append(Design(depth, count, size, chain(vote(bit_error(size, pairs), count), depth)))
    return designs


def recall(symbols_T: Tensor, size: int, pairs: int, generator: torch.Generator) -> Tensor:
    """What fresh random memories answer, each asked for one symbol.

    Each of the T memories stores `pairs` random keys with random values of the same size, one for each symbol from 0,
    and answers the symbol whose value is most like what it reads.
    """
    shape = len(symbols_T), pairs, size
    k_TPD, v_TPD = (F.normalize(torch.randn(shape, generator=generator), dim=-1) for _ in "kv")
    q_TD1 = k_TPD[torch.arange(len(symbols_T)), symbols_T].unsqueeze(-1)
    read_TD1 = v_TPD.transpose(1, 2) @ (k_TPD @ q_TD1)
    return (v_TPD @ read_TD1).squeeze(-1).argmax(-1)


def run_chain(layers: int, size: int, pairs: int, *, heads: int = 1, chains: int = 1000, seed: int = 0) -> float:
    """The share of chains that end with the right symbol; each layer asks its memories for what the last one answered.

    Args:
        layers: how many memories lie behind each other.
        size, pairs: of each memory.
        heads: memories of a layer, which vote; the most frequent symbol goes on.
        chains: how many are run.
        seed: of the memories.
    """
    at_least_one(layers=layers, size=size, pairs=pairs, heads=heads, chains=chains)
    generator = torch.Generator().manual_seed(seed)
    right = pairs - 1  # of equally frequent symbols `mode` takes the smallest: a split vote is lost
    symbols_T = torch.full((chains,), right)
    for _ in range(layers):
        votes = [recall(symbols_T, size, pairs, generator) for _ in range(heads)]
        symbols_T = torch.stack(votes).mode(0).values
    return float((symbols_T == right).double().mean())


class Phase(NamedTuple):
    """Equal trials: a stimulus (D,), which may be a sum of several, and the strength of the outcome."""

    stimulus: Tensor
    outcome: float
    trials: int


def responses(attend: Attend, phases: Sequence[Phase], tests_SD: Tensor) -> Tensor:
    """The response to each test stimulus after each trial, (S, T).

    Args:
        attend: one causal head whose state learns, as `make_attend("pavlovian_delta", 1, D, causal=True, rate=0.2)`.
        phases: what happens, in order.
        tests_SD: stimuli that are tried without being learned.
    """
    if not attend.site.causal or attend.site.heads != 1:
        raise BadInput(f"trials are learned one after the other by one head: build {attend.spec.name} with causal=True")
    at_least_one(trials=min((phase.trials for phase in phases), default=0))
    stimuli_TD = torch.cat([phase.stimulus.expand(phase.trials, -1) for phase in phases])
    outcomes_TE = torch.zeros_like(stimuli_TD)
    outcomes_TE[:, 0] = torch.cat([stimuli_TD.new_full((phase.trials,), phase.outcome) for phase in phases])
    tests = len(tests_SD)
    k, v = (x.expand(tests, 1, -1, -1) for x in (stimuli_TD, outcomes_TE))
    q = tests_SD[:, None, None].expand_as(k)
    with torch.no_grad():
        return attend(q, k, v)[:, 0, :, 0]


def acquisition(attend: Attend, trials: int = 30) -> Tensor:
    """The response (T,) to a stimulus that the outcome always follows."""
    a, _ = _stimuli(attend)
    return responses(attend, [Phase(a, 1.0, trials)], a[None])[0]


def extinction(attend: Attend, trials: int = 30) -> Tensor:
    """The response (2 T,) to a stimulus that the outcome follows first, and then no longer."""
    a, _ = _stimuli(attend)
    return responses(attend, [Phase(a, 1.0, trials), Phase(a, 0.0, trials)], a[None])[0]


def blocking(attend: Attend, trials: int = 30) -> float:
    """How much less is learned of B in trials of A with B where A alone already foretold the outcome: 0 to 1."""
    a, b = _stimuli(attend)
    together = Phase(a + b, 1.0, trials)
    blocked = responses(attend, [Phase(a, 1.0, trials), together], b[None])[0, -1]
    control = responses(attend, [together], b[None])[0, -1]
    return float(1 - blocked / control)


def generalisation(attend: Attend, degrees: Sequence[float], trials: int = 30) -> Tensor:
    """The response to stimuli at these angles from the one that was learned, as a share of the response to that."""
    a, b = _stimuli(attend)
    angles_S1 = torch.tensor(degrees, dtype=a.dtype).deg2rad()[:, None]
    tests_SD = torch.cat([a[None], angles_S1.cos() * a + angles_S1.sin() * b])
    learned_S = responses(attend, [Phase(a, 1.0, trials)], tests_SD)[:, -1]
    return learned_S[1:] / learned_S[0]


def _stimuli(attend: Attend) -> tuple[Tensor, Tensor]:
    """Two of length 1 that have nothing in common."""
    size = attend.site.head_dim
    if size < 2:
        raise BadInput(f"two stimuli need a head of at least 2 features, got {size}")
    a, b = torch.eye(size, dtype=torch.float64)[:2]
    return a, b


def _probability(error: float) -> float:
    if not 0 <= error <= 1:
        raise BadInput(f"error is a probability, got {error}")
    return error


def at_least_one(**counts: int) -> None:
    """Refuse a count below 1, by its name."""
    for name, count in counts.items():
        if count < 1:
            raise BadInput(f"{name} is at least 1, got {count}")
