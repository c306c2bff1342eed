"""Mechanisms that are wrong on purpose: the contract suite must catch each of them.

The base is a correct decayed linear attention, which passes; every other class breaks one thing.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attlas.core import registry
from attlas.core.mechanism import Attend, Call, Cost, Sizes
from attlas.core.spec import Example, Pattern, Spec
from tests.contract import checks
from tests.contract.checks import Case

CAUSAL = frozenset({Pattern.CAUSAL_SELF})
SPEC = Spec(
    name="right",
    title="A correct decayed linear attention",
    year=2024,
    paper="none",
    equation="o_n = sum_{m <= n} 0.9^(n - m) (q_n . k_m) v_m",
    complexity="O(N^2 D)",
    patterns=CAUSAL,
    grids=(1,),
    streams=True,
    examples=(Example(parameters=4 * (16 * 16 + 16)),),
)
DECAY = 0.9


class Right(Attend):
    decay = DECAY

    def real(self, call_keys: Tensor | None, k: Tensor) -> Tensor:
        keep = k.new_ones(k.shape[0], k.shape[2]) if call_keys is None else call_keys.to(k)
        return keep[:, None, :, None]

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        k = k_BGMD * self.real(call.mask.keys, k_BGMD)
        return (q_BHND @ k.transpose(-1, -2) * self.weights(q_BHND, k)) @ (v_BGME * self.real(call.mask.keys, k_BGMD))

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        keys = k.shape[2]
        key = torch.arange(keys)
        distance = (key[keys - q.shape[2] :, None] - key).to(q)
        return torch.where(distance >= 0, self.decay ** distance.clamp(min=0), 0)

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        real = self.real(call.mask.keys, k_BGMD)
        state, rows = 0, []
        for m in range(k_BGMD.shape[2]):
            outer = k_BGMD[:, :, m, :, None] * v_BGME[:, :, m, None, :]
            state = DECAY * state + outer * real[:, :, m, :, None]
            rows.append((q_BHND[:, :, m, None] @ state).squeeze(2))
        return torch.stack(rows, 2)

    def count(self, sizes: Sizes) -> Cost:
        site = self.site
        pairs = sizes.batch * site.heads * sizes.queries * (sizes.queries + 1) // 2
        full = sizes.batch * site.heads * sizes.queries * sizes.keys
        return Cost(4 * pairs * site.head_dim, 4 * full * site.head_dim, pairs)

    def initial_state(self, batch: int, like: Tensor) -> Tensor:
        site = self.site
        return like.new_zeros(batch, site.heads, site.head_dim, site.head_dim)

    def advance(self, q, k, v, state, keep, tokens):
        rows = []
        real = self.real(keep, k)
        for n in range(q.shape[2]):
            state = self.decay * state + k[:, :, n, :, None] * v[:, :, n, None, :] * real[:, :, n, :, None]
            rows.append((q[:, :, n, None] @ state).squeeze(2))
        return torch.stack(rows, 2), state


class LeaksOneFutureToken(Right):
    """Sees the key right behind the query as well."""

    def weights(self, q, k):
        key = torch.arange(k.shape[2])
        distance = (key[k.shape[2] - q.shape[2] :, None] - key).to(q)
        return torch.where(distance >= -1, self.decay ** distance.clamp(min=0), 0)


class LeaksThroughNorm(Right):
    """Divides by the norm of all keys, so that the future changes the past's scale."""

    def compute(self, q, k, v, call):
        return super().compute(q, k / k.norm(dim=2, keepdim=True), v, call)


class PaddingEntersTheState(Right):
    """Carries on the keys of padded tokens."""

    def advance(self, q, k, v, state, keep, tokens):
        return super().advance(q, k, v, state, None, tokens)


class PaddingIsSeen(Right):
    """Ignores the padding mask."""

    def compute(self, q, k, v, call):
        return super().compute(q, k, v, Call(call.mask.with_(keys=None), call.grid))


class WrongDecay(Right):
    """Decays by 0.89 for 0.9."""

    decay = 0.89


class WrongCost(Right):
    """Counts a tenth too many FLOPs."""

    def count(self, sizes):
        cost = super().count(sizes)
        return replace(cost, executed=cost.executed * 11 // 10)


class WrongPairs(Right):
    """Counts the pairs of a mask without the diagonal."""

    def count(self, sizes):
        cost = super().count(sizes)
        return replace(cost, pairs=cost.pairs - sizes.batch * self.site.heads * sizes.queries)


class ForgetsTheState(Right):
    """Starts every segment from nothing."""

    def advance(self, q, k, v, state, keep, tokens):
        return super().advance(q, k, v, torch.zeros_like(state), keep, tokens)


class DetachesTheState(Right):
    """Right outputs of a stream, whose gradients end at the last segment."""

    def advance(self, q, k, v, state, keep, tokens):
        return super().advance(q, k, v, state.detach(), keep, tokens)


class MixesTheBatch(Right):
    """Subtracts the mean over the batch."""

    def compute(self, q, k, v, call):
        return super().compute(q, k, v - 0.01 * v.mean(0, keepdim=True), call)


class DetachesValues(Right):
    """Right values, wrong gradients."""

    def compute(self, q, k, v, call):
        return super().compute(q, k.detach(), v, call)


@contextmanager
def registered(cls):
    """A case of `cls`, which the registry forgets afterwards."""
    name = cls.__name__.lower()
    registry.register(replace(SPEC, name=name))(cls)
    try:
        yield Case(name, 0, Pattern.CAUSAL_SELF)
    finally:
        del registry._mechanisms[name]


ALL = [
    checks.check_oracle,
    checks.check_causality,
    checks.check_alignment,
    checks.check_padding,
    checks.check_sees_nothing,
    checks.check_segments,
    checks.check_stream_gradients,
    checks.check_batch,
    checks.check_cost,
    checks.check_pairs,
    checks.check_parameters,
]


@pytest.mark.parametrize("check", ALL, ids=lambda check: check.__name__)
def test_the_right_one_passes(check):
    with registered(Right) as case:
        check(case)


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (LeaksOneFutureToken, checks.check_causality),
        (LeaksOneFutureToken, checks.check_oracle),
        (LeaksOneFutureToken, checks.check_pairs),
        (LeaksThroughNorm, checks.check_causality),
        (PaddingEntersTheState, checks.check_segments),
        (PaddingIsSeen, checks.check_padding),
        (PaddingIsSeen, checks.check_oracle),
        (PaddingIsSeen, checks.check_sees_nothing),
        (WrongDecay, checks.check_oracle),
        (WrongCost, checks.check_cost),
        (WrongPairs, checks.check_pairs),
        (ForgetsTheState, checks.check_segments),
        (DetachesTheState, checks.check_stream_gradients),
        (MixesTheBatch, checks.check_batch),
        (DetachesValues, checks.check_oracle),
        (DetachesValues, checks.check_parameters),
    ],
    ids=lambda value: value.__name__,
)
def test_a_broken_one_is_caught(cls, check):
    with registered(cls) as case, pytest.raises(AssertionError):
        check(case)


def test_a_wrong_parameter_count_is_caught():
    wrong = replace(SPEC, name="miscounted", examples=(Example(parameters=17),))
    cls = type("Miscounted", (Right,), {})
    registry.register(wrong)(cls)
    try:
        with pytest.raises(AssertionError, match="declared 17"):
            checks.check_parameters(Case("miscounted", 0, Pattern.CAUSAL_SELF))
    finally:
        del registry._mechanisms["miscounted"]
