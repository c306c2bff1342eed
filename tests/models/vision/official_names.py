"""From our state dicts to the names of official checkpoints, the way back of the key maps under test."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attlas import models

State = dict[str, Tensor]


def shaken(name: str, **settings: Any) -> nn.Module:
    """A network whose weights and statistics are all off their starts."""
    torch.manual_seed(0)
    net = models.create(name, **{"num_classes": 5, **settings}).double().eval()
    with torch.no_grad():
        for key, value in [*net.named_parameters(), *net.named_buffers()]:
            if value.is_floating_point():
                noise = 0.2 * torch.randn_like(value)
                value.add_(noise.abs() if key.endswith("running_var") else noise)
    return net


def renamed(state: State, *rules: tuple[str, str]) -> State:
    """Every key with all rules applied in order."""
    found = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        assert key not in found, key
        found[key] = value
    return found


def fused(state: State, names: Sequence[str], name: str) -> State:
    """Entries that differ in `names` alone joined along the first axis."""
    found = dict(state)
    for key in state:
        if f".{names[0]}." in key:
            parts = [found.pop(key.replace(f".{names[0]}.", f".{each}.")) for each in names]
            found[key.replace(f".{names[0]}.", f".{name}.")] = torch.cat(parts)
    return found


def assert_loads(net: nn.Module, name: str, official: State, image: Tensor, **settings: Any) -> None:
    """A new network with the official checkpoint gives the logits of `net`."""
    own = {"num_classes": 5, **settings}
    again = models.create(name, weights=official, source="official", **own).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(again(image), net(image), rtol=1e-5, atol=1e-6)


def picture(height: int, width: int, batch: int = 1) -> Tensor:
    """Pictures of noise."""
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
