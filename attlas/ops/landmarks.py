"""Landmarks: one more token behind every F ordinary ones, and the softmax in which it speaks for them.

Keys stand in blocks of P = F + 1 places, the landmark last. For query i in block c with scores s_ij

    w = softmax over { ordinary j <= i of block c } and { landmarks of the blocks b < c }
    u = softmax over the ordinary tokens of b, for each b < c on its own
    weight of j:   w_j in block c,   w_landmark(b) u_j in an earlier block b,   0 for a landmark

Since w_landmark(b) is proportional to exp(s_landmark(b)) and u_j to exp(s_j - lse_b), lse_b = log Σ_b exp(s_j), this is
one softmax over the ordinary tokens with s_landmark(b) - lse_b added to the scores of block b.

B batch, N queries, M keys, F ordinary tokens of a block, P = F + 1, K blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.ops.precision import as_written, wide


def insert_landmarks(x_BN: Tensor, every: int, landmark: Tensor | int) -> Tensor:
    """Tokens (B, N, ...) with a landmark behind every `every` of them, (B, N + N // every, ...).

    Args:
        x_BN: token numbers (B, N), or vectors (B, N, C).
        every: F. The tokens of a last block that is not full get no landmark yet.
        landmark: its number, or its vector (C).
    """
    _check(every)
    if not x_BN.is_floating_point() and not _holds(x_BN.dtype, landmark):
        raise BadInput(f"tokens in {x_BN.dtype} cannot hold the landmark {landmark}: give both one wide enough dtype")
    mark = torch.as_tensor(landmark, device=x_BN.device)
    if x_BN.ndim < 2 or mark.shape != x_BN.shape[2:]:
        raise BadInput(
            f"a landmark is one more token, a number among numbers (B, N) or a vector (C) among vectors (B, N, C): got "
            f"{tuple(mark.shape)} for {tuple(x_BN.shape)}"
        )
    whole = x_BN.shape[1] // every
    blocks, rest = x_BN[:, : whole * every].unflatten(1, (whole, every)), x_BN[:, whole * every :]
    marks = mark.to(x_BN.dtype).expand_as(blocks[:, :, :1])
    return torch.cat([torch.cat([blocks, marks], 2).flatten(1, 2), rest], 1)


def drop_landmarks(x_BN: Tensor, every: int) -> Tensor:
    """What `insert_landmarks` was given: logits of landmarks, which nobody predicts, are dropped in the same way."""
    _check(every)
    place = torch.arange(x_BN.shape[1], device=x_BN.device)
    return x_BN[:, place % (every + 1) < every]


def scaled_scores(q_ND: Tensor, k_MD: Tensor) -> Tensor:
    """q · k / √D (..., N, M), in float32 or better: in half precision sums overflow, and rounding decides choices."""
    with as_written(q_ND):
        return wide(q_ND) * q_ND.shape[-1] ** -0.5 @ wide(k_MD).mT


def grouped_softmax(scores_NM: Tensor, every: int, keep_M: Tensor | None = None) -> Tensor:
    """The weights of landmark attention, (..., N, M), in float32 or better; causal, rows sum to 1.

    Args:
        scores_NM: (..., N, M). Keys begin with the first place of a block; queries are the last N of the M places.
        every: F, ordinary tokens of a block.
        keep_M: (..., M) bool, False where a key is padding, in shape to be broadcast over the rows of scores. A block
            whose landmark is padding, or all whose tokens are, is seen by no later block.

    Returns:
        Weights; 0 in all of a row that sees nothing.
    """
    _check(every)
    queries, keys = scores_NM.shape[-2:]
    period = every + 1
    spare = -keys % period
    scores_NKP = F.pad(wide(scores_NM), (0, spare)).unflatten(-1, (-1, period))
    place_KP = torch.arange(keys + spare, device=scores_NM.device).unflatten(0, (-1, period))
    query_N11 = torch.arange(keys - queries, keys, device=scores_NM.device)[:, None, None]
    real_KP = place_KP < keys
    if keep_M is not None:
        real_KP = real_KP & F.pad(keep_M, (0, spare)).unflatten(-1, (-1, period)).unsqueeze(-3)
    token_NKF, mark_NK = scores_NKP[..., :-1], scores_NKP[..., -1]
    block_K, own_N1 = place_KP[:, 0] // period, query_N11[..., 0] // period
    reached_NK = real_KP[..., -1] & real_KP[..., :-1].any(-1) & (block_K < own_N1)
    reached_NK1 = reached_NK.unsqueeze(-1)
    own_NKF = (block_K == own_N1).unsqueeze(-1) & (place_KP[:, :-1] <= query_N11)
    seen_NKF = real_KP[..., :-1] & (own_NKF | reached_NK1)
    # A block that is not reached keeps its scores in the sum, so that no infinity can enter a gradient.
    lse_NK = token_NKF.masked_fill(~seen_NKF & reached_NK1, -torch.inf).logsumexp(-1)
    shift_NK = (mark_NK - lse_NK).where(reached_NK, 0)
    shifted = (token_NKF + shift_NK.unsqueeze(-1)).flatten(-2)
    seen = seen_NKF.flatten(-2)
    seeing = seen.any(-1, keepdim=True)
    weights = shifted.masked_fill(~seen & seeing, -torch.inf).softmax(-1) * seeing
    return F.pad(weights.unflatten(-1, (-1, every)), (0, 1)).flatten(-2)[..., :keys]


def _holds(dtype: torch.dtype, value: Tensor | int) -> bool:
    if isinstance(value, Tensor):
        return torch.promote_types(value.dtype, dtype) == dtype
    return torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max


def _check(every: int) -> None:
    if every < 1:
        raise BadInput(f"a landmark stands behind a count of tokens, at least 1, got {every}")
