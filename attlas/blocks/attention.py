"""The shell around an attend: projections, heads, positions, norms, gate, output.

B batch, N queries, M keys, C channels, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.positions import Position
from attlas.core.errors import BadInput, share
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Mixer, Sizes
from attlas.core.spec import Takes
from attlas.ops.recurrent import roomy
from attlas.ops.softmax import repeat_heads

ACTIVATIONS = {None: nn.Identity, "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "relu": nn.ReLU, "gelu": nn.GELU}


class AttentionState(NamedTuple):
    """The attend's state and how many tokens came before."""

    attend: Any
    position: int


class Attention(Mixer):
    """Any attend as a layer on tokens.

        y = W_o (gate(x) * norm(concat_h attend(q, k, v)))

    with q = rotate(norm(act(W_q x))), k likewise, v = W_v x.

    Args:
        attend: the mechanism; its site says dim, heads, key/value heads, head size and causality.
        projected: (query heads, key/value heads) that the projections make. By default the attend's. With
            fewer query heads than key/value heads the query heads are tiled.
        bias: of the query, key and value projections.
        out_bias: of the output projection.
        context_dim: channels of the context in cross-attention; dim by default.
        qk_norm: None, "layer" or "rms", over the head size of queries and of keys.
        qk_activation: None or the name of an activation, on queries and keys.
        position: where tokens stand; see `attlas.positions`.
        output_norm: None, "layer", "rms" or "simple_rms" (no weight), over all channels, before the gate.
        gate: None for no gate; "linear", "sigmoid" or "silu" for that function of a projection of x, which
            multiplies the output before its projection.
        dropout: on the output, in training.
    """

    def __init__(
        self,
        attend: Attend,
        *,
        projected: tuple[int, int] | None = None,
        bias: bool = True,
        out_bias: bool = True,
        context_dim: int | None = None,
        qk_norm: str | None = None,
        qk_activation: str | None = None,
        position: Position | None = None,
        output_norm: str | None = None,
        gate: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        site = attend.site
        self.spec = attend.spec  # type: ignore[misc]  # a shell is the mechanism that it wraps
        super().__init__(site, attend.backend)
        query_heads, kv_heads = projected or (site.heads, site.kv_heads)
        if position is not None and position.biases and Takes.BIAS not in self.spec.masks:
            raise self._unsupported(f"{type(position).__name__} positions, a bias", mask=Takes.BIAS)
        if gate not in (None, "linear", "sigmoid", "silu"):
            raise BadInput(f"gate is None, 'linear', 'sigmoid' or 'silu', got {gate!r}")
        if qk_activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise BadInput(f"qk_activation is one of {known}, got {qk_activation!r}")
        self.attend = attend
        self.query_heads, self.kv_heads = query_heads, kv_heads
        size, width = site.head_dim, site.heads * site.head_dim
        source = site.dim if context_dim is None else context_dim
        self.context_dim = source
        self.q_proj = nn.Linear(site.dim, query_heads * size, bias)
        self.k_proj = nn.Linear(source, kv_heads * size, bias)
        self.v_proj = nn.Linear(source, kv_heads * size, bias)
        self.out_proj = nn.Linear(width, site.dim, out_bias)
        self.q_norm, self.k_norm = make_norm(qk_norm, size), make_norm(qk_norm, size)
        self.qk_activation = ACTIVATIONS[qk_activation]()
        self.position = position or Position()
        self.output_norm = make_norm(output_norm, width)
        self.gate_proj = nn.Linear(site.dim, width, bias) if gate else None
        self.gate_activation = ACTIVATIONS[None if gate == "linear" else gate]()
        self.dropout = share("dropout", dropout)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Project, attend, merge."""
        q, k, v = self._project(x_BNC, context_BMC, 0)
        return self._merge(self._attend(q, k, v, x_BNC, call), x_BNC)

    oracle = compute  # the attend has the oracle

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, x_BNC: Tensor, call: Call) -> Tensor:
        """Hook: what is merged, as heads (B, H, N, D); a shell with more than the attend adds to it."""
        mask = call.mask
        bias = None if call.cross else self.position.bias(call.grid)
        if bias is not None:
            mask = mask & Mask.biased(bias.to(q.dtype))
        return self.attend(q, k, v, mask=mask, grid=call.grid, cross=call.cross, tokens=x_BNC)

    def _project(self, x_BNC: Tensor, context: Tensor | None, start: int) -> tuple[Tensor, Tensor, Tensor]:
        heads, size = self.site.heads, self.site.head_dim
        x_BNC = self.position.embed(x_BNC, start)
        source = x_BNC if context is None else context
        if source.shape[2] != self.context_dim:
            raise BadInput(f"context has {source.shape[2]} channels; build with context_dim={source.shape[2]}")
        q_BNHD = self.q_proj(x_BNC).unflatten(-1, (self.query_heads, size))
        k_BMGD = self.k_proj(source).unflatten(-1, (self.kv_heads, size))
        v = self.v_proj(source).unflatten(-1, (self.kv_heads, size)).transpose(1, 2)
        q = self.q_norm(self.qk_activation(q_BNHD)).transpose(1, 2)
        k = self.k_norm(self.qk_activation(k_BMGD)).transpose(1, 2)
        if context is None:
            q, k = self.position.rotate(q, start), self.position.rotate(k, start)
        if self.query_heads < heads:
            q = q.repeat(1, heads // self.query_heads, 1, 1)
        if not self.spec.grouped:
            k, v = repeat_heads(k, heads), repeat_heads(v, heads)
        if isinstance(self.output_norm, SimpleRMSNorm):  # which brings sums back into float16's range
            q, k, v = roomy(q), roomy(k), roomy(v)
        return q, k, v

    def _merge(self, o_BHND: Tensor, x_BNC: Tensor) -> Tensor:
        o = self.output_norm(o_BHND.transpose(1, 2).flatten(2))
        if o.dtype == torch.float32:
            o = o.to(x_BNC.dtype)
        if self.gate_proj is not None:
            o = o * self.gate_activation(self.gate_proj(x_BNC))
        return F.dropout(self.out_proj(o), self.dropout, self.training)

    def count(self, sizes: Sizes) -> Cost:
        """The projections and the attend."""
        site = self.site
        width = site.heads * site.head_dim
        per_query = self.query_heads * site.head_dim * site.dim + width * site.dim
        if self.gate_proj is not None:
            per_query += width * site.dim
        per_key = 2 * self.kv_heads * site.head_dim * self.context_dim
        flops = 2 * sizes.batch * (sizes.queries * per_query + sizes.keys * per_key)
        return self.attend.count(sizes) + Cost(flops, flops)

    def start(self, batch: int, like: Tensor) -> AttentionState:
        """The attend's initial state, at position 0."""
        return AttentionState(self.attend.initial_state(batch, like), 0)

    def advance(self, x_BNC: Tensor, state: AttentionState, keep: Tensor | None) -> tuple[Tensor, AttentionState]:
        """Project the segment at its position and extend the attend."""
        if self.position.biases:
            raise BadInput(f"{type(self.position).__name__} positions do not stream; use Rotary or Learned")
        q, k, v = self._project(x_BNC, None, state.position)
        o, inner = self.attend.extend(q, k, v, state.attend, keep=keep, tokens=x_BNC)
        return self._merge(o, x_BNC), AttentionState(inner, state.position + x_BNC.shape[1])


class SimpleRMSNorm(nn.Module):
    """x / √(mean x² + 1e-6) over the last axis, without a weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def make_norm(name: str | None, size: int) -> nn.Module:
    """A norm of tokens by name: None, "layer", "rms" or "simple_rms" (no weight)."""
    kinds: dict[str | None, Callable[[], nn.Module]] = {
        None: nn.Identity,
        "layer": lambda: nn.LayerNorm(size),
        "rms": lambda: nn.RMSNorm(size, eps=1e-6),
        "simple_rms": SimpleRMSNorm,
    }
    if name not in kinds:
        raise BadInput(f"a norm is one of {', '.join(map(repr, kinds))}, got {name!r}")
    return kinds[name]()
