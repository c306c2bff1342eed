"""Nyström attention: the softmax matrix rebuilt from its columns and rows at a few landmarks.

    o = softmax(s q K̃ᵀ) Z softmax(s Q̃ kᵀ) v + DWC(v),    Z ≈ A⁺,    A = softmax(s Q̃ K̃ᵀ),    s = 1 / √D

The landmarks Q̃, K̃ (B, H, m, D) are the means of queries and of keys over m runs of neighbouring tokens. The
pseudo-inverse of the m by m matrix A is made of matrix products alone,

    Z₀ = Aᵀ / (‖A‖₁ ‖A‖∞),    Z ← ¼ Z (13 I - A Z (15 I - A Z (7 I - A Z))),

and ‖A‖∞ = 1 because its rows are distributions. DWC is a convolution of `kernel` taps along the tokens, one filter per
head. Runs are equally long up to one token, the shorter ones first. With no more tokens than landmarks every token is
its own landmark and attention is exact: the formula is then softmax attention itself, computed as such.

q, k, v (B, H, N, D). Runs are counted over real tokens alone, so that padding moves no border and enters no mean; it
is 0 to the convolution. A sequence with fewer real tokens than landmarks leaves the first landmarks empty and unseen.
Rows of the matrix do not sum exactly to 1, and weights may be negative.

Time O(N m D + m³), memory O(N m), linear in N.

Source: Xiong et al., "Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention", 2021
(arXiv:2102.03902), official code mlpen/Nystromformer. Its first version divides all matrices of a batch by one
‖A‖₁; here each has its own, as in its later option. Runs of two lengths follow Shark-NLP/CAB.
"""

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.grid_conv import convolution_flops
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import attention_weights, blank_padding, softmax_attention

SPEC = Spec(
    name="nystrom",
    title="Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention",
    year=2021,
    paper="arXiv:2102.03902",
    equation="o = softmax(q K̃ᵀ) softmax(Q̃ K̃ᵀ)⁺ softmax(Q̃ kᵀ) v + DWC(v)",
    complexity="O(N m D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    examples=(
        Example(grid=(9,), params={"landmarks": 4, "kernel": 3}, parameters=4 * (16 * 16 + 16) + 2 * 3),
        Example(heads=4, grid=(2, 4), prefix=1, params={"landmarks": 3, "kernel": 0}, parameters=4 * (16 * 16 + 16)),
        Example(parameters=4 * (16 * 16 + 16) + 2 * 33),
    ),
)


def pseudo_inverse(a_mm: Tensor, iterations: int) -> Tensor:
    """The iterated pseudo-inverse of (..., m, m) matrices whose rows sum to 1."""
    z_mm = a_mm.mT / a_mm.sum(-2).amax(-1)[..., None, None]
    identity = torch.eye(a_mm.shape[-1], dtype=a_mm.dtype, device=a_mm.device)
    for _ in range(iterations):
        az_mm = a_mm @ z_mm
        z_mm = 0.25 * z_mm @ (13 * identity - az_mm @ (15 * identity - az_mm @ (7 * identity - az_mm)))
    return z_mm


