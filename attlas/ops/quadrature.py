"""Integrals over the points that a function is known at: ∫ f ≈ Σ_m w_m f(x_m).

B batch, H heads, M points, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.ops.precision import wide

RULES = ("midpoint", "trapezoid")
"""Where the points of a grid lie on their domain: in the middle of equal cells, or from border to border."""


def check_rule(rule: str) -> str:
    """`rule` itself if there is such a one."""
    if rule not in RULES:
        raise BadInput(f"rule is one of {', '.join(map(repr, RULES))}, got {rule!r}")
    return rule


def rule_weights(shape: Sequence[int], rule: str, like: Tensor) -> Tensor:
    """The weights of a grid's points in order (M,), whose sum is 1, in float32 at least, on the device of `like`."""
    check_rule(rule)
    weights = wide(like.new_ones(1))
    for length in shape:
        axis = weights.new_ones(length)
        if rule == "trapezoid" and length > 1:
            axis[0] = axis[-1] = 0.5
        weights = (weights[:, None] * axis / axis.sum()).flatten()
    return weights


class Quadrature:
    """The weights of the points of one axis of tokens: given ones, or those of a rule on their grid.

    Args:
        rule: "midpoint" or "trapezoid", where no weights are given.
        weights: (M,), positive, for points that lie on no grid.
    """

    def __init__(self, rule: str = "midpoint", weights: Tensor | Sequence[float] | None = None) -> None:
        self.rule = check_rule(rule)
        self.weights = None
        if weights is None:
            return
        self.weights = torch.as_tensor(weights, dtype=torch.float64).detach()
        if self.weights.ndim != 1 or not bool((self.weights > 0).all() & self.weights.isfinite().all()):
            raise BadInput(
                f"weights are positive, one for each point, got {tuple(self.weights.shape)} of them: {weights}"
            )

    def __call__(self, grid: Grid | None, points: int, like: Tensor, keep_BM: Tensor | None = None) -> Tensor:
        """(B or 1, M) in float32 at least; those of a rule have the sum 1 over the real points, given ones are as is.

        Args:
            grid: how the points lie; None for one axis.
            points: M.
            like: gives dtype and device.
            keep_BM: False for padding, which weighs 0: a rule on one axis is that of the real points alone.
        """
        if self.weights is None:
            return self._ruled((points,) if grid is None else grid.shape, like, keep_BM)
        if self.weights.shape[0] != points:
            raise BadInput(
                f"weights were given for {self.weights.shape[0]} points, the keys are {points}: build it with "
                f"weights=({points} numbers) or with a rule"
            )
        w_BM = wide(self.weights.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32)))[None]
        return w_BM if keep_BM is None else w_BM.where(keep_BM, 0)

    def _ruled(self, shape: Sequence[int], like: Tensor, keep_BM: Tensor | None) -> Tensor:
        w_BM = rule_weights(shape, self.rule, like)[None]
        if keep_BM is None:
            return w_BM
        if self.rule == "trapezoid":
            if len(shape) > 1:
                raise BadInput(
                    "the rule 'trapezoid' halves the weights at the border, and padding hides where that is on a grid "
                    f"of {len(shape)} axes: give weights=(one for each point) instead"
                )
            before, behind = keep_BM.cumsum(1), keep_BM.flip(1).cumsum(1).flip(1)
            w_BM = torch.where((before == 1) | (behind == 1), 0.5, 1).to(w_BM)
        w_BM = w_BM.where(keep_BM, 0)
        total = w_BM.sum(1, keepdim=True)
        return w_BM / total.where(total > 0, 1)

    @property
    def uniform(self) -> bool:
        """Whether all points of any grid weigh the same."""
        return self.weights is None and self.rule == "midpoint"


def normalised(x_BHMD: Tensor, w_BM: Tensor, eps: float) -> Tensor:
    """x with mean 0 and variance 1 over the domain, both as integrals, feature by feature; 0 where w is 0.

    Args:
        x_BHMD: values; NaN where w is 0 does no harm.
        w_BM: weights, not negative.
        eps: added to the variance.
    """
    real = (w_BM > 0)[:, None, :, None]
    total = w_BM.sum(1, keepdim=True)
    share = (w_BM / total.where(total > 0, 1))[:, None, :, None]
    x = x_BHMD.where(real, 0)
    centred = (x - (share * x).sum(2, keepdim=True)).where(real, 0)
    variance = (share * centred.square()).sum(2, keepdim=True)
    return centred * (variance + eps).rsqrt()


def relative_l2(got: Tensor, expected: Tensor, weights: Tensor | None = None) -> Tensor:
    """‖got − expected‖ / ‖expected‖ over channels and points, (B,) in float32 at least; 0 where both functions are 0.

    Args:
        got, expected: (B, C, S...) on one grid, or with M points as the last axis.
        weights: (S...) or (M,) for all points in order, none negative; without them all points weigh the same.
    """
    if got.shape != expected.shape:
        raise BadInput(f"functions are compared at one set of points, got {tuple(got.shape)}, {tuple(expected.shape)}")
    got, expected = wide(got), wide(expected)
    difference = got - expected
    if weights is not None:
        shape = got.shape[2:]
        if weights.shape not in (shape, (math.prod(shape),)):
            raise BadInput(f"there is one weight for each point of {tuple(shape)}, got {tuple(weights.shape)}")
        root = wide(weights).sqrt().reshape(shape)
        difference, expected = difference * root, expected * root
    error, size = (torch.linalg.vector_norm(x.flatten(1), dim=1) for x in (difference, expected))
    return error / size.where((size > 0) | (error > 0), 1)
