"""Norm-aware linear attention: what the attentions share whose weights sharpen as the norm of the query grows.

    o_n = Σ_m w°_nm v_m / (Σ_m w_nm + ε),    w_nm = Σ_i |d(q_n)_i|^{p(‖q_n‖)} |k_mi|^κ s(d(q_n)_i, d(k_m)_i)

with the direction d(x) = x / ‖x‖ and p(x) = λ (τ + tanh x). How signs agree, s, is a sum of two products f(a) f(b)
+ g(a) g(b); so w is a product of 2 D features of the query and 2 D of the key. w° is w after both have been turned by
their places on the grid (`attlas.ops.rotary.rotate_axes`), which the denominator must not be: it could get below 0.

B batch, H heads, N queries, M keys, D head size, E value size, R axes of the grid.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.ops.grid_conv import convolution_flops, convolve_values, value_convolution
from attlas.ops.linear import feature_product, product_flops
from attlas.ops.precision import wide
from attlas.ops.rotary import relative_turn, rotate_axes
from attlas.ops.softmax import blank_padding

EPS = 1e-6
SMALLEST_NORM = 1e-12


class NormAwareState(NamedTuple):
    """Sums over the keys so far, and how many tokens there were.

    Attributes:
        sums: of turned features and values, (B, H, 2 D, E).
        keys: of features that are not turned, (B, H, 2 D).
        tokens: real or not, which is where the next one stands.
    """

    sums: Tensor
    keys: Tensor
    tokens: int


class NormAwareAttend(Attend):
    """The sums, their stream, places and the convolution of the values. Subclasses write `halves` and `agreement`.

    Args:
        site: where it is installed; the convolution needs the axes of its grid.
        backend: of `feature_product` and `grid_convolution`.
        power: λ, of the query's exponent.
        offset: τ, of the query's exponent.
        key_power: κ, the key's exponent.
        kernel: taps of the depthwise convolution of the values (LePE) on each axis, odd; 0 for none. Only
            noncausal self-attention has it.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        power: float = 3.0,
        offset: float = 0.5,
        key_power: float = 3.0,
        kernel: int = 5,
    ) -> None:
        super().__init__(site, backend)
        if not (power > 0 and offset > 0 and power * offset >= 1):
            raise BadInput(
                "the query's exponent is power * (offset + tanh): both above 0 and their product at least 1, below "
                f"which its slope at 0 is infinite, got power={power}, offset={offset}"
            )
        if not key_power >= 1:
            raise BadInput(f"key_power is at least 1, below which its slope at 0 is infinite, got {key_power}")
        self.power, self.offset, self.key_power = power, offset, key_power
        self.kernel = 0 if site.causal else kernel
        self.lepe = value_convolution(site, self.kernel, self.spec.name)

    @abstractmethod
    def halves(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Hook: f and g of a direction."""

    @abstractmethod
    def agreement(self, query: Tensor, key: Tensor) -> Tensor:
        """Hook of the oracle: s of two directions."""

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Features, and their sums over the keys."""
        places = self._places(q_BHND, k_BHMD, call)
        q, k, v = self._features(q_BHND, k_BHMD, v_BHME, call.mask.keys)
        if call.mask.causal:
            return self._causal(q, k, v, None)[0].to(q_BHND.dtype)
        count = k.shape[2] if call.mask.keys is None else call.mask.keys.sum(1)[:, None, None, None].clamp(min=1)
        total = (q * (k.sum(2, keepdim=True) / count)).sum(-1, keepdim=True) + EPS
        if places is not None:
            q, k = _turn(q, places), _turn(k, places)
        o = (feature_product(q, k, v / count, backend=self.backend)[0] / total).to(q_BHND.dtype)
        if self.lepe is None or call.cross:
            return o
        return o + convolve_values(self.lepe, v_BHME, call.grid, call.mask.keys, self.backend)

    def _places(self, q: Tensor, k: Tensor, call: Call) -> Tensor | None:
        """Where the tokens of noncausal self-attention stand, (N, R); prefix tokens stand at 0."""
        if call.cross:
            return None
        grid = call.grid
        if call.mask.causal:
            if grid.rank != 1:
                raise BadInput(
                    f"causal {self.spec.name} runs along one axis, got a {grid}: build and call it without grid="
                )
            return None
        if q.shape[2] != k.shape[2]:
            raise BadInput(
                f"{self.spec.name} lays queries and keys on one grid, got {q.shape[2]} queries and {k.shape[2]} "
                "keys; keys of another sequence need cross=True"
            )
        return F.pad(grid.places(q.device), (0, 0, grid.prefix, 0))

    def _exponent(self, norm: Tensor) -> Tensor:
        return self.power * (self.offset + norm.tanh())

    def _features(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """2 D features of queries and of keys, and the values; 0 where there is padding."""
        q = wide(q)
        k, v = blank_padding(keep, wide(k), wide(v))
        norm, k_norm = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (q, k))
        direction, k_direction = q / norm.clamp(min=SMALLEST_NORM), k / k_norm.clamp(min=SMALLEST_NORM)
        reach, k_reach = direction.abs() ** self._exponent(norm), k.abs() ** self.key_power
        q, k = (
            torch.cat([size * half for half in self.halves(towards)], -1)
            for size, towards in ((reach, direction), (k_reach, k_direction))
        )
        return q, k, v

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, state: NormAwareState | None) -> tuple[Tensor, NormAwareState]:
        queries, keys = q.shape[2], k.shape[2]
        start = 0 if state is None else state.tokens
        places = torch.arange(start + min(keys - queries, 0), start + keys, device=q.device).unsqueeze(1)
        running = k.cumsum(2) if state is None else k.cumsum(2) + state.keys.unsqueeze(2)
        # Queries are the last positions: a negative pad cuts off what the first keys add, a positive one adds zeros.
        total = (q * F.pad(running, (0, 0, queries - keys, 0))).sum(-1, keepdim=True) + EPS
        q, k = _turn(q, places[-queries:]), _turn(k, places[-keys:])
        before = None if state is None else state.sums
        o, sums = feature_product(q, k, v, before, causal=True, backend=self.backend)
        return o / total, NormAwareState(sums, running[:, :, -1], start + keys)

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Every pair's weight from its agreements, turned by the difference of the places."""
        places = self._places(q_BHND, k_BHMD, call)
        queries, keys = q_BHND.shape[2], k_BHMD.shape[2]
        q_norm, k_norm = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (q_BHND, k_BHMD))
        q_BHN1D = (q_BHND / q_norm.clamp(min=SMALLEST_NORM)).unsqueeze(3)
        k_BH1MD = (k_BHMD / k_norm.clamp(min=SMALLEST_NORM)).unsqueeze(2)
        q_reach = q_BHN1D.abs() ** self._exponent(q_norm).unsqueeze(3)
        k_reach = k_BHMD.abs().unsqueeze(2) ** self.key_power

        def agree(i: slice, j: slice) -> Tensor:
            """The terms of w (B, H, N, M, pairs) if features i of the queries met features j of the keys."""
            return q_reach[..., i] * k_reach[..., j] * self.agreement(q_BHN1D[..., i], k_BH1MD[..., j])

        even, odd = slice(0, None, 2), slice(1, None, 2)
        w_BHNM = agree(slice(None), slice(None)).sum(-1)
        turned_BHNM = w_BHNM
        if call.mask.causal:
            places = torch.arange(min(0, keys - queries), keys, device=q_BHND.device).unsqueeze(1)
        if places is not None:
            cos, sin = relative_turn(places[-queries:], places[-keys:], q_BHND.shape[-1])
            along, across = agree(even, even) + agree(odd, odd), agree(odd, even) - agree(even, odd)
            turned_BHNM = (along * cos.to(along) - across * sin.to(along)).sum(-1)
        seen = call.mask.pairs(queries, keys, q_BHND.device)
        if seen is not None:
            w_BHNM, turned_BHNM = w_BHNM.where(seen, 0), turned_BHNM.where(seen, 0)
        count: Tensor | int = 1
        if not call.mask.causal:
            count = keys if seen is None else seen.sum(-1, keepdim=True).clamp(min=1)
        o = turned_BHNM @ v_BHME / count / (w_BHNM.sum(-1, keepdim=True) / count + EPS)
        if self.lepe is None or call.cross:
            return o
        return o + convolve_values(self.lepe, v_BHME, call.grid, call.mask.keys, "oracle")

    def count(self, sizes: Sizes) -> Cost:
        """Products of 2 D features with values, and the taps that fall on the grid; torch multiplies the rest too."""
        heads, size = self.site.heads, self.site.head_dim
        causal = self.site.causal and not sizes.cross
        needed, made = product_flops(sizes.queries, sizes.keys, 2 * size, size, causal)
        if self.lepe is not None and not sizes.cross:
            on_grid, multiplied = convolution_flops(sizes.grid, self.kernel)
            needed, made = needed + size * on_grid, made + size * multiplied
        copies = sizes.batch * heads
        pairs = Mask(causal=causal).area(sizes.queries, sizes.keys, sizes.batch, heads)
        return Cost(copies * needed, copies * made, pairs)

    def initial_state(self, batch: int, like: Tensor) -> NormAwareState:
        """Empty sums."""
        heads, size = self.site.heads, self.site.head_dim
        sums = wide(like.new_zeros(batch, heads, 2 * size, size))
        return NormAwareState(sums, sums.new_zeros(batch, heads, 2 * size), 0)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: NormAwareState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, NormAwareState]:
        """The causal form, from the sums before the segment."""
        o, state = self._causal(*self._features(q, k, v, keep), state)
        return o.to(q.dtype), state


def _turn(x_BHNF: Tensor, places_NR: Tensor) -> Tensor:
    """Both halves of the features, by the same angles."""
    return torch.cat([rotate_axes(half, places_NR) for half in x_BHNF.chunk(2, -1)], -1)
