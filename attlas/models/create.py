"""Build a published network, or one like it with another mechanism inside."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attlas.blocks.stage import set_checkpointing
from attlas.core.errors import AttlasError, BadInput
from attlas.core.registry import nearest
from attlas.models.backbone import Backbone, FeaturePyramid
from attlas.models.registry import State, model, models


def create(
    name: str,
    *,
    weights: str | Path | State | None = None,
    source: str = "attlas",
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    checkpointing: bool = False,
    **settings: Any,
) -> nn.Module:
    """Build a network by name.

    >>> net = create("davit_micro", num_classes=10, in_chans=1, img_size=64)
    >>> net(torch.zeros(2, 1, 64, 64)).shape
    torch.Size([2, 10])

    Args:
        name: of the network, see `attlas list models`.
        weights: a checkpoint to load: a file that the user has, or a state dict. Nothing is downloaded.
        source: whose names the checkpoint has: "attlas", "timm" or "official".
        features_only: give feature maps, finest first, instead of logits.
        out_indices: which of them; all by default.
        checkpointing: compute activations again in the backward pass, which saves memory.
        **settings: num_classes, in_chans, img_size, drop_path, mixer (a mechanism by name, or one per stage) and
            others that the network takes; whatever is left out is as published.

    Raises:
        UnknownName: no such network.
        BadInput: no such setting, a value that has no meaning there; weights that do not fit.
    """
    entry = model(name)
    for setting in settings:
        if setting not in entry.accepted:
            able = [each for each in models() if setting in model(each).accepted]
            those = f"; networks that do: {', '.join(able[:8])}" if able else ""
            raise BadInput(f"{name} takes no {setting}{those or nearest(setting, entry.accepted)}")
    if out_indices is not None and not features_only:
        raise BadInput("out_indices choose feature maps: pass features_only=True as well")
    net = entry.build(**{**entry.settings, **settings})
    if weights is not None:
        load_weights(net, name, weights, source)
    if features_only:
        if not isinstance(net, Backbone):
            raise BadInput(f"{name} is for {entry.task} and has no feature maps")
        net = FeaturePyramid(net, out_indices)
    set_checkpointing(net, checkpointing)
    return net


def load_weights(net: nn.Module, name: str, weights: str | Path | State, source: str = "attlas") -> None:
    """Load a checkpoint into a network that `create(name)` made; every weight has to find its place.

    Args:
        net: the network.
        name: that it was created with.
        weights: a file (`.safetensors`, or what `torch.save` wrote) or a state dict.
        source: whose names the checkpoint has: "attlas", "timm" or "official".

    Raises:
        BadInput: no key map from that source, a file that is not there, or weights that do not fit; the message
            lists which.
    """
    key_maps = model(name).key_maps
    if source != "attlas" and source not in key_maps:
        known = ", ".join(["attlas", *key_maps])
        raise BadInput(f"{name} reads checkpoints of {known}, got source={source!r}")
    state = read_checkpoint(weights) if isinstance(weights, str | Path) else weights
    if not isinstance(state, Mapping):
        raise BadInput(f"weights are a file or a state dict, got a {type(state).__name__}; pass model.state_dict()")
    if source != "attlas":
        try:
            state = key_maps[source](dict(state), net)
        except AttlasError:
            raise
        except (LookupError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise BadInput(f"these are not the names and shapes of {source}'s {name}: {why}") from error
    own = net.state_dict()
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shaped = [
        f"{key}: {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    wrong = {"missing": missing, "not in the network": surplus, "of another shape": shaped}
    said = [f"{what}: {', '.join(keys[:6])}{' ...' if len(keys) > 6 else ''}" for what, keys in wrong.items() if keys]
    if said:
        raise BadInput(f"the checkpoint does not fit {name}; {'; '.join(said)}")
    _check_tied(name, own, state)
    net.load_state_dict(state)


def _check_tied(name: str, own: State, state: State) -> None:
    """Refuse a checkpoint with two values for what is one weight in the network."""
    homes: dict[int, str] = {}
    for key, value in own.items():
        if value.is_meta or not value.numel():
            continue
        first = homes.setdefault(value.data_ptr(), key)
        if first != key and own[first].shape == value.shape and not torch.equal(state[first], state[key]):
            raise BadInput(f"the checkpoint does not fit {name}: {first} and {key} are one weight here, two in it")


def read_checkpoint(path: str | Path) -> State:
    """The state dict in a file, also where it stands under "model", "state_dict" or the like."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"there is no checkpoint {path}; Attlas downloads nothing, pass a file that you have")
    if path.suffix == ".safetensors":
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise BadInput(f"to read {path.name}: pip install safetensors") from None
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{path.name} is no whole safetensors file: {error}") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
        LookupError,
        ValueError,
        AttributeError,
    ) as error:
        raise BadInput(
            f"{path.name} cannot be read without running what it holds ({type(error).__name__}); where you trust it, "
            "open it with torch.load(path, weights_only=False) and pass the state dict inside"
        ) from None
    for key in ("state_dict_ema", "model_ema", "state_dict", "model", "params_ema", "params"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise BadInput(f"{path.name} holds no state dict but a {type(state).__name__}; save model.state_dict()")
    return {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)}
