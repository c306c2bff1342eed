"""No attention at all: where attention was, a gated MLP of exactly as many parameters.

    y = W_dn (SiLU(W_gt x) * W_up x)

No token learns anything of another one, whatever the length of the context: the control that says how much
of a model's quality is token mixing. Attention has 4 C² weights, so the MLP is 4/3 C wide. What the division
by three leaves over, biases of attention included, is one or two vectors of C numbers: one becomes a bias of
the output, two become a hidden unit without W_up. With that, which is ours, the count is equal to the unit.

x (B, N, C); time O(N C²), no state.

Source: Xue et al., "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
2025 (arXiv:2510.11602); no official code was found.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec

SPEC = Spec(
    name="deconstruct_mlp",
    title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    year=2025,
    paper="arXiv:2510.11602",
    equation="y = W_dn (SiLU(W_gt x) ⊙ W_up x)",
    complexity="O(N C²) time, no state",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    streams=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(grid=(2, 3), prefix=1, dim=12, params={"bias": False}, parameters=4 * 12 * 12 + 12),
        Example(dim=8, params={"bias": False, "out_bias": False}, parameters=4 * 8 * 8),
    ),
    reconstruction=True,
)


@register(SPEC)
class DeconstructMLP(Mixer):
    """A SwiGLU in the place and of the size of attention.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        bias: whether the attention that it replaces has biases at queries, keys and values.
        out_bias: whether that attention has a bias at the output.
    """

    def __init__(self, site: Site, backend: str = "auto", *, bias: bool = True, out_bias: bool = True) -> None:
        super().__init__(site, backend)
        vectors = 4 * site.dim + 3 * bias + out_bias  # of attention, dim numbers each
        width, left = divmod(vectors, 3)
        self.ungated = left // 2
        self.up_proj = nn.Linear(site.dim, width, bias=False)
        self.gate_proj = nn.Linear(site.dim, width + self.ungated, bias=False)
        self.out_proj = nn.Linear(width + self.ungated, site.dim, bias=left == 1)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """All tokens at once; the unit without W_up is multiplied by 1."""
        up = F.pad(self.up_proj(x_BNC), (0, self.ungated), value=1.0)
        return self.out_proj(F.silu(self.gate_proj(x_BNC)) * up)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Hidden unit by hidden unit."""
        y = x_BNC * 0 if self.out_proj.bias is None else x_BNC * 0 + self.out_proj.bias
        for unit, (gate_C, down_C) in enumerate(zip(self.gate_proj.weight, self.out_proj.weight.T, strict=True)):
            gate_BN1 = (x_BNC * gate_C).sum(-1, keepdim=True)
            hidden_BN1 = gate_BN1 / (1 + (-gate_BN1).exp())
            if unit < len(self.up_proj.weight):
                hidden_BN1 = hidden_BN1 * (x_BNC * self.up_proj.weight[unit]).sum(-1, keepdim=True)
            y = y + hidden_BN1 * down_C
        return y

    def count(self, sizes: Sizes) -> Cost:
        """The three products."""
        weights = self.up_proj.weight.numel() + 2 * self.gate_proj.weight.numel()
        flops = 2 * sizes.batch * sizes.queries * weights
        return Cost(flops, flops)

    def start(self, batch: int, like: Tensor) -> tuple[()]:
        """Nothing is carried."""
        return ()

    def advance(self, x_BNC: Tensor, state: tuple[()], keep: Tensor | None) -> tuple[Tensor, tuple[()]]:
        """The segment by itself."""
        return self(x_BNC), ()
