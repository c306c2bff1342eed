"""The two forms of a mechanism: `Attend` (q, k, v) -> o, and `Mixer` x -> y.

B batch, N queries, M keys, C channels, H query heads, G key/value heads, D head size, E value size.

A mechanism's file subclasses one of the two and writes the hooks: `compute`, `oracle`, `count`, and
`initial_state` with `advance` where it streams. The base class does every check, so that a hook only
ever sees input that has a meaning for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attlas.core import registry
from attlas.core.errors import BadInput, Unsupported
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.spec import Pattern, Spec, Takes
from attlas.core.state import KVCache, check_keep

SHOWN = 8
"""How many mechanisms an error names; with all of them it would not be read."""


@dataclass(frozen=True)
class Site:
    """The place in a model where a mechanism is installed.

    Attributes:
        dim: channels of the tokens.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: features of a query and of a key, per head.
        causal: whether a position may depend on later ones.
        length: the (largest) number of tokens it is trained on, where that is known.
        grid: the grid it is trained on, where that is known.
        layer, layers: which layer of how many, for mechanisms that differ along the depth.
    """

    dim: int
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 0
    causal: bool = False
    length: int | None = None
    grid: Grid | None = None
    layer: int = 0
    layers: int = 1


@dataclass(frozen=True)
class Call:
    """What comes with the tensors of one call, checked.

    Attributes:
        mask: what may be seen; its `causal` is set for a causal mechanism.
        grid: how the queries lie.
        cross: whether keys and values come from another sequence.
        tokens: the tokens that the queries were made of (B, N, C), where there are any.
    """

    mask: Mask
    grid: Grid
    cross: bool = False
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call, for counting."""

    batch: int
    queries: int
    keys: int
    grid: Grid
    cross: bool = False


@dataclass(frozen=True)
class Cost:
    """What one forward pass takes; FLOP = 2 MAC.

    Attributes:
        flops: what the mathematics needs: only visible pairs, only useful products.
        executed: what the torch backend multiplies in matrix products and convolutions, as
            `torch.utils.flop_counter.FlopCounterMode` counts it.
        pairs: visible (query, key) pairs over batch and heads; 0 where there are none.
    """

    flops: int
    executed: int
    pairs: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.executed + other.executed, self.pairs + other.pairs)


class Mechanism(nn.Module, ABC):
    """What both forms share."""

    spec: ClassVar[Spec]
    site: Site
    backend: str
    auxiliary: Tensor | None
    """The auxiliary loss of the last training forward, its coefficient included; see `auxiliary_loss`."""

    def __init__(self, site: Site, backend: str = "auto") -> None:
        super().__init__()
        self.site = site
        self.backend = backend
        self.auxiliary = None
        causal = {pattern for pattern in self.spec.patterns if pattern.startswith("causal")}
        if site.causal and not causal:
            raise self._unsupported("causal use", pattern=Pattern.CAUSAL_SELF)
        if not site.causal and causal == self.spec.patterns:
            raise self._unsupported("noncausal use (build it with causal=True)", pattern=Pattern.NONCAUSAL_SELF)

    def __getstate__(self) -> dict[str, Any]:
        # The last auxiliary loss hangs in an autograd graph, which can be neither copied nor pickled.
        return self.__dict__ | {"auxiliary": None}

    def _unsupported(self, what: str, **filters: Any) -> Unsupported:
        able = registry.mechanisms(**filters)
        named = ", ".join(able[:SHOWN]) or "none yet"
        if len(able) > SHOWN:
            plain = {key: str(value) if isinstance(value, str) else value for key, value in filters.items()}
            asked = ", ".join(f"{key}={value!r}" for key, value in plain.items())
            named += f" and {len(able) - SHOWN} more: attlas.mechanisms({asked})"
        spec = self.spec
        return Unsupported(
            f"{spec.name} does not serve {what}. It serves: {', '.join(sorted(spec.patterns))}; grids of "
            f"{' or '.join(map(str, spec.grids))} axes; masks: "
            f"{', '.join(sorted(spec.masks)) or 'none'}. Mechanisms that do: {named}"
        )

    def _check(
        self, batch: int, queries: int, keys: int, cross: bool, mask: Mask | Tensor | None, grid: Any
    ) -> tuple[Mask, Grid]:
        spec = self.spec
        pattern = Pattern.of(self.site.causal, cross)
        if pattern not in spec.patterns:
            raise self._unsupported(f"{pattern} attention", pattern=pattern)
        mask = Mask.of(mask)
        if mask.causal and not self.site.causal and Takes.PAIRS not in spec.masks:
            raise BadInput(f"a causal mask needs a causal layer: build {spec.name} with causal=True")
        for given, takes in ((mask.keys, Takes.PADDING), (mask.rule, Takes.PAIRS), (mask.bias, Takes.BIAS)):
            if given is not None and takes not in spec.masks:
                raise self._unsupported(f"a mask with {takes}", mask=takes)
        for name, keep, tokens in (("key", mask.keys, keys), ("query", mask.queries, queries)):
            if keep is not None and keep.shape != (batch, tokens):
                raise BadInput(f"the {name} padding mask is {tuple(keep.shape)}, expected ({batch}, {tokens})")
        if self.site.causal and not cross:
            mask = mask.with_(causal=True)
        if not cross and mask.queries is None and mask.keys is not None and queries <= keys:
            mask = mask.with_(queries=mask.keys[:, keys - queries :])
        grid = self._default_grid() if grid is None else grid
        if grid is None and 1 not in spec.grids:
            raise BadInput(f"{spec.name} needs to know how tokens lie: pass grid=(height, width)")
        grid = Grid.of(grid, queries)
        if grid.rank not in spec.grids:
            raise self._unsupported(f"a {grid}", grid=grid.rank)
        if grid.prefix and not spec.prefix:
            raise Unsupported(f"{spec.name} takes no prefix tokens, got a {grid}")
        return mask, grid

    def _default_grid(self) -> Grid | None:
        """The site's grid; a plain sequence may have any length."""
        grid = self.site.grid
        return None if grid is None or (grid.rank == 1 and not grid.prefix) else grid

    def cost(
        self,
        batch: int,
        queries: int,
        keys: int | None = None,
        grid: Grid | Sequence[int] | None = None,
    ) -> Cost:
        """FLOPs and pairs of one forward at these sizes; `keys` only for cross-attention."""
        cross = keys is not None
        grid = Grid.of(self._default_grid() if grid is None else grid, queries)
        if grid.rank not in self.spec.grids:
            raise self._unsupported(f"a {grid}", grid=grid.rank)
        return self.count(Sizes(batch, queries, queries if keys is None else keys, grid, cross))

    @abstractmethod
    def count(self, sizes: Sizes) -> Cost:
        """Hook: the cost formula."""

    def _streaming(self) -> None:
        if not self.spec.streams:
            raise self._unsupported("streaming: it carries no state", streams=True)
        if not self.site.causal:
            raise BadInput(f"only a causal layer streams: build {self.spec.name} with causal=True")

    def extra_repr(self) -> str:
        """The name and pattern in `print(module)`."""
        return f"{self.spec.name}, {'causal' if self.site.causal else 'noncausal'}"


