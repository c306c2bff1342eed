"""Rescaling the attention of a model that exists, for the time of a block.

    with attlas.adapt.rescale.applied(model, "zerotuning", gamma=1.5):
        answer = model(x)

What can be applied is any attend that learns nothing. Parameters are not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from attlas.blocks.attention import Attention
from attlas.blocks.factory import resolve, settings_of
from attlas.core.errors import BadInput, Unsupported
from attlas.core.mechanism import Attend
from attlas.core.spec import Takes

CARRIED = {"scale": None, "weight_dropout": 0.0}
"""Settings of softmax attention that the replacement takes over, and their defaults."""


def softmax_layers(model: nn.Module) -> list[Attention]:
    """The layers of `model` that attend by softmax, in order; `layers` of `applied` counts them."""
    return [m for m in model.modules() if isinstance(m, Attention) and m.spec.name == "softmax"]


@contextmanager
def applied(
    model: nn.Module, name: str, *, layers: Iterable[int] | None = None, **settings: Any
) -> Iterator[list[Attention]]:
    """Replace softmax attention by the attend `name` inside the block, and put it back behind it.

    A scale and a dropout of the weights are taken over. States of a stream are the attend's own: begin and
    end them on the same side of the block.

    Args:
        model: holds the layers, or is one.
        name: of an attend that learns nothing, such as "zerotuning" or "attention_sink".
        layers: which of `softmax_layers(model)`, by number; None for all.
        **settings: of the attend.

    Yields:
        The layers that were changed.

    Raises:
        BadInput: no such layers, a number out of range, an attend with parameters.
        Unsupported: a mechanism that mixes tokens, or that cannot do what a layer does.
        UnknownName: no such mechanism or setting.
    """
    chosen = _choose(softmax_layers(model), layers)
    replacements = [_replacement(layer, name, settings) for layer in chosen]
    before = [layer.attend for layer in chosen]
    try:
        for layer, attend in zip(chosen, replacements, strict=True):
            _install(layer, attend)
        yield chosen
    finally:
        for layer, attend in zip(chosen, before, strict=True):
            _install(layer, attend)


def _choose(found: list[Attention], layers: Iterable[int] | None) -> list[Attention]:
    if not found:
        raise BadInput(
            "the model has no softmax layer to rescale: it needs an attlas.Attention with the attend 'softmax', "
            "as attlas.mixer('softmax', ...) builds it"
        )
    numbers = range(len(found)) if layers is None else sorted(set(layers))
    for number in numbers:
        if not 0 <= number < len(found):
            raise BadInput(f"layers are numbers from 0 to {len(found) - 1}, the softmax layers there are, got {number}")
    return [found[number] for number in numbers]


def _replacement(layer: Attention, name: str, settings: dict[str, Any]) -> Attend:
    cls, variant = resolve(name)
    if variant is not None or not issubclass(cls, Attend):
        raise Unsupported(f"{name!r} is a layer of its own; only an attend can take the place of softmax in one")
    own = settings_of(cls)
    for setting in settings:
        if setting not in own:
            raise BadInput(f"{name} has no setting {setting!r}; its settings: {', '.join(own) or 'none'}")
    carried = {key: getattr(layer.attend, key) for key in CARRIED}
    for key, default in CARRIED.items():
        if carried[key] != default and key not in own:
            raise BadInput(f"a layer sets {key}={carried[key]}, and {name} has no such setting to take it over")
    attend = cls(layer.site, layer.backend, **{key: carried[key] for key in CARRIED if key in own} | settings)
    assert isinstance(attend, Attend)
    if next(attend.parameters(), None) is not None:
        raise BadInput(f"{name} has parameters to learn; only what learns nothing can be applied to a trained model")
    if layer.position.biases and Takes.BIAS not in attend.spec.masks:
        raise Unsupported(f"{name} takes no bias, which the positions {type(layer.position).__name__} of a layer give")
    return attend.to(layer.q_proj.weight.device).train(layer.attend.training)


def _install(layer: Attention, attend: Attend) -> None:
    layer.attend = attend
    layer.spec = attend.spec  # type: ignore[misc]  # a shell is the mechanism that it wraps