@register(SPEC)
class Nystrom(Attend):
    """Attention through landmarks and a pseudo-inverse.

    Args:
        site: where it is installed.
        backend: of the two softmax attentions.
        landmarks: m, runs of tokens that are averaged.
        iterations: of the pseudo-inverse.
        kernel: taps of the convolution of the values, odd; 0 for no convolution.
    """

    def __init__(
        self, site: Site, backend: str = "auto", *, landmarks: int = 64, iterations: int = 6, kernel: int = 33
    ) -> None:
        super().__init__(site, backend)
        if landmarks < 1 or iterations < 0:
            raise BadInput(f"landmarks is at least 1 and iterations at least 0, got {landmarks} and {iterations}")
        if kernel < 0 or (kernel and kernel % 2 == 0):
            raise BadInput(f"the convolution is centred, so its kernel is odd (or 0 for none), got {kernel}")
        self.landmarks, self.iterations, self.kernel = landmarks, iterations, kernel
        self.convolution: nn.Module | None = None
        if kernel:
            self.convolution = nn.Conv2d(
                site.heads, site.heads, (kernel, 1), padding=(kernel // 2, 0), groups=site.heads, bias=False
            )

    def compute(self, q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, call: Call) -> Tensor:
        """Two attentions with m keys or queries, and the m by m matrix between them."""
        self._check_lengths(q_BHND, k_BHND)
        keep = call.mask.keys
        q, k, v = blank_padding(keep, q_BHND, k_BHND, v_BHNE)
        if q.shape[2] <= self.landmarks:
            o = softmax_attention(q, k, v, Mask(keys=keep), backend=self.backend)
        else:
            # Rounding errors are multiplied by the norm of Z, which no half precision can afford.
            with as_written(q):
                o = self._rebuilt(wide(q), wide(k), wide(v), keep)
        o = o.to(q_BHND.dtype)
        return o if self.convolution is None else o + self.convolution(v)

    def _check_lengths(self, q: Tensor, k: Tensor) -> None:
        if q.shape[2] != k.shape[2]:
            raise BadInput(
                f"nystrom takes the means of queries and keys over the same tokens, got {q.shape[2]} queries and "
                f"{k.shape[2]} keys: pass as many"
            )

    def _rebuilt(self, q: Tensor, k: Tensor, v: Tensor, keep_BN: Tensor | None) -> Tensor:
        run_bN, count_bm = self._runs(q, keep_BN)
        q_land, k_land = (self._means(x, run_bN, count_bm) for x in (q, k))
        gathered = softmax_attention(q_land, k, v, Mask(keys=keep_BN), backend=self.backend)
        spread = pseudo_inverse(attention_weights(q_land, k_land), self.iterations) @ gathered
        live_Bm = None
        if keep_BN is not None:
            # With so few real tokens each is a landmark or a landmark is empty, and attention is exact.
            few = keep_BN.sum(1) <= self.landmarks
            spread = self._means(v, run_bN, count_bm).where(few[:, None, None, None], spread)
            live_Bm = count_bm > 0
        return softmax_attention(q, k_land, spread, Mask(keys=live_Bm), backend=self.backend)

    def _runs(self, x_BHND: Tensor, keep_BN: Tensor | None) -> tuple[Tensor, Tensor]:
        """The run that each token belongs to, and how many real tokens a run has; of one sequence where all are."""
        m = self.landmarks
        keep = x_BHND.new_ones(1, x_BHND.shape[2], dtype=torch.bool) if keep_BN is None else keep_BN
        rank, total = keep.cumsum(1) - 1, keep.sum(1, keepdim=True)
        size = total // m
        short = m - total % m
        border = short * size
        ahead = (rank // size.clamp(min=1)).where(rank < border, short + (rank - border) // (size + 1))
        run = ahead.where(keep, 0)
        return run, torch.zeros_like(run[:, :1]).expand(-1, m).scatter_add(1, run, keep.long())

    def _means(self, x_BHND: Tensor, run_bN: Tensor, count_bm: Tensor) -> Tensor:
        batch, heads, _, size = x_BHND.shape
        sums = x_BHND.new_zeros(batch, heads, self.landmarks, size)
        sums = sums.scatter_add(2, run_bN[:, None, :, None].expand_as(x_BHND), x_BHND)
        return sums / count_bm[:, None, :, None].clamp(min=1)

    def oracle(self, q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, call: Call) -> Tensor:
        """Sequence by sequence on its real tokens, landmark by landmark; the convolution tap by tap."""
        self._check_lengths(q_BHND, k_BHND)
        outputs = []
        for b, (q_HND, k_HND, v_HNE) in enumerate(zip(q_BHND, k_BHND, v_BHNE, strict=True)):
            keep_N = q_HND.new_ones(q_HND.shape[1], dtype=torch.bool)
            if call.mask.keys is not None:
                keep_N = call.mask.keys[b]
            o_HNE = torch.zeros_like(v_HNE)
            if keep_N.any():
                o_HNE[:, keep_N] = self._sequence(q_HND[:, keep_N], k_HND[:, keep_N], v_HNE[:, keep_N])
            outputs.append(o_HNE)
        o = torch.stack(outputs)
        if isinstance(self.convolution, nn.Conv2d):
            tokens, reach = v_BHNE.shape[2], self.kernel // 2
            place = torch.arange(tokens, device=v_BHNE.device)
            tap_NN = place - place[:, None] + reach
            near_NN = (tap_NN >= 0) & (tap_NN < self.kernel)
            taps_HNN = self.convolution.weight[:, 0, :, 0][:, tap_NN.clamp(0, self.kernel - 1)] * near_NN
            (v,) = blank_padding(call.mask.keys, v_BHNE)
            o = o + torch.einsum("hnm,bhme->bhne", taps_HNN, v)
        return o

    def _sequence(self, q_HND: Tensor, k_HND: Tensor, v_HNE: Tensor) -> Tensor:
        tokens, scale = q_HND.shape[1], q_HND.shape[2] ** -0.5
        if tokens <= self.landmarks:
            return torch.softmax(q_HND @ k_HND.mT * scale, -1) @ v_HNE
        longer = tokens % self.landmarks
        sizes = [tokens // self.landmarks] * (self.landmarks - longer) + [tokens // self.landmarks + 1] * longer
        q_land, k_land = (torch.stack([run.mean(1) for run in x.split(sizes, 1)], 1) for x in (q_HND, k_HND))
        columns = torch.softmax(q_HND @ k_land.mT * scale, -1)
        rows = torch.softmax(q_land @ k_HND.mT * scale, -1)
        inverses = []
        for a in torch.softmax(q_land @ k_land.mT * scale, -1):
            one = torch.eye(len(a), dtype=a.dtype, device=a.device)
            z = a.T / (torch.linalg.matrix_norm(a, 1) * torch.linalg.matrix_norm(a, torch.inf))
            for _ in range(self.iterations):
                z = z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z))) / 4
            inverses.append(z)
        return columns @ torch.stack(inverses) @ rows @ v_HNE

    def count(self, sizes: Sizes) -> Cost:
        """Both attentions, A and its iterations, and the convolution's taps, of which some fall off the ends."""
        copies, tokens, size, m = sizes.batch * self.site.heads, sizes.queries, self.site.head_dim, self.landmarks
        pairs = copies * tokens * tokens
        flops = 4 * pairs * size
        if tokens > m:
            flops = copies * (8 * m * tokens * size + 4 * m * m * size + 8 * self.iterations * m**3)
        on_line, multiplied = convolution_flops(Grid((tokens,)), self.kernel) if self.kernel else (0, 0)
        return Cost(flops + copies * size * on_line, flops + copies * size * multiplied, pairs)
