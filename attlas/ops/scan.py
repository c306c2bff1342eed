"""The running softmax: for every t, the average of the values up to t with weights softmax(scores up to t).

B batch, H heads, N tokens, E value size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attlas.ops.dispatch import Backend, Op
from attlas.ops.precision import wide

NEVER = -1e30
"""The largest score of no token at all: below every score, and finite, so that differences stay numbers."""


class RunningSoftmax(NamedTuple):
    """What a run of tokens leaves behind; runs that follow each other merge into one.

    Attributes:
        m: largest score, (B, H, N, 1).
        u: sum of exp(score - m), (B, H, N, 1).
        w: sum of exp(score - m) value, (B, H, N, E).
    """

    m: Tensor
    u: Tensor
    w: Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, value: int, like: Tensor) -> RunningSoftmax:
        """No token yet, with N = 1, in float32 at least."""
        zero = wide(like.new_zeros(batch, heads, 1, value))
        return cls(zero[..., :1] + NEVER, zero[..., :1], zero)

    def runs(self, which: slice) -> RunningSoftmax:
        """Some of the N runs."""
        return RunningSoftmax(self.m[:, :, which], self.u[:, :, which], self.w[:, :, which])

    @property
    def average(self) -> Tensor:
        """The weighted averages w / u (B, H, N, E); 0 of no tokens."""
        return self.w / self.u.where(self.u > 0, 1)


def merge(first: RunningSoftmax, second: RunningSoftmax) -> RunningSoftmax:
    """Runs and the runs behind them as one, pair by pair; associative."""
    m = torch.maximum(first.m, second.m)
    before, behind = (first.m - m).exp(), (second.m - m).exp()
    return RunningSoftmax(m, first.u * before + second.u * behind, first.w * before + second.w * behind)


def _oracle(
    scores_BHN: Tensor,
    values_BHNE: Tensor,
    keep_BN: Tensor | None = None,
    state: RunningSoftmax | None = None,
) -> tuple[Tensor, RunningSoftmax]:
    """Softmax attention of one fixed query over the tokens so far, for every token.

    Computed in float32 at least.

    Args:
        scores_BHN, values_BHNE: of the tokens.
        keep_BN: False where a token is padding and has no weight.
        state: what came before the first token, with N = 1.

    Returns:
        The averages (B, H, N, E), 0 where no token came yet, and the state behind the last token.
    """
    scores, values = wide(scores_BHN), wide(values_BHNE)
    if keep_BN is not None:
        scores = scores.masked_fill(~keep_BN.unsqueeze(1), -torch.inf)
    if state is not None:  # as a token of its own: its weight is u exp(m), its value the average so far
        scores = torch.cat([(state.m + state.u.log()).squeeze(-1), scores], 2)
        values = torch.cat([state.average, values], 2)
    averages = []
    for t in range(scores.shape[2] - scores_BHN.shape[2] + 1, scores.shape[2] + 1):
        m_BH1 = scores[:, :, :t].amax(2, keepdim=True).clamp(min=NEVER)
        powers_BHt = (scores[:, :, :t] - m_BH1).exp()
        u_BH1 = powers_BHt.sum(2, keepdim=True)
        w_BH1E = powers_BHt.unsqueeze(2) @ values[:, :, :t]
        run = RunningSoftmax(m_BH1.unsqueeze(-1), u_BH1.unsqueeze(-1), w_BH1E)
        averages.append(run.average)
    return torch.cat(averages, 2), run


def _torch(
    scores_BHN: Tensor,
    values_BHNE: Tensor,
    keep_BN: Tensor | None = None,
    state: RunningSoftmax | None = None,
) -> tuple[Tensor, RunningSoftmax]:
    m, values = wide(scores_BHN).unsqueeze(-1), wide(values_BHNE)
    # Averages do not depend on m: it is a constant for gradients, and those of the scores go through u = 1.
    u = (m - m.detach()).exp()
    tokens = RunningSoftmax(m.detach(), u, u * values)
    if keep_BN is not None:
        keep = keep_BN[:, None, :, None]
        tokens = RunningSoftmax(tokens.m.where(keep, NEVER), u.where(keep, 0), tokens.w.where(keep, 0))
    if state is not None:
        first = merge(state, tokens.runs(slice(1)))
        tokens = _join(first, tokens.runs(slice(1, None)))
    runs = _scan(tokens)
    return runs.average, runs.runs(slice(-1, None))


def _scan(runs: RunningSoftmax) -> RunningSoftmax:
    """Each run merged with all before it, in 2 log2 N steps and 2 N merges: those of pairs, then in between."""
    count = runs.m.shape[2]
    if count == 1:
        return runs
    even, odd = runs.runs(slice(0, None, 2)), runs.runs(slice(1, None, 2))
    pairs = count // 2
    ends = _scan(merge(even.runs(slice(pairs)), odd))  # up to every odd place
    between = merge(ends.runs(slice((count - 1) // 2)), even.runs(slice(1, None)))
    evens = _join(even.runs(slice(1)), between)
    woven = (torch.stack([a[:, :, :pairs], b], 3).flatten(2, 3) for a, b in zip(evens, ends, strict=True))
    return _join(RunningSoftmax(*woven), evens.runs(slice(pairs, None)))


def _join(first: RunningSoftmax, second: RunningSoftmax) -> RunningSoftmax:
    return RunningSoftmax(*(torch.cat(pair, 2) for pair in zip(first, second, strict=True)))


running_softmax = Op("running_softmax", Backend("torch", _torch), Backend("oracle", _oracle))
