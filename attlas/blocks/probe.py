"""A stack of layers some of which make their queries and keys of another sequence than the one they mix.

B batch, N tokens, L tokens of the probe, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.ops.probed import ProbedMixer, StoredMap


class Probed(nn.Module):
    """Runs a stack, and hands to each of its `deconstruct_*_qk` layers what it makes queries and keys of.

        X_0 = probe,  X_{l+1} = layer_l(X_l)        the stack itself, on the probe
        H_0 = x,      H_{l+1} = layer_l(H_l; X_l)

    A layer with a stored map is given its level of the probe, as it arrives at the layer: behind the norm, where
    the stack has one. A static layer is given x itself. While gradients are on or the stack trains, the probe runs
    with every forward pass, since its levels change with the weights; else they are kept until a weight changes.

    Args:
        stack: layers, (B, N, C) to (B, N, C).
        probe: (L, C); by default what the first stored map was built with.

    Raises:
        BadInput: no layer of the stack makes queries and keys of another sequence.
    """

    probe: Tensor | None

    def __init__(self, stack: nn.Module, probe: Tensor | None = None) -> None:
        super().__init__()
        self.stack = stack
        self.layers = tuple(module for module in stack.modules() if isinstance(module, ProbedMixer))
        if not self.layers:
            raise BadInput("no layer of this stack makes its queries and keys of another sequence: run it as it is")
        self.stored = tuple(layer for layer in self.layers if isinstance(layer, StoredMap))
        if probe is None and self.stored:
            probe = self.stored[0].probe[0]
        self.register_buffer("probe", None if probe is None else _batched(probe), persistent=False)
        self._known: tuple[Any, list[Tensor]] | None = None

    def forward(self, x_BNC: Tensor, probe: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The stack on x.

        Args:
            x_BNC: what goes into the first layer; the embeddings of the tokens, for static layers.
            probe: (L, C) instead of the stored one, for a text whose embeddings are learned.
            **kwargs: of the stack on x; the probe runs without them.
        """
        given: dict[ProbedMixer, Tensor] = dict.fromkeys(self.layers, x_BNC)
        if self.stored:
            given.update(zip(self.stored, self.levels(probe), strict=True))
        with _handed(given):
            return self.stack(x_BNC, **kwargs)

    def levels(self, probe: Tensor | None = None) -> list[Tensor]:
        """What the probe is at each stored map, (1, L, C) each."""
        probe_1LC = self.probe if probe is None else _batched(probe)
        assert probe_1LC is not None  # wherever a map is stored
        if torch.is_grad_enabled() or self.stack.training:
            self._known = None
            return self._propagate(probe_1LC)
        weights = tuple((p.data_ptr(), p._version) for p in self.stack.parameters())
        if self._known is None or self._known[0][0] != weights or not torch.equal(self._known[0][1], probe_1LC):
            self._known = (weights, probe_1LC.clone()), self._propagate(probe_1LC)
        return self._known[1]

    def _propagate(self, probe_1LC: Tensor) -> list[Tensor]:
        """Run the stack on the probe, where each layer's source is what arrives at it."""
        levels: dict[ProbedMixer, Tensor] = {}

        def arrive(layer: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(layer, ProbedMixer)
            layer.level = levels[layer] = args[0]

        with _handed({layer: None if layer in self.stored else probe_1LC for layer in self.layers}):
            hooks = [layer.register_forward_pre_hook(arrive) for layer in self.stored]
            try:
                self.stack(probe_1LC)
            finally:
                for hook in hooks:
                    hook.remove()
        return [levels[layer] for layer in self.stored]


def _batched(probe_LC: Tensor) -> Tensor:
    if probe_LC.ndim != 2:
        raise BadInput(f"a probe is one sequence of vectors, (tokens, channels), got {tuple(probe_LC.shape)}")
    return probe_LC.unsqueeze(0)


@contextmanager
def _handed(levels: Mapping[ProbedMixer, Tensor | None]) -> Iterator[None]:
    """Layers with these levels, inside; what they had before is put back behind."""
    before = {layer: layer.level for layer in levels}
    try:
        for layer, level in levels.items():
            layer.level = level
        yield
    finally:
        for layer, level in before.items():
            layer.level = level
