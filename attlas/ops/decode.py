"""Softmax attention of a few queries over a cache of keys and values: decoding.

B batch, H query heads, G key/value heads, N queries, M keys, D key size, E value size, P pages of a sequence.

A cache may be longer than what it holds: sequence b has `lengths[b]` keys, and its N queries are the last N of
them. The cache is (B, G, M, D), or pages (any number, G, page size, D) with a table of the pages of each sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.kernels.cpu import decode as kernel
from attlas.ops.dispatch import Backend, Op
from attlas.ops.precision import wide


def quantise_heads(x_BGMD: Tensor) -> tuple[Tensor, Tensor]:
    """int8 with one scale for every sequence and head, so that x is about int8 * scale.

    Returns:
        int8 in the shape of x, and float32 scales (B, G).
    """
    scales = x_BGMD.float().abs().amax((2, 3)) / 127
    steps = x_BGMD.float() / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None, None]
    return steps.round().to(torch.int8), scales


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _check_shape(what: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise BadInput(f"{what} should be {shape}, got {tuple(x.shape)}")


# Called for every token: what is not needed there costs more than it looks, since reading the cache has just driven
# everything else out of the processor's.
def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    keep: Tensor | None,
    pages: Tensor | None,
    scales: tuple[Tensor, Tensor] | None,
    causal: bool,
    window: int | None,
    sinks: int,
) -> None:
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4 or k_shape[:3] != v_shape[:3] or q_shape[3] != k_shape[3]:
        raise BadInput(f"q is (B, H, N, D), the cache (B, G, M, D) and (B, G, M, E), got {_shapes(q, k, v)}")
    batch, heads, queries, _ = q_shape
    sequences, groups, room, _ = k_shape
    if groups < 1 or heads % groups:
        raise BadInput(f"query heads must be a multiple of key/value heads, got {_shapes(q, k, v)}")
    if k.dtype != v.dtype or k.dtype not in (q.dtype, torch.int8):
        raise BadInput(f"the cache is {q.dtype} as the queries, or int8, got {k.dtype} and {v.dtype}")
    if (k.dtype == torch.int8) != (scales is not None):
        raise BadInput("an int8 cache needs scales=(of keys, of values), and only that; see quantise_heads")
    if window is not None and (window < 1 or not causal):
        raise BadInput(f"a window is at least 1 and needs causal=True, got {window}")
    if sinks < 0 or (sinks and window is None):
        raise BadInput(f"sinks are the first keys, seen beside a window, got {sinks} with window={window}")
    if pages is None and sequences != batch:
        raise BadInput(f"q and the cache need one batch size (or give pages), got {_shapes(q, k, v)}")
    if pages is not None:
        if pages.ndim != 2 or pages.shape[0] != batch or pages.is_floating_point():
            found = f"{pages.dtype} {tuple(pages.shape)} with {_shapes(q, k, v)}"
            raise BadInput(f"pages is (B, P), whole numbers, got {found}")
        room *= pages.shape[1]
    if lengths is not None:
        _check_shape("lengths", lengths, (batch,))
    if keep is not None:
        _check_shape("keep", keep, (batch, room))
        if keep.dtype != torch.bool:
            raise BadInput(f"keep is bool, True for real keys, got {keep.dtype}")
        if pages is not None:
            raise BadInput("keep goes with a cache that is not paged: leave padding out of the pages")
    if scales is not None:
        _check_shape("the scales of keys", scales[0], (batch, groups))
        _check_shape("the scales of values", scales[1], (batch, groups))
        if pages is not None:
            raise BadInput("the scales of an int8 cache belong to sequences, whose pages may be shared: do not page it")
    if torch.compiler.is_compiling():
        return  # what follows looks at values
    if lengths is None and room < queries:
        raise BadInput(f"the cache is too short: it holds {room} keys, and the {queries} queries are the last of them")
    if lengths is not None and batch:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > room:
            wrong = [f"sequence {b} has {n}" for b, n in enumerate(lengths.tolist()) if not 0 <= n <= room]
            raise BadInput(f"lengths are between 0 and the {room} keys that the cache has room for: {'; '.join(wrong)}")
    if pages is not None and pages.numel() and lengths is not None:
        used = torch.arange(pages.shape[1], device=pages.device) * k.shape[2] < lengths[:, None]
        wrong_pages = pages[used & ((pages < 0) | (pages >= k.shape[0]))]
        if wrong_pages.numel():
            raise BadInput(f"pages names page {int(wrong_pages[0])}, and the cache has {k.shape[0]}")


def _dense(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, pages: Tensor | None, scales: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The cache without pages and in the dtype of the queries, and the lengths."""
    if scales is not None:
        k, v = (x * s[..., None, None].to(q.dtype) for x, s in zip((k, v), scales, strict=True))
    if pages is not None:
        held = pages.clamp(0, k.shape[0] - 1).long()  # pages behind the end may name nothing
        k, v = (x[held].transpose(1, 2).flatten(2, 3) for x in (k, v))
    if lengths is None:
        lengths = torch.full((q.shape[0],), k.shape[2], device=q.device)
    return k, v, lengths


