"""The TransNormer block: what stands around lightning attention in TransNormerLLM and in MiniMax.

    x ← x + mixer(norm(x)),    x ← x + SGLU(norm(x)),    SGLU(x) = (x W₁ * x W₂) W₃,    norm(x) = x / √(mean x² + ε)

B batch, N tokens, C channels, F hidden channels, H heads, D head size.

Sources: Qin et al., "TransNormerLLM", 2023 (arXiv:2307.14995), and "Various Lengths, Constant Speed", 2024
(arXiv:2405.17381), official code OpenNLPLab/TransnormerLLM and OpenNLPLab/lightning-attention; MiniMax, "MiniMax-01",
2025 (arXiv:2501.08313).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attlas.blocks.attention import ACTIVATIONS, Attention, SimpleRMSNorm
from attlas.blocks.positions import LRPE
from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Cost, Mixer, Site, Sizes
from attlas.mechanisms.linear.lightning import Lightning
from attlas.ops.decay import flops


class SGLU(nn.Module):
    """The gated channel mixer without an activation: (x W₁ * x W₂) W₃."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.last = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Token by token."""
        return self.last(self.first(x_BNC) * self.second(x_BNC))


class LightningAttention(Attention):
    """The shell of an attend whose values pass an activation too and whose gate may be of low rank.

    Args:
        attend: the mechanism.
        value_activation: None or the name of an activation.
        gate_rank: rank of the gate's projection, two matrices without anything between; None for one matrix.
        **shell: settings of `Attention`.
    """

    def __init__(
        self, attend: Attend, *, value_activation: str | None = None, gate_rank: int | None = None, **shell: Any
    ) -> None:
        super().__init__(attend, **shell)
        if value_activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise BadInput(f"value_activation is one of {known}, got {value_activation!r}")
        self.value_activation = ACTIVATIONS[value_activation]()
        self.gate_rank = gate_rank
        if gate_rank is not None:
            full = self.gate_proj
            if not isinstance(full, nn.Linear) or gate_rank < 1:
                raise BadInput(f"gate_rank is at least 1, of a gate that there is, got {gate_rank}")
            bias = full.bias is not None
            low = nn.Linear(full.in_features, gate_rank, bias), nn.Linear(gate_rank, full.out_features, bias)
            self.gate_proj = nn.Sequential(*low)  # type: ignore[assignment]

    def _project(self, x_BNC: Tensor, context: Tensor | None, start: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._project(x_BNC, context, start)
        return q, k, self.value_activation(v)

    def count(self, sizes: Sizes) -> Cost:
        """The shell's, with the gate at its rank and LRPE's features."""
        site, cost = self.site, super().count(sizes)
        width, tokens = site.heads * site.head_dim, sizes.batch * sizes.queries
        if self.gate_rank is not None:
            less = 2 * tokens * (self.gate_rank * (site.dim + width) - site.dim * width)
            cost = cost + Cost(less, less)
        if isinstance(self.position, LRPE):
            made = flops(sizes.queries, 2 * site.head_dim, site.head_dim)
            counted = flops(sizes.queries, site.head_dim, site.head_dim)
            more = (sizes.batch * site.heads * (two - one) for two, one in zip(made, counted, strict=True))
            cost = cost + Cost(*more)
        return cost


def transnormer_attention(
    dim: int,
    heads: int,
    *,
    layer: int = 0,
    layers: int = 1,
    lrpe: bool = False,
    low_rank_gate: bool = False,
    backend: str = "auto",
) -> LightningAttention:
    """Lightning attention as TransNormerLLM lays it out: it streams, and no projection has a bias.

    Args:
        dim: C.
        heads: H.
        layer, layers: its place; the last layer hardly forgets.
        lrpe: learned relative positions, in the released models of the first layer alone.
        low_rank_gate: the later form: LayerNorm, and the sigmoid of a gate of rank D; values are activated as queries
            and keys are. Without: no weight in the norm, a linear gate, and values as they are.
        backend: of the attend.
    """
    if dim % heads:
        raise BadInput(f"heads must divide dim: {dim} channels do not split into {heads} heads")
    size = dim // heads
    attend = Lightning(Site(dim, heads, heads, size, True, layer=layer, layers=layers), backend)
    shell = dict(Lightning.spec.shell)
    if low_rank_gate:
        shell |= {"output_norm": "layer", "gate": "sigmoid", "value_activation": "silu", "gate_rank": size}
    return LightningAttention(attend, position=LRPE(heads, size) if lrpe else None, **shell)


class TransNormerBlock(nn.Module):
    """A mixer and a channel mixer, each behind a norm without a weight and beside a residual path.

    Args:
        mixer: any layer on tokens.
        hidden: F.
    """

    def __init__(self, mixer: Mixer, hidden: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = SimpleRMSNorm()
        self.channels = SGLU(mixer.site.dim, hidden)

    def forward(self, x_BNC: Tensor, mask: Mask | Tensor | None = None) -> Tensor:
        """Mix tokens, then channels."""
        return self._channels(x_BNC + self.mixer(self.norm(x_BNC), mask=mask))

    def _channels(self, x_BNC: Tensor) -> Tensor:
        return x_BNC + self.channels(self.norm(x_BNC))

    def initial_state(self, batch: int, like: Tensor | None = None) -> Any:
        """The mixer's state before the first token."""
        return self.mixer.initial_state(batch, like)

    def extend(self, x_BNC: Tensor, state: Any, *, keep: Tensor | None = None) -> tuple[Tensor, Any]:
        """The outputs of a segment that follows `state`, and the state behind it."""
        y, state = self.mixer.extend(self.norm(x_BNC), state, keep=keep)
        return self._channels(x_BNC + y), state
