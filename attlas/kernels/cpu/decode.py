"""The C++ kernel of softmax attention over a cache as a torch operator, with fake and FLOP formula.

B batch, H query heads, G key/value heads, N queries, M keys, D key size, E value size, P pages, S keys of a page.
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from attlas.kernels.cpu import build
from attlas.kernels.cpu.arrays import dense_rows, places

UNLIMITED = 2**62


def softmax_decode(
    q_BHND: Tensor,
    k: Tensor,
    v: Tensor,
    lengths_B: Tensor | None = None,
    keep_BM: Tensor | None = None,
    pages_BP: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    sinks: int = 0,
) -> tuple[Tensor, Tensor]:
    """As `attlas.ops.decode.softmax_decode`, which checks the arguments. No gradient.

    Returns:
        o (B, H, N, E), and the logarithm of the sum of exp(scores), float32 (B, H, N).
    """
    key_scales, value_scales = (None, None) if scales is None else scales
    reach = UNLIMITED if window is None else window
    return _operator(q_BHND, k, v, lengths_B, keep_BM, pages_BP, key_scales, value_scales, scale, causal, reach, sinks)


def refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernel cannot take these, or None."""
    if not (q.is_cpu and k.is_cpu and v.is_cpu):
        return f"it runs on the CPU, and the queries are on {q.device}"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in float32 or bfloat16, not {q.dtype}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no gradient"
    usable, detail = _status()
    return None if usable else detail


_status = functools.cache(functools.partial(build.status, "decode"))  # asked at every layer of every token
_status._dynamo_marked_constant = True  # type: ignore[attr-defined]


_PROBLEM = struct.Struct("=16qf4i")  # `Problem`, in its order


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = build.load("decode")
    loaded.attlas_decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return loaded


library.define(
    "attlas::softmax_decode",
    "(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? keep, Tensor? pages, Tensor? key_scales, "
    "Tensor? value_scales, float scale, bool causal, int window, int sinks) -> (Tensor, Tensor)",
)


# Not a `custom_op`: the Python that wraps one takes a tenth of the time of reading a cache of 64 MiB.
@library.impl("attlas::softmax_decode", "cpu")
def _decode(*arguments: Any) -> tuple[Tensor, Tensor]:
    run, o, lse, _ = prepare(*arguments)
    if run():
        raise MemoryError("the decoding kernel found no memory for its scratch")
    return o, lse


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    keep: Tensor | None = None,
    pages: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    scale: float = 1.0,
    causal: bool = True,
    window: int = UNLIMITED,
    sinks: int = 0,
) -> tuple[Callable[[], int], Tensor, Tensor, tuple[Tensor | None, ...]]:
    """The call of the C++ function on checked arguments, which can be timed without what Python adds.

    Returns:
        the call, which gives 1 where it found no memory, else 0; o and the logarithm that it writes; what it reads,
        which the caller keeps alive.
    """
    o, lse = _results(q, k, v)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    dense = [x if x is None else x.contiguous() for x in (lengths, pages, keep, key_scales, value_scales)]
    page_size, count = (0, 0) if pages is None else (k.shape[2], pages.shape[1])
    problem = _PROBLEM.pack(
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        k.shape[2],
        q.shape[3],
        v.shape[3],
        window,
        sinks,
        page_size,
        count,
        *[0 if x is None else x.data_ptr() for x in dense],
        scale,
        causal,
        q.dtype == torch.bfloat16,
        k.dtype == torch.int8,
        torch.get_num_threads(),
    )
    run = functools.partial(_library().attlas_decode, problem, places(q, k, v, o, lse))
    return run, o, lse, (q, k, v, *dense)


@library.register_fake("attlas::softmax_decode")
def _results(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(*q.shape[:3], dtype=torch.float32)


_operator = torch.ops.attlas.softmax_decode.default


# Lengths are data, so that every key of the cache counts as visible.
@register_flop_formula(torch.ops.attlas.softmax_decode)
def _decode_flop(q, k, v, lengths, keep, pages, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
    batch, heads, queries, size = q
    keys = k[2] * (1 if pages is None else pages[1])
    return 2 * batch * heads * queries * keys * (size + v[3])
