"""Single-head attention on a part of the channels (SHViT).

    [x₁, x₂] = x,    [q, k, v] = BN(W_1 GN(x₁))
    o = softmax(q kᵀ / √D) v
    y = BN(W_2 ReLU([o, x₂]))

x₁ has the first P channels, about a fifth of them; x₂, the rest, is neither normalised nor projected before the last
product, in which the two meet. There is one head, with a width of D = 16 for queries and keys whatever the dim, and of
P for values. GN is one group over all tokens and channels of x₁, BN a batch normalisation; neither matrix has a bias of
its own.

x, y (B, N, C), q and k (B, N, D), v and o (B, N, P). Tokens have no position, so permuting them permutes the output,
and tokens without a place on the grid are tokens like others; in SHViT a depthwise convolution stands before. Padding
is no key and enters no statistics. GN looks at all tokens: there is no causal form.

Time O(N² (D + P) + N C²).

Source: Yun and Ro, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", 2024
(arXiv:2401.16456), official code ysj9909/SHViT, in which the last BN starts with a weight of 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.batch_norm import TokenBatchNorm
from attlas.ops.precision import wide
from attlas.ops.softmax import softmax_attention

SHARE = 3 / 14
"""Of the channels that attend, in the published networks on average."""

EPS = 1e-5


def _parameters(dim: int, attended: int, key_dim: int) -> int:
    """GN, W_1 with its BN, W_2 with its BN."""
    projected = 2 * key_dim + attended
    return 2 * attended + projected * (attended + 2) + dim * (dim + 2)


SPEC = Spec(
    name="shvit",
    title="SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
    year=2024,
    paper="arXiv:2401.16456",
    equation="y = W₂ ReLU([softmax(q kᵀ / √D) v, x₂]), [q, k, v] = W₁ GN(x₁)",
    complexity="O(N² (D + P) + N C²) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    examples=(
        Example(grid=(3, 4), dim=32, parameters=_parameters(32, 7, 16)),
        Example(grid=(2, 3), prefix=1, params={"attended": 6, "key_dim": 4}, parameters=_parameters(16, 6, 4)),
    ),
)


@register(SPEC)
class SHViT(Mixer):
    """Single-head attention on a part of the channels.

    Args:
        site: where it is installed.
        backend: of `softmax_attention`.
        attended: P; 3 / 14 of the channels by default.
        key_dim: D.
    """

    def __init__(self, site: Site, backend: str = "auto", *, attended: int | None = None, key_dim: int = 16) -> None:
        super().__init__(site, backend)
        dim = site.dim
        self.attended = max(1, round(SHARE * dim)) if attended is None else attended
        self.key_dim = key_dim
        if not 1 <= self.attended <= dim or key_dim < 1:
            raise BadInput(
                f"attended counts channels of {dim} and key_dim those of a key, both at least 1, got {attended} and "
                f"{key_dim}"
            )
        self.norm = nn.GroupNorm(1, self.attended, EPS)
        self.qkv_proj = nn.Linear(self.attended, 2 * key_dim + self.attended, bias=False)
        self.qkv_norm = TokenBatchNorm(2 * key_dim + self.attended)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.out_norm = TokenBatchNorm(dim)

    def _parts(self, x_BNC: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """x₁ and x₂, 0 where there is padding."""
        x_BNC = x_BNC if keep is None else x_BNC.where(keep.unsqueeze(-1), 0)
        first, rest = x_BNC.split((self.attended, self.site.dim - self.attended), -1)
        return first, rest

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Norm, attend, join, project."""
        keep = call.mask.keys
        x1, x2 = self._parts(x_BNC, keep)
        qkv = self.qkv_norm(self.qkv_proj(self._group_norm(x1, keep)), keep)
        q, k, v = (part.unsqueeze(1) for part in qkv.split((self.key_dim, self.key_dim, self.attended), -1))
        o_BNP = softmax_attention(q, k, v, Mask(keys=keep), backend=self.backend).squeeze(1)
        return self.out_norm(self.out_proj(F.relu(torch.cat([o_BNP, x2], -1))), keep)

    def _group_norm(self, x_BNP: Tensor, keep: Tensor | None) -> Tensor:
        """One group over the real tokens."""
        if keep is None:
            return F.group_norm(x_BNP.mT, 1, self.norm.weight, self.norm.bias, EPS).mT
        x, real_BN1 = wide(x_BNP), keep.unsqueeze(-1)
        count = (real_BN1.sum(1, keepdim=True) * self.attended).clamp(min=1)
        mean = x.sum((1, 2), keepdim=True) / count
        variance = (x - mean).square().where(real_BN1, 0).sum((1, 2), keepdim=True) / count
        return ((x - mean) * (variance + EPS).rsqrt() * self.norm.weight + self.norm.bias).to(x_BNP.dtype)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Picture by picture, on its real tokens alone."""
        keep = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool) if call.mask.keys is None else call.mask.keys
        x1, x2 = self._parts(x_BNC, keep)
        normed = torch.zeros_like(x1)
        for picture, real in enumerate(keep):
            tokens = x1[picture, real]
            centred = tokens - tokens.mean() if len(tokens) else tokens
            deviation = (centred.square().mean() + EPS).sqrt() if len(tokens) else 1.0
            normed = normed.index_put((torch.tensor(picture), real), centred / deviation)
        normed = normed * self.norm.weight + self.norm.bias
        qkv = self.qkv_norm.oracle(torch.einsum("bnp,fp->bnf", normed, self.qkv_proj.weight), keep)
        q, k, v = qkv[..., : self.key_dim], qkv[..., self.key_dim : 2 * self.key_dim], qkv[..., 2 * self.key_dim :]
        weights = (torch.einsum("bnd,bmd->bnm", q, k) / self.key_dim**0.5).exp() * keep.unsqueeze(1)
        o = torch.einsum("bnm,bmp->bnp", weights, v) / weights.sum(-1, keepdim=True).clamp(min=1e-300)
        joined = torch.cat([o, x2], -1).clamp(min=0)
        return self.out_norm.oracle(torch.einsum("bnc,fc->bnf", joined, self.out_proj.weight), keep)

    def count(self, sizes: Sizes) -> Cost:
        """Two projections, and two products per pair of tokens."""
        tokens, dim, projected = sizes.queries, self.site.dim, 2 * self.key_dim + self.attended
        pairs = sizes.batch * tokens**2
        linear = sizes.batch * tokens * (self.attended * projected + dim * dim)
        flops = 2 * (linear + pairs * (self.key_dim + self.attended))
        return Cost(flops, flops, pairs)
