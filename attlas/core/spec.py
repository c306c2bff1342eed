"""What a mechanism declares about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Pattern(StrEnum):
    """How queries and keys relate. Causal cross: no output depends on a later query."""

    NONCAUSAL_SELF = "noncausal self"
    CAUSAL_SELF = "causal self"
    NONCAUSAL_CROSS = "noncausal cross"
    CAUSAL_CROSS = "causal cross"

    @classmethod
    def of(cls, causal: bool, cross: bool) -> Pattern:
        """The pattern of a call."""
        return cls(f"{'causal' if causal else 'noncausal'} {'cross' if cross else 'self'}")


class Takes(StrEnum):
    """What of a mask a mechanism honours beside causality."""

    PADDING = "padding"
    PAIRS = "pairs"
    BIAS = "bias"


ALL_PATTERNS = frozenset(Pattern)
EVERY_MASK = frozenset(Takes)


@dataclass(frozen=True)
class Example:
    """Tiny sizes at which the contract suite runs a mechanism and pictures show it.

    `parameters` is the exact count of the mixer at these sizes, worked out from the paper; `patterns` limits
    the example to some of those that the mechanism serves.
    """

    parameters: int
    grid: tuple[int, ...] = (7,)
    prefix: int = 0
    dim: int = 16
    heads: int = 2
    kv_heads: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    patterns: frozenset[Pattern] | None = None


@dataclass(frozen=True)
class Spec:
    """The declaration at the head of a mechanism's file.

    Attributes:
        name: the short name users type.
        title, year, paper: the publication; `paper` is an arXiv number or DOI.
        equation: the mechanism in one line.
        complexity: time and state in the field's notation.
        patterns: what `Pattern`s it serves.
        grids: ranks of grids (1, 2, 3) it serves.
        prefix: whether tokens without a position may stand in front.
        class_token: whether a class token has to stand in front of the grid.
        masks: what of a mask it honours beside causality.
        streams: whether `extend` carries a state through a causal sequence.
        grouped: whether it reads shared key/value heads itself; else the shell repeats them.
        shell: the published settings of the shell around it (see `attlas.Attention`), as defaults.
        variants: named head counts, as shares of the nominal heads, rounded down to at least one head.
        examples: tiny sizes for tests and pictures.
        reconstruction: no official code was found; the equations are the paper's as far as known.
    """

    name: str
    title: str
    year: int
    paper: str
    equation: str
    complexity: str
    patterns: frozenset[Pattern]
    examples: tuple[Example, ...]
    grids: tuple[int, ...] = (1, 2, 3)
    prefix: bool = True
    class_token: bool = False
    masks: frozenset[Takes] = frozenset({Takes.PADDING})
    streams: bool = False
    grouped: bool = False
    shell: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    reconstruction: bool = False
