"""Agent attention without training, for diffusion models: agents are merged tokens.

    V_A = softmax(s A kᵀ) v,    o = softmax(s^κ q Aᵀ) V_A + λ v,    s = 1 / √D

It replaces softmax attention in a trained model and learns nothing. One token of each cell of `stride` by `stride`
positions is a destination; every other one knows its most similar destination, by the cosine of tokens. The `ratio` N
most similar ones are merged into theirs, a mean, before attention, and take its output after; merging `agent_ratio` N
of them gives the n agents A. A mean of tokens goes through an affine projection as a mean of queries, so that A is what
the same query projection makes of merged tokens. κ < 1 makes the second logits larger, and λ v brings back what the
rank of n agents cannot give. Unless 2 n is less than the tokens that remain, attention is softmax attention.

q, k, v (B, H, N, D), tokens (B, N, C) or else the queries. Time O(N n D) and N²/stride² C for the similarities.

Source: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", 2023 (arXiv:2312.08874),
official code LeapLabTHU/Agent-Attention, agentsd, on the token merging of Bolya and Hoffman, 2023 (arXiv:2303.17604).
Officially similarities are those of the tokens before the norm in front of attention, and destinations are drawn at
random where a batch is even; here they are the layer's input, and each cell's first. Published are these defaults for
the first 20 of 50 steps; stride=2, agent_ratio=0.5 behind them, where nothing but merging is left.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput, share
from attlas.core.grid import Grid
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import softmax_attention

SPEC = Spec(
    name="agent_sd",
    title="Agent Attention: On the Integration of Softmax and Linear Attention",
    year=2023,
    paper="arXiv:2312.08874",
    equation="o = softmax(s^κ q Aᵀ) softmax(s A kᵀ) v + λ v,  A merged queries",
    complexity="O(N n D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2,),
    prefix=False,
    masks=frozenset(),
    examples=(
        Example(grid=(4, 8), parameters=4 * (16 * 16 + 16)),
        Example(
            heads=4,
            grid=(5, 6),
            params={"stride": 2, "ratio": 0.1, "agent_ratio": 0.7},
            parameters=4 * (16 * 16 + 16),
        ),
        Example(grid=(4, 6), params={"stride": 2, "agent_ratio": 0.5}, parameters=4 * (16 * 16 + 16)),
    ),
)


class _Sizes(NamedTuple):
    """How many destinations there are, and how many tokens are merged for attention and for the agents."""

    destinations: int
    merged: int
    merged_for_agents: int


@register(SPEC)
class AgentSD(Attend):
    """Agent attention in place of trained softmax attention.

    Args:
        site: where it is installed.
        backend: of the softmax attentions.
        stride: positions of a cell on each axis.
        ratio: share of all tokens that is merged before attention; 0 for none.
        agent_ratio: share of all tokens that is merged to make the agents.
        k_scale2: κ, the power of the scale in the second logits.
        k_shortcut: λ, the share of the values that is added.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        stride: int = 4,
        ratio: float = 0.4,
        agent_ratio: float = 0.95,
        k_scale2: float = 0.3,
        k_shortcut: float = 0.075,
    ) -> None:
        super().__init__(site, backend)
        if stride < 2:
            raise BadInput(f"a cell has tokens beside its destination, so stride is at least 2, got {stride}")
        self.stride = stride
        self.ratio, self.agent_ratio = share("ratio", ratio), share("agent_ratio", agent_ratio)
        self.k_scale2, self.k_shortcut = k_scale2, k_shortcut

    def compute(self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, call: Call) -> Tensor:
        """Merge, attend through agents where they are few, and hand every token its slot's output."""
        sizes = self._sizes(call.grid)
        slot_BN, agent_BN = self._slots(self._metric(q_BHND, k_BHND, call), call.grid)
        tokens = q_BHND.shape[2]
        kept, agents = tokens - sizes.merged, tokens - sizes.merged_for_agents
        q, k, v = (_means(x, slot_BN, kept) for x in (q_BHND, k_BHND, v_BHND))
        if 2 * agents < kept:
            a_BHAD = _means(q_BHND, agent_BN, agents)
            gathered_BHAD = softmax_attention(a_BHAD, k, v, backend=self.backend)
            scale = q.shape[3] ** (-0.5 * self.k_scale2)
            o = softmax_attention(q, a_BHAD, gathered_BHAD, scale=scale, backend=self.backend) + self.k_shortcut * v
        else:
            o = softmax_attention(q, k, v, backend=self.backend)
        return o.gather(2, slot_BN[:, None, :, None].expand(-1, o.shape[1], -1, o.shape[3]))

    def _sizes(self, grid: Grid) -> _Sizes:
        height, width = grid.shape
        destinations = (height // self.stride) * (width // self.stride)
        if not destinations:
            raise BadInput(
                f"no cell of {self.stride} by {self.stride} positions fits on a {grid}: take a smaller stride"
            )
        tokens = grid.positions
        merged, for_agents = (min(tokens - destinations, int(tokens * r)) for r in (self.ratio, self.agent_ratio))
        return _Sizes(destinations, merged, for_agents)

    def _metric(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        if q.shape[2] != k.shape[2]:
            raise BadInput(f"tokens that merge are queries and keys, got {q.shape[2]} queries and {k.shape[2]} keys")
        return q.transpose(1, 2).flatten(2) if call.tokens is None else call.tokens

    def _places(self, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
        """The destinations, first of each whole cell, and the other tokens, both in order."""
        height, width = grid.shape
        y, x = grid.places(device).unbind(-1)
        whole = (y < height // self.stride * self.stride) & (x < width // self.stride * self.stride)
        first = whole & (y % self.stride == 0) & (x % self.stride == 0)
        order = (~first).int().argsort(dim=0, stable=True)
        count = self._sizes(grid).destinations
        return order[:count], order[count:]

    def _slots(self, x_BNC: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """The slot of each token (B, N) in attention and among the agents: destinations first, then who is alone."""
        sizes = self._sizes(grid)
        destination_D, source_S = self._places(grid, x_BNC.device)
        # A rounded cosine could choose another destination.
        with torch.no_grad(), as_written(x_BNC):
            x = F.normalize(wide(x_BNC), dim=-1)
            likeness_BS, nearest_BS = (x[:, source_S] @ x[:, destination_D].mT).max(-1)
            rank_BS = likeness_BS.argsort(dim=-1, descending=True, stable=True).argsort(-1)
            own_BD = torch.arange(sizes.destinations, device=x.device).expand(len(x), -1)
            order = torch.cat([destination_D, source_S]).argsort()
            slots = []
            for merged in (sizes.merged, sizes.merged_for_agents):
                slot_BS = nearest_BS.where(rank_BS < merged, sizes.destinations + rank_BS - merged)
                slots.append(torch.cat([own_BD, slot_BS], 1)[:, order])
        return slots[0], slots[1]

    def oracle(self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, call: Call) -> Tensor:
        """Picture by picture with lists of who is merged with whom, and the two attentions as one matrix."""
        metric_BNC, (height, width) = self._metric(q_BHND, k_BHND, call), call.grid.shape
        sizes, edge = self._sizes(call.grid), self.stride
        destinations = [
            y * width + x for y in range(0, height - edge + 1, edge) for x in range(0, width - edge + 1, edge)
        ]
        outputs = []
        for x_NC, q_HND, k_HND, v_HND in zip(metric_BNC.detach(), q_BHND, k_BHND, v_BHND, strict=True):
            best = {}
            for n in set(range(height * width)) - set(destinations):
                likeness = [float(torch.cosine_similarity(x_NC[n], x_NC[d], 0)) for d in destinations]
                best[n] = max(zip(likeness, destinations, strict=True), key=lambda pair: pair[0])
            ranked = sorted(best, key=lambda n: -best[n][0])

            def groups(merged: int, best: dict = best, ranked: list = ranked) -> list[list[int]]:
                joined = {d: [d] for d in destinations}
                for n in ranked[:merged]:
                    joined[best[n][1]].append(n)
                return [*joined.values(), *([n] for n in ranked[merged:])]

            kept, agents = groups(sizes.merged), groups(sizes.merged_for_agents)
            q, k, v = (torch.stack([x[:, group].mean(1) for group in kept], 1) for x in (q_HND, k_HND, v_HND))
            scale = q.shape[-1] ** -0.5
            if 2 * len(agents) < len(kept):
                a_HAD = torch.stack([q_HND[:, group].mean(1) for group in agents], 1)
                read = torch.softmax(q @ a_HAD.mT * scale**self.k_scale2, -1)
                o = read @ torch.softmax(a_HAD @ k.mT * scale, -1) @ v + self.k_shortcut * v
            else:
                o = torch.softmax(q @ k.mT * scale, -1) @ v
            rows = {n: o[:, i] for i, group in enumerate(kept) for n in group}
            outputs.append(torch.stack([rows[n] for n in range(height * width)], 1))
        return torch.stack(outputs)

    def count(self, sizes: Sizes) -> Cost:
        """The similarities and the attentions among what remains."""
        merge, tokens = self._sizes(sizes.grid), sizes.queries
        kept, agents = tokens - merge.merged, tokens - merge.merged_for_agents
        pairs = 2 * agents * kept if 2 * agents < kept else kept * kept
        similar = (tokens - merge.destinations) * merge.destinations * self.site.dim
        flops = sizes.batch * (2 * similar + 4 * self.site.heads * self.site.head_dim * pairs)
        return Cost(flops, flops, sizes.batch * self.site.heads * tokens * tokens)


def _means(x_BHND: Tensor, slot_BN: Tensor, slots: int) -> Tensor:
    """The mean of the tokens in each slot, (B, H, slots, D)."""
    batch, heads, _, size = x_BHND.shape
    sums = wide(x_BHND).new_zeros(batch, heads, slots, size)
    sums = sums.scatter_add(2, slot_BN[:, None, :, None].expand_as(x_BHND), wide(x_BHND))
    count = slot_BN.new_zeros(batch, slots).scatter_add(1, slot_BN, torch.ones_like(slot_BN))
    return (sums / count[:, None, :, None]).to(x_BHND.dtype)
