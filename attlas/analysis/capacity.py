"""How many associations a mechanism can be asked for, by the size of its head.

Pairs of a random key and one of a few orthogonal values are given to one head; asked with a stored key, it is right if
the largest feature of its output is that of the stored value. A sum of values times keys (Hebb's rule) stores a number
proportional to D. Rules that fade, or that overwrite old pairs to correct themselves, store about as many or fewer of
pairs that are shown once. Softmax, which keeps every key, stores a number that grows much faster than D.

Keys have length sqrt(D), as features of unit variance have, and a query is a key.

B probes, M pairs, D key size, E value size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.analysis.conditioning import at_least_one, random_keys
from attlas.blocks.factory import make_attend, resolve
from attlas.core.errors import BadInput
from attlas.core.mechanism import Attend
from attlas.core.spec import Pattern

CLASSES = 8


@torch.no_grad()
def retrieved(attend: Attend, pairs: int, *, probes: int = 32, memories: int = 4, seed: int = 0) -> float:
    """The share of probes that get the stored value's class, among CLASSES.

    A causal attend reads the pairs as a sequence; the query at its end is the probe.
    """
    at_least_one(pairs=pairs, probes=probes, memories=memories)
    size = attend.site.head_dim
    if attend.site.heads != 1 or size < CLASSES:
        raise BadInput(
            f"associations are stored in one head of at least {CLASSES} features, got {attend.site.heads} of {size}"
        )
    generator = torch.Generator().manual_seed(seed)
    right = asked = 0
    for _ in range(memories):
        k_MD = size**0.5 * random_keys(pairs, size, generator).float()
        kinds_M = torch.randint(CLASSES, (pairs,), generator=generator)
        v_ME = F.one_hot(kinds_M, size).float()
        chosen_B = torch.randperm(pairs, generator=generator)[:probes]
        response_BE = _ask(attend, k_MD, v_ME, chosen_B)[:, :CLASSES]
        right += int((response_BE.argmax(-1) == kinds_M[chosen_B]).sum())
        asked += len(chosen_B)
    return right / asked


def _ask(attend: Attend, k_MD: Tensor, v_ME: Tensor, chosen_B: Tensor) -> Tensor:
    if not attend.site.causal:
        everything = attend(k_MD[None, None], k_MD[None, None], v_ME[None, None])
        return everything[0, 0, chosen_B]
    k, v = (x.expand(len(chosen_B), 1, -1, -1) for x in (k_MD, v_ME))
    q = k.clone()
    q[:, 0, -1] = k_MD[chosen_B]
    return attend(q, k, v)[:, 0, -1]


def stored_pairs(name: str, size: int, *, level: float = 0.5, limit: int = 2048, seed: int = 0, **params: Any) -> int:
    """The largest number of pairs of which a share of at least `level` is retrieved, at most `limit`.

    Args:
        name: of a mechanism that is a function of queries, keys and values.
        size: features of a head.
        level: share of right answers, above 1 / CLASSES, which is guessing.
        limit: where to stop looking.
        seed: of the pairs, and of what a mechanism has to learn.
        **params: of the mechanism.
    """
    at_least_one(limit=limit)
    if not 1 / CLASSES < level <= 1:
        raise BadInput(f"level is a share of right answers above guessing, 1 / {CLASSES}, got {level}")
    causal = Pattern.NONCAUSAL_SELF not in resolve(name)[0].spec.patterns

    def holds(pairs: int) -> bool:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            attend = make_attend(name, 1, size, causal=causal, length=pairs, **params).eval()
            return retrieved(attend, pairs, seed=seed) >= level

    return largest(holds, limit)


def hebbian_pairs(size: float, level: float = 0.5) -> float:
    """The number of pairs that Hebb's rule should store at this level of retrieval: proportional to the size.

    The right class is read as 1 and each class with Gaussian interference of variance (M - 1) / (CLASSES D).
    """
    if not 1 / CLASSES < level < 1:
        raise BadInput(f"level is a share of right answers above guessing, 1 / {CLASSES}, and below 1, got {level}")
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    density = (-z.square() / 2).exp()
    density /= density.sum()
    low, high = 0.0, 20.0
    for _ in range(60):
        signal = (low + high) / 2
        right = float((density * torch.special.ndtr(z + signal) ** (CLASSES - 1)).sum())
        low, high = (signal, high) if right < level else (low, signal)
    return 1 + CLASSES * size / low**2


def largest(holds: Callable[[int], bool], limit: int) -> int:
    """The last number before `holds` fails, which it goes on doing; at most `limit`, 0 where it never holds.

    >>> largest(lambda n: n * n <= 200, 1000)
    14
    """
    low, high = 0, 1
    while high < limit and holds(high):
        low, high = high, 2 * high
    if high >= limit:
        if holds(limit):
            return limit
        high = limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
