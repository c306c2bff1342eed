"""Attention maps of noise: queries and keys are made of one fixed random sequence, values of the input.

    o = softmax(W_q X (W_k X)ᵀ / √D) W_v H,    X_0 = ε ~ N(0, σ²),  X_{l+1} = layer_l(X_l)

The same map serves all inputs and, once trained, can be stored. In a model X_l is what the model's own layers
make of the random sequence, and `attlas.blocks.probe.Probed` hands it over; a layer on its own is the first
one, X = ε. σ is not known to us and is 1 here.

H (B, N, C), X (1, N, C); time O(N² C) with the scores once for the batch; the state are the values, N C
numbers, and the keys of the one sequence. The projections and the parameters are those of softmax attention.
Padding of the input is not seen.

Source: Xue et al., "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
2025 (arXiv:2510.11602), RndEmbQK; no official code was found.
"""

import torch

from attlas.core.errors import BadInput
from attlas.core.mechanism import Site
from attlas.core.registry import register
from attlas.core.spec import EVERY_MASK, Example, Pattern, Spec
from attlas.ops.probed import Rotates, StoredMap

SPEC = Spec(
    name="deconstruct_random_qk",
    title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    year=2025,
    paper="arXiv:2510.11602",
    equation="o = softmax(W_q X (W_k X)ᵀ / √D) v,  X from ε ~ N(0, σ²)",
    complexity="O(N² D) time, O(N D) state",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    masks=EVERY_MASK,
    streams=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(heads=4, grid=(2, 4), prefix=1, params={"bias": False, "sigma": 0.5}, parameters=4 * 16 * 16 + 16),
    ),
    reconstruction=True,
)


@register(SPEC)
class DeconstructRandomQK(StoredMap):
    """Attention whose queries and keys are made of noise.

    Args:
        site: where it is installed; its length is that of the noise.
        backend: `auto`, `torch` or `oracle`.
        bias: of the query, key and value projections.
        out_bias: of the output projection.
        position: turns queries and keys, such as `attlas.positions.Rotary`.
        sigma: standard deviation of the noise.
        seed: of the noise; all layers of a model have the same one.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        bias: bool = True,
        out_bias: bool = True,
        position: Rotates | None = None,
        sigma: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(site, backend, bias=bias, out_bias=out_bias, position=position)
        if site.length is None:
            raise BadInput(f"{SPEC.name} draws its noise when it is built: pass length=, the longest sequence")
        if sigma <= 0:
            raise BadInput(f"sigma is the standard deviation of the noise and must be positive, got {sigma}")
        generator = torch.Generator().manual_seed(seed)
        noise_1LC = sigma * torch.randn(1, site.length, site.dim, generator=generator)
        self.register_buffer("probe", noise_1LC.to(torch.get_default_dtype()))
