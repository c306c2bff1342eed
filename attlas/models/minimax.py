"""MiniMax: lightning attention in seven of eight layers, softmax attention in the eighth, experts in all.

    r = RMSNorm(x),   h = α r + β mixer(r),   r' = RMSNorm(h),   y = α r' + β experts(r'),    α = (2 L)^¼, β = 1

Layer i, from 0, is softmax attention where (i + 1) % 8 == 0: 64 query heads on 8 key/value heads of 128 features, of
which the first 64 turn by rotary positions of base 10⁷. The others are lightning attention with 64 heads of 128:
queries, keys and values pass a SiLU, there is no scale and no position, the output is divided by its root mean square
over all 8192 channels with a weight, and multiplied by a sigmoid gate. The residual path carries the normed input,
as in DeepNorm, not x. Each token goes to the 2 of 32 experts that a softmax over all likes best, with weights that sum
to 1; an expert is W₂(SiLU(W₁ x) * W₃ x). The logits are made in float32.

B batch, N tokens, C channels, F hidden channels, E experts, T tokens of an expert, V vocabulary.

Source: MiniMax, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", 2025 (arXiv:2506.13585),
and "MiniMax-01", 2025 (arXiv:2501.08313), official code MiniMax-AI/MiniMax-M1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.factory import mixer
from attlas.blocks.positions import Rotary
from attlas.blocks.transnormer import LightningAttention
from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Mixer, Site
from attlas.mechanisms.linear.lightning import Lightning
from attlas.ops.precision import wide


@dataclass(frozen=True)
class MiniMaxConfig:
    """The declaration; the defaults are MiniMax-M1.

    Attributes:
        vocabulary: V.
        dim: C.
        layers: L.
        period: every layer whose number, from 1, it divides is softmax attention.
        heads, kv_heads, head_dim: of softmax attention; lightning attention has as many key/value heads as heads.
        rotary: features of a head that turn, in softmax attention.
        base: of the rotary wavelengths.
        experts, active: how many there are, and how many a token goes to.
        hidden: F, of an expert.
        alpha, beta: of the residual path and of what is added; alpha is (2 L)^¼ by default.
    """

    vocabulary: int = 200_064
    dim: int = 6144
    layers: int = 80
    period: int = 8
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    rotary: int = 64
    base: float = 1e7
    experts: int = 32
    active: int = 2
    hidden: int = 9216
    alpha: float | None = None
    beta: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.experts:
            raise BadInput(f"a token goes to at least 1 and at most all {self.experts} experts, got {self.active}")
        if self.layers < 1 or self.period < 1:
            raise BadInput(f"layers and period are at least 1, got {self.layers} and {self.period}")

    def is_softmax(self, layer: int) -> bool:
        """Whether layer `layer`, from 0, is softmax attention."""
        return (layer + 1) % self.period == 0

    @property
    def residual(self) -> float:
        """α."""
        return (2 * self.layers) ** 0.25 if self.alpha is None else self.alpha

    def mixer(self, layer: int, backend: str = "auto") -> Mixer:
        """The attention of layer `layer`."""
        if self.is_softmax(layer):
            position = Rotary(self.head_dim, self.base, self.rotary)
            return mixer(
                "softmax",
                self.dim,
                self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                causal=True,
                bias=False,
                out_bias=False,
                position=position,
                backend=backend,
            )
        site = Site(self.dim, self.heads, self.heads, self.head_dim, True, layer=layer, layers=self.layers)
        shell = dict(Lightning.spec.shell) | {"output_norm": "rms", "gate": "sigmoid"}
        return LightningAttention(Lightning(site, backend), value_activation="silu", **shell)


class Experts(nn.Module):
    """A sum over the experts that a token likes best, weighed by how much.

    Args:
        dim: C.
        hidden: F.
        experts: E.
        active: how many a token goes to.
    """

    def __init__(self, dim: int, hidden: int, experts: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.gate = nn.Linear(dim, experts, bias=False)
        self.w1, self.w3 = (nn.Parameter(torch.empty(experts, hidden, dim)) for _ in range(2))
        self.w2 = nn.Parameter(torch.empty(experts, dim, hidden))

    def choose(self, x_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of a token's experts, which sum to 1, and which they are, (B, N, active) each."""
        likes_BNE = wide(self.gate(x_BNC)).softmax(-1)
        weights, chosen = likes_BNE.topk(self.active, -1)
        return weights / weights.sum(-1, keepdim=True), chosen

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Expert by expert, each on its own tokens."""
        weights, chosen = (t.flatten(0, 1) for t in self.choose(x_BNC))
        x, y = x_BNC.flatten(0, 1), torch.zeros_like(x_BNC).flatten(0, 1)
        for e in range(self.gate.out_features):
            token_T, place_T = (chosen == e).nonzero(as_tuple=True)
            x_TC = x[token_T]
            y_TC = (F.silu(x_TC @ self.w1[e].T) * (x_TC @ self.w3[e].T)) @ self.w2[e].T
            y = y.index_add(0, token_T, (y_TC * weights[token_T, place_T].unsqueeze(1)).to(y.dtype))
        return y.view_as(x_BNC)


class MiniMaxLayer(nn.Module):
    """One layer, with the normed input on its residual path."""

    def __init__(self, config: MiniMaxConfig, layer: int, backend: str = "auto") -> None:
        super().__init__()
        self.alpha, self.beta = config.residual, config.beta
        self.mixer_norm, self.experts_norm = (nn.RMSNorm(config.dim, eps=1e-5) for _ in range(2))
        self.mixer = config.mixer(layer, backend)
        self.experts = Experts(config.dim, config.hidden, config.experts, config.active)

    def forward(self, x_BNC: Tensor, mask: Mask | Tensor | None = None) -> Tensor:
        """Mix tokens, then channels."""
        r = self.mixer_norm(x_BNC)
        return self._experts(self.alpha * r + self.beta * self.mixer(r, mask=mask))

    def _experts(self, h_BNC: Tensor) -> Tensor:
        r = self.experts_norm(h_BNC)
        return self.alpha * r + self.beta * self.experts(r)

    def extend(self, x_BNC: Tensor, state: Any, keep: Tensor | None) -> tuple[Tensor, Any]:
        """The outputs of a segment that follows `state`, and the state behind it."""
        r = self.mixer_norm(x_BNC)
        y, state = self.mixer.extend(r, state, keep=keep)
        return self._experts(self.alpha * r + self.beta * y), state


class MiniMaxState(NamedTuple):
    """One state per layer: a matrix per head, or keys and values."""

    layers: tuple[Any, ...]


class MiniMax(nn.Module):
    """The causal language model.

    >>> config = MiniMaxConfig(64, 32, 8, heads=4, kv_heads=2, head_dim=8, rotary=4, experts=4, hidden=48)
    >>> model = MiniMax(config)
    >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape
    torch.Size([2, 5, 64])

    Args:
        config: the declaration.
        backend: of both attentions.
    """

    def __init__(self, config: MiniMaxConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.dim)
        self.layers = nn.ModuleList(MiniMaxLayer(config, i, backend) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.head = nn.Linear(config.dim, config.vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids_BN: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, N, V) of the token behind each.

        Args:
            ids_BN: tokens.
            mask: (B, N) bool, which of them are real.
        """
        x_BNC = self.embedding(ids_BN)
        for layer in self.layers:
            x_BNC = layer(x_BNC, mask)
        return self._logits(x_BNC)

    def _logits(self, x_BNC: Tensor) -> Tensor:
        return F.linear(wide(self.norm(x_BNC)), wide(self.head.weight))

    def initial_state(self, batch: int) -> MiniMaxState:
        """The state before the first token."""
        like = self.embedding.weight
        return MiniMaxState(tuple(layer.mixer.initial_state(batch, like) for layer in self._layers()))

    def _layers(self) -> list[MiniMaxLayer]:
        return [layer for layer in self.layers if isinstance(layer, MiniMaxLayer)]

    def extend(self, ids_BN: Tensor, state: MiniMaxState, *, keep: Tensor | None = None) -> tuple[Tensor, MiniMaxState]:
        """The logits of a segment that follows `state`, and the state behind it; `keep` (B, N) marks real tokens."""
        x_BNC, states = self.embedding(ids_BN), []
        for layer, before in zip(self._layers(), state.layers, strict=True):
            x_BNC, after = layer.extend(x_BNC, before, keep)
            states.append(after)
        return self._logits(x_BNC), MiniMaxState(tuple(states))

    def activated(self) -> int:
        """Parameters of the layers that one token meets: its experts of all, and neither embedding, head nor norm."""
        config, layers = self.config, sum(p.numel() for p in self.layers.parameters())
        idle = config.layers * (config.experts - config.active) * 3 * config.dim * config.hidden
        return layers - idle


