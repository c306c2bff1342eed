"""Multiply-accumulates of a whole network for one picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attlas.core.mechanism import Attend, Mechanism, Mixer
from attlas.ops.flops import flop_counter


def macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates of one forward: each mechanism by its own formula, everything else as it multiplies.

    Mechanisms are not run: what their mathematics needs is counted, whatever a backend would multiply beside it, so
    that a network on the meta device is counted in milliseconds.

    Args:
        model: of Attlas or not; convolutions and matrix products outside mechanisms are counted either way.
        image: a picture (or a batch) on the device of the model.
    """
    flops = [0]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), _counted(model, flops), flop_counter() as counter:
            model(image)
    finally:
        for module, training in modes.items():
            module.training = training
    return (flops[0] + counter.get_total_flops()) // 2


@contextmanager
def _counted(model: nn.Module, flops: list[int]) -> Iterator[None]:
    mechanisms = [module for module in model.modules() if isinstance(module, Mechanism)]
    for module in mechanisms:
        module.forward = _formula(module, flops)
    try:
        yield
    finally:
        for module in mechanisms:
            del module.forward


def _formula(module: Mechanism, flops: list[int]) -> Callable[..., Tensor]:
    def mix(x_BNC: Tensor, context_BMC: Tensor | None = None, *, grid: Any = None, **rest: Any) -> Tensor:
        keys = None if context_BMC is None else context_BMC.shape[1]
        flops[0] += module.cost(x_BNC.shape[0], x_BNC.shape[1], keys, grid).flops
        return torch.empty_like(x_BNC)

    def attend(q: Tensor, k: Tensor, v: Tensor, *, grid: Any = None, cross: bool = False, **rest: Any) -> Tensor:
        flops[0] += module.cost(q.shape[0], q.shape[2], k.shape[2] if cross else None, grid).flops
        return q.new_empty(*q.shape[:3], v.shape[3])

    if isinstance(module, Mixer):
        return mix
    assert isinstance(module, Attend)
    return attend
