"""Attention maps of one text: queries and keys are made of a fixed sequence, values of the input.

    o = softmax(W_q X (W_k X)ᵀ / √D) W_v H,    X_0 = embedded text,  X_{l+1} = layer_l(X_l)

The same map serves all inputs and, once trained, can be stored: what a map of real text has that one of noise
has not is natural statistics of neighbours. The paper takes the first 2048 tokens of FineWeb. In a model X_l is
what the model's own layers make of the text, and `attlas.blocks.probe.Probed` hands it over; a layer on its own
is the first one, X = the probe that it is built with. Without a probe it takes a text of ours, repeated up to
the length, of which each byte has a fixed random vector.

H (B, N, C), X (1, N, C); time O(N² C) with the scores once for the batch; the state are the values, N C
numbers, and the keys of the one text. The projections and the parameters are those of softmax attention.
Padding of the input is not seen.

Source: Xue et al., "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
2025 (arXiv:2510.11602), FixedSeqQK; no official code was found.
"""

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mechanism import Site
from attlas.core.registry import register
from attlas.core.spec import EVERY_MASK, Example, Pattern, Spec
from attlas.ops.probed import Rotates, StoredMap

TEXT = (
    b"A fixed text knows nothing of what is asked. It has words that come back, pauses between them, and sentences "
    b"that end, and a layer that looks at it may learn from it how far to look back: to the last letter, to the "
    b"start of a word, to the one before. What it cannot learn is to find something. "
)
"""What a layer without a probe looks at."""


def _embedded(tokens: int, dim: int) -> Tensor:
    """The text (tokens, dim), with vectors that are the same everywhere."""
    vectors = torch.randn(256, dim, generator=torch.Generator().manual_seed(0))
    return vectors[[TEXT[place % len(TEXT)] for place in range(tokens)]]


SPEC = Spec(
    name="deconstruct_fixed_qk",
    title="Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
    year=2025,
    paper="arXiv:2510.11602",
    equation="o = softmax(W_q X (W_k X)ᵀ / √D) v,  X from a fixed text",
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
class DeconstructFixedQK(StoredMap):
    """Attention whose queries and keys are made of one fixed sequence.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        bias: of the query, key and value projections.
        out_bias: of the output projection.
        position: turns queries and keys, such as `attlas.positions.Rotary`.
        probe: the fixed sequence (tokens, dim), embedded; by default a text of ours, as long as the site's length.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        bias: bool = True,
        out_bias: bool = True,
        position: Rotates | None = None,
        probe: Tensor | None = None,
    ) -> None:
        super().__init__(site, backend, bias=bias, out_bias=out_bias, position=position)
        if probe is None:
            if site.length is None:
                raise BadInput(f"{SPEC.name} needs the fixed sequence, probe=, or a length= for one of its own")
            probe = _embedded(site.length, site.dim)
        if probe.ndim != 2 or probe.shape[1] != site.dim:
            raise BadInput(f"probe is the fixed sequence as (tokens, {site.dim}) vectors, got {tuple(probe.shape)}")
        self.register_buffer("probe", probe.detach().unsqueeze(0).to(torch.get_default_dtype(), copy=True))