class Attend(Mechanism):
    """A mechanism of the form (q, k, v) -> o.

    Subclasses write `compute` and `oracle` with the same signature, `count`, and where they stream
    `initial_state` and `advance`.
    """

    def forward(
        self,
        q_BHND: Tensor,
        k_BGMD: Tensor,
        v_BGME: Tensor,
        *,
        mask: Mask | Tensor | None = None,
        grid: Grid | Sequence[int] | None = None,
        cross: bool = False,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Attend: (B, H, N, D), (B, G, M, D), (B, G, M, E) -> (B, H, N, E).

        Args:
            q_BHND, k_BGMD, v_BGME: queries, keys and values.
            mask: a `Mask`, or a tensor that `Mask.of` understands.
            grid: how the queries lie; None is one axis.
            cross: keys come from another sequence.
            tokens: (B, N, C), for mechanisms that look at the tokens themselves.

        Raises:
            BadInput: shapes that do not fit.
            Unsupported: a pattern, mask or grid that the mechanism does not serve.
        """
        self._check_tensors(q_BHND, k_BGMD, v_BGME)
        mask, grid = self._check(q_BHND.shape[0], q_BHND.shape[2], k_BGMD.shape[2], cross, mask, grid)
        if self.auxiliary is not None:
            self.auxiliary = None
        run = self.oracle if self.backend == "oracle" else self.compute
        return run(q_BHND, k_BGMD, v_BGME, Call(mask, grid, cross, tokens))

    def _check_tensors(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        if not q.ndim == k.ndim == v.ndim == 4:
            raise BadInput(f"q, k, v are (batch, heads, tokens, features), got {shapes}")
        if not (q.shape[0] == k.shape[0] == v.shape[0] and q.shape[3] == k.shape[3]):
            raise BadInput(f"q, k and v need one batch size, q and k one head size, got {shapes}")
        if k.shape[1:3] != v.shape[1:3]:
            raise BadInput(f"k and v need the same heads and tokens, got {shapes}")
        if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
            raise BadInput(f"query heads must be a multiple of key/value heads, got {shapes}")
        if k.shape[1] != q.shape[1] and not self.spec.grouped:
            raise BadInput(f"{self.spec.name} needs as many key/value heads as query heads, got {shapes}")
        if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
            raise BadInput(f"q, k, v need one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")

    @abstractmethod
    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Hook: the mechanism on its fast path."""

    @abstractmethod
    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Hook: the literal formula, slow, any dtype."""

    def initial_state(self, batch: int, like: Tensor) -> Any:
        """Hook: the state before the first token, in the dtype and on the device of `like`."""
        raise self._unsupported("streaming", streams=True)

    def extend(
        self,
        q_BHND: Tensor,
        k_BGMD: Tensor,
        v_BGME: Tensor,
        state: Any,
        *,
        keep: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """The outputs of a segment that follows `state`, and the state behind it.

        Any segmentation of a sequence gives what one full pass gives; a segment may be empty. `keep` (B, N) marks
        the real tokens of the segment.
        """
        self._streaming()
        self._check_tensors(q_BHND, k_BGMD, v_BGME)
        if v_BGME.shape[3] != self.site.head_dim:
            raise BadInput(
                f"the state was made for values of {self.site.head_dim} features, got {v_BGME.shape[3]}: build with "
                f"head_dim={v_BGME.shape[3]}, or pass all tokens at once"
            )
        keep = check_keep(keep, q_BHND.shape[0], q_BHND.shape[2])
        if not q_BHND.shape[2]:
            return q_BHND, state
        return self.advance(q_BHND, k_BGMD, v_BGME, state, keep, tokens)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Hook of `extend`."""
        raise self._unsupported("streaming", streams=True)


class CachedAttend(Attend):
    """An attend whose state is a cache of all keys and values so far; its `compute` then streams as it is."""

    def initial_state(self, batch: int, like: Tensor) -> KVCache:
        """An empty cache."""
        size = self.site.head_dim
        return KVCache.empty(batch, self.site.kv_heads, size, size, like)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: KVCache, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, KVCache]:
        """Attend to the cache and the segment itself."""
        state = state.append(k, v, keep)
        call = Call(Mask(causal=True, keys=state.keys, queries=keep), Grid((q.shape[2],)), tokens=tokens)
        return self.compute(q, state.k.rows, state.v.rows, call), state


