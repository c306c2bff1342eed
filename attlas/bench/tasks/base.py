"""What a task is: data, a question at some positions, and how answers are scored.

B sequences, N tokens, F features of a token, K questions, Y classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput

IGNORED = -100
"""The target of a position where nothing is asked."""


class Batch(NamedTuple):
    """Values (B, N) or vectors (B, N, F), and targets (B, N), or (B,) for one per sequence."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Metric:
    """A measure on answers.

    Attributes:
        name: with its unit.
        higher_is_better: which way it runs.
        score: of logits (K, Y) for targets (K,), one number each.
    """

    name: str
    higher_is_better: bool
    score: Callable[[Tensor, Tensor], Tensor]


def bits(logits_KY: Tensor, targets_K: Tensor) -> Tensor:
    """-log2 of the probability given to the target."""
    return F.cross_entropy(logits_KY, targets_K, reduction="none") / math.log(2)


def hits(logits_KY: Tensor, targets_K: Tensor) -> Tensor:
    """1 where the likeliest class is the target, else 0."""
    return (logits_KY.argmax(-1) == targets_K).float()


ACCURACY = Metric("accuracy", True, hits)


@dataclass(frozen=True)
class Setting:
    """Sizes at which a task tells mechanisms apart within seconds on one core; the defaults of its jobs.

    `ratio` is the MLP's width over dim in the baseline's model, which sets the budget of parameters.
    """

    steps: int
    batch: int
    length: int
    dim: int = 64
    heads: int = 4
    layers: int = 2
    ratio: int = 2
    learning_rate: float = 6e-3


class Task(ABC):
    """A task, at one length.

    Attributes:
        name, description: for tables.
        causal: which self-attention pattern the mixers are built for.
        metric: how held-out answers are measured.
        vocabulary: number of token values; 0 where tokens are vectors of `features` numbers.
        classes: of an answer.
        per_sequence: whether one question is asked of the whole sequence rather than of its tokens.
        picture: channels and side of the pictures that tokens were cut from, which whole image networks see; None
            where there are none.
        setting: the default sizes.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    causal: ClassVar[bool]
    metric: ClassVar[Metric]
    vocabulary: ClassVar[int] = 0
    features: ClassVar[int] = 0
    classes: ClassVar[int]
    per_sequence: ClassVar[bool] = False
    picture: ClassVar[tuple[int, int] | None] = None
    setting: ClassVar[Setting]

    def __init__(self, length: int) -> None:
        if length < 1:
            raise BadInput(f"the {self.name} task needs a length of at least one token, got {length}")
        self.length = length

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of the positions."""
        return (self.length,)

    def pictures(self, inputs_BNF: Tensor) -> Tensor:
        """The pictures (B, channels, side, side) that the tokens were cut from, where `picture` says so."""
        raise BadInput(f"the {self.name} task has no pictures")

    @abstractmethod
    def chance(self) -> float:
        """The metric's value for a model that has learned nothing but how frequent the answers are."""

    @abstractmethod
    def batches(self, seed: int, batch: int) -> Iterator[Batch]:
        """Endless training data, the same for the same seed."""

    @abstractmethod
    def held_out(self) -> Mapping[str, list[Batch]]:
        """Data that no training batch holds, always the same; in named parts that are worth telling apart."""

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, dict[str, float]]:
        """The metric over all held-out questions, and over each part where there are several."""
        total, count, parts = 0.0, 0, {}
        for part, batches in self.held_out().items():
            scores = torch.cat([self.metric.score(*asked(model(b.inputs), b.targets)) for b in batches])
            parts[part] = float(scores.mean())
            total, count = total + float(scores.sum(dtype=torch.float64)), count + len(scores)
        return total / count, parts if len(parts) > 1 else {}


def asked(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (K, Y) and targets (K,) of the questions alone."""
    where = targets != IGNORED
    return logits[where], targets[where]


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over the questions, in nats."""
    return F.cross_entropy(*asked(logits, targets))
