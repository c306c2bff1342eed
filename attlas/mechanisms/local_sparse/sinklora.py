"""Sink fixed attention (SF-Attn): S²-Attn without the seam, and with first tokens that everybody sees.

    query i sees key j   if j <= i and (j < s or group(j) = group(i))
    group(t) = floor(t / g) in the first half of the heads, floor((t + g/2) / g) in the second

    o_i = softmax over the visible j of (q_i · k_j / √D) v_j

q, k and v (B, H, N, D). S²-Attn turns half of the heads by half a group, g/2, and thereby puts the end of the sequence
and its beginning into one group, where the beginning sees the end (see `shifted_sparse`). Here both are groups of their
own, of half the size, and the layer is causal. The first s = `sinks` tokens, which softmax heads spend their
spare attention on, are keys for every query. Like S²-Attn it is made for fine-tuning of a model that attends in
full afterwards.

g is `group_ratio` of the length that the layer is built for, `length=`, or else of the call; a stream needs the
former. Where g is odd, half of it is rounded down. Padding has no weight; it moves no border.

Time O(N (g + s) D); the state is s + g - 1 keys and values.

Source: Zhang, "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models", 2024
(arXiv:2406.05678). Its repository Dexter-GT-86/SinkLoRA holds S²-Attn alone: this is a reconstruction
from the description, and s = 4 is StreamingLLM's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.causal_groups import Keys, causal_groups, causal_groups_cost, group_size
from attlas.ops.recurrent import keys_ahead
from attlas.ops.softmax import softmax_attention

SPEC = Spec(
    name="sinklora",
    title="SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models",
    year=2024,
    paper="arXiv:2406.05678",
    equation="o = softmax in causal groups and over the first s tokens of (q kᵀ / √D) v, two groupings",
    complexity="O(N (g + s) D) time, O((g + s) D) state, g = N / 4",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    grids=(1,),
    prefix=False,
    streams=True,
    reconstruction=True,
    examples=(
        Example(grid=(13,), params={"sinks": 2}, parameters=4 * (16 * 16 + 16)),
        Example(grid=(11,), heads=4, params={"group_ratio": 0.4, "sinks": 1}, parameters=4 * (16 * 16 + 16)),
    ),
)


class SinkState(NamedTuple):
    """The first s and the last g - 1 keys and values, and the position of the next token."""

    sinks: Keys
    recent: Keys
    position: int


@register(SPEC)
class SinkLoRA(Attend):
    """Sink fixed attention.

    Args:
        site: where it is installed; its length decides on the groups.
        backend: of `softmax_attention`.
        group_ratio: share of the length that a group holds.
        sinks: s, first tokens that every query sees.
    """

    def __init__(self, site: Site, backend: str = "auto", *, group_ratio: float = 0.25, sinks: int = 4) -> None:
        super().__init__(site, backend)
        group_size(1, group_ratio)
        if sinks < 0:
            raise BadInput(f"sinks counts the first tokens that every query sees, got {sinks}")
        self.group_ratio, self.sinks = group_ratio, sinks

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Attend in the groups of each half of the heads."""
        keys_ahead(q_BHND.shape[2], k_BGMD.shape[2])
        keep = call.mask.keys
        keep = k_BGMD.new_ones(k_BGMD.shape[0], k_BGMD.shape[2], dtype=torch.bool) if keep is None else keep
        keys = Keys(k_BGMD, v_BGME, keep)
        return self._attend(q_BHND, keys, keys.part(0, self.sinks), 0, self._group(k_BGMD.shape[2]))

    def _group(self, keys: int) -> int:
        return group_size(keys if self.site.length is None else self.site.length, self.group_ratio)

    def _attend(self, q_BHND: Tensor, keys: Keys, sinks: Keys, start: int, group: int) -> Tensor:
        straight = q_BHND.shape[1] // 2
        outputs = []
        for heads, shift in ((slice(straight), 0), (slice(straight, None), group // 2)):
            own, first = (Keys(x.k[:, heads], x.v[:, heads], x.keep) for x in (keys, sinks))
            part = causal_groups(
                q_BHND[:, heads], own, first, group=group, shift=shift, start=start, backend=self.backend
            )
            outputs.append(part)
        return torch.cat(outputs, 1)

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Dense attention under the mask."""
        heads, queries, keys = *q_BHND.shape[1:3], k_BGMD.shape[2]
        first = keys_ahead(queries, keys)
        group = self._group(keys)
        seen_HNM = q_BHND.new_zeros(heads, queries, keys, dtype=torch.bool)
        for h in range(heads):
            shift = group // 2 if h >= heads // 2 else 0
            for n in range(queries):
                i = n + first
                for j in range(i + 1):
                    seen_HNM[h, n, j] = j < self.sinks or (j + shift) // group == (i + shift) // group
        mask = Mask.pairs_(seen_HNM.unsqueeze(0)).with_(keys=call.mask.keys)
        return softmax_attention(q_BHND, k_BGMD, v_BGME, mask, backend="oracle")

    def count(self, sizes: Sizes) -> Cost:
        """Two products per visible pair; whole groups are multiplied."""
        heads, group = self.site.heads, self._group(sizes.keys)
        pairs = multiplied = 0
        for half, shift in ((heads // 2, 0), (heads - heads // 2, group // 2)):
            seen, products = causal_groups_cost(sizes.queries, sizes.keys, group, shift, self.sinks)
            pairs, multiplied = pairs + half * seen, multiplied + half * products
        per_pair = 4 * sizes.batch * self.site.head_dim
        return Cost(per_pair * pairs, per_pair * multiplied, sizes.batch * pairs)

    def initial_state(self, batch: int, like: Tensor) -> SinkState:
        """Nothing seen yet."""
        if self.site.length is None:
            raise BadInput("groups are a share of the length, which a stream does not know: build with length=")
        rows = like.new_empty(batch, self.site.heads, 0, self.site.head_dim)
        nothing = Keys(rows, rows, rows.new_empty(batch, 0, dtype=torch.bool))
        return SinkState(nothing, nothing, 0)

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: SinkState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, SinkState]:
        """Attend to the sinks, to what is left of the groups, and to the segment."""
        real = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
        segment, group = Keys(k, v, real), self._group(0)
        sinks = state.sinks.then(segment.part(0, self.sinks - state.sinks.k.shape[2]))
        keys = state.recent.then(segment)
        held = keys.k.shape[2]
        stop = state.position + k.shape[2]
        o = self._attend(q, keys, sinks, stop - held, group)
        # A view would keep the whole segment alive.
        recent = Keys(*(x.clone() for x in keys.part(max(held - group + 1, 0), held)))
        return o, SinkState(sinks, recent, stop)
