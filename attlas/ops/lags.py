"""Sums over the past with a weight for each lag: o_n = Σ_{i<L} w_i x_{n−i}.

B batch, N outputs, M tokens, C and D channels, L lags.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.ops.dispatch import Backend, Op
from attlas.ops.precision import wide

FFT_FROM = 64
"""Lags from which transforms are faster than products on a CPU."""


def _oracle(x_BMC: Tensor, w: Tensor, last: int) -> Tensor:
    """The weighted sum of each of the last tokens and those before it. Before the first token there are zeros.

    Args:
        x_BMC: tokens.
        w: a weight for each channel at each lag (L, C), or a matrix x W_i for each lag (L, C, D).
        last: how many outputs.

    Returns:
        (B, last, C or D).
    """
    rows = []
    for n in range(x_BMC.shape[1] - last, x_BMC.shape[1]):
        terms = (x_BMC[:, n - i] * w[i] if w.ndim == 2 else x_BMC[:, n - i] @ w[i] for i in range(min(n + 1, len(w))))
        rows.append(sum(terms, x_BMC.new_zeros(())))
    return torch.stack(rows, 1)


def _torch(x_BMC: Tensor, w: Tensor, last: int) -> Tensor:
    """A convolution with the kernel turned round; the step of a stream is its one sum."""
    w = w[: x_BMC.shape[1]]
    if last == 1 and w.ndim == 2 and 1 < len(w) == x_BMC.shape[1]:
        return (x_BMC * w.flip(0)).sum(1, keepdim=True)
    kernel = w.flip(0).permute(*range(w.ndim - 1, 0, -1), 0)  # (C, L) or (D, C, L)
    groups = 1 if w.ndim == 3 else x_BMC.shape[2]
    if w.ndim == 2:
        kernel = kernel.unsqueeze(1)
    x = F.pad(x_BMC, (0, 0, len(w) - 1 - (x_BMC.shape[1] - last), 0))  # a negative pad cuts off what nobody reads
    return F.conv1d(x.transpose(1, 2), kernel, groups=groups).transpose(1, 2)


def _fft(x_BMC: Tensor, w_LC: Tensor, last: int) -> Tensor:
    """A product of transforms, along an axis that lies together in memory and is a power of two long."""
    tokens = x_BMC.shape[1]
    x_BCM, w_CL = (wide(t).transpose(-1, -2).contiguous() for t in (x_BMC, w_LC[:tokens]))
    size = 1 << (tokens + w_CL.shape[1] - 2).bit_length()
    product = torch.fft.rfft(x_BCM, size) * torch.fft.rfft(w_CL, size)
    return torch.fft.irfft(product, size)[..., tokens - last : tokens].transpose(-1, -2).to(x_BMC.dtype)


def _fft_refuses(x_BMC: Tensor, w: Tensor, last: int) -> str | None:
    if w.ndim == 3:
        return "a matrix for each lag has no transform that pays"
    if min(last, len(w)) < FFT_FROM:
        return f"sums of fewer than {FFT_FROM} lags are faster one by one"
    return None


lagged_sum = Op("lagged_sum", Backend("fft", _fft, _fft_refuses), Backend("torch", _torch), Backend("oracle", _oracle))


class LagState(NamedTuple):
    """The rows of the last L - 1 tokens (B, L - 1, C), zeros before the first, and how many tokens there were."""

    rows: Tensor
    tokens: int


class LaggedMixer(Mixer):
    """What mixers share that learn a weight for each lag: the sum, its length, its state.

        y_n = finish(Σ_{i<L} T_i x_{n−i} + b, x_n)

    Subclasses make `weight` and write `finish`, `term` and, where T_i is not `weight` alone, `rows`.

    Args:
        site: where it is installed; its length is L.
        backend: of `lagged_sum`.
        bias: of the sum.
    """

    weight: nn.Parameter

    def __init__(self, site: Site, backend: str = "auto", *, bias: bool = True) -> None:
        super().__init__(site, backend)
        if site.length is None or site.length < 1:
            raise BadInput(f"{self.spec.name} learns a weight for each lag: pass length=, the longest context")
        self.lags = site.length
        self.bias = nn.Parameter(torch.zeros(site.dim)) if bias else None

    def rows(self, x_BNC: Tensor) -> Tensor:
        """Hook: what is summed."""
        return x_BNC

    @abstractmethod
    def finish(self, sum_BNC: Tensor, x_BNC: Tensor) -> Tensor:
        """Hook: the output of the sum and of the tokens that ask."""

    @abstractmethod
    def term(self, x_C: Tensor, lag: int) -> Tensor:
        """Hook of the oracle: T_i x, what a token adds to the sum of the one that stands `lag` places behind it."""

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """One sum over all tokens."""
        self._check_length(x_BNC.shape[1])
        return self._mix(self._real_rows(x_BNC, call.mask.keys), x_BNC)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Token by token, lag by lag."""
        batch, tokens, _ = x_BNC.shape
        self._check_length(tokens)
        real = x_BNC.new_ones(batch, tokens, dtype=torch.bool) if call.mask.keys is None else call.mask.keys
        y = []
        for b in range(batch):
            for n in range(tokens):
                sum_C = torch.zeros_like(x_BNC[b, n]) if self.bias is None else self.bias
                for lag in range(n + 1):
                    if real[b, n - lag]:
                        sum_C = sum_C + self.term(x_BNC[b, n - lag], lag)
                y.append(self.finish(sum_C, x_BNC[b, n]))
        return torch.stack(y).view(x_BNC.shape)

    def _mix(self, rows_BMC: Tensor, x_BNC: Tensor) -> Tensor:
        total = lagged_sum(rows_BMC, self.weight, x_BNC.shape[1], backend=self.backend)
        return self.finish(total if self.bias is None else total + self.bias, x_BNC)

    def _real_rows(self, x_BNC: Tensor, keep: Tensor | None) -> Tensor:
        return self.rows(x_BNC if keep is None else x_BNC.where(keep.unsqueeze(-1), 0))

    def _check_length(self, tokens: int) -> None:
        if tokens > self.lags:
            raise BadInput(
                f"{self.spec.name} has weights for a context of {self.lags} tokens, the sequence reaches {tokens}; "
                f"build it with length={tokens} or more"
            )

    def count(self, sizes: Sizes) -> Cost:
        """The lags that there are, and the projections; a convolution multiplies with the zeros before them too."""
        tokens, channels = sizes.queries, self.weight[0].numel()
        area = Mask(causal=True).area(tokens, tokens, sizes.batch)
        layers = (m for m in self.modules() if isinstance(m, nn.Linear))
        projections = 2 * sizes.batch * tokens * sum(layer.weight.numel() for layer in layers)
        made = 2 * sizes.batch * tokens * tokens * channels
        return Cost(2 * area * channels + projections, made + projections, area)

    def start(self, batch: int, like: Tensor) -> LagState:
        """No token yet."""
        return LagState(like.new_zeros(batch, self.lags - 1, self.site.dim), 0)

    def advance(self, x_BNC: Tensor, state: LagState, keep: Tensor | None) -> tuple[Tensor, LagState]:
        """The sum over the rows that are kept and those of the segment."""
        tokens = state.tokens + x_BNC.shape[1]
        self._check_length(tokens)
        rows = torch.cat([state.rows, self._real_rows(x_BNC, keep)], 1)
        return self._mix(rows, x_BNC), LagState(rows[:, rows.shape[1] - (self.lags - 1) :], tokens)
