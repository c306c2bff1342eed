"""What layers share whose queries and keys are made of another sequence than the values.

    o = softmax(W_q s (W_k s)ᵀ / √D) W_v x,    s the source

B batch, S batch of the source (1 where one serves all), N tokens, M tokens so far, L tokens of a probe, C channels,
H heads, D head size.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.state import Rows
from attlas.ops.pairs import dense_mask
from attlas.ops.softmax import attention_weights, blank_padding


class MapState(NamedTuple):
    """Keys (S, H, M, D) and values (B, H, M, D) so far, and which tokens are real (B, 1, M)."""

    k: Rows
    v: Rows
    keep: Rows


class Rotates(Protocol):
    """A position that turns queries and keys (B, H, N, D), the first of which stands at `start`."""

    def rotate(self, x_BHND: Tensor, start: int) -> Tensor: ...  # noqa: D102


class ProbedMixer(Mixer):
    """Attention whose map is made of a source and whose values are made of x.

    Args:
        site: where it is installed; heads divide dim.
        backend: `auto`, `torch` or `oracle`.
        bias: of the query, key and value projections.
        out_bias: of the output projection.
        position: turns queries and keys, such as `attlas.positions.Rotary`.

    Attributes:
        level: the source (S, L, C) that a model hands over, what the probe has become before this layer; None
            for a layer on its own, which then has its `source`.
    """

    shared: ClassVar[bool]
    """Whether one source, and so one map, serves all sequences."""
    level: Tensor | None

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        bias: bool = True,
        out_bias: bool = True,
        position: Rotates | None = None,
    ) -> None:
        super().__init__(site, backend)
        if site.dim % site.heads:
            raise BadInput(f"heads must divide dim: {site.dim} channels do not split into {site.heads} heads")
        self.size = site.dim // site.heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(site.dim, site.dim, bias) for _ in range(3))
        self.out_proj = nn.Linear(site.dim, site.dim, out_bias)
        self.position = position
        self.level = None

    @abstractmethod
    def source(self, x_BNC: Tensor, start: int) -> Tensor:
        """Hook: the source (S, N, C) where the tokens are, the first of which stands at position `start`."""

    def _split(self, x: Tensor, proj: nn.Linear) -> Tensor:
        return proj(x).unflatten(-1, (self.site.heads, self.size)).transpose(1, 2)

    def _queries(self, x_BNC: Tensor, start: int) -> tuple[Tensor, Tensor]:
        source_SNC = self.source(x_BNC, start).to(x_BNC.dtype)
        q, k = self._split(source_SNC, self.q_proj), self._split(source_SNC, self.k_proj)
        if self.position is not None:
            q, k = self.position.rotate(q, start), self.position.rotate(k, start)
        return q, k

    def map(self, x_BNC: Tensor, mask: Mask | None = None) -> Tensor:
        """The weights (S or B, H, N, N) over the tokens of x; S is 1 where they are the same for all inputs."""
        if mask is None:
            mask = Mask(causal=self.site.causal)
        return attention_weights(*self._queries(x_BNC, 0), mask)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """The map, once for all sequences where it can be, times the values."""
        return self._merge(self.map(x_BNC, call.mask), self._values(x_BNC, call.mask.keys))

    def _values(self, x_BNC: Tensor, keep: Tensor | None) -> Tensor:
        v = self._split(x_BNC, self.v_proj)
        return blank_padding(keep, v)[0]

    def _merge(self, weights: Tensor, v_BHME: Tensor) -> Tensor:
        return self.out_proj((weights.to(v_BHME.dtype) @ v_BHME).transpose(1, 2).flatten(2))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Sequence by sequence, head by head, query by query over the keys that it sees."""
        batch, tokens, _ = x_BNC.shape
        q, k = (t.expand(batch, -1, -1, -1) for t in self._queries(x_BNC, 0))
        v = self._split(x_BNC, self.v_proj)
        seen, bias = dense_mask(call.mask, (batch, self.site.heads, tokens, tokens), x_BNC)
        o = torch.zeros_like(v)
        for b in range(batch):
            for h in range(self.site.heads):
                for n in range(tokens):
                    m = seen[b, h, n]
                    powers = (k[b, h, m] @ q[b, h, n] / self.size**0.5 + bias[b, h, n, m]).exp()
                    o[b, h, n] = (powers / powers.sum()) @ v[b, h, m]
        return self.out_proj(o.transpose(1, 2).flatten(2))

    def count(self, sizes: Sizes) -> Cost:
        """Two projections of source and tokens each, the scores of every map, and the products with the values."""
        dim, tokens, batch = self.site.dim, sizes.queries, sizes.batch
        maps = 1 if self.shared else batch
        projections = 4 * tokens * dim * dim * (maps + batch)
        area = Mask(causal=self.site.causal).area(tokens, tokens)
        needed, made = (2 * (maps + batch) * dim * pairs for pairs in (area, tokens * tokens))
        return Cost(projections + needed, projections + made, area * batch * self.site.heads)

    def start(self, batch: int, like: Tensor) -> MapState:
        """An empty cache."""
        k, v = (like.new_empty(n, self.site.heads, 0, self.size) for n in (1 if self.shared else batch, batch))
        return MapState(Rows(k), Rows(v), Rows(like.new_empty(batch, 1, 0, dtype=torch.bool)))

    def advance(self, x_BNC: Tensor, state: MapState, keep: Tensor | None) -> tuple[Tensor, MapState]:
        """The rows of the map that belong to the segment."""
        q, k = self._queries(x_BNC, state.v.rows.shape[2])
        real = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool) if keep is None else keep
        v = self._values(x_BNC, keep)
        state = MapState(state.k.append(k), state.v.append(v), state.keep.append(real.unsqueeze(1)))
        mask = Mask(causal=True, keys=state.keep.rows[:, 0])
        return self._merge(attention_weights(q, state.k.rows, mask), state.v.rows), state


class StoredMap(ProbedMixer):
    """One source for all inputs: what the model makes of a probe, or the probe itself in a layer on its own."""

    shared = True
    probe: Tensor

    def source(self, x_BNC: Tensor, start: int) -> Tensor:
        """The rows of the source at the positions of the tokens."""
        source_1LC = self.probe if self.level is None else self.level
        end = start + x_BNC.shape[1]
        if end > source_1LC.shape[1]:
            raise BadInput(
                f"{self.spec.name} has an attention map of {source_1LC.shape[1]} positions, the sequence reaches "
                f"{end}; give a longer probe"
            )
        return source_1LC[:, start:end]
