"""Token coordinated prompt attention (TCPA): every token sees the prompts that match it.

    keys, values of [x; P],  P = [P^c; P^m]              groups of prompts for class and for image tokens
    a_n = softmax(q_n [k; k_P]ᵀ / √D + bias)             over tokens and all prompts
    o_n = Σ_m a_nm v_m + Σ_j M_nj a_nj v_Pj,   M_nj = 1 where token n chose the group of prompt j

A class token (a prefix token of the grid) chooses among the groups of P^c, an image token among those of P^m: the
`chosen` whose keys have the largest cosine to the token as it comes, before the norm. What is not chosen stays in
the denominator: the published code masks behind the softmax and does not normalise again, so that keys of
prompts matter where their values do not. `renormalise=True` masks before it. In training `auxiliary` is

    matching (mean(1 - cos) over choices of class tokens + the same of image tokens)

over real tokens. For the first epochs groups are chosen at random (`layer.random = True`), so that all learn.
Prompts take part in the layer and are gone behind it.

x (B, N, C) tokens as they come: the layer has the LayerNorm before it, which the prompts share; with it and the
projections of a trained ViT frozen, `class_pool` and `image_pool` are what is learned, 2 · 20 · (1 + 4) C
numbers by default. P prompts: time O(N (N + P) C), and O(N C) per group for the matching.

Source: Liu et al., "Token Coordinated Prompt Attention is Needed for Visual Prompting", 2025
(arXiv:2505.02406), official code zhoujiahuan1991/ICML2025-TCPA (the full method, "TDVP").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput, share
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import EVERY_MASK, Example, Pattern, Spec
from attlas.ops.pairs import dense_mask
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import attention_weights

SPEC = Spec(
    name="tcpa",
    title="Token Coordinated Prompt Attention is Needed for Visual Prompting",
    year=2025,
    paper="arXiv:2505.02406",
    equation="o = (softmax(q [k; k_P]ᵀ / √D) ⊙ [1; M]) [v; v_P],  M = the prompts that match a token",
    complexity="O(N (N + P) D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    masks=EVERY_MASK,
    class_token=True,
    examples=(
        Example(
            prefix=1,
            params={"groups": 5, "prompts": 2, "chosen": 2},
            parameters=4 * (16 * 16 + 16) + 2 * 16 + 2 * 5 * (1 + 2) * 16,
        ),
        Example(
            heads=4,
            grid=(2, 3),
            prefix=2,
            params={"groups": 4, "prompts": 3, "chosen": 1, "renormalise": True},
            parameters=4 * (16 * 16 + 16) + 2 * 16 + 2 * 4 * (1 + 3) * 16,
        ),
    ),
)


class _Pool(nn.Module):
    """Groups of prompts (G, L, C), each with a key (G, C) that tokens are matched with."""

    def __init__(self, groups: int, prompts: int, dim: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(groups, prompts, dim).uniform_(-1, 1))
        self.keys = nn.Parameter(torch.empty(groups, dim).uniform_(-1, 1))

    def choose(self, x_BNC: Tensor, count: int, random: bool) -> tuple[Tensor, Tensor]:
        """Which groups every token chooses, bool (B, N, G), and 1 - cosine of the choices, (B, N, count)."""
        with as_written(x_BNC):  # a rounded cosine could choose another group
            cosine = F.normalize(wide(x_BNC), dim=-1) @ F.normalize(wide(self.keys), dim=-1).T
        which = (torch.rand_like(cosine) if random else cosine).topk(count).indices
        return torch.zeros_like(cosine, dtype=torch.bool).scatter(-1, which, True), 1 - cosine.gather(-1, which)


@register(SPEC)
class TCPA(Mixer):
    """Attention with prompts that match each token.

    Args:
        site: where it is installed; heads divide dim, and calls have a grid with a class token.
        backend: `auto`, `torch` or `oracle`.
        groups: of prompts, for class tokens and for image tokens each.
        prompts: in a group.
        chosen: how many groups a token sees.
        matching: coefficient of the matching loss.
        random: choose at random in training; set `layer.random = False` after the first epochs (5, as published).
        renormalise: mask before the softmax instead of behind it.
        prompt_dropout: on the prompts, in training.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        groups: int = 20,
        prompts: int = 4,
        chosen: int = 3,
        matching: float = 0.1,
        random: bool = False,
        renormalise: bool = False,
        prompt_dropout: float = 0.1,
    ) -> None:
        super().__init__(site, backend)
        if site.dim % site.heads:
            raise BadInput(f"heads must divide dim: {site.dim} channels do not split into {site.heads} heads")
        if groups < 1 or prompts < 1:
            raise BadInput(f"groups and prompts are counts of at least 1, got {groups} and {prompts}")
        if not 1 <= chosen <= groups:
            raise BadInput(f"chosen is 1 to {groups}, the groups there are, got {chosen}")
        if matching < 0:
            raise BadInput(f"matching is a coefficient and cannot be negative, got {matching}")
        self.chosen, self.matching = chosen, matching
        self.random, self.renormalise = random, renormalise
        self.prompt_dropout = share("prompt_dropout", prompt_dropout)
        self.norm = nn.LayerNorm(site.dim, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(site.dim, site.dim) for _ in range(4))
        self.class_pool, self.image_pool = (_Pool(groups, prompts, site.dim) for _ in range(2))

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """All prompts as keys, then the choice."""
        batch, tokens = x_BNC.shape[:2]
        x_BNC = _real(x_BNC, call.mask)
        chosen_BNP = self._choices(x_BNC, call)
        prompts_BPC = F.dropout(self._prompts().expand(batch, -1, -1), self.prompt_dropout, self.training)
        x_BNC = self.norm(x_BNC)
        keys_BMC = torch.cat([x_BNC, self.norm(prompts_BPC)], 1)
        q, k, v = (
            proj(source).unflatten(-1, (self.site.heads, -1)).transpose(1, 2)
            for proj, source in ((self.q_proj, x_BNC), (self.k_proj, keys_BMC), (self.v_proj, keys_BMC))
        )
        seen_BHNM = call.mask.pairs(tokens, tokens, x_BNC.device)
        mask = Mask() if call.mask.bias is None else Mask.biased(F.pad(call.mask.bias, (0, chosen_BNP.shape[2])))
        if seen_BHNM is None:
            seen_BHNM = chosen_BNP.new_ones(1, 1, tokens, tokens)
        visible_BHNM = F.pad(seen_BHNM, (0, chosen_BNP.shape[2]), value=True)
        allowed_BHNM = F.pad(chosen_BNP[:, None], (tokens, 0), value=True)
        inside = visible_BHNM & allowed_BHNM if self.renormalise else visible_BHNM
        weights_BHNM = attention_weights(q, k, mask & Mask.pairs_(inside)).where(allowed_BHNM, 0)
        return self.out_proj((weights_BHNM @ v).transpose(1, 2).flatten(2))

    def _prompts(self) -> Tensor:
        return torch.cat([self.class_pool.prompts, self.image_pool.prompts]).flatten(0, 1)

    def _choices(self, x_BNC: Tensor, call: Call) -> Tensor:
        """Which prompts every token sees, (B, N, P). In training this sets the matching loss."""
        self._check_prefix(call)
        choices, loss = [], x_BNC.new_zeros(())
        real = [None, None] if call.mask.keys is None else call.grid.split(call.mask.keys, -1)
        pools = (self.class_pool, self.image_pool)
        for pool, part_BNC, real_BN in zip(pools, call.grid.split(x_BNC), real, strict=True):
            choice_BNG, distance_BNK = pool.choose(part_BNC, self.chosen, self.random and self.training)
            choices.append(choice_BNG.repeat_interleave(pool.prompts.shape[1], -1))
            distance_BN = distance_BNK.mean(-1)
            counted = torch.ones_like(distance_BN, dtype=torch.bool) if real_BN is None else real_BN
            loss = loss + distance_BN.where(counted, 0).sum() / counted.sum().clamp(min=1)
        if self.training:
            self.auxiliary = self.matching * loss
        mine, other = choices[0].shape[2], choices[1].shape[2]
        return torch.cat([F.pad(choices[0], (0, other)), F.pad(choices[1], (mine, 0))], 1)

    def _check_prefix(self, call: Call) -> None:
        if not call.grid.prefix:
            raise BadInput(
                f"tcpa has prompts of their own for class tokens and the {call.grid} has none: pass "
                f"grid=Grid({call.grid.shape}, prefix=1) and the class token in front"
            )

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Token by token and head by head, with the 0/1 mask written out."""
        self._check_prefix(call)
        x_BNC = _real(x_BNC, call.mask)
        tokens, size = x_BNC.shape[1], self.site.dim // self.site.heads
        length, groups = self.class_pool.prompts.shape[1], len(self.class_pool.keys)
        seen, bias = dense_mask(call.mask, (x_BNC.shape[0], self.site.heads, tokens, tokens), x_BNC)
        sequences, distances = [], ([], [])  # type: tuple[list[Tensor], tuple[list[Tensor], list[Tensor]]]
        for b in range(x_BNC.shape[0]):
            prompts = F.dropout(self._prompts(), self.prompt_dropout, self.training)
            normed = self.norm(torch.cat([x_BNC[b], prompts]))
            q, k, v = self.q_proj(normed[:tokens]), self.k_proj(normed), self.v_proj(normed)
            rows = []
            for n in range(tokens):
                image = n >= call.grid.prefix
                keys = (self.image_pool if image else self.class_pool).keys
                cosines = F.cosine_similarity(x_BNC[b, n], keys, -1, eps=1e-12)
                best = torch.randperm(groups) if self.random and self.training else cosines.argsort(descending=True)
                best = best[: self.chosen]
                if call.mask.keys is None or call.mask.keys[b, n]:
                    distances[image].append((1 - cosines[best]).mean())
                passes = k.new_zeros(len(k))
                passes[:tokens] = 1
                for group in best.tolist():
                    start = tokens + (groups * image + group) * length
                    passes[start : start + length] = 1
                heads = []
                for h in range(self.site.heads):
                    head = slice(h * size, (h + 1) * size)
                    scores = k[:, head] @ q[n, head] / size**0.5 + F.pad(bias[b, h, n], (0, len(prompts)))
                    visible = F.pad(seen[b, h, n], (0, len(prompts)), value=True)
                    visible = visible & (passes > 0) if self.renormalise else visible
                    heads.append((scores.masked_fill(~visible, -torch.inf).softmax(0) * passes) @ v[:, head])
                rows.append(torch.cat(heads))
            sequences.append(torch.stack(rows))
        if self.training:
            self.auxiliary = self.matching * torch.stack([torch.stack(part).mean() for part in distances]).sum()
        return self.out_proj(torch.stack(sequences))

    def count(self, sizes: Sizes) -> Cost:
        """Projections, matching and attention; values of prompts that were not chosen are not needed."""
        dim, batch, tokens = self.site.dim, sizes.batch, sizes.queries
        groups, length = self.class_pool.prompts.shape[:2]
        prompts, mine = 2 * groups * length, self.chosen * length
        projections = 2 * batch * dim * dim * (4 * tokens + 2 * prompts)
        matching = 2 * batch * tokens * groups * dim
        scores = tokens + (mine if self.renormalise else prompts)
        flops = projections + matching + 2 * batch * tokens * (scores + tokens + mine) * dim
        executed = projections + matching + 4 * batch * tokens * (tokens + prompts) * dim
        return Cost(flops, executed, batch * self.site.heads * tokens * (tokens + mine))


def _real(x_BNC: Tensor, mask: Mask) -> Tensor:
    """The tokens with 1 as padding, which may hold anything, even NaN; to 0 all keys would be equally near."""
    return x_BNC if mask.keys is None else x_BNC.where(mask.keys[..., None], 1)
