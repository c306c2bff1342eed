"""The pointer network: an encoder and a decoder whose every output is one of its inputs.

    e_1..e_N = LSTM(points),   d_t = LSTM(what was pointed to last),   p(t) = softmax_m(vᵀ tanh(W₁ e_m + W₂ d_t))

The decoder starts from the encoder's last state and from a learned start vector; its next input is the point
itself that was pointed to, as it was given, never a blend of encoder states. Slot N, behind the points, is the
end symbol, a learned state e_N, so that answers may have any length.

B batch, N points, F features of a point, C channels, T steps, K beams, S slots, N + 1.

Source: Vinyals et al., "Pointer Networks", 2015 (arXiv:1506.03134): one layer of 256 or 512 units, trained by SGD
at rate 1, batches of 128, gradients clipped to a norm of 2. Reconstruction: its authors published no code. Weights
begin in U(-2 / √C, 2 / √C), ±0.125 at 256 units; with the published ±0.08 small networks stay on a plateau.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attlas.blocks.factory import mixer
from attlas.core.errors import BadInput
from attlas.mechanisms.softmax.pointer import Pointer

State = tuple[Tensor, Tensor]


class Decoded(NamedTuple):
    """Slots (B, T) pointed to, the end symbol N from where it was chosen on, and their log-probability (B,)."""

    slots: Tensor
    log_p: Tensor


class PointerNetwork(nn.Module):
    """Points to its inputs, one after the other.

    Args:
        features: F, such as two coordinates.
        dim: units of both LSTMs.
        clip: largest score of the pointer; None for scores as they are.
    """

    def __init__(self, features: int = 2, dim: int = 256, *, clip: float | None = None) -> None:
        super().__init__()
        pointer = mixer("pointer", dim, clip=clip)
        assert isinstance(pointer, Pointer)
        self.features = features
        self.encoder = nn.LSTM(features, dim, batch_first=True)
        self.decoder = nn.LSTM(features, dim, batch_first=True)
        self.pointer = pointer
        self.first = nn.Parameter(torch.empty(features))
        self.end = nn.Parameter(torch.empty(dim))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -2 * dim**-0.5, 2 * dim**-0.5)

    def forward(self, points_BNF: Tensor, targets_BT: Tensor, mask: Tensor | None = None) -> Tensor:
        """log p of every slot at every step, (B, T, N + 1), where the right slots were pointed to before.

        Args:
            points_BNF: the inputs.
            targets_BT: which slot is right at each step; N is the end, and what follows an end is not read.
            mask: (B, N) bool, True for real points, which stand before padding.
        """
        slots_BSC, real_BS, state = self._encode(points_BNF, mask)
        points = points_BNF.shape[1]
        if targets_BT.ndim != 2 or targets_BT.shape[0] != points_BNF.shape[0] or targets_BT.is_floating_point():
            raise BadInput(f"targets are integers (batch, steps), got {targets_BT.dtype} {tuple(targets_BT.shape)}")
        first_B1F = self.first.expand(points_BNF.shape[0], 1, -1)
        before = _pick(points_BNF, targets_BT[:, :-1].clamp(0, points - 1))
        d_BTC, _ = self.decoder(torch.cat([first_B1F, before], 1), state)
        return self.pointer.point(d_BTC, slots_BSC, real_BS)

    def _encode(self, points_BNF: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, State]:
        """States of the slots (B, N + 1, C), which of them are real, and the encoder's last state."""
        if points_BNF.ndim != 3 or points_BNF.shape[2] != self.features or not points_BNF.shape[1]:
            raise BadInput(f"points are (batch, points, {self.features} features), got {tuple(points_BNF.shape)}")
        batch, points = points_BNF.shape[:2]
        if mask is None:
            e_BNC, state = self.encoder(points_BNF)
            mask = points_BNF.new_ones(batch, points, dtype=torch.bool)
        else:
            if mask.dtype != torch.bool or mask.shape != (batch, points):
                raise BadInput(f"mask is bool ({batch}, {points}), got {mask.dtype} {tuple(mask.shape)}")
            if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
                raise BadInput("real points stand before padding, at least one in each row of mask")
            packed = pack_padded_sequence(points_BNF, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
            e, state = self.encoder(packed)
            e_BNC, _ = pad_packed_sequence(e, batch_first=True, total_length=points)
        slots_BSC = torch.cat([e_BNC, self.end.expand(batch, 1, -1)], 1)
        return slots_BSC, torch.cat([mask, mask[:, :1]], 1), state  # the end is as real as a first point

    @torch.no_grad()
    def decode(
        self, points_BNF: Tensor, mask: Tensor | None = None, beam: int = 1, visit_once: bool = False
    ) -> Decoded:
        """The most probable answer that a beam finds; it has at most N + 1 steps.

        Args:
            points_BNF: the inputs.
            mask: (B, N) bool, True for real points, which stand before padding.
            beam: K, how many beginnings are kept; 1 is greedy.
            visit_once: answers are tours: every real point once, and N steps. The end symbol is not read.
        """
        if beam < 1:
            raise BadInput(f"a beam keeps at least one beginning, got {beam}")
        slots_BSC, real_BS, state = self._encode(points_BNF, mask)
        batch, slots = real_BS.shape
        end = slots - 1
        # Beams lie along the batch; at first all but one are impossible, so that no two are the same.
        slots_KSC, points_KNF, free_KS = (x.repeat_interleave(beam, 0) for x in (slots_BSC, points_BNF, real_BS))
        h, c = (part.repeat_interleave(beam, 1) for part in state)
        log_p_BK = slots_BSC.new_full((batch, beam), -torch.inf)
        log_p_BK[:, 0] = 0
        chosen_KT = torch.empty(batch * beam, 0, dtype=torch.long, device=points_BNF.device)
        done_K = torch.zeros(batch * beam, dtype=torch.bool, device=points_BNF.device)
        given = self.first.expand(batch * beam, 1, -1)
        ending_S = torch.arange(slots, device=points_BNF.device) == end
        for _ in range(end if visit_once else slots):
            d, (h, c) = self.decoder(given, (h, c))
            if visit_once:
                done_K = ~free_KS[:, :end].any(1)
                free_KS = torch.where(ending_S, done_K.unsqueeze(1), free_KS)
            log_p_KS = self.pointer.point(d, slots_KSC, free_KS)[:, 0]
            after_end = torch.where(ending_S, 0.0, -torch.inf).to(log_p_KS)
            log_p_KS = torch.where(done_K.unsqueeze(1), after_end, log_p_KS)
            total = (log_p_BK.unsqueeze(-1) + log_p_KS.unflatten(0, (batch, beam))).flatten(1)
            log_p_BK, best = total.topk(beam)
            rows_BK = best // slots + beam * torch.arange(batch, device=best.device).unsqueeze(1)
            rows, slot = rows_BK.flatten(), (best % slots).flatten()
            chosen_KT = torch.cat([chosen_KT[rows], slot.unsqueeze(1)], 1)
            h, c, done_K, free_KS = h[:, rows], c[:, rows], done_K[rows] | (slot == end), free_KS[rows]
            if visit_once:
                free_KS = free_KS.scatter(1, slot.unsqueeze(1), False)
            given = _pick(points_KNF[rows], slot.clamp(max=end - 1).unsqueeze(1))
        return Decoded(chosen_KT.unflatten(0, (batch, beam))[:, 0], log_p_BK[:, 0])


def _pick(points_BNF: Tensor, slots_BT: Tensor) -> Tensor:
    """The points (B, T, F) that slots name."""
    return points_BNF.gather(1, slots_BT.unsqueeze(-1).expand(-1, -1, points_BNF.shape[2]))
