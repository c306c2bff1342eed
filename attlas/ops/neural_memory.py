"""Neural memory: a small network whose weights are written by gradient descent while it reads the sequence.

B batch, H heads, N tokens, D head size, C tokens of a chunk, I and O inputs and outputs of a layer of the memory.

The memory M is a network without biases, M(z) = gelu(... gelu(z W_1) W_2 ...) W_L; one layer is a matrix. For each
token it is asked for the token's value under the token's key, and learns from the error:

    u_t = -theta_t grad_W |M_{t-1}(k_t) - v_t|^2
    S_t = eta_t S_{t-1} + u_t                       what surprised before goes on surprising
    M_t = (1 - alpha_t) M_{t-1} + S_t               and what was known is forgotten
    o_t = M_t(q_t)

In chunks all gradients are taken at the weights with which the chunk began; with chunks of one token that is the
recurrence itself. The gradient of a token with respect to a matrix has rank one, so that within a chunk no token's
weights are ever made: with G_tj the share of u_j that is left in M_t, z M_t = beta_t z M_0 + gamma_t z S_0 + sum_j G_tj
(z . a_j) d_j, where a_j goes into the layer and d_j is the error behind it.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.ops.dispatch import Backend, Op
from attlas.ops.linear_scan import linear_scan
from attlas.ops.precision import as_written, wide
from attlas.ops.recurrent import alone, short_convolution
from attlas.ops.softmax import blank_padding

Weights = tuple[Tensor, ...]
"""The matrices (B, H, I, O) of a memory, first layer first."""


class MemoryState(NamedTuple):
    """A memory between two tokens, in float32 at least.

    Attributes:
        anchor: the weights with which the chunk began, at which its gradients are taken.
        weights: the weights behind the last token.
        momentum: S behind the last token.
        filled: tokens of the chunk so far, padded ones included.
    """

    anchor: Weights
    weights: Weights
    momentum: Weights
    filled: int


def ask(z_BHND: Tensor, weights: Weights) -> Tensor:
    """What a memory with these weights answers, M(z)."""
    *hidden, last = weights
    for weight in hidden:
        z_BHND = F.gelu(z_BHND @ weight)
    return z_BHND @ last


def _oracle(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    step_BHN: Tensor,
    momentum_BHN: Tensor,
    forget_BHN: Tensor,
    state: MemoryState,
    keep_BN: Tensor | None = None,
    *,
    chunk: int = 1,
) -> tuple[Tensor, MemoryState]:
    """What the memory answers to every query behind its own token, token by token, with autograd's gradients.

    Args:
        q_BHND, k_BHND, v_BHND: queries, keys and values.
        step_BHN, momentum_BHN, forget_BHN: theta, eta and alpha.
        state: the memory before the first token.
        keep_BN: False where there is no token: nothing is learned, nothing is forgotten.
        chunk: tokens whose gradients are taken at the same weights.

    Returns:
        o (B, H, N, D), and the memory behind the last token.
    """
    q, k, v = blank_padding(keep_BN, *(wide(x) for x in (q_BHND, k_BHND, v_BHND)))
    anchor, weights, momentum, filled = state
    rows = []
    for t in range(q.shape[2]):
        key, value = k[:, :, t : t + 1], v[:, :, t : t + 1]

        def error(anchor: Weights, key: Tensor = key, value: Tensor = value) -> Tensor:
            return (ask(key, anchor) - value).square().sum()

        gradients = torch.func.grad(error)(anchor)
        step, carry, forget = (wide(rate)[:, :, t, None, None] for rate in (step_BHN, momentum_BHN, forget_BHN))
        after_S = [carry * s - step * gradient for s, gradient in zip(momentum, gradients, strict=True)]
        after_M = [(1 - forget) * w + s for w, s in zip(weights, after_S, strict=True)]
        if keep_BN is not None:
            keep = keep_BN[:, t, None, None, None]
            after_S = [torch.where(keep, new, old) for new, old in zip(after_S, momentum, strict=True)]
            after_M = [torch.where(keep, new, old) for new, old in zip(after_M, weights, strict=True)]
        weights, momentum = tuple(after_M), tuple(after_S)
        rows.append(ask(q[:, :, t : t + 1], weights))
        filled = (filled + 1) % chunk
        anchor = anchor if filled else weights
    return torch.cat(rows, 2).to(v_BHND.dtype), MemoryState(anchor, weights, momentum, filled)


def _torch(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    step_BHN: Tensor,
    momentum_BHN: Tensor,
    forget_BHN: Tensor,
    state: MemoryState,
    keep_BN: Tensor | None = None,
    *,
    chunk: int = 1,
) -> tuple[Tensor, MemoryState]:
    with as_written(q_BHND):  # rounded weights would not learn from small errors
        tokens = blank_padding(keep_BN, *(wide(x) for x in (q_BHND, k_BHND, v_BHND)))
        rates = [wide(x) for x in (step_BHN, momentum_BHN, forget_BHN)]
        rates.append(torch.ones_like(rates[0]))
        if keep_BN is not None:
            rates = [x.where(keep_BN.unsqueeze(1), idle) for x, idle in zip(rates, IDLE, strict=True)]
        rows = []
        for part in _parts(q_BHND.shape[2], state.filled, chunk):
            o, state = _run([x[:, :, part] for x in tokens], [x[:, :, part] for x in rates], state, chunk)
            rows.append(o)
        return torch.cat(rows, 2).to(v_BHND.dtype), state


IDLE = (0.0, 1.0, 0.0, 0.0)
"""Step, momentum, forgetting and the share of S that enters M, of a token that leaves the memory as it is."""


def _parts(tokens: int, filled: int, chunk: int) -> list[slice]:
    """The tokens that fill up the chunk that has begun, and those behind."""
    first = min(-filled % chunk, tokens)
    return [part for part in (slice(0, first), slice(first, tokens)) if part.start < part.stop]


def _run(tokens: list[Tensor], rates: list[Tensor], state: MemoryState, chunk: int) -> tuple[Tensor, MemoryState]:
    """Chunk by chunk, from the beginning of a chunk on or within one."""
    anchor, weights, momentum, filled = state
    count = tokens[0].shape[2]
    size = min(chunk, count)
    back = -count % size
    q, k, v = (F.pad(x, (0, 0, 0, back)).unflatten(2, (-1, size)) for x in tokens)
    step, carry, forget, learn = (
        F.pad(x, (0, back), value=idle).unflatten(2, (-1, size)) for x, idle in zip(rates, IDLE, strict=True)
    )
    shares = _Shares.of(step, carry, 1 - forget, learn)
    rows = []
    for n in range(q.shape[2]):
        inputs, errors = _surprise(k.select(2, n), v.select(2, n), anchor)
        o, weights, momentum = _chunk(q.select(2, n), inputs, errors, shares.at(n), weights, momentum)
        rows.append(o)
        filled += min(size, count - n * size)
        if filled == chunk:
            anchor, filled = weights, 0
    return torch.cat(rows, 2)[:, :, :count], MemoryState(anchor, weights, momentum, filled)


class _Shares(NamedTuple):
    """What is left, in M_t and in S_t for every t of a chunk, of what was there before and of each token's u.

    Attributes:
        old: of the weights in M_t, (..., C, 1).
        past: of the momentum in M_t, (..., C, 1).
        new: of u_j in M_t, (..., C, C), with the step theta_j.
        past_s: of the momentum in S_t, (..., C, 1).
        new_s: of u_j in S_t, (..., C, C), with the step theta_j.
    """

    old: Tensor
    past: Tensor
    new: Tensor
    past_s: Tensor
    new_s: Tensor

    @classmethod
    def of(cls, step: Tensor, carry: Tensor, keep: Tensor, learn: Tensor) -> _Shares:
        kept, carried = _products(torch.stack([keep, carry]))
        old = kept[..., :1] * keep[..., :1, None]
        past_s = carried[..., :1] * carry[..., :1, None]
        new_s = carried * step.unsqueeze(-2)
        learned = kept * learn.unsqueeze(-2)
        return cls(old, learned @ past_s, learned @ new_s, past_s, new_s)

    def at(self, n: int) -> _Shares:
        return _Shares(*(x.select(2, n) for x in self))


def _products(rate_C: Tensor) -> Tensor:
    """Π_{j<i≤t} rate_i for every t and j (..., C, C), 0 where j > t."""
    size = rate_C.shape[-1]
    ones = torch.eye(size, dtype=rate_C.dtype, device=rate_C.device).expand(*rate_C.shape, size)
    return linear_scan(rate_C.unsqueeze(-1), ones, dim=-2)


def _chunk(
    q: Tensor, inputs: list[Tensor], errors: list[Tensor], shares: _Shares, weights: Weights, momentum: Weights
) -> tuple[Tensor, Weights, Weights]:
    """The answers within a chunk, and weights and momentum behind it."""
    z, after_M, after_S = q, [], []
    for layer, (a, d, w, s) in enumerate(zip(inputs, errors, weights, momentum, strict=True)):
        if layer:
            z = F.gelu(z)
        z = shares.old * (z @ w) + shares.past * (z @ s) - (z @ a.mT * shares.new) @ d
        last_M, last_S = (x[:, :, -1].unsqueeze(-1) for x in (shares.new, shares.new_s))
        after_M.append(shares.old[:, :, -1:] * w + shares.past[:, :, -1:] * s - a.mT @ (last_M * d))
        after_S.append(shares.past_s[:, :, -1:] * s - a.mT @ (last_S * d))
    return z, tuple(after_M), tuple(after_S)


def _surprise(k: Tensor, v: Tensor, weights: Weights) -> tuple[list[Tensor], list[Tensor]]:
    """What goes into each layer, a, and the gradient behind it, d: that of the layer's matrix is a^T d."""
    inputs, slopes = [k], []
    for weight in weights[:-1]:
        h = inputs[-1] @ weight
        normal = torch.erf(h * 0.5**0.5) * 0.5 + 0.5
        inputs.append(h * normal)
        slopes.append(normal + h * torch.exp(-h.square() / 2) * (2 * math.pi) ** -0.5)
    errors = [2 * (inputs[-1] @ weights[-1] - v)]
    for weight, slope in zip(reversed(weights[1:]), reversed(slopes), strict=True):
        errors.insert(0, errors[0] @ weight.mT * slope)
    return inputs, errors


