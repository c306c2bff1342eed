"""The first-order linear recurrence x_t = a_t x_{t-1} + b_t, element by element, along one axis.

N steps along the axis; what lies on the other axes are independent recurrences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.ops.dispatch import Backend, Op


def _oracle(a: Tensor, b: Tensor, initial: Tensor | None = None, *, dim: int = 1) -> Tensor:
    """All x of the recurrence x_t = a_t x_{t-1} + b_t, step by step.

    Computed in the dtype of the inputs: widen half precision first. Nothing is divided, so that zeros are served like
    any other factor. Differentiable any number of times.

    Args:
        a: factors, of b's number of axes; an axis of length 1 is shared, so that one number may scale a matrix. With
            |a| <= 1 no product of them overflows; beyond that one may where no x does, and x is then inf or nan.
        b: what is added, of the shape of the result.
        initial: x before the first step, without the axis `dim`; zeros if None.
        dim: the axis of the steps.

    Returns:
        x, of b's shape.
    """
    _check(a, b, initial, dim)
    x = torch.zeros_like(b.select(dim, 0)) if initial is None else initial
    steps = []
    for a_t, b_t in zip(a.unbind(dim), b.unbind(dim), strict=True):
        x = a_t * x + b_t
        steps.append(x)
    return torch.stack(steps, dim)


def _torch(a: Tensor, b: Tensor, initial: Tensor | None = None, *, dim: int = 1) -> Tensor:
    _check(a, b, initial, dim)
    a, b = a.movedim(dim, 0), b.movedim(dim, 0)
    if initial is not None:
        b = torch.cat([b[:1] + a[:1] * initial, b[1:]])
    return _scan(a, b).movedim(0, dim)


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """In 2 log2 N steps and 2 N multiplications: two steps at once, which is a step again, then those in between."""
    count, pairs = b.shape[0], b.shape[0] // 2
    if count < 2:
        return b
    first_a, first_b, second_a, second_b = a[0::2], b[0::2], a[1::2], b[1::2]
    seconds = _scan(second_a * first_a[:pairs], second_b + second_a * first_b[:pairs])
    between = first_b[1:] + first_a[1:] * seconds[: (count - 1) // 2]
    firsts = torch.cat([first_b[:1], between])
    return torch.cat([torch.stack([firsts[:pairs], seconds], 1).flatten(0, 1), firsts[pairs:]])


def _check(a: Tensor, b: Tensor, initial: Tensor | None, dim: int) -> None:
    shapes = f"a {tuple(a.shape)}, b {tuple(b.shape)}, dim {dim}"
    if a.ndim != b.ndim or not -b.ndim <= dim < b.ndim or not b.shape[dim]:
        raise BadInput(f"a and b have the same axes, and at least one step along dim, got {shapes}")
    if a.shape[dim] != b.shape[dim] or any(x not in (1, y) for x, y in zip(a.shape, b.shape, strict=True)):
        raise BadInput(f"a has as many steps as b, and on every other axis b's length or 1, got {shapes}")
    if initial is not None and initial.shape != b.select(dim, 0).shape:
        raise BadInput(f"the initial x has b's shape without axis {dim}, got {tuple(initial.shape)} for {shapes}")


linear_scan = Op("linear_scan", Backend("torch", _torch), Backend("oracle", _oracle))
