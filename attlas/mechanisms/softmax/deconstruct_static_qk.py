"""Attention maps without context: queries and keys of every layer are made of the token embeddings.

    o = softmax(W_q E (W_k E)ᵀ / √D) W_v H,    E the embeddings of the input, the same in every layer

The map follows the input, but only what the tokens are, not what the layers before have made of them. In a
model E is what goes into the first layer, and `attlas.blocks.probe.Probed` hands it over; a layer on its own is
the first one, where E is its input and this is softmax attention.

H, E (B, N, C); time O(N² C), the state is a key/value cache of 2 N C numbers. The projections and the
parameters are those of softmax attention.

Source: Xue et al., "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
2025 (arXiv:2510.11602), StaticEmbQK; no official code was found.
"""

from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.registry import register
from attlas.core.spec import EVERY_MASK, Example, Pattern, Spec
from attlas.ops.probed import ProbedMixer

SPEC = Spec(
    name="deconstruct_static_qk",
    title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    year=2025,
    paper="arXiv:2510.11602",
    equation="o = softmax(W_q E (W_k E)ᵀ / √D) v,  E token embeddings",
    complexity="O(N² D) time, O(N D) state",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    masks=EVERY_MASK,
    streams=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(heads=4, grid=(2, 4), prefix=1, params={"bias": False}, parameters=4 * 16 * 16 + 16),
    ),
    reconstruction=True,
)


@register(SPEC)
class DeconstructStaticQK(ProbedMixer):
    """Attention whose queries and keys are made of the token embeddings."""

    shared = False

    def source(self, x_BNC: Tensor, start: int) -> Tensor:
        """The embeddings of these tokens."""
        if self.level is None:
            return x_BNC
        if self.level.shape != x_BNC.shape:
            raise BadInput(
                f"{SPEC.name} was handed embeddings {tuple(self.level.shape)} for tokens {tuple(x_BNC.shape)}; "
                f"hand over those of the same tokens"
            )
        return self.level
