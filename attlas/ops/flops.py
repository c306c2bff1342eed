"""Counting the FLOPs that run."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry


def _attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    (batch, heads, queries, size), keys = q, k[2]
    return 2 * batch * heads * queries * keys * (size + v[3])


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    (batch, heads, queries, size), keys = q, k[2]
    return 2 * batch * heads * queries * keys * (3 * size + 2 * v[3])


def flop_counter() -> FlopCounterMode:
    """A counter of matrix products, FLOP = 2 MAC; torch before 2.15 forgets the fused attention of the CPU."""
    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    missing = {op: formula for op, formula in formulas.items() if op not in flop_registry}
    return FlopCounterMode(display=False, custom_mapping=missing)
