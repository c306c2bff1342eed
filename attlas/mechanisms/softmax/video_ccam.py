"""Causal cross-attention masks (CCAM): queries that stand in time ask the frames of a video.

    o_i = softmax_m(q_i · k_m / √D + bias_im) v_m    over the m of frames t ≤ t_i

N queries are spread evenly over the T frames. Query i, from 0, sees the frames up to t_i = ⌊i T / N⌋, the one that
its share of time starts in ("floor"), or up to ⌈(i + 1) T / N⌉ − 1, the one that it ends in ("ceil"; then the last
query sees all frames even where there are more frames than queries). So attention, which cannot tell the order of
keys, is given the order of frames, an image (T = 1) is seen by all queries, and the more densely one signal is
sampled the less the output changes. Attention among queries there is none.

q (B, H, N, D), k and v (B, G, T P, D): all P = `patches` tokens of a frame, frame after frame. Videos of several
lengths are padded: a frame that is padding alone does not exist and takes no time. Time O(N T P D).

Source: Fei et al., "Video-CCAM: Enhancing Video-Language Understanding with Causal Cross-Attention Masks for Short
and Long Videos", 2024 (arXiv:2408.14023), repository QQ-MM/Video-CCAM, which does not hold the projector: the
rounding of t_i is a reconstruction.
"""

import torch
from torch import Tensor

from attlas.core.errors import BadInput, share
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import EVERY_MASK, Example, Pattern, Spec
from attlas.ops.pairs import dense_mask
from attlas.ops.softmax import repeat_heads, softmax_attention

SPEC = Spec(
    name="video_ccam",
    title="Video-CCAM: Enhancing Video-Language Understanding with Causal Cross-Attention Masks for Short and Long "
    "Videos",
    year=2024,
    paper="arXiv:2408.14023",
    equation="o_i = softmax(q_i kᵀ / √D) v over frames t ≤ ⌊i T / N⌋",
    complexity="O(N T P D) time",
    patterns=frozenset({Pattern.CAUSAL_CROSS, Pattern.NONCAUSAL_CROSS}),
    grids=(1,),
    prefix=False,
    masks=EVERY_MASK,
    grouped=True,
    reconstruction=True,
    examples=(
        Example(grid=(9,), params={"patches": 3}, parameters=4 * (16 * 16 + 16)),
        Example(
            grid=(5,),
            heads=4,
            kv_heads=2,
            params={"patches": 1, "rounding": "ceil"},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8),
        ),
    ),
)


@register(SPEC)
class VideoCCAM(Attend):
    """Cross-attention under a causal mask over the frames.

    Args:
        site: where it is installed.
        backend: of `softmax_attention`.
        patches: P, tokens of a frame.
        rounding: "floor" or "ceil": the last frame that a query sees is the one that its time starts or ends in.
        weight_dropout: share of the attention weights dropped in training.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        patches: int = 729,
        rounding: str = "floor",
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        if patches < 1:
            raise BadInput(f"patches counts the tokens of a frame and is at least 1, got {patches}")
        if rounding not in ("floor", "ceil"):
            raise BadInput(f"rounding is 'floor' or 'ceil', got {rounding!r}")
        self.patches, self.rounding = patches, rounding
        self.weight_dropout = share("weight_dropout", weight_dropout)

    def _frames(self, keys: int) -> int:
        if keys % self.patches:
            raise BadInput(
                f"a video is whole frames of {self.patches} tokens, got {keys} keys: "
                "build with patches=tokens of a frame"
            )
        return keys // self.patches

    def staircase(
        self, queries: int, keys: int, keep_BM: Tensor | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Which keys each query sees, (B or 1, 1, N, M); `keep_BM` marks the tokens that are not padding."""
        frames = self._frames(keys)
        real_BT = torch.ones(1, frames, dtype=torch.bool, device=device)
        if keep_BM is not None:
            real_BT = keep_BM.unflatten(1, (frames, self.patches)).any(2)
        frame_BT, frames_B1 = real_BT.cumsum(1) - 1, real_BT.sum(1, keepdim=True)
        query_N = torch.arange(queries, device=real_BT.device)
        if self.rounding == "floor":
            last_BN = query_N * frames_B1 // queries
        else:
            last_BN = -((query_N + 1) * -frames_B1 // queries) - 1
        seen_BNT = frame_BT[:, None, :] <= last_BN[:, :, None]
        return seen_BNT.repeat_interleave(self.patches, 2).unsqueeze(1)

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Softmax attention under the staircase and whatever mask there is."""
        stairs = self.staircase(q_BHND.shape[2], k_BGMD.shape[2], call.mask.keys, q_BHND.device)
        dropout = self.weight_dropout if self.training else 0.0
        mask = call.mask & Mask.pairs_(stairs)
        return softmax_attention(q_BHND, k_BGMD, v_BGME, mask, dropout=dropout, backend=self.backend)

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Video by video without its missing frames, query by query over the frames that it sees."""
        batch, heads, queries, size = q_BHND.shape
        keys, mask = k_BGMD.shape[2], call.mask
        k_BHMD, v_BHME = repeat_heads(k_BGMD, heads), repeat_heads(v_BGME, heads)
        seen, bias = dense_mask(mask, (batch, heads, queries, keys), q_BHND)
        o_BHNE = v_BGME.new_zeros(batch, heads, queries, v_BGME.shape[3])
        for b in range(batch):
            every = list(range(keys)) if mask.keys is None else mask.keys[b].nonzero()[:, 0].tolist()
            frames = sorted({m // self.patches for m in every})
            for i in range(queries):
                start, end = i * len(frames), (i + 1) * len(frames)
                count = start // queries + 1 if self.rounding == "floor" else (end + queries - 1) // queries
                reach = [m for t in frames[:count] for m in range(t * self.patches, (t + 1) * self.patches)]
                for h in range(heads):
                    ms = [m for m in reach if seen[b, h, i, m]]
                    scores = k_BHMD[b, h, ms] @ q_BHND[b, h, i] * size**-0.5 + bias[b, h, i, ms]
                    o_BHNE[b, h, i] = scores.softmax(0) @ v_BHME[b, h, ms]
        return o_BHNE

    def count(self, sizes: Sizes) -> Cost:
        """Two products for each pair under the staircase; the torch backend is counted over all pairs."""
        batch, heads, size = sizes.batch, self.site.heads, self.site.head_dim
        pairs = batch * heads * int(self.staircase(sizes.queries, sizes.keys).sum())
        return Cost(4 * pairs * size, 4 * batch * heads * sizes.queries * sizes.keys * size, pairs)