def _seen(
    lengths_B: Tensor, queries: int, keys: int, causal: bool, window: int | None, sinks: int, keep: Tensor | None
) -> Tensor:
    """Which query sees which key, (B, N, M)."""
    key = torch.arange(keys, device=lengths_B.device)
    position = lengths_B[:, None, None] - queries + torch.arange(queries, device=lengths_B.device)[:, None]
    seen = (key < lengths_B[:, None, None]).expand(-1, queries, -1)
    if causal:
        seen = seen & (key <= position)
    if window is not None:
        seen = seen & ((key > position - window) | (key < sinks))
    return seen if keep is None else seen & keep[:, None]


def _oracle(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    lengths_B: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    keep_BM: Tensor | None = None,
    pages_BP: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of a few queries over a cache; without a gradient on the CPU kernel.

    Args:
        q_BHND: the queries, the last N tokens of each sequence.
        k_BGMD, v_BGME: the cache, in the dtype of the queries or int8; H is a multiple of G.
        lengths_B: int64, how many keys each sequence has, its queries included; all M if None. Of a shorter
            sequence than there are queries, the first queries see nothing.
        causal: a query sees itself and what came before; else all keys of its sequence.
        window: a query sees itself and the window - 1 keys before it.
        sinks: first keys that every query sees beside its window.
        scale: of the scores, D ** -0.5 by default.
        keep_BM: bool, False where a key is padding.
        pages_BP: the cache is pages (any number, G, page size, D), and row b names those of sequence b in order.
            Only the pages that its length reaches are read.
        scales: of the keys and the values of an int8 cache, float32 (B, G) each; see `quantise_heads`.

    Returns:
        o (B, H, N, E) in the dtype of the queries, and the logarithm of the sum of exp(scores), (B, H, N), with
        which results over parts of a cache merge (`attlas.ops.flash.merge`). A query that sees nothing gives 0
        and -inf.

    Raises:
        BadInput: shapes that do not fit, lengths or pages out of range, a cache that is too short.
    """
    _check(q_BHND, k_BGMD, v_BGME, lengths_B, keep_BM, pages_BP, scales, causal, window, sinks)
    k_BGMD, v_BGME, lengths = _dense(q_BHND, k_BGMD, v_BGME, lengths_B, pages_BP, scales)
    batch, heads, queries, size = q_BHND.shape
    seen = _seen(lengths, queries, k_BGMD.shape[2], causal, window, sinks, keep_BM)
    o = q_BHND.new_zeros(batch, heads, queries, v_BGME.shape[3])
    lse = q_BHND.new_full((batch, heads, queries), -torch.inf)
    for b in range(batch):
        for h in range(heads):
            g = h * k_BGMD.shape[1] // heads
            for n in range(queries):
                visible = seen[b, n].nonzero().flatten()
                if len(visible):
                    scores = k_BGMD[b, g, visible] @ q_BHND[b, h, n] * (size**-0.5 if scale is None else scale)
                    o[b, h, n] = scores.softmax(0) @ v_BGME[b, g, visible]
                    lse[b, h, n] = scores.logsumexp(0)
    return o, lse


def _torch(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    lengths_B: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    keep_BM: Tensor | None = None,
    pages_BP: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    _check(q_BHND, k_BGMD, v_BGME, lengths_B, keep_BM, pages_BP, scales, causal, window, sinks)
    k_BGMD, v_BGME, lengths = _dense(q_BHND, k_BGMD, v_BGME, lengths_B, pages_BP, scales)
    (batch, heads, queries, size), groups, keys = q_BHND.shape, k_BGMD.shape[1], k_BGMD.shape[2]
    seen_BNM = _seen(lengths, queries, keys, causal, window, sinks, keep_BM)
    seen = seen_BNM[:, None, None]
    # What no query sees may hold anything, NaN included.
    unseen = ~seen_BNM.any(1)[:, None, :, None]
    k_BGMD, v_BGME = k_BGMD.masked_fill(unseen, 0), v_BGME.masked_fill(unseen, 0)
    q = q_BHND.reshape(batch, groups, -1, size)  # heads of a group are rows of one product: no key is copied
    scores = wide(q @ k_BGMD.transpose(-1, -2)) * (size**-0.5 if scale is None else scale)
    scores = scores.view(batch, groups, heads // groups, queries, keys).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp().to(v_BGME.dtype)
    o = weights.view(batch, groups, -1, keys) @ v_BGME
    return o.view(batch, heads, queries, -1), lse.view(batch, heads, queries)


def _cpu(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    lengths_B: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    keep_BM: Tensor | None = None,
    pages_BP: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    _check(q_BHND, k_BGMD, v_BGME, lengths_B, keep_BM, pages_BP, scales, causal, window, sinks)
    return kernel.softmax_decode(
        q_BHND,
        k_BGMD,
        v_BGME,
        None if lengths_B is None else lengths_B.long(),
        keep_BM,
        None if pages_BP is None else pages_BP.int(),
        None if scales is None else (scales[0].float(), scales[1].float()),
        scale=q_BHND.shape[3] ** -0.5 if scale is None else scale,
        causal=causal,
        window=window,
        sinks=sinks,
    )


softmax_decode = Op(
    "softmax_decode",
    Backend("cpu", _cpu, lambda q, k, v, *args, **kwargs: kernel.refuses(q, k, v)),
    Backend("torch", _torch),
    Backend("oracle", _oracle),
)
