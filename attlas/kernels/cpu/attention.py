"""The C++ kernels of softmax and sigmoid attention as torch operators, with fake, autograd and FLOP formula.

B batch, H query heads, G key/value heads, N queries, M keys, D key size, E value size.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from attlas.core.mask import Mask
from attlas.kernels.cpu import build
from attlas.kernels.cpu.arrays import LN_2, check_attention, dense_rows, like_queries, once_only, places


def softmax_attention(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    keep_BM: Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """o_n = sum_m softmax_m(scale q_n . k_m) v_m over the visible keys, which are tiled: no score is stored.

    Args:
        q_BHND, k_BGMD, v_BGME: float32 or bfloat16, all the same, on the CPU; H is a multiple of G. A feature axis
            that is not contiguous costs a copy.
        keep_BM: bool, False where a key is padding; nothing of it is read. All are kept if None.
        scale: of the scores.
        causal: query n sees keys up to n + M - N.

    Returns:
        o (B, H, N, E) in the dtype of v, and the logarithm of the sum of exp(scores), float32 (B, H, N), which has no
        gradient. A query that sees nothing gives 0 and -inf.

    Raises:
        BadInput: shapes or dtypes do not fit together.
        KernelUnavailable: the kernel cannot be compiled here.
    """
    o, log2 = torch.ops.attlas.attention(q_BHND, k_BGMD, v_BGME, keep_BM, scale, 0.0, causal, True)
    return o, log2 * LN_2


def sigmoid_attention(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    keep_BM: Tensor | None = None,
    *,
    scale: float,
    shift: float,
    causal: bool = False,
) -> Tensor:
    """o_n = sum_m sigmoid(scale q_n . k_m + shift) v_m over the visible keys; otherwise as `softmax_attention`."""
    return torch.ops.attlas.attention(q_BHND, k_BGMD, v_BGME, keep_BM, scale, shift, causal, False)[0]


def refuses(q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, mask: Mask | None) -> str | None:
    """Why the kernels cannot take these, or None."""
    if q_BHND.device.type != "cpu":
        return f"it runs on the CPU, and the queries are on {q_BHND.device}"
    dtypes = {x.dtype for x in (q_BHND, k_BGMD, v_BGME)}
    if dtypes not in ({torch.float32}, {torch.bfloat16}):
        return f"it computes in float32 or bfloat16, not {', '.join(sorted(map(str, dtypes)))}"
    if mask is not None and (mask.rule is not None or mask.bias is not None):
        return "of a mask it takes causality and padding only"
    usable, detail = build.status("attention")
    return None if usable else detail


class _Problem(ctypes.Structure):
    """`Problem`: sizes, and what belongs to the whole call."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "queries", "keys", "key_size", "value_size")),
        ("kept", ctypes.c_void_p),
        ("kept_count", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("shift", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("causal", "normalised", "is_bf16", "threads")),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = build.load("attention")
    for function in (loaded.attlas_attention_forward, loaded.attlas_attention_backward):
        function.argtypes = [ctypes.POINTER(_Problem), ctypes.c_void_p]
    return loaded


def _call(
    function: Any,
    keep: Tensor | None,
    settings: tuple[float, float, bool, bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: Tensor,
) -> None:
    """Call a function of the library with its arrays in their order. Only inputs can need a copy."""
    scale, shift, causal, normalised = settings
    kept = counts = None
    if keep is not None:
        kept, counts = torch.argsort(~keep, dim=1, stable=True).int(), keep.sum(1)
    rows = [dense_rows(x) for x in (q, k, v, *others)]
    problem = _Problem(
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        k.shape[2],
        q.shape[3],
        v.shape[3],
        None if kept is None else kept.data_ptr(),
        None if counts is None else counts.data_ptr(),
        scale,
        shift,
        causal,
        normalised,
        q.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    if function(problem, places(*rows)):
        raise MemoryError("the attention kernel found no memory for its scratch")


@library.custom_op("attlas::attention", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    scale: float,
    shift: float,
    causal: bool,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    o, lse = _forward_fake(q, k, v, keep, scale, shift, causal, normalised)
    _call(_library().attlas_attention_forward, keep, (scale, shift, causal, normalised), q, k, v, o, lse)
    return o, lse


@_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    scale: float,
    shift: float,
    causal: bool,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, keep)
    lse = q.new_empty(*q.shape[:3] if normalised else (0, 0, 0), dtype=torch.float32)
    return like_queries(q, q.shape[1], q.shape[2], v.shape[3]), lse


@library.custom_op("attlas::attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    o: Tensor,
    lse: Tensor,
    grad_o: Tensor,
    scale: float,
    shift: float,
    causal: bool,
    normalised: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = (scale, shift, causal, normalised)
    grads = _backward_fake(q, k, v, keep, o, lse, grad_o, *settings)
    _call(_library().attlas_attention_backward, keep, settings, q, k, v, o, lse, grad_o, *grads)
    return grads


@_backward.register_fake
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    o: Tensor,
    lse: Tensor,
    grad_o: Tensor,
    scale: float,
    shift: float,
    causal: bool,
    normalised: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_attention(q, k, v, keep)
    return tuple(like_queries(x, *x.shape[1:]) for x in (q, k, v))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, keep, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, keep, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_o: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grads = torch.ops.attlas.attention_backward(*ctx.saved_tensors, grad_o, *ctx.settings)
    return *grads, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(once_only)


def _pair_flops(q: Any, k: Any, keep: Any, causal: bool) -> int:
    """FLOP of one multiply-add per feature and visible pair; padding is not known here and counts as visible."""
    return 2 * Mask(causal=causal).area(q[2], k[2], q[0], q[1])


@register_flop_formula(torch.ops.attlas.attention)
def _forward_flop(
    q: Any, k: Any, v: Any, keep: Any, scale: float, shift: float, causal: bool, *args: Any, **kwargs: Any
) -> int:
    return _pair_flops(q, k, keep, causal) * (q[3] + v[3])


# The scores once more, the gradients of weights, values, queries and keys.
@register_flop_formula(torch.ops.attlas.attention_backward)
def _backward_flop(
    q: Any, k: Any, v: Any, keep: Any, o: Any, lse: Any, grad_o: Any, scale: float, shift: float, causal: bool,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _pair_flops(q, k, keep, causal) * (3 * q[3] + 2 * v[3])