class Mixer(Mechanism):
    """A mechanism of the form x -> y on tokens, (B, N, C) -> (B, N, C)."""

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        grid: Grid | Sequence[int] | None = None,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x_BNC: tokens (B, N, C).
            context_BMC: the other sequence of a cross pattern.
            mask: a `Mask`, or a tensor that `Mask.of` understands, such as bool (B, N) for padding.
            grid: the shape of the positions, as a tuple or a `Grid` with prefix tokens.

        Raises:
            BadInput: shapes that do not fit.
            Unsupported: a pattern, mask or grid that the mechanism does not serve.
        """
        self._check_tokens("x", x_BNC, self.site.dim)
        source = x_BNC if context_BMC is None else context_BMC
        if source.ndim != 3 or source.shape[0] != x_BNC.shape[0]:
            raise BadInput(
                f"context is (batch, tokens, channels) with x's batch of {x_BNC.shape[0]}, got {tuple(source.shape)}"
            )
        cross = context_BMC is not None
        mask, grid = self._check(x_BNC.shape[0], x_BNC.shape[1], source.shape[1], cross, mask, grid)
        if self.auxiliary is not None:
            self.auxiliary = None
        run = self.oracle if self.backend == "oracle" else self.compute
        return run(x_BNC, context_BMC, Call(mask, grid, cross, x_BNC))

    def _check_tokens(self, name: str, x: Tensor, dim: int) -> None:
        if x.ndim != 3 or x.shape[2] != dim:
            raise BadInput(f"{name} is (batch, tokens, {dim} channels), got {tuple(x.shape)}")

    @abstractmethod
    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Hook: the mechanism on its fast path."""

    @abstractmethod
    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Hook: the literal formula, slow, any dtype."""

    def initial_state(self, batch: int, like: Tensor | None = None) -> Any:
        """The state before the first token, for `batch` sequences.

        It takes dtype and device of `like`, by default of the layer's parameters.
        """
        self._streaming()
        if like is None:
            like = next(self.parameters(), torch.empty(0))
        return self.start(batch, like)

    def start(self, batch: int, like: Tensor) -> Any:
        """Hook of `initial_state`."""
        raise self._unsupported("streaming", streams=True)

    def extend(self, x_BNC: Tensor, state: Any, *, keep: Tensor | None = None) -> tuple[Tensor, Any]:
        """The outputs of a segment that follows `state`, and the state behind it.

        Any segmentation of a sequence gives what one full pass gives; a segment may be empty. `keep` (B, N) marks
        the real tokens of the segment.
        """
        self._streaming()
        self._check_tokens("x", x_BNC, self.site.dim)
        keep = check_keep(keep, x_BNC.shape[0], x_BNC.shape[1])
        return self.advance(x_BNC, state, keep) if x_BNC.shape[1] else (x_BNC, state)

    def advance(self, x_BNC: Tensor, state: Any, keep: Tensor | None) -> tuple[Tensor, Any]:
        """Hook of `extend`."""
        raise self._unsupported("streaming", streams=True)


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The sum of the auxiliary losses of the last training forward, coefficients included; 0 if none.

    Add it to the task's loss whatever the mechanisms are: `loss = task + auxiliary_loss(model)`.
    """
    losses = [m.auxiliary for m in model.modules() if isinstance(m, Mechanism) and m.auxiliary is not None]
    if losses:
        return torch.stack(losses).sum()
    return next(model.parameters(), torch.empty(0)).new_zeros(())
