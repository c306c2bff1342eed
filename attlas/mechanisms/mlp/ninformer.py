"""NiNformer: an MLP-Mixer block makes a gate for every token and channel.

    y = (x W + b) ⊙ mix(x)
    mix(x) = z + W₄ᵀ φ(W₃ᵀ LN₂(z)),    z = x + (T₂ φ(T₁ LN₁(x)ᵀ))ᵀ,    φ = GELU

each product with a bias of its own. T₁ (F, N) and T₂ (N, F) mix tokens, the same in every channel, W₃ (C, F) and W₄
(F, C) channels. The gate is the raw output of the mixer, with its two residual paths and without a squashing function.
T belongs to places, so the number of tokens is fixed and no position encoding is needed; padding counts as 0 in T₁.

tokens (B, N, C), F hidden numbers in both MLPs. Time O(N C (F + C)); 2 N F weights that grow with N; no N² matrix.

Source: Abdullah and Aydin, "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
2024 (arXiv:2403.02411), official code Abdullah-88/NiNformer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.mlp import Mlp

CHANNEL_SIDE = (16 * 16 + 16) + 2 * (16 + 16)
"""Weights of the projection and of two norms at 16 channels."""

SPEC = Spec(
    name="ninformer",
    title="NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
    year=2024,
    paper="arXiv:2403.02411",
    equation="y = (x W) ⊙ mixer(x)",
    complexity="O(N C (F + C)) time, F hidden",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    examples=(
        Example(parameters=CHANNEL_SIDE + (2 * 7 * 32 + 32 + 7) + (2 * 16 * 32 + 32 + 16)),
        Example(
            grid=(2, 3),
            prefix=1,
            params={"hidden": 5},
            parameters=CHANNEL_SIDE + (2 * 7 * 5 + 5 + 7) + (2 * 16 * 5 + 5 + 16),
        ),
    ),
)


@register(SPEC)
class NiNformer(Mixer):
    """A projection gated by an MLP-Mixer block.

    Args:
        site: where it is installed; it has to know its grid or its length.
        backend: `auto`, `torch` or `oracle`.
        hidden: F of both MLPs; twice the channels by default, as published.
        dropout: after both matrices of both MLPs, in training.
    """

    def __init__(self, site: Site, backend: str = "auto", *, hidden: int | None = None, dropout: float = 0.5) -> None:
        super().__init__(site, backend)
        tokens = site.grid.tokens if site.grid is not None else site.length
        if tokens is None:
            raise BadInput(
                "ninformer has a row of weights for every token: pass grid=(height, width) or length= when building it"
            )
        hidden = 2 * site.dim if hidden is None else hidden
        if hidden < 1:
            raise BadInput(f"hidden counts hidden numbers of the MLPs, at least 1, got {hidden}")
        self.tokens = tokens
        self.proj = nn.Linear(site.dim, site.dim)
        self.token_norm, self.channel_norm = nn.LayerNorm(site.dim), nn.LayerNorm(site.dim)
        self.token_mlp = Mlp(tokens, hidden, drop=dropout)
        self.channel_mlp = Mlp(site.dim, hidden, drop=dropout)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Gate the projection."""
        self._check_length(x_BNC)
        return self.proj(x_BNC) * self.gate(x_BNC, call.mask.keys)

    def gate(self, x_BNC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
        """The output of the mixer block (B, N, C)."""
        normed = x_BNC
        if keep_BN is not None:
            normed = x_BNC = x_BNC.where(keep_BN.unsqueeze(-1), 0)
        normed = self.token_norm(normed)
        if keep_BN is not None:
            normed = normed.where(keep_BN.unsqueeze(-1), 0)
        z_BNC = x_BNC + self.token_mlp(normed.transpose(1, 2)).transpose(1, 2)
        return z_BNC + self.channel_mlp(self.channel_norm(z_BNC))

    def _check_length(self, x_BNC: Tensor) -> None:
        if x_BNC.shape[1] != self.tokens:
            raise BadInput(
                f"this ninformer has weights for {self.tokens} tokens, got {x_BNC.shape[1]}: build it with the grid "
                "that it is used on, and pad shorter sequences"
            )

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Channel by channel over the tokens, then token by token over the channels."""
        self._check_length(x_BNC)
        keep = call.mask.keys
        keep_BN = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool) if keep is None else keep
        x_BNC = torch.where(keep_BN[..., None], x_BNC, 0)
        u_BNC = _normalised(x_BNC, self.token_norm) * keep_BN[..., None]
        mixed = [x_BNC[..., c] + self._two_layers(u_BNC[..., c], self.token_mlp) for c in range(x_BNC.shape[2])]
        z_BNC = torch.stack(mixed, -1)
        w_BNC = _normalised(z_BNC, self.channel_norm)
        gate = [z_BNC[:, n] + self._two_layers(w_BNC[:, n], self.channel_mlp) for n in range(x_BNC.shape[1])]
        p_BNC = torch.einsum("bnc,ec->bne", x_BNC, self.proj.weight) + self.proj.bias
        return p_BNC * torch.stack(gate, 1)

    def _two_layers(self, x_BK: Tensor, mlp: Mlp) -> Tensor:
        h = F.gelu(torch.einsum("bk,fk->bf", x_BK, mlp.fc1.weight) + mlp.fc1.bias)
        h = F.dropout(h, mlp.drop.p, self.training)
        y = torch.einsum("bf,kf->bk", h, mlp.fc2.weight) + mlp.fc2.bias
        return F.dropout(y, mlp.drop.p, self.training)

    def count(self, sizes: Sizes) -> Cost:
        """The projection and two products each over tokens and channels; no pair of tokens is scored."""
        dim, tokens = self.site.dim, sizes.queries
        hidden = self.token_mlp.fc1.out_features + self.channel_mlp.fc1.out_features
        flops = 2 * sizes.batch * tokens * dim * (dim + 2 * hidden)
        return Cost(flops, flops)


def _normalised(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm as it is printed."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
