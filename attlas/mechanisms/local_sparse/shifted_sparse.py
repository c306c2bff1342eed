"""Shifted sparse attention (S²-Attn): half of the heads attend in groups, half in groups moved by half a group.

    heads 1 to H/2:     o_i = softmax over { j <= i in the group of i } of (q_i · k_j / √D) v_j
    heads H/2+1 to H:   the same on the sequence turned by g/2, p(i) = (i - g/2) mod N, and turned back

q, k and v (B, H, N, D). Groups are the g = `group_ratio` N places from a multiple of g on; the last may be smaller, and
where g is odd its half is rounded down. With two groupings that overlap, information crosses every border. It is made
for fine-tuning on long sequences, cheaply, of a model that attends in full afterwards; positions stay the original
ones.

It is not causal, although every head is masked as if it were: in the turned heads the end of the sequence stands
before its beginning, in one group. With h = g/2 rounded down and r places in the last group, r = g where groups divide
N, the first h tokens see the last r - h if r > h; otherwise the first h - r tokens see the last g + r - h. Hence it
serves no causal pattern here. `sinklora` is the same with that seam cut.

Padding has no weight; it moves no border. (The official code takes only lengths that groups divide.)

Time O(N g D), g a quarter of N as published; no state.

Source: Chen et al., "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models", 2023 (arXiv:2309.12307),
official code dvlab-research/LongLoRA, of which Dexter-GT-86/SinkLoRA holds a copy.
"""

import torch
from torch import Tensor

from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.causal_groups import Keys, causal_groups, causal_groups_cost, every_token_asks, group_size
from attlas.ops.softmax import softmax_attention

SPEC = Spec(
    name="shifted_sparse",
    title="LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",
    year=2023,
    paper="arXiv:2309.12307",
    equation="o = softmax in groups of (q kᵀ / √D) v, half of the heads turned by half a group",
    complexity="O(N g D) time, g = N / 4",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(1,),
    prefix=False,
    examples=(
        Example(grid=(12,), parameters=4 * (16 * 16 + 16)),
        Example(grid=(11,), heads=4, params={"group_ratio": 0.4}, parameters=4 * (16 * 16 + 16)),
    ),
)


@register(SPEC)
class ShiftedSparse(Attend):
    """Shifted sparse attention.

    Args:
        site: where it is installed.
        backend: of `softmax_attention`.
        group_ratio: share of the sequence that a group holds.
    """

    def __init__(self, site: Site, backend: str = "auto", *, group_ratio: float = 0.25) -> None:
        super().__init__(site, backend)
        group_size(1, group_ratio)
        self.group_ratio = group_ratio

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Turn half of the heads, attend in groups, turn back."""
        every_token_asks(q_BHND, k_BGMD)
        group = group_size(k_BGMD.shape[2], self.group_ratio)
        keep = call.mask.keys
        keep = k_BGMD.new_ones(k_BGMD.shape[0], k_BGMD.shape[2], dtype=torch.bool) if keep is None else keep
        straight = q_BHND.shape[1] // 2
        outputs = []
        for heads, turn in ((slice(straight), 0), (slice(straight, None), group // 2)):
            q, k, v = (x[:, heads].roll(-turn, 2) for x in (q_BHND, k_BGMD, v_BGME))
            keys = Keys(k, v, keep.roll(-turn, 1))
            o = causal_groups(q, keys, keys.part(0, 0), group=group, backend=self.backend)
            outputs.append(o.roll(turn, 2))
        return torch.cat(outputs, 1)

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Dense attention under a mask for each half of the heads."""
        every_token_asks(q_BHND, k_BGMD)
        heads, tokens = q_BHND.shape[1:3]
        group = group_size(tokens, self.group_ratio)
        seen_HNN = q_BHND.new_zeros(heads, tokens, tokens, dtype=torch.bool)
        for h in range(heads):
            turn = group // 2 if h >= heads // 2 else 0
            for i in range(tokens):
                for j in range(tokens):
                    place, other = (i - turn) % tokens, (j - turn) % tokens
                    seen_HNN[h, i, j] = other <= place and other // group == place // group
        mask = Mask.pairs_(seen_HNN.unsqueeze(0)).with_(keys=call.mask.keys)
        return softmax_attention(q_BHND, k_BGMD, v_BGME, mask, backend="oracle")

    def count(self, sizes: Sizes) -> Cost:
        """Two products per visible pair; whole groups are multiplied."""
        heads, size = sizes.batch * self.site.heads, self.site.head_dim
        group = group_size(sizes.keys, self.group_ratio)
        pairs, multiplied = causal_groups_cost(sizes.queries, sizes.keys, group, 0, 0)
        return Cost(4 * heads * pairs * size, 4 * heads * multiplied * size, heads * pairs)
