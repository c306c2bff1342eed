"""Titans, memory as a context: attention within a segment, to which a neural memory adds what came before.

For the segments s of a sequence, with the memory M as the segments before have left it,

    h = M(q(s))                            what the memory knows of these tokens
    y = Attention([P | h | s])             of the tokens of s
    o = W_o (silu(norm y) * silu(norm M'(y)))

where M' has learned y, each token by the time that it is answered (`attlas show titans` has the equations of M). P are
persistent tokens, learned and the same for every sequence, and seen by all. A token sees h and s up to its own place:
h is made of the tokens of the segment itself, and the later ones of it would tell what is to come. A segment is a
chunk of the memory: all its gradients are taken at the weights that gave h. Segments are counted in positions, padded
ones included.

x (B, N, C); time O(N (C segment + |M|)); the state is that of the memory and keys and values of the segment so far.

Source: Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time", 2024 (arXiv:2501.00663). There is no
official code: the causal reading of h and of M', the SiLU of the gate and the projections around it are ours.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.neural_memory import GatedProduct, LayerState, MemoryMixer, blank, project
from attlas.ops.softmax import attention_weights, softmax_attention

SPEC = Spec(
    name="titans_mac",
    title="Titans: Learning to Memorize at Test Time",
    year=2024,
    paper="arXiv:2501.00663",
    equation="y = Attention([P | M(s) | s]),  o = y ⊗ M'(y)",
    complexity="O(N (C D + |M|)) time, O(C D + |M|) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    grids=(1,),
    prefix=False,
    streams=True,
    examples=(
        # The memory layer, three projections of the attention and one of the output, two norms, persistent tokens.
        Example(
            grid=(5,),
            dim=24,
            params={"segment": 3, "persistent": 2},
            parameters=(5 * 24 * 24 + 4 * 72 + 24 * 6 + 6 + 24 + 2 * (12 * 48 + 48 * 12))
            + 4 * 24 * 24
            + 2 * 24
            + 2 * 24,
        ),
        Example(
            dim=8,
            params={"depth": 1, "segment": 8, "persistent": 0},
            parameters=(5 * 8 * 8 + 4 * 24 + 8 * 6 + 6 + 8 + 2 * 4 * 4) + 4 * 8 * 8 + 2 * 8,
        ),
    ),
    reconstruction=True,
)


class ContextState(NamedTuple):
    """Between two tokens.

    Attributes:
        memory: of what the attention put out.
        queries: the last rows of real questions before their convolution (B, K - 1, C).
        k, v: of h and of the token itself, for each token of the segment so far (B, H, n, 2, D).
        keep: which of these tokens are real (B, n).
    """

    memory: LayerState
    queries: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor


@register(SPEC)
class TitansContext(MemoryMixer):
    """Attention within segments that sees what a neural memory recalls.

    Args:
        site: where it is installed; heads divide dim.
        backend: of `neural_memory` and `softmax_attention`.
        segment: tokens that attend to one another, and whose gradients are taken at the same weights.
        depth: layers of the memory; one is a matrix.
        expansion: width of the memory's hidden layers, in head sizes.
        kernel: tokens that the memory's convolutions see.
        persistent: learned tokens in front of every segment.
        max_step: theta stays below max_step / segment.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        segment: int = 128,
        depth: int = 2,
        expansion: int = 4,
        kernel: int = 4,
        persistent: int = 4,
        max_step: float = 1.0,
    ) -> None:
        if segment < 1:
            raise BadInput(f"a segment holds at least one token, got {segment}")
        super().__init__(
            site,
            backend,
            depth=depth,
            expansion=expansion,
            chunk=segment,
            kernel=kernel,
            persistent=persistent,
            max_step=max_step,
        )
        self.segment = segment
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(site.dim, site.dim, bias=False) for _ in range(4)
        )
        self.gate = GatedProduct(site.dim)

    def count(self, sizes: Sizes) -> Cost:
        """Memory and projections, of the persistent tokens once, and the pairs of each segment."""
        dim, tokens = self.site.dim, sizes.queries
        first = 0 if self.persistent is None else self.persistent.shape[1]
        around = 12 * tokens * dim * dim
        memory, seen, shown = self.memory.count_recall(tokens) + Cost(around, around), 0, 0
        for start in range(0, tokens, self.segment):
            size = min(self.segment, tokens - start)
            memory = memory + self.memory.count(size)
            seen += size * (first + size + 1)
            shown += size * (first + 2 * size)
        flops, executed = (
            sizes.batch * (one + 4 * dim * pairs) + 4 * first * dim * dim
            for one, pairs in ((memory.flops, seen), (memory.executed, shown))
        )
        return Cost(flops, executed, sizes.batch * self.site.heads * seen)

    def start(self, batch: int, like: Tensor) -> ContextState:
        """The learned memory, and no token."""
        memory = self.memory.start(batch, like)
        queries = memory.tail[..., : self.site.dim]
        return ContextState(memory, queries, *self._empty(like.new_zeros(batch, 0, self.site.dim)))

    def _empty(self, x_B0C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and flags of no token."""
        batch, heads = x_B0C.shape[0], self.site.heads
        rows = x_B0C.new_zeros(batch, heads, 0, 2, self.site.dim // heads)
        return rows, rows, x_B0C.new_zeros(batch, 0, dtype=torch.bool)

    def read(self, x_BNC: Tensor, state: ContextState, keep: Tensor | None) -> tuple[Tensor, ContextState]:
        """Segment by segment, from where the state stands in its own."""
        keep = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool) if keep is None else keep
        x_BNC = blank(x_BNC, keep)
        first_k, first_v = (self._heads(proj(self.front(x_BNC))) for proj in (self.k_proj, self.v_proj))
        rows, start = [], 0
        while start < x_BNC.shape[1]:
            part = slice(start, start + self.segment - state.memory.memory.filled)
            o, state = self._read(x_BNC[:, part], keep[:, part], state, first_k, first_v)
            rows.append(o)
            start = part.stop
        return torch.cat(rows, 1), state

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, ..., C) to (B, H, N, ..., D)."""
        return x.unflatten(-1, (self.site.heads, -1)).movedim(-2, 1)

    def _read(
        self, x_BNC: Tensor, keep: Tensor, state: ContextState, first_k: Tensor, first_v: Tensor
    ) -> tuple[Tensor, ContextState]:
        """Tokens of one segment."""
        h, queries = self.memory.recall(x_BNC, state.memory, state.queries, keep)
        both_BN2C = torch.stack([h, x_BNC.to(h)], 2)
        k, v = (self._heads(proj(both_BN2C)) for proj in (self.k_proj, self.v_proj))
        k, v = torch.cat([state.k.to(k), k], 2), torch.cat([state.v.to(v), v], 2)
        real = torch.cat([state.keep, keep], 1)
        y = self._attend(self._heads(self.q_proj(x_BNC)), k, v, real, first_k, first_v)
        m, memory = self.memory.read(y, state.memory, keep, backend=self.backend)
        if memory.memory.filled == 0:
            k, v, real = self._empty(x_BNC[:, :0])
        return self.out_proj(self.gate(y, m)), ContextState(memory, queries, k, v, real)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, first_k: Tensor, first_v: Tensor) -> Tensor:
        """(B, N, C), the queries being the last N tokens of the segment."""
        queries, tokens, first = q.shape[2], k.shape[2], first_k.shape[2]
        place = torch.arange(tokens, device=q.device)
        seen = (place <= place[tokens - queries :, None]).repeat_interleave(2, 1)
        mask = Mask.pairs_(F.pad(seen, (first, 0), value=True))
        mask = mask & Mask.padding(F.pad(real.repeat_interleave(2, 1), (first, 0), value=True))
        k, v = (torch.cat([p.expand(len(x), -1, -1, -1), x.flatten(2, 3)], 2) for p, x in ((first_k, k), (first_v, v)))
        o = softmax_attention(q, k, v, mask, backend=self.backend)
        return o.transpose(1, 2).flatten(2)

    def literal(self, first_BPC: Tensor, x_BNC: Tensor, keep: Tensor | None) -> Tensor:
        """Segment by segment; what the memory has learned is learned anew for each."""
        keep_BN = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool) if keep is None else keep
        weights, y_BNC, m = self.memory.literal_start(len(x_BNC)), x_BNC[:, :0], x_BNC[:, :0]
        for start in range(0, x_BNC.shape[1], self.segment):
            here = slice(start, start + self.segment)
            h_BCC = self.memory.literal_recall(x_BNC[:, : here.stop], keep_BN[:, : here.stop], weights)[:, start:]
            y = self._literal_attend(first_BPC, h_BCC, x_BNC[:, here], keep_BN[:, here])
            y_BNC = torch.cat([y_BNC, y], 1)
            m, weights = self.memory.literal(y_BNC, keep_BN[:, : here.stop])
        return project(self.out_proj, self.gate.literal(y_BNC, m))

    def _literal_attend(self, first_BPC: Tensor, h_BNC: Tensor, x_BNC: Tensor, keep_BN: Tensor) -> Tensor:
        """y of one segment, query by query."""
        rows = []
        for n in range(x_BNC.shape[1]):
            seen_BMC = torch.cat([first_BPC, h_BNC[:, : n + 1], x_BNC[:, : n + 1]], 1)
            real_BM = torch.cat([keep_BN.new_ones(first_BPC.shape[:2]), *[keep_BN[:, : n + 1]] * 2], 1)
            q, k, v = (
                torch.stack(project(proj, t).chunk(self.site.heads, -1), 1)
                for proj, t in ((self.q_proj, x_BNC[:, n : n + 1]), (self.k_proj, seen_BMC), (self.v_proj, seen_BMC))
            )
            o_BH1D = attention_weights(q, k, Mask.padding(real_BM)) @ v
            rows.append(torch.cat(o_BH1D.unbind(1), -1))
        return torch.cat(rows, 1)
