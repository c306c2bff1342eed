"""What mixers with a recurrent state share: sizes, gates, a norm of heads, sequences without gaps, a short convolution.

B batch, N tokens, C channels, H heads, D features of a head, L lags.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Sizes
from attlas.ops.lags import lagged_sum
from attlas.ops.precision import wide


def head_size(name: str, share: float, dim: int, heads: int) -> int:
    """Features of a head where all heads together have `share` of `dim` channels; else `BadInput` naming it."""
    width = round(share * dim) if share > 0 else 0
    if width < 1 or abs(width - share * dim) > 1e-6 or width % heads:
        raise BadInput(f"{name} times dim splits into heads: {share} of {dim} channels do not split into {heads} heads")
    return width // heads


def keys_ahead(queries: int, keys: int) -> int:
    """How many keys come before the first query, where the queries are the last of the positions."""
    if queries > keys:
        raise BadInput(f"queries are the last of the keys' positions, got {queries} queries and {keys} keys")
    return keys - queries


class MatrixState(NamedTuple):
    """S (B, H, D, E), with what each token left in it."""

    sums: Tensor


class RecurrentAttend(Attend):
    """What causal attends share whose state is one matrix per head; subclasses write `recur` and `head_flops`."""

    @abstractmethod
    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hook: the outputs of tokens that follow S, zeros if None, and S behind them."""

    @abstractmethod
    def head_flops(self, tokens: int, size: int) -> tuple[int, int]:
        """Hook: FLOPs of one head, what the recurrence takes and what the torch backend multiplies."""

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """From an empty state."""
        ahead = keys_ahead(q_BHND.shape[2], k_BGMD.shape[2])
        q = F.pad(q_BHND, (0, 0, ahead, 0))  # the first keys go into the state alone
        return self.recur(q, k_BGMD, v_BGME, None, call.mask.keys)[0][:, :, ahead:]

    def count(self, sizes: Sizes) -> Cost:
        """Each token into the state and out of it, and what the torch backend weighs besides."""
        needed, made = self.head_flops(sizes.queries, self.site.head_dim)
        copies = sizes.batch * self.site.heads
        pairs = Mask(causal=True).area(sizes.queries, sizes.keys, sizes.batch, self.site.heads)
        return Cost(copies * needed, copies * made, pairs)

    def initial_state(self, batch: int, like: Tensor) -> MatrixState:
        """S before the first token, zero."""
        size = self.site.head_dim
        return MatrixState(wide(like.new_zeros(batch, self.site.heads, size, size)))

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: MatrixState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, MatrixState]:
        """The recurrence, from the state before the segment."""
        # Positions may give keys more features than the state was made for: nothing is in their rows yet.
        sums = F.pad(state.sums, (0, 0, 0, k.shape[3] - state.sums.shape[2]))
        o, sums = self.recur(q, k, v, sums, keep)
        return o, MatrixState(sums)


class LogGates(nn.Sequential):
    """Logarithms of gates, log σ(W_2 W_1 x + b) / divisor, in float32 or better.

    Args:
        dim: channels of the tokens.
        rank: channels that the gates pass through.
        gates: how many there are.
        divisor: what holds the gates near 1, the larger the nearer.
    """

    def __init__(self, dim: int, rank: int, gates: int, divisor: float) -> None:
        if rank < 1:
            raise BadInput(f"rank counts the channels that the gates pass through, at least 1, got {rank}")
        if divisor <= 0:
            raise BadInput(f"divisor is positive: what it divides is the logarithm of a gate below 1; got {divisor}")
        super().__init__(nn.Linear(dim, rank, bias=False), nn.Linear(rank, gates))
        self.divisor = divisor

    def logits(self, x_BNC: Tensor) -> Tensor:
        """W_2 W_1 x + b."""
        return wide(super().forward(x_BNC))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, gates), at most 0."""
        return F.logsigmoid(self.logits(x_BNC)) / self.divisor


def roomy(x: Tensor) -> Tensor:
    """`x` in float32 if it is float16, which ends at 65504: sums over a sequence that are normed later pass that."""
    return wide(x) if x.dtype == torch.float16 else x


def normed_heads(o_BNHD: Tensor, like: Tensor, eps: float, weight_D: Tensor | None = None) -> Tensor:
    """Each head over its root mean square, made in float32, as channels (B, N, H D) in the dtype of `like`."""
    weight = None if weight_D is None else wide(weight_D)
    return F.rms_norm(wide(o_BNHD), o_BNHD.shape[-1:], weight, eps).flatten(2).to(like.dtype)


def projection_flops(module: nn.Module, tokens: int) -> int:
    """FLOPs of the linear layers of `module`, each once on every token."""
    return 2 * tokens * sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def alone(run: Callable[[Tensor], Tensor], x_BNC: Tensor, keep_BN: Tensor | None) -> Tensor:
    """`run` on each sequence alone, (1, n, C) -> (1, n, C), as if its padding were not there; 0 for padding."""
    if keep_BN is None:
        return torch.cat([run(x_1NC) for x_1NC in x_BNC.split(1)])
    y_BNC = torch.zeros_like(x_BNC)
    for b, keep_N in enumerate(keep_BN):
        if keep_N.any():
            y_BNC[b, keep_N] = run(x_BNC[b : b + 1, keep_N])[0]
    return y_BNC


def short_convolution(
    x_BNC: Tensor, w_LC: Tensor, tail_BLC: Tensor, keep_BN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The weighted sum of each token and the L - 1 real ones before it: padding between them is skipped.

    Args:
        x_BNC: tokens.
        w_LC: a weight for each channel at each lag.
        tail_BLC: the last L - 1 real tokens before these, zeros for those that there are not.
        keep_BN: False where there is no token.

    Returns:
        (B, N, C), 0 for padding, and the tail behind the last token.
    """
    before, tokens = tail_BLC.shape[1], x_BNC.shape[1]
    if keep_BN is None:
        rows = torch.cat([tail_BLC, x_BNC], 1)
        return lagged_sum(rows, w_LC, tokens), rows[:, tokens:]
    # Moved to the end in their order, real tokens have nothing but the tail and then padding before them.
    rows = torch.cat([tail_BLC, x_BNC.masked_fill(~keep_BN.unsqueeze(-1), 0)], 1)
    real = torch.cat([keep_BN.new_ones(keep_BN.shape[0], before), keep_BN], 1)
    order = real.int().argsort(dim=1, stable=True)
    rows = _take(rows, order)
    place = (order.argsort(dim=1)[:, before:] - before).clamp(min=0)
    y = _take(lagged_sum(rows, w_LC, tokens), place)
    return y.masked_fill(~keep_BN.unsqueeze(-1), 0), rows[:, tokens:]


def _take(x_BNC: Tensor, place_BN: Tensor) -> Tensor:
    return x_BNC.gather(1, place_BN.unsqueeze(-1).expand(-1, -1, x_BNC.shape[2]))
