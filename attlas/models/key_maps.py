"""Tools for key maps: from the names of another library's checkpoint to ours."""

from __future__ import annotations

import re
from collections.abc import Sequence

from attlas.core.errors import BadInput
from attlas.models.registry import State


def rename(state: State, rules: Sequence[tuple[str, str]]) -> State:
    """Every key with all rules (regular expression, replacement) applied in order.

    Raises:
        BadInput: two keys that become one.
    """
    renamed: State = {}
    for key, value in state.items():
        new = key
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise BadInput(f"two entries of the checkpoint become {new!r}; the last is {key!r}")
        renamed[new] = value
    return renamed


def split(state: State, pattern: str, names: Sequence[str]) -> State:
    """Entries whose key holds `pattern` cut into equal parts along the first axis, one per name.

    split(state, "qkv", ("q_proj", "k_proj", "v_proj")) gives what `attlas.Attention` has.

    Raises:
        BadInput: an entry that has no such parts.
    """
    parts: State = {}
    for key, value in state.items():
        if pattern in key:
            if not value.ndim or len(value) % len(names):
                raise BadInput(f"{key} holds {', '.join(names)} in equal parts, got the shape {tuple(value.shape)}")
            chunks = value.chunk(len(names))
            parts |= {key.replace(pattern, name): chunk for name, chunk in zip(names, chunks, strict=True)}
        else:
            parts[key] = value
    return parts


QKV = ("q_proj", "k_proj", "v_proj")
"""The projections of `attlas.Attention`, in the order in which others fuse them."""


def tables(state: State, *names: str) -> State:
    """Tables of places and prefix tokens, (1, N, C) or (1, H, W, C) elsewhere, as (N, C) here; those that are there.

    Raises:
        BadInput: an entry that is no table.
    """
    found = dict(state)
    for name in names:
        if name in found:
            if found[name].ndim < 2:
                raise BadInput(f"{name} is a table of places and channels, got the shape {tuple(found[name].shape)}")
            found[name] = found[name].flatten(0, -2)
    return found


def in_stages(state: State, depths: Sequence[int], blocks: str = "blocks") -> State:
    """Blocks that are counted through in stages of so many: blocks.7.norm1 becomes stages.2.blocks.1.norm1."""
    homes = [(stage, place) for stage, depth in enumerate(depths) for place in range(depth)]
    rules = [
        (rf"^{blocks}\.{index}\.", f"stages.{stage}.blocks.{place}.") for index, (stage, place) in enumerate(homes)
    ]
    return rename(state, rules)


def linear(state: State, pattern: str) -> State:
    """Weights whose key matches, 1 x 1 convolutions elsewhere, as linear maps here."""
    return {
        key: value.flatten(1) if re.search(pattern, key) and value.ndim > 2 else value for key, value in state.items()
    }
