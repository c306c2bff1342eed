"""Which key each query may see, and what is added to its score.

B batch, H heads, N queries, M keys. `True` means *keep*. Queries are the last N of M positions, so
query n stands at position n + M - N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from attlas.core.errors import BadInput


class Rule(Protocol):
    """A visibility rule: broadcast query positions (N, 1) and key positions (1, M) to (..., N, M) bool."""

    def __call__(self, query: Tensor, key: Tensor) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class _Causal:
    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        return key <= query


@dataclass(frozen=True)
class _Window:
    left: int
    right: int

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        return (key >= query - self.left) & (key <= query + self.right)


@dataclass(frozen=True)
class _Document:
    ids: Tensor  # (M,) or (B, M)

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        if self.ids.shape[-1] != key.shape[-1]:
            raise BadInput(f"document ids cover {self.ids.shape[-1]} positions, the keys are {key.shape[-1]}")
        ids = self.ids.to(key.device)
        same = ids[..., query.flatten()].unsqueeze(-1) == ids[..., key.flatten()].unsqueeze(-2)
        return same if ids.ndim == 1 else same.unsqueeze(1)


@dataclass(frozen=True)
class _Prefix:
    length: int

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        return (key < self.length).expand(query.shape[0], -1)


@dataclass(frozen=True)
class _Block:
    size: int

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        return query // self.size == key // self.size


@dataclass(frozen=True)
class _Global:
    count: int

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        return (query < self.count) | (key < self.count)


@dataclass(frozen=True)
class _Pairs:
    keep: Tensor  # (..., N, M); one row for all queries where N is 1

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        keep = self.keep.to(key.device)
        rows, columns = keep.shape[-2:]
        if columns != key.shape[-1]:
            raise BadInput(f"the mask covers {columns} keys, the call has {key.shape[-1]}")
        if rows == 1:
            return keep.expand(*keep.shape[:-2], query.shape[0], columns)
        return keep[..., query.flatten() - (columns - rows), :]


@dataclass(frozen=True)
class _Both:
    first: Rule
    second: Rule

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        return self.first(query, key) & self.second(query, key)


@dataclass(frozen=True)
class _Either:
    first: Rule
    second: Rule

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        return self.first(query, key) | self.second(query, key)


@dataclass(frozen=True, eq=False)
class Mask:
    """Causality, padding, visible pairs and additive bias in one object.

    Combine with `&` (visible in both; biases add) and `|` (visible in either). A prefix-LM is
    `Mask.causal_() | Mask.prefix(100)`, causal documents are `Mask.causal_() & Mask.document(ids)`.

    Attributes:
        causal: a query sees no later position.
        keys: (B, M) bool, False where a key is padding.
        queries: (B, N) bool, False where a query is padding: mechanisms that sum over queries skip it.
            What a padded query itself returns is finite and otherwise unspecified.
        rule: further structure (window, documents, ...), or None.
        bias: (B or 1, H or 1, N, M) float, added to the scores.
    """

    causal: bool = False
    keys: Tensor | None = None
    queries: Tensor | None = None
    rule: Rule | None = None
    bias: Tensor | None = None

    @staticmethod
    def causal_() -> Mask:
        """Each query sees itself and what came before."""
        return Mask(causal=True)

    @staticmethod
    def padding(keep: Tensor) -> Mask:
        """keep (B, M) bool, True where the token is real. In self-attention it holds for queries too."""
        if keep.dtype != torch.bool or keep.ndim != 2:
            raise BadInput(
                "a padding mask is a (batch, tokens) bool tensor, True for real tokens, "
                f"got {keep.dtype} {tuple(keep.shape)}"
            )
        return Mask(keys=keep)

    @staticmethod
    def pairs_(keep: Tensor) -> Mask:
        """Pairs given one by one: (N, M), (B, N, M) or (B or 1, H or 1, N, M) bool, True = visible."""
        if keep.dtype != torch.bool or not 2 <= keep.ndim <= 4:
            raise BadInput(f"a pair mask is a bool tensor (..., N, M), got {keep.dtype} {tuple(keep.shape)}")
        return Mask(rule=_Pairs(keep.unsqueeze(1) if keep.ndim == 3 else keep))

    @staticmethod
    def biased(bias: Tensor) -> Mask:
        """A float bias (N, M), (H, N, M) or (B or 1, H or 1, N, M), added to the scores."""
        if not bias.is_floating_point() or not 2 <= bias.ndim <= 4:
            raise BadInput(f"a bias is a float tensor (..., N, M), got {bias.dtype} {tuple(bias.shape)}")
        return Mask(bias=bias[(None,) * (4 - bias.ndim)])

    @staticmethod
    def window(left: int, right: int | None = None) -> Mask:
        """Keys from `left` positions before the query to `right` after it (as many as left by default)."""
        right = left if right is None else right
        if left < 0 or right < 0:
            raise BadInput(f"a window reaches left and right by counts of positions, got {left}, {right}")
        return Mask(rule=_Window(left, right))

    @staticmethod
    def document(ids: Tensor) -> Mask:
        """Tokens see their own document only; ids (M,) or (B, M) integers."""
        if ids.is_floating_point() or ids.ndim not in (1, 2):
            raise BadInput(f"document ids are integers (M,) or (B, M), got {ids.dtype} {tuple(ids.shape)}")
        return Mask(rule=_Document(ids))

    @staticmethod
    def prefix(length: int) -> Mask:
        """Every query sees the first `length` keys (and nothing else: combine with `|`)."""
        return Mask(rule=_Prefix(length))

    @staticmethod
    def block(size: int) -> Mask:
        """Positions are cut into blocks of `size`; tokens see their own block."""
        if size < 1:
            raise BadInput(f"a block holds at least one position, got {size}")
        return Mask(rule=_Block(size))

    @staticmethod
    def global_(count: int) -> Mask:
        """The first `count` tokens see everything and are seen by everything (combine with `|`)."""
        return Mask(rule=_Global(count))

    @staticmethod
    def of(value: Mask | Tensor | None) -> Mask:
        """The mask that `value` means: bool (B, M) is padding, other bool is pairs, float is a bias."""
        if value is None:
            return Mask()
        if isinstance(value, Mask):
            return value
        if value.dtype == torch.bool:
            return Mask.padding(value) if value.ndim == 2 else Mask.pairs_(value)
        return Mask.biased(value)

    def __and__(self, other: Mask) -> Mask:
        biases = [bias for bias in (self.bias, other.bias) if bias is not None]
        return Mask(
            causal=self.causal or other.causal,
            keys=_meet(self.keys, other.keys),
            queries=_meet(self.queries, other.queries),
            rule=_Both(self.rule, other.rule) if self.rule and other.rule else self.rule or other.rule,
            bias=sum(biases[1:], biases[0]) if biases else None,
        )

    def __or__(self, other: Mask) -> Mask:
        if self.bias is not None or other.bias is not None:
            raise BadInput("a union of masks with a bias has no meaning: add the bias with & afterwards")
        first, second = self._whole_rule(), other._whole_rule()
        return Mask(causal=self.causal and other.causal, rule=_Either(first, second) if first and second else None)

    def _whole_rule(self) -> Rule | None:
        """Everything that restricts visibility as one rule; None where every pair is visible."""
        rules: list[Rule] = []
        if self.causal:
            rules.append(_Causal())
        if self.keys is not None:
            rules.append(_Pairs(self.keys[:, None, None, :]))
        if self.rule is not None:
            rules.append(self.rule)
        whole: Rule | None = None
        for rule in rules:
            whole = _Both(whole, rule) if whole else rule
        return whole

    def with_(self, **changes: object) -> Mask:
        """A copy with some attributes replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def pairs(self, queries: int, keys: int, device: torch.device | str = "cpu") -> Tensor | None:
        """The visible pairs as (B or 1, H or 1, N, M) bool; None where all pairs are visible."""
        rule = self._whole_rule()
        return None if rule is None else self._rows(rule, 0, queries, queries, keys, device)

    @staticmethod
    def _rows(rule: Rule, start: int, stop: int, queries: int, keys: int, device: torch.device | str) -> Tensor:
        query = torch.arange(start, stop, device=device).unsqueeze(1) + (keys - queries)
        seen = rule(query, torch.arange(keys, device=device).unsqueeze(0))
        return seen[(None,) * (4 - seen.ndim)]

    def area(self, queries: int, keys: int, batch: int = 1, heads: int = 1) -> int:
        """The exact number of visible (query, key) pairs, over `batch` sequences and `heads` heads.

        >>> Mask.causal_().area(4, 4)
        10
        """
        if self.rule is None and self.keys is None:
            if not self.causal:
                return batch * heads * queries * keys
            full = max(queries - keys, 0)  # the first queries that see nothing
            seeing = queries - full
            return batch * heads * seeing * (2 * (keys - seeing + 1) + seeing - 1) // 2
        rule = self._whole_rule()
        assert rule is not None
        count = 0
        block = max(1, 2**22 // max(keys, 1))
        for start in range(0, queries, block):
            seen = self._rows(rule, start, min(start + block, queries), queries, keys, "cpu")
            repeat = (batch // seen.shape[0]) * (heads // seen.shape[1])
            count += int(seen.sum()) * repeat
        return count

    def draw(self, queries: int, keys: int | None = None, width: int = 64) -> str:
        """The mask of the first sequence and head as text, two rows a line; `#` of a cell is its share.

        Larger masks are averaged down to `width` columns.
        """
        keys = queries if keys is None else keys
        seen = self.pairs(queries, keys)
        share = torch.ones(queries, keys) if seen is None else seen[0, 0].float()
        if keys > width:
            rows = max(2, round(queries * width / keys))
            share = torch.nn.functional.adaptive_avg_pool2d(share[None, None], (rows, width))[0, 0]
        if share.shape[0] % 2:
            share = torch.cat([share, share.new_zeros(1, share.shape[1])])
        signs = {(False, False): "·", (True, False): "▀", (False, True): "▄", (True, True): "█"}
        return "\n".join(
            "".join(signs[bool(a >= 0.5), bool(b >= 0.5)] for a, b in zip(top, bottom, strict=True))
            for top, bottom in zip(share[0::2].tolist(), share[1::2].tolist(), strict=True)
        )

    def __str__(self) -> str:
        return " & ".join(self._parts()) or "everything visible"

    def _parts(self) -> Iterator[str]:
        if self.causal:
            yield "causal"
        if self.keys is not None:
            yield f"padding {tuple(self.keys.shape)}"
        if self.rule is not None:
            yield _describe(self.rule)
        if self.bias is not None:
            yield f"bias {tuple(self.bias.shape)}"


def _meet(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _describe(rule: Rule) -> str:
    if isinstance(rule, _Both):
        return f"{_describe(rule.first)} & {_describe(rule.second)}"
    if isinstance(rule, _Either):
        return f"({_describe(rule.first)} | {_describe(rule.second)})"
    values = ", ".join(
        str(tuple(value.shape)) if isinstance(value, Tensor) else str(value) for value in vars(rule).values()
    )
    return f"{type(rule).__name__.lstrip('_').lower()}({values})"
