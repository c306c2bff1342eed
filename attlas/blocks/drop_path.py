"""Stochastic depth: in training a residual branch is left out for some pictures of the batch.

Source: Huang et al., "Deep Networks with Stochastic Depth", 2016 (arXiv:1603.09382).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from attlas.core.errors import BadInput, share


class DropPath(nn.Module):
    """0 with probability `rate` for each entry of the batch, else x / (1 - rate); x itself in evaluation."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = share("drop_path", rate)

    def forward(self, x: Tensor) -> Tensor:
        """Drop whole entries of the first axis."""
        if not self.rate or not self.training:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        """The rate in `print(module)`."""
        return f"{self.rate:.3f}"


def rising(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop rates that rise evenly from 0 in the first block to `rate` in the last, as lists per stage.

    Raises:
        BadInput: a rate that is no share, or depths that count no block.
    """
    rate, total = share("drop_path", rate), sum(depths)
    if total < 1 or min(depths) < 0:
        raise BadInput(f"depths count the blocks of each stage, at least one in all, got {list(depths)}")
    each: Iterator[float] = (rate * index / max(1, total - 1) for index in range(total))
    return [[next(each) for _ in range(depth)] for depth in depths]
