"""Rules that the key maps of several families have."""

from __future__ import annotations

from attlas.models.key_maps import QKV, split
from attlas.models.registry import State

BETWEEN = tuple((rf"^(?:layers|levels)\.{i}\.downsample\.", f"downsamples.{i + 1}.") for i in range(3))
"""A stage that ends with the way to the next one; here the way belongs to the next one."""
CLASSIFIER = (r"^head\.(weight|bias)$", r"head.classifier.\1")
LAST_NORM = (r"^norm\.", "head.before.")


def unfused(state: State) -> State:
    """attn.qkv, the three projections in one, as those of a mixer."""
    return split(state, "attn.qkv", tuple(f"mixer.{name}" for name in QKV))
