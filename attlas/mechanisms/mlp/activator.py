"""Activator: a gated linear unit where a transformer has attention. No token sees another.

    y = W₃ (LN(GELU(W₁ x)) ⊙ LN(W₂ x))

each product with a bias. Both LN are one, with one weight and bias. The unit works token by token, so that a network of
such blocks is a function of each patch, averaged over patches: permuting tokens permutes outputs, and whatever mixes
tokens has to come from elsewhere.

tokens (B, N, C), F hidden channels. Time O(N C F), 3 C F weights, no state.

Source: Abdullah and Aydin, "Activator: GLU Activations as The Core Functions of a Vision Transformer", 2024
(arXiv:2405.15953), official code Abdullah-88/Activator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec

SPEC = Spec(
    name="activator",
    title="Activator: GLU Activations as The Core Functions of a Vision Transformer",
    year=2024,
    paper="arXiv:2405.15953",
    equation="y = W₃ (LN(GELU(W₁ x)) ⊙ LN(W₂ x))",
    complexity="O(N C F) time, F hidden",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    streams=True,
    examples=(
        Example(parameters=3 * 16 * 32 + 2 * 32 + 16 + 2 * 32),
        Example(
            grid=(2, 3),
            prefix=1,
            params={"hidden": 5},
            parameters=3 * 16 * 5 + 2 * 5 + 16 + 2 * 5,
            patterns=frozenset({Pattern.NONCAUSAL_SELF}),
        ),
    ),
)


@register(SPEC)
class Activator(Mixer):
    """A gated linear unit.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        hidden: F; twice the channels by default, as published.
    """

    def __init__(self, site: Site, backend: str = "auto", *, hidden: int | None = None) -> None:
        super().__init__(site, backend)
        hidden = 2 * site.dim if hidden is None else hidden
        if hidden < 1:
            raise BadInput(f"hidden counts hidden channels, at least 1, got {hidden}")
        self.gate, self.value = nn.Linear(site.dim, hidden), nn.Linear(site.dim, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, site.dim)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Token by token, all at once."""
        return self.out(self.norm(F.gelu(self.gate(x_BNC))) * self.norm(self.value(x_BNC)))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """One token after the other, its norms as printed."""
        outputs = []
        for x_BC in x_BNC.unbind(1):
            u, v = (torch.einsum("bc,fc->bf", x_BC, w.weight) + w.bias for w in (self.gate, self.value))
            u, v = (self._normalised(h) for h in (0.5 * u * (1 + torch.erf(u / 2**0.5)), v))
            outputs.append(torch.einsum("bf,cf->bc", u * v, self.out.weight) + self.out.bias)
        return torch.stack(outputs, 1)

    def _normalised(self, h_BF: Tensor) -> Tensor:
        centred = h_BF - h_BF.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + self.norm.eps).sqrt()
        return centred / spread * self.norm.weight + self.norm.bias

    def count(self, sizes: Sizes) -> Cost:
        """Three matrices on every token."""
        flops = 2 * sizes.batch * sizes.queries * 3 * self.site.dim * self.out.in_features
        return Cost(flops, flops)

    def start(self, batch: int, like: Tensor) -> tuple[()]:
        """Nothing has to be remembered."""
        return ()

    def advance(self, x_BNC: Tensor, state: tuple[()], keep: Tensor | None) -> tuple[Tensor, tuple[()]]:
        """The tokens of the segment by themselves."""
        return self(x_BNC), state
