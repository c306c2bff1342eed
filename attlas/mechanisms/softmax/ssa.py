"""Stochastically subsampled self-attention: in training a layer sees a random part of its sources.

    o_n = softmax_{m in R}(q_n . k_m / sqrt(D) + bias_nm) v_m,    R a random subset of the keys

Every layer draws a subset for every sequence, and all queries and heads share it, so that keys and values are
gathered before attention and its cost and memory fall to the kept share. The softmax normalises over what is
left; nothing is scaled. So a network trains many information pathways through itself, each of which is a
smaller network. A causal query sees its own token beside the subset, which would else be empty for the first.

With `window` the subsets are local: queries are cut into blocks of half a window, and each block draws its
subset from the window around it (behind it, if causal). Padding is drawn last.

Evaluation is dense, softmax attention over all keys. `subsampling` turns the subsets on there too, and
`self_ensemble` averages predictions over passes that each see other subsets. The published recipe ends with
some dense training, which is this layer in eval mode, or softmax attention with the same weights.

q (B, H, N, D), k (B, G, M, D), v (B, G, M, E). Time and memory of attention O(N r M) in training, r the share.
It has no parameters; the state is a key/value cache. `Cost` is that of the dense layer.

Source: Hussain et al., "The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles", 2023
(arXiv:2306.01705). The official repository shamim-hussain/ssa holds no code; the unbiased subset is the
`source_dropout` of the authors' shamim-hussain/tgt. The causal query's own token and the blocks of the local
form are a reconstruction.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import CachedAttend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Spec
from attlas.ops.pairs import pair_cost
from attlas.ops.softmax import attention_weights, repeat_heads, softmax_attention

SPEC = Spec(
    name="ssa",
    title="The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles",
    year=2023,
    paper="arXiv:2306.01705",
    equation="o = softmax(q k_Rᵀ / √D + bias) v_R,  R random in training",
    complexity="O(r N² D) time in training, O(N² D) after, O(N D) state",
    patterns=ALL_PATTERNS,
    masks=EVERY_MASK,
    streams=True,
    grouped=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(
            heads=4,
            kv_heads=2,
            grid=(9,),
            params={"share": 0.5, "window": 4},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8),
        ),
    ),
    reconstruction=True,
)


@register(SPEC)
class SSA(CachedAttend):
    """Softmax attention over a random subset of the keys in training.

    Args:
        site: where it is installed.
        backend: of the dense `softmax_attention`.
        share: of the keys that are kept; in the paper a quarter to an eighth.
        window: positions that the subset of a block of queries is drawn from, even; all by default.

    Attributes:
        sampling: whether subsets are drawn in eval mode too; see `subsampling`.
    """

    def __init__(self, site: Site, backend: str = "auto", *, share: float = 0.25, window: int | None = None) -> None:
        super().__init__(site, backend)
        if not 0 < share <= 1:
            raise BadInput(f"share is the part of the keys that is kept, in (0, 1], got {share}")
        if window is not None and (window < 2 or window % 2):
            raise BadInput(f"window is an even number of positions, two blocks of queries, got {window}")
        self.share, self.window = share, window
        self.sampling = False

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """All keys, or the gathered ones."""
        if not (self.training or self.sampling):
            return softmax_attention(q_BHND, k_BGMD, v_BGME, call.mask, backend=self.backend)
        return self._gathered(q_BHND, k_BGMD, v_BGME, call.mask)

    def _gathered(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, mask: Mask) -> Tensor:
        """Block by block of queries (S blocks of T), the K keys of its subset and in front of them the own one."""
        batch, heads, queries, size = q_BHND.shape
        keys = k_BGMD.shape[2]
        drawn_BSK, block = self.subsets(batch, queries, keys, mask, q_BHND.device)
        blocks = drawn_BSK.shape[1]
        own_ST = torch.arange(blocks * block, device=q_BHND.device).view(blocks, block) + keys - queries
        places = drawn_BSK.unsqueeze(2).expand(-1, -1, block, -1)  # of keys; outside 0 to M - 1 where there is none
        real = (places >= 0) & (places < keys)
        if mask.causal:
            own = own_ST.expand(batch, -1, -1).unsqueeze(-1)
            real = torch.cat([(own >= 0) & (own < keys), real & (places < own)], -1)
            places = torch.cat([own, places], -1)
        places = places.clamp(0, keys - 1)
        if mask.keys is not None:
            real = real & mask.keys.gather(1, places.flatten(1)).view(places.shape)

        def cut(x: Tensor) -> Tensor:
            """(..., N, M) to what the blocks see of it, (..., S, T, K)."""
            x = F.pad(x, (0, 0, 0, blocks * block - queries)).unflatten(-2, (blocks, block))
            at = places.unsqueeze(1)
            return x.expand(batch, *x.shape[1:]).gather(-1, at.expand(-1, x.shape[1], -1, -1, -1))

        seen = Mask(rule=mask.rule).pairs(queries, keys, q_BHND.device)
        real_BHSTK = real.unsqueeze(1) if seen is None else real.unsqueeze(1) & cut(seen)
        bias_BHSTK = None if mask.bias is None else cut(mask.bias)
        k, v = repeat_heads(k_BGMD, heads), repeat_heads(v_BGME, heads)
        q_BHSTD = F.pad(q_BHND, (0, 0, 0, blocks * block - queries)).unflatten(2, (blocks, block))
        subset = drawn_BSK.clamp(0, keys - 1).flatten(1)[:, None, :, None]
        k_BHSKD, v_BHSKE = (
            x.gather(2, subset.expand(-1, heads, -1, x.shape[3])).unflatten(2, drawn_BSK.shape[1:]) for x in (k, v)
        )
        scores = q_BHSTD @ k_BHSKD.transpose(-1, -2)
        if mask.causal:
            at = own_ST.flatten().clamp(0, keys - 1)
            own_k, own_v = (x[:, :, at].unflatten(2, (blocks, block)) for x in (k, v))
            scores = torch.cat([(q_BHSTD * own_k).sum(-1, keepdim=True), scores], -1)
        scores = scores * size**-0.5
        if bias_BHSTK is not None:
            scores = scores + bias_BHSTK
        seeing = real_BHSTK.any(-1, keepdim=True)
        weights = (scores.masked_fill(~real_BHSTK & seeing, -torch.inf).softmax(-1) * seeing).to(v.dtype)
        o = weights[..., 1:] @ v_BHSKE + weights[..., :1] * own_v if mask.causal else weights @ v_BHSKE
        return o.flatten(2, 3)[:, :, :queries].to(v.dtype)

    def subsets(self, batch: int, queries: int, keys: int, mask: Mask, device: torch.device) -> tuple[Tensor, int]:
        """Draw the keys that each block of queries sees.

        Returns:
            Their places (B, S, K), below 0 or from `keys` on where a window reaches over the end, and the queries
            of a block.
        """
        block, width = (queries, keys) if self.window is None else (self.window // 2, self.window)
        blocks = -(-queries // block)
        first = torch.arange(blocks, device=device).unsqueeze(1) * block
        if self.window is not None:
            first = first + keys - queries - (block if mask.causal else block // 2)
        places_SW = first + torch.arange(width, device=device)
        inside = ((places_SW >= 0) & (places_SW < keys)).expand(batch, -1, -1)
        if mask.keys is not None:
            inside = inside & mask.keys[:, places_SW.clamp(0, keys - 1)]
        lots_BSW = torch.rand(batch, blocks, width, device=device) + inside
        count = max(1, round(self.share * width))
        drawn = lots_BSW.topk(count).indices
        return places_SW.expand(batch, -1, -1).gather(-1, drawn), block

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """The mask form: dense attention in which all but the subset is not seen."""
        mask, queries, keys = call.mask, q_BHND.shape[2], k_BGMD.shape[2]
        if self.training or self.sampling:
            drawn_BSK, block = self.subsets(q_BHND.shape[0], queries, keys, mask, q_BHND.device)
            seen = q_BHND.new_zeros(q_BHND.shape[0], queries, keys, dtype=torch.bool)
            for b, drawn_SK in enumerate(drawn_BSK.tolist()):
                for n in range(queries):
                    seen[b, n, [m for m in drawn_SK[n // block] if 0 <= m < keys]] = True
                    if mask.causal and n + keys >= queries:
                        seen[b, n, n + keys - queries] = True
            mask = mask & Mask.pairs_(seen)
        return attention_weights(q_BHND, k_BGMD, mask) @ repeat_heads(v_BGME, q_BHND.shape[1])

    def count(self, sizes: Sizes) -> Cost:
        """Of the dense layer: two products per visible pair."""
        return pair_cost(self.site, sizes)


@contextmanager
def subsampling(model: nn.Module) -> Iterator[None]:
    """Inside, the `ssa` layers of a model draw subsets in eval mode too."""
    layers = [module for module in model.modules() if isinstance(module, SSA)]
    if not layers:
        raise BadInput("no layer of this model draws subsets: build its attention with attlas.mixer('ssa', ...)")
    before = [layer.sampling for layer in layers]
    try:
        for layer in layers:
            layer.sampling = True
        yield
    finally:
        for layer, sampling in zip(layers, before, strict=True):
            layer.sampling = sampling


def self_ensemble(
    model: nn.Module, passes: int, read: Callable[[Any], Tensor] = lambda output: output
) -> Callable[..., Tensor]:
    """The model as an ensemble of its subsampled selves: a function that averages over passes.

    Args:
        model: with `ssa` layers; put it into eval mode.
        passes: how many selves are averaged. With one seed they are the same ones.
        read: what of the model's output is averaged, such as `lambda logits: logits.softmax(-1)`.
    """
    if passes < 1:
        raise BadInput(f"an ensemble takes at least one pass, got {passes}")

    def average(*args: Any, **kwargs: Any) -> Tensor:
        with subsampling(model):
            total = read(model(*args, **kwargs))
            for _ in range(passes - 1):
                total = total + read(model(*args, **kwargs))
        return total / passes

    return average