neural_memory = Op("neural_memory", Backend("torch", _torch), Backend("oracle", _oracle))


def memory_flops(shapes: list[tuple[int, int]], tokens: int, filled: int, chunk: int) -> tuple[int, int]:
    """FLOPs of one head of `neural_memory`: what the recurrence takes, and what the torch backend multiplies.

    Args:
        shapes: inputs and outputs of the layers.
        tokens: of the call.
        filled: tokens of the chunk that had begun.
        chunk: tokens of a chunk.
    """
    area, width, first = sum(i * o for i, o in shapes), sum(i + o for i, o in shapes), math.prod(shapes[0])
    made = 0
    for part in _parts(tokens, filled, chunk):
        count = part.stop - part.start
        size = min(chunk, count)
        padded = -(-count // size) * size
        made += 2 * padded * (6 * area - first + size * width + size * size + size)
    return 2 * tokens * (4 * area - first), made


class LayerState(NamedTuple):
    """The memory, and the last rows of real tokens before the convolution (B, K - 1, 3 dim)."""

    memory: MemoryState
    tail: Tensor


class NeuralMemory(nn.Module):
    """The memory with what stands around it: projections, convolutions, rates, normalised and gated output.

    q, k, v are projections behind a causal convolution of each channel over the real tokens and a SiLU, q and k of
    length 1. The rates of each head are sigmoids of a projection of the token, the step divided by the tokens of a
    chunk, whose gradients add up. Answers are divided by their root mean square, multiplied by a SiLU gate of the token
    and projected.

    Args:
        site: where it is installed; heads divide dim.
        depth: layers of the memory; one is a matrix.
        expansion: width of the memory's hidden layers, in head sizes.
        chunk: tokens whose gradients are taken at the same weights.
        kernel: tokens that a convolution sees.
        max_step: theta stays below max_step / chunk and starts at an eighth of that. With 1, a matrix without momentum
            never diverges; with momentum near 1, and where there are more layers and large values, it still may. The
            memory starts empty, its last layer being 0, and the convolutions start as the identity.
    """

    def __init__(self, site: Site, *, depth: int, expansion: int, chunk: int, kernel: int, max_step: float) -> None:
        super().__init__()
        for name, value in (("depth", depth), ("expansion", expansion), ("chunk", chunk), ("kernel", kernel)):
            if value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        if not 0 < max_step < math.inf:
            raise BadInput(f"max_step is the largest step of the memory's descent, above 0, got {max_step}")
        dim, heads = site.dim, site.heads
        if dim % heads:
            raise BadInput(f"heads must divide dim: {dim} channels do not split into {heads} heads")
        self.heads, self.chunk, self.kernel, self.max_step = heads, chunk, kernel, max_step
        widths = [dim // heads, *[expansion * (dim // heads)] * (depth - 1), dim // heads]
        self.shapes = list(itertools.pairwise(widths))
        self.initial = nn.ParameterList(torch.randn(heads, i, o) * i**-0.5 for i, o in self.shapes)
        nn.init.zeros_(self.initial[-1])
        self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.out_proj = (
            nn.Linear(dim, dim, bias=False) for _ in range(5)
        )
        self.taps = nn.Parameter(F.pad(torch.ones(1, 3 * dim), (0, 0, 0, kernel - 1)))
        self.rates = nn.Linear(dim, 3 * heads)
        with torch.no_grad():
            self.rates.bias.copy_(torch.tensor([-math.log(7), 0.0, -4.0]).repeat_interleave(heads))
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def start(self, batch: int, like: Tensor) -> LayerState:
        """The learned initial memory, without momentum."""
        weights = tuple(wide(w.to(like)).expand(batch, -1, -1, -1) for w in self.initial)
        momentum = tuple(torch.zeros_like(w) for w in weights)
        tail = wide(like.new_zeros(batch, self.kernel - 1, self.taps.shape[1]))
        return LayerState(MemoryState(weights, weights, momentum, 0), tail)

    def read(
        self, x_BNC: Tensor, state: LayerState, keep: Tensor | None = None, *, backend: str = "auto"
    ) -> tuple[Tensor, LayerState]:
        """Learn every token and answer it, (B, N, dim) each; the state behind the last one."""
        x_BNC = blank(x_BNC, keep)
        rows = torch.cat([proj(x_BNC) for proj in (self.q_proj, self.k_proj, self.v_proj)], -1)
        mixed, tail = self._convolve(rows, state.tail, self.taps, keep)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in mixed.chunk(3, -1))
        rates = F.linear(wide(x_BNC), wide(self.rates.weight), wide(self.rates.bias))
        step, momentum, forget = rates.sigmoid().transpose(1, 2).chunk(3, 1)
        o, memory = neural_memory(
            _unit(q),
            _unit(k),
            v,
            step * (self.max_step / self.chunk),
            momentum,
            forget,
            state.memory,
            keep,
            chunk=self.chunk,
            backend=backend,
        )
        return self._finish(o, x_BNC), LayerState(memory, tail)

    def recall(
        self, x_BNC: Tensor, state: LayerState, tail: Tensor, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Answers with the weights with which the chunk began, and the last rows of queries (B, K - 1, dim)."""
        dim = x_BNC.shape[2]
        mixed, tail = self._convolve(self.q_proj(x_BNC), tail, self.taps[:, :dim], keep)
        q = _unit(mixed.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        with as_written(q):
            o = ask(q, state.memory.anchor)
        return self._finish(o, x_BNC), tail

    @staticmethod
    def _convolve(rows: Tensor, tail: Tensor, taps: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        mixed, tail = short_convolution(wide(rows), wide(taps), tail, keep)
        return F.silu(wide(mixed)), tail.clone()  # a copy: nothing keeps the whole segment alive

    def _finish(self, o_BHND: Tensor, x_BNC: Tensor) -> Tensor:
        o = rms_norm(self.norm, o_BHND.transpose(1, 2).flatten(2)) * F.silu(wide(self.gate_proj(x_BNC)))
        return self.out_proj(o.to(x_BNC.dtype))

    def literal(self, x_BNC: Tensor, keep: Tensor | None) -> tuple[Tensor, Weights]:
        """`read` from the beginning, written out: the answers, and the weights behind the last token."""
        q_BHND, k_BHND, v_BHND = (self._literal_row(x_BNC, keep, place) for place in range(3))
        rates_B3HN = project(self.rates, x_BNC).sigmoid().transpose(1, 2).unflatten(1, (3, self.heads))
        step, momentum, forget = rates_B3HN.unbind(1)
        weights = self.literal_start(len(x_BNC))
        o, memory = neural_memory(
            q_BHND,
            k_BHND,
            v_BHND,
            self.max_step * step / self.chunk,
            momentum,
            forget,
            MemoryState(weights, weights, tuple(0 * w for w in weights), 0),
            keep,
            chunk=self.chunk,
            backend="oracle",
        )
        return self._literal_finish(o, x_BNC), memory.weights

    def literal_start(self, batch: int) -> Weights:
        """The learned weights, for each sequence."""
        return tuple(torch.stack([wide(w)] * batch) for w in self.initial)

    def literal_recall(self, x_BNC: Tensor, keep: Tensor | None, weights: Weights) -> Tensor:
        """`recall` from the beginning, with these weights, written out."""
        z_BHND = self._literal_row(x_BNC, keep, 0)
        for layer, weight in enumerate(weights):
            if layer:
                z_BHND = z_BHND * (1 + torch.erf(z_BHND / math.sqrt(2))) / 2
            z_BHND = torch.einsum("bhni,bhio->bhno", z_BHND, weight)
        return self._literal_finish(z_BHND, x_BNC)

    def _literal_row(self, x_BNC: Tensor, keep: Tensor | None, place: int) -> Tensor:
        """q, k or v (B, H, N, D)."""
        taps_KC = wide(self.taps).chunk(3, 1)[place]

        def convolve(rows_1NC: Tensor) -> Tensor:
            sums = []
            for n in range(rows_1NC.shape[1]):
                terms = [tap * rows_1NC[:, n - lag] for lag, tap in enumerate(taps_KC) if lag <= n]
                sums.append(torch.stack(terms).sum(0))
            return torch.stack(sums, 1)

        mixed = alone(convolve, project((self.q_proj, self.k_proj, self.v_proj)[place], x_BNC), keep)
        row_BHND = torch.stack((mixed * mixed.sigmoid()).chunk(self.heads, -1), 1)
        return row_BHND if place == 2 else row_BHND / (row_BHND.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()

    def _literal_finish(self, o_BHND: Tensor, x_BNC: Tensor) -> Tensor:
        gate = project(self.gate_proj, x_BNC)
        o_BNC = literal_norm(self.norm, torch.cat(o_BHND.unbind(1), -1))
        return project(self.out_proj, o_BNC * gate * gate.sigmoid())

    def count(self, tokens: int, filled: int = 0) -> Cost:
        """Of one sequence."""
        needed, made = memory_flops(self.shapes, tokens, filled, self.chunk)
        dim = self.norm.normalized_shape[0]
        around = 2 * tokens * (5 * dim * dim + 3 * dim * self.kernel + 3 * dim * self.heads)
        return Cost(around + self.heads * needed, around + self.heads * made)

    def count_recall(self, tokens: int) -> Cost:
        """Of `recall`, for one sequence."""
        dim = self.norm.normalized_shape[0]
        area = self.heads * sum(i * o for i, o in self.shapes)
        flops = 2 * tokens * (3 * dim * dim + dim * self.kernel + area)
        return Cost(flops, flops)


class GatedProduct(nn.Module):
    """silu(norm(y)) * silu(norm(m)), each norm a root mean square with weights of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.y_norm, self.m_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        """The product."""
        product = F.silu(rms_norm(self.y_norm, y)) * F.silu(rms_norm(self.m_norm, m))
        return product.to(y.dtype)

    def literal(self, y: Tensor, m: Tensor) -> Tensor:
        """The product, written out."""
        y, m = literal_norm(self.y_norm, y), literal_norm(self.m_norm, m)
        return y * y.sigmoid() * m * m.sigmoid()


class MemoryMixer(Mixer):
    """What the mixers with a neural memory share: the memory, persistent tokens, and reading on from a state.

    Subclasses write `start`, `read` and `literal`.

    Args:
        site: where it is installed; heads divide dim.
        backend: of the ops.
        depth: layers of the memory; one is a matrix.
        expansion: width of the memory's hidden layers, in head sizes.
        chunk: tokens whose gradients are taken at the same weights.
        kernel: real tokens that the memory's convolutions see.
        persistent: learned tokens in front.
        max_step: theta stays below max_step / chunk; see `NeuralMemory`.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        depth: int = 2,
        expansion: int = 4,
        chunk: int = 64,
        kernel: int = 4,
        persistent: int = 4,
        max_step: float = 1.0,
    ) -> None:
        super().__init__(site, backend)
        if persistent < 0:
            raise BadInput(f"persistent counts learned tokens, got {persistent}")
        self.memory = NeuralMemory(
            site, depth=depth, expansion=expansion, chunk=chunk, kernel=kernel, max_step=max_step
        )
        self.persistent = nn.Parameter(torch.randn(1, persistent, site.dim)) if persistent else None

    def front(self, like: Tensor) -> Tensor:
        """The persistent tokens (1, P, C), of which there may be none."""
        return like.new_zeros(1, 0, self.site.dim) if self.persistent is None else self.persistent.to(like)

    def begin(self, like: Tensor) -> tuple[Tensor, LayerState]:
        """What the memory answers to the persistent tokens (1, P, C), and the state of one sequence behind them."""
        first, memory = self.front(like), self.memory.start(1, like)
        return self.memory.read(first, memory, backend=self.backend) if first.shape[1] else (first, memory)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Read all tokens."""
        return self.advance(x_BNC, self.start(x_BNC.shape[0], x_BNC), call.mask.keys)[0]

    def advance(self, x_BNC: Tensor, state: Any, keep: Tensor | None) -> tuple[Tensor, Any]:
        """Read on; no tokens leave the state as it is."""
        return self.read(x_BNC, state, keep) if x_BNC.shape[1] else (x_BNC, state)

    @abstractmethod
    def read(self, x_BNC: Tensor, state: Any, keep: Tensor | None) -> tuple[Tensor, Any]:
        """Hook of `advance`, with one token at least."""

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """The whole sequence at once, written out, in float32 at least."""
        x = wide(blank(x_BNC, call.mask.keys))
        return self.literal(torch.cat([self.front(x)] * len(x)), x, call.mask.keys).to(x_BNC.dtype)

    @abstractmethod
    def literal(self, first_BPC: Tensor, x_BNC: Tensor, keep: Tensor | None) -> Tensor:
        """Hook of `oracle`: the persistent tokens and the sequence behind them, 0 where there is padding."""

    def literal_answers(self, first_BPC: Tensor, x_BNC: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the memory answers to the persistent tokens and to the others, written out."""
        first, tokens = first_BPC.shape[1], x_BNC.shape[1]
        keep = None if keep is None else F.pad(keep, (first, 0), value=True)
        both = self.memory.literal(torch.cat([first_BPC, x_BNC], 1), keep)[0]
        return both[:, :first], both[:, both.shape[1] - tokens :]

    def count(self, sizes: Sizes) -> Cost:
        """The memory reads the persistent tokens once, and each sequence behind them."""
        first = 0 if self.persistent is None else self.persistent.shape[1]
        one = self.memory.count(sizes.queries, first % self.memory.chunk)
        every = Cost(sizes.batch * one.flops, sizes.batch * one.executed)
        return every + self.memory.count(first)


def blank(x_BNC: Tensor, keep: Tensor | None) -> Tensor:
    """x, 0 where there is padding, which may hold anything."""
    return x_BNC if keep is None else x_BNC.where(keep.unsqueeze(-1), 0)


def rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """What `norm` makes of x, in float32 at least."""
    return F.rms_norm(wide(x), x.shape[-1:], wide(norm.weight), norm.eps)


def _unit(x: Tensor) -> Tensor:
    """x of length 1 along its last axis; 0 stays 0, with a finite gradient."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def expand(state: LayerState, batch: int) -> LayerState:
    """The state of one sequence, for each of a batch."""
    memory = state.memory

    def each(weights: Weights) -> Weights:
        return tuple(w.expand(batch, -1, -1, -1) for w in weights)

    copies = MemoryState(each(memory.anchor), each(memory.weights), each(memory.momentum), memory.filled)
    return LayerState(copies, state.tail.expand(batch, -1, -1))


def project(linear: nn.Linear, x: Tensor) -> Tensor:
    """What `linear` makes of x, written out, in float32 at least."""
    y = torch.einsum("...i,oi->...o", x, wide(linear.weight))
    return y if linear.bias is None else y + wide(linear.bias)


def literal_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """`rms_norm`, written out."""
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * wide(norm.weight)
