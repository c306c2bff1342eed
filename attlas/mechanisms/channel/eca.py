"""Efficient channel attention (ECA): every channel is weighed by its mean and the means of its neighbours in order.

    m = (1/N) Σ_n x_n,    g = sigmoid(w * m),    y_n = x_n ⊙ g

* is a convolution along the channels, with k taps shared by all of them and zeros beyond both ends: k weights in all,
no bias. For C channels k is the odd number at or above ⌊(log₂ C + b) / γ⌋. So no token sees another but through the
means, and a channel's gate depends on those at most (k - 1) / 2 away alone. `circular` lets the last channel be a
neighbour of the first.

x, y (B, N, C), m and g (B, C). Tokens have no position here, prefix tokens are tokens like others, and padding enters
no mean. A causal layer, our extension, has a mean of what came so far for every token; its state is a sum and a count.

Time O(N C + k C), causal O(N k C).

Source: Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", 2019
(arXiv:1910.03151), official code BangguWu/ECANet, whose checkpoints have kernels chosen by stage instead of the rule.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.precision import wide

SPEC = Spec(
    name="eca",
    title="ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
    year=2019,
    paper="arXiv:1910.03151",
    equation="y = x ⊙ sigmoid(conv_k(mean x))",
    complexity="O(N C) time, O(C) state",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF}),
    streams=True,
    examples=(
        Example(parameters=3),
        Example(grid=(3, 4), prefix=1, params={"kernel": 5, "circular": True}, parameters=5),
    ),
)


def adaptive_kernel(dim: int, gamma: float = 2.0, beta: float = 1.0) -> int:
    """The odd number of neighbours that the paper gives to so many channels: 3 for 64, 5 for 128 to 1024."""
    taps = int(abs((math.log2(dim) + beta) / gamma))
    return taps if taps % 2 else taps + 1


class EcaState(NamedTuple):
    """The sum of all tokens so far (B, 1, C), in float32 or better, and how many they were (B, 1, 1)."""

    total: Tensor
    tokens: Tensor


@register(SPEC)
class ECA(Mixer):
    """Efficient channel attention.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        kernel: k, odd; by the paper's rule from the number of channels where it is None.
        gamma, beta: γ and b of the rule.
        circular: whether the channels lie in a ring.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        kernel: int | None = None,
        gamma: float = 2.0,
        beta: float = 1.0,
        circular: bool = False,
    ) -> None:
        super().__init__(site, backend)
        if gamma <= 0:
            raise BadInput(f"gamma divides the logarithm of the channels and is positive, got {gamma}")
        self.kernel = kernel = adaptive_kernel(site.dim, gamma, beta) if kernel is None else kernel
        if kernel < 1 or kernel % 2 == 0:
            raise BadInput(f"kernel counts a channel and its neighbours on both sides, so it is odd, got {kernel}")
        if circular and kernel // 2 > site.dim:
            raise BadInput(
                f"a kernel of {kernel} goes around the ring of {site.dim} channels twice: take a smaller one"
            )
        self.circular = circular
        self.conv = nn.Conv1d(1, 1, kernel, bias=False)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """The mean, its convolution, a product."""
        if self.site.causal:
            return self.advance(x_BNC, self.start(len(x_BNC), x_BNC), call.mask.keys)[0]
        real_BN1 = self._real(x_BNC, call.mask.keys)
        count_B11 = real_BN1.expand(*x_BNC.shape[:2], 1).sum(1, keepdim=True).clamp(min=1)
        mean_B1C = wide(x_BNC).where(real_BN1, 0).sum(1, keepdim=True) / count_B11
        return x_BNC * self._gate(mean_B1C.to(x_BNC.dtype))

    def _real(self, x_BNC: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            return x_BNC.new_ones(1, x_BNC.shape[1], 1, dtype=torch.bool)
        return keep.unsqueeze(-1)

    def _gate(self, mean_BMC: Tensor) -> Tensor:
        """Factors of the channels, for each mean."""
        reach, mode = self.kernel // 2, "circular" if self.circular else "constant"
        line = F.pad(mean_BMC.flatten(0, 1).unsqueeze(1), (reach, reach), mode)
        return self.conv(line).view_as(mean_BMC).sigmoid()

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """The convolution as a banded matrix of channels by channels, the means as a matrix of tokens by tokens."""
        tokens, dim, reach = x_BNC.shape[1], self.site.dim, self.kernel // 2
        keep = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool) if call.mask.keys is None else call.mask.keys
        seen_BNM = keep.unsqueeze(1).expand(-1, tokens, -1).to(x_BNC)
        if self.site.causal:
            seen_BNM = seen_BNM.tril()
        means = seen_BNM @ x_BNC.where(keep.unsqueeze(-1), 0) / seen_BNM.sum(-1, keepdim=True).clamp(min=1)
        band = x_BNC.new_zeros(dim, dim)
        for tap, weight in enumerate(self.conv.weight.flatten()):
            shift = tap - reach
            rows = torch.arange(dim) if self.circular else torch.arange(max(0, -shift), max(0, min(dim, dim - shift)))
            band = band.index_put((rows, (rows + shift) % dim), weight.expand(len(rows)), accumulate=True)
        return x_BNC / (1 + (-means @ band.T).exp())

    def count(self, sizes: Sizes) -> Cost:
        """The taps on the channels, once for each mean; the torch backend also multiplies the zeros beyond the ends."""
        dim, reach = self.site.dim, self.kernel // 2
        means = sizes.batch * (sizes.queries if self.site.causal else 1)
        inside = sum(min(c + reach, dim - 1) - max(c - reach, 0) + 1 for c in range(dim))
        executed = 2 * means * dim * self.kernel
        return Cost(executed if self.circular else 2 * means * inside, executed)

    def start(self, batch: int, like: Tensor) -> EcaState:
        """No token yet."""
        return EcaState(wide(like.new_zeros(batch, 1, self.site.dim)), like.new_zeros(batch, 1, 1, dtype=torch.int64))

    def advance(self, x_BNC: Tensor, state: EcaState, keep: Tensor | None) -> tuple[Tensor, EcaState]:
        """Every token by the mean up to it."""
        real_BN1 = self._real(x_BNC, keep)
        totals = state.total + wide(x_BNC).where(real_BN1, 0).cumsum(1)
        counts = state.tokens + real_BN1.cumsum(1)
        means = (totals / counts.clamp(min=1)).to(x_BNC.dtype)
        return x_BNC * self._gate(means), EcaState(totals[:, -1:].clone(), counts[:, -1:].clone())
