"""Identity: no token mixing at all, the lower bound of a network's other parts.

    y = x

In a MetaFormer block x + mixer(norm x) a token then adds its own norm to itself, and whatever reaches a place comes
through the convolutions between the stages.

tokens (B, N, C). No time, no parameters.

Source: Yu et al., "MetaFormer Is Actually What You Need for Vision", 2021 (arXiv:2111.11418), official code
sail-sg/poolformer.
"""

from torch import Tensor

from attlas.core.mechanism import Call, Cost, Mixer, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec

SPEC = Spec(
    name="identity",
    title="MetaFormer Is Actually What You Need for Vision",
    year=2021,
    paper="arXiv:2111.11418",
    equation="y = x",
    complexity="nothing",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    streams=True,
    examples=(Example(parameters=0), Example(grid=(2, 3), prefix=1, parameters=0)),
)


@register(SPEC)
class Identity(Mixer):
    """The tokens themselves, padding as 0."""

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """All at once."""
        keep = call.mask.queries
        return x_BNC.clone() if keep is None else x_BNC.where(keep.unsqueeze(-1), 0)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Token by token."""
        y_BNC = x_BNC * 0
        for n in range(x_BNC.shape[1]):
            y_BNC[:, n] = x_BNC[:, n]
        return y_BNC

    def count(self, sizes: Sizes) -> Cost:
        """Nothing."""
        return Cost(0, 0)

    def start(self, batch: int, like: Tensor) -> None:
        """Nothing is carried."""
        return None

    def advance(self, x_BNC: Tensor, state: None, keep: Tensor | None) -> tuple[Tensor, None]:
        """The segment."""
        return self(x_BNC, mask=keep), state
