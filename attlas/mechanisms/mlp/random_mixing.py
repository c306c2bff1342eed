"""Random mixing: softmax weights that are drawn once and never learned.

    y_n = Σ_m A_nm x_m,    A = softmax(U),    U_nm uniform in [0, 1)

The control between no mixing and learned mixing. A belongs to places, so the number of tokens is fixed. Under padding
the rest of a row is scaled to sum to 1, our extension.

tokens (B, N, C), N² numbers that are kept but not trained. Time O(N² C).

Source: Yu et al., "MetaFormer Baselines for Vision", 2022 (arXiv:2210.13452), official code sail-sg/metaformer.
"""

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec

SPEC = Spec(
    name="random_mixing",
    title="MetaFormer Baselines for Vision",
    year=2022,
    paper="arXiv:2210.13452",
    equation="y = softmax(U) x, U random and fixed",
    complexity="O(N² C) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    examples=(Example(parameters=0), Example(grid=(2, 3), prefix=1, parameters=0)),
)


@register(SPEC)
class RandomMixing(Mixer):
    """Fixed random weights between places.

    Args:
        site: where it is installed; it has to know its grid or its length.
        backend: `auto`, `torch` or `oracle`.
    """

    weight: Tensor

    def __init__(self, site: Site, backend: str = "auto") -> None:
        super().__init__(site, backend)
        tokens = site.grid.tokens if site.grid is not None else site.length
        if tokens is None:
            raise BadInput(
                "random_mixing has a weight for every pair of tokens: pass grid=(height, width) or length= when "
                "building it"
            )
        self.tokens = tokens
        self.register_buffer("weight", torch.rand(tokens, tokens).softmax(-1))

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """One matrix product."""
        self._check_length(x_BNC)
        keep = call.mask.keys
        if keep is None:
            return self.weight.to(x_BNC.dtype) @ x_BNC
        real_BN1 = keep.unsqueeze(-1)
        seen_BN1 = self.weight @ real_BN1.to(self.weight.dtype)
        mixed_BNC = self.weight.to(x_BNC.dtype) @ x_BNC.where(real_BN1, 0)
        return (mixed_BNC / seen_BN1.clamp_min(1e-12).to(x_BNC.dtype)).where(real_BN1, 0)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Pair by pair."""
        self._check_length(x_BNC)
        keep = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool) if call.mask.keys is None else call.mask.keys
        y_BNC = x_BNC * 0
        for b, n in keep.nonzero().tolist():
            weights = [float(self.weight[n, m]) if keep[b, m] else 0.0 for m in range(self.tokens)]
            total = 1.0 if call.mask.keys is None else sum(weights)
            rows = [weight / total * x_BNC[b, m] for m, weight in enumerate(weights) if weight]
            y_BNC[b, n] = torch.stack(rows).sum(0)
        return y_BNC

    def _check_length(self, x_BNC: Tensor) -> None:
        if x_BNC.shape[1] != self.tokens:
            raise BadInput(
                f"this random_mixing has weights for {self.tokens} tokens, got {x_BNC.shape[1]}: build it with the "
                "grid that it is used on, and pad shorter sequences"
            )

    def count(self, sizes: Sizes) -> Cost:
        """One product of N x N with N x C; every pair is visible."""
        flops = 2 * sizes.batch * self.tokens**2 * self.site.dim
        return Cost(flops, flops)
