"""Parts of mixture-of-head attention on pictures: gates of heads, and a bias that is a function of the distance.

B batch, N queries, M keys, C channels, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.ops.precision import as_written, wide

REACH, HIDDEN = 8, 512


class HeadGates(nn.Module):
    """A gate for each head of each token: all of the first heads, and those of the others that the token picks.

    g = w₁ h_s softmax(W_s x) over the shared heads, w₂ K p / Σ p over the K best of p = softmax(W_r x), 0 elsewhere,
    [w₁, w₂] = 2 softmax(W_b x). In training `auxiliary` is coefficient · h_r² mean_h(mean p_h · mean kept_h).

    Args:
        dim: C.
        heads: H.
        shared: h_s; a quarter of all by default.
        active: K; half of all by default, or what there is.
        coefficient: of the balance loss.

    Source: Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024 (arXiv:2410.11842).
    """

    def __init__(
        self, dim: int, heads: int, shared: int | None = None, active: int | None = None, coefficient: float = 0.01
    ) -> None:
        super().__init__()
        shared = heads // 4 if shared is None else shared
        if not 0 <= shared <= heads:
            raise BadInput(f"shared_heads is 0 to {heads}, the heads there are, got {shared}")
        routed = heads - shared
        active = min(max(1, heads // 2), routed) if active is None else active
        if not min(1, routed) <= active <= routed:
            raise BadInput(f"active_heads is {min(1, routed)} to {routed}, the heads that are not shared, got {active}")
        self.shared, self.routed, self.active, self.coefficient = shared, routed, active, coefficient
        self.auxiliary: Tensor | None = None
        self.pick = nn.Linear(dim, routed, bias=False) if routed else None
        self.weigh = nn.Linear(dim, shared, bias=False) if shared > 1 else None
        self.split = nn.Linear(dim, 2, bias=False) if shared and routed else None

    def forward(self, x_BNC: Tensor) -> Tensor:
        """The gates (B, N, H), in float32 or better: a rounded score could pick another head."""
        self.auxiliary = None
        with as_written(x_BNC):
            shared_BNS = wide(x_BNC.new_ones(*x_BNC.shape[:2], self.shared))
            if self.weigh is not None:
                shared_BNS = self.shared * _shares(self.weigh, x_BNC)
            if self.pick is None:
                return shared_BNS
            p_BNR = _shares(self.pick, x_BNC)
            kept_BNR = torch.zeros_like(p_BNR).scatter(-1, p_BNR.topk(self.active).indices, 1)
            if self.training:
                together_R = p_BNR.mean((0, 1)) * kept_BNR.mean((0, 1))
                self.auxiliary = self.coefficient * self.routed**2 * together_R.mean()
            routed_BNR = p_BNR * kept_BNR
            routed_BNR = self.active * routed_BNR / routed_BNR.sum(-1, keepdim=True)
            if self.split is None:
                return routed_BNR
            w_BN2 = 2 * _shares(self.split, x_BNC)
            return torch.cat([w_BN2[..., :1] * shared_BNS, w_BN2[..., 1:] * routed_BNR], -1)

    def oracle(self, x_BNC: Tensor) -> Tensor:
        """Token by token, the picked heads one after the other."""
        gates = []
        for x_C in x_BNC.flatten(0, 1):
            p_S = (self.weigh.weight @ x_C).softmax(0) if self.weigh else x_C.new_ones(1)
            w_shared, w_routed = 2 * (self.split.weight @ x_C).softmax(0) if self.split else x_C.new_ones(2)
            row = [w_shared * self.shared * p_S[h] for h in range(self.shared)]
            if self.pick is not None:
                p_R = (self.pick.weight @ x_C).softmax(0)
                chosen = p_R.argsort(descending=True)[: self.active].tolist()
                total = sum(p_R[r] for r in chosen)
                row += [
                    w_routed * self.active * p_R[r] / total if r in chosen else p_R[r] * 0 for r in range(self.routed)
                ]
            gates.append(torch.stack(row))
        self.forward(x_BNC)  # sets the balance loss
        return torch.stack(gates).unflatten(0, x_BNC.shape[:2])


def _shares(router: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(wide(x), wide(router.weight)).softmax(-1)


class DistanceBias(nn.Module):
    """A number for each head, query and key on a plane, from an MLP on the log of how far they are apart.

    b_h(q, k) = W₂ relu(W₁ t),  t = sign(d) log₂(|d| + 1) / 3,  d = 8 (q - k) / (L - 1) on either axis of length L

    Keys may be means over blocks of places; a key then stands in the middle of its block. L is the length that the
    layer is trained on, so that other pictures are measured by the same ruler.

    Args:
        heads: H.
        trained: L of both axes.

    Source: Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", 2023 (arXiv:2311.17132).
    """

    def __init__(self, heads: int, trained: Sequence[int]) -> None:
        super().__init__()
        self.trained = tuple(trained)
        self.fc1, self.fc2 = nn.Linear(2, HIDDEN), nn.Linear(HIDDEN, heads)

    def forward(self, queries: Sequence[int], keys: Sequence[int]) -> Tensor:
        """(H, N, M) for places on axes of these lengths; each distance is looked up once."""
        axes = [_distances(*lengths) for lengths in zip(queries, keys, strict=True)]
        weight = wide(self.fc1.weight)
        far = [
            weight.new_tensor([REACH * d / max(1, length - 1) for d in distances])
            for (distances, _), length in zip(axes, self.trained, strict=True)
        ]
        table_UV2 = torch.stack(torch.meshgrid(*far, indexing="ij"), -1)
        table_UV2 = table_UV2.sign() * (table_UV2.abs() + 1).log2() / 3
        with as_written(weight):
            hidden = F.relu(F.linear(table_UV2, weight, wide(self.fc1.bias)))
            bias_UVH = F.linear(hidden, wide(self.fc2.weight), wide(self.fc2.bias))
        rows, columns = (torch.tensor(index, device=weight.device) for _, index in axes)
        bias = bias_UVH[rows[:, None, :, None], columns[None, :, None, :]]
        return bias.permute(4, 0, 1, 2, 3).flatten(3).flatten(1, 2)

    def flops(self, queries: Sequence[int], keys: Sequence[int]) -> int:
        """Of one call."""
        entries = 1
        for lengths in zip(queries, keys, strict=True):
            entries *= len(_distances(*lengths)[0])
        return 2 * entries * (self.fc1.weight.numel() + self.fc2.weight.numel())


def _distances(queries: int, keys: int) -> tuple[list[float], list[list[int]]]:
    """Every distance between a place and the middle of a block of places, and which one each pair has."""
    middles = [(key * queries // keys + -(-(key + 1) * queries // keys) - 1) / 2 for key in range(keys)]
    known = sorted({query - middle for query in range(queries) for middle in middles})
    at = {distance: index for index, distance in enumerate(known)}
    return known, [[at[query - middle] for middle in middles] for query in range(queries)]
