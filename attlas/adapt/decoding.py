"""Any model's linear layers at the speed of memory while it decodes.

    with attlas.adapt.decoding.applied(model):
        model.generate(...)                     # or a loop of model.extend(token, state)

A step that makes one token reads every weight once, and the time of that is the time of the step. PyTorch's product of
one row with a matrix runs on one thread here; the kernel behind this reads on all. Whatever it does not serve (many
rows, gradients, other dtypes and devices, autocast, compiled models) goes the layer's own way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from attlas.kernels.cpu import rows


class FewRows(nn.Linear):
    """A linear layer that lets few rows pass by the kernel."""

    def forward(self, input: Tensor) -> Tensor:
        """x Wᵀ + b."""
        if rows.refuses(input, self.weight, self.bias) is None:
            return rows.few_rows(input, self.weight, self.bias)
        return super().forward(input)


@contextmanager
def applied(model: nn.Module) -> Iterator[int]:
    """Inside, the linear layers of `model` take few rows by the kernel; yields how many layers that are.

    Subclasses of `torch.nn.Linear` stay as they are, for what they do besides.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.__class__ = FewRows
    try:
        yield len(layers)
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