def cispo_loss(
    log_p_BN: Tensor,
    old_log_p_BN: Tensor,
    advantages_B: Tensor,
    keep_BN: Tensor | None = None,
    *,
    above: float = 0.2,
    below: float = float("inf"),
) -> Tensor:
    """The loss of CISPO: REINFORCE with importance weights that are clipped, where PPO would drop their tokens.

        loss = -1 / Σ|o_i| Σ_i Σ_t sg(clip(r_it, 1 - below, 1 + above)) A_i log π(o_it),    r = π / π_old

    The weight is a constant to gradients, so that every token gives one. Only the upper bound is used as published. A
    token that has become impossible, log π = −∞, has no gradient and counts as none.

    Args:
        log_p_BN, old_log_p_BN: of the tokens of each response, now and when it was sampled.
        advantages_B: of each response, as `group_advantages` makes them.
        keep_BN: which tokens there are.
        above, below: how far a ratio may leave 1.

    Source: the MiniMax-M1 report, where `above` is tuned; 0.2 is what PPO takes.
    """
    if log_p_BN.shape != old_log_p_BN.shape or advantages_B.shape != log_p_BN.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (log_p_BN, old_log_p_BN, advantages_B))
        raise BadInput(f"log_p and old_log_p are (B, N), and advantages (B,), one for each response, got {shapes}")
    possible_BN = log_p_BN != -torch.inf
    keep_BN = possible_BN if keep_BN is None else keep_BN & possible_BN
    log_p, old_log_p = (x.where(keep_BN, 0) for x in (log_p_BN, old_log_p_BN))
    weight = (log_p - old_log_p).detach().exp().clamp(1 - below, 1 + above)
    return -(weight * advantages_B.unsqueeze(1) * log_p).sum() / keep_BN.sum().clamp(min=1)


def group_advantages(rewards_G: Tensor, eps: float = 1e-8) -> Tensor:
    """(R - mean) / std over the last axis, the responses to one question, in float32 at least."""
    rewards_G = wide(rewards_G)
    centred = rewards_G - rewards_G.mean(-1, keepdim=True)
    return centred / (rewards_G.std(-1, keepdim=True, correction=0) + eps)
