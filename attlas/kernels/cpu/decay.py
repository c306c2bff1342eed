"""The C++ kernel of causal decayed linear attention as a torch operator, with fake, autograd and FLOP formula.

B batch, H heads, N tokens, D key size, E value size.
"""

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from attlas.core.errors import BadInput
from attlas.kernels.cpu import build
from attlas.kernels.cpu.arrays import dense_rows, once_only, places


def decayed_linear_attention(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    slopes_H: Tensor,
    state_BHDE: Tensor | None = None,
    lengths_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o_t = q_t S_t with S_t = exp(-slope) S_{t-1} + k_t v_t^T, in one pass over the tokens.

    Time O(N D E); no memory that grows with N besides the results. Tokens may have any strides, but a feature axis
    that is not contiguous costs a copy.

    Args:
        q_BHND, k_BHND, v_BHNE: float32 or bfloat16, all the same, on the CPU.
        slopes_H: float32, at least 0; receives no gradient.
        state_BHDE: float32, what earlier tokens left; zeros if None.
        lengths_B: int64. Tokens from lengths[b] on do not exist: they neither enter nor decay the state, and give 0.
            All exist if None.

    Returns:
        o (B, H, N, E) in the dtype of v, and the state after the last token, float32 (B, H, D, E).

    Raises:
        BadInput: shapes or dtypes do not fit together.
        KernelUnavailable: the kernel cannot be compiled here.
    """
    return torch.ops.attlas.decayed_linear_attention(q_BHND, k_BHND, v_BHNE, slopes_H, state_BHDE, lengths_B)


def refuses(q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, slopes_H: Tensor) -> str | None:
    """Why the kernel cannot take these, or None."""
    if any(x.device.type != "cpu" for x in (q_BHND, k_BHND, v_BHNE, slopes_H)):
        return f"it runs on the CPU, and the queries are on {q_BHND.device}"
    dtypes = {x.dtype for x in (q_BHND, k_BHND, v_BHNE)}
    if dtypes not in ({torch.float32}, {torch.bfloat16}):
        return f"it computes in float32 or bfloat16, not {', '.join(sorted(map(str, dtypes)))}"
    if slopes_H.requires_grad:
        return "it has no gradient for the slopes"
    usable, detail = build.status("decay")
    return None if usable else detail


class _Problem(ctypes.Structure):
    """`attlas_decay`: sizes, and what belongs to the whole call."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("key_size", ctypes.c_int64),
        ("value_size", ctypes.c_int64),
        ("slopes", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("is_bf16", ctypes.c_int32),
        ("averages", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("totals", ctypes.c_void_p),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = build.load("decay")
    for function in (loaded.attlas_decay_forward, loaded.attlas_decay_backward):
        function.argtypes = [ctypes.POINTER(_Problem), ctypes.c_void_p]
    return loaded


def _call(
    function: Any,
    slopes: Tensor,
    lengths: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: Tensor | None,
    totals: Tensor | None = None,
) -> None:
    """Call a function of the library with its arrays in their order. Only inputs can need a copy.

    With totals, the outputs are averages, whose sums of weights go there.
    """
    slopes = slopes.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    rows = [None if x is None else dense_rows(x) for x in (q, k, v, *others)]
    problem = _Problem(
        *q.shape,
        v.shape[3],
        slopes.data_ptr(),
        None if lengths is None else lengths.data_ptr(),
        q.dtype == torch.bfloat16,
        totals is not None,
        torch.get_num_threads(),
        None if totals is None else totals.data_ptr(),
    )
    if function(problem, places(*rows)):
        raise MemoryError("the decay kernel found no memory for its workspace")


def _check(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor | None, lengths: Tensor | None) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise BadInput(f"q and k are (B, H, N, D) and v is (B, H, N, E), got {shapes}")
    if q.dtype not in (torch.float32, torch.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise BadInput(f"q, k, v are all float32 or all bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}")
    batch, heads, _, size = q.shape
    for name, x, shape, dtype in (
        ("slopes", slopes, (heads,), torch.float32),
        ("state", state, (batch, heads, size, v.shape[3]), torch.float32),
        ("lengths", lengths, (batch,), torch.int64),
    ):
        if x is not None and (x.shape != shape or x.dtype != dtype):
            raise BadInput(f"{name} is {dtype} of shape {shape}, got {x.dtype} of shape {tuple(x.shape)}")


def _like(x_BHND: Tensor) -> Tensor:
    """Uninitialised; (B, N, H, D) in memory where x is, so that merging the heads needs no copy."""
    if x_BHND.transpose(1, 2).is_contiguous():
        return torch.empty_like(x_BHND)
    return torch.empty_like(x_BHND, memory_format=torch.contiguous_format)


def _empty_state(k: Tensor, v: Tensor) -> Tensor:
    return k.new_empty(*k.shape[:2], k.shape[3], v.shape[3], dtype=torch.float32)


@library.custom_op("attlas::decayed_linear_attention", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    o, final_state = _forward_fake(q, k, v, slopes, state, lengths)
    _call(_library().attlas_decay_forward, slopes, lengths, q, k, v, state, o, final_state)
    return o, final_state


@_forward.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, slopes, state, lengths)
    return _like(v), _empty_state(k, v)


@library.custom_op("attlas::decayed_linear_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    lengths: Tensor | None,
    grad_o: Tensor,
    grad_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _backward_fake(q, k, v, slopes, state, lengths, grad_o, grad_final)
    _call(_library().attlas_decay_backward, slopes, lengths, q, k, v, state, grad_o, grad_final, *grads)
    return grads


@_backward.register_fake
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    state: Tensor | None,
    lengths: Tensor | None,
    grad_o: Tensor,
    grad_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(q, k, v, slopes, state, lengths)
    return _like(q), _like(k), _like(v), _empty_state(k, v)


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_o: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    state = ctx.saved_tensors[4]
    dq, dk, dv, dstate = _backward(*ctx.saved_tensors, grad_o, grad_final)
    return dq, dk, dv, None, None if state is None else dstate, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(once_only)


def weighted_average(
    q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, state_BHDE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o_t = sum_{j<=t} (q_t.k_j) v_j / sum_{j<=t} q_t.k_j: linear attention with its normaliser, in one pass.

    Args:
        q_BHND, k_BHND, v_BHNE: float32, on the CPU. Where the weights sum to 0 or less nothing is divided.
        state_BHDE: float32 (B, H, D, E + 1), what earlier tokens left; the last column is the sum of the keys.

    Returns:
        o (B, H, N, E), and the state after the last token.

    Raises:
        BadInput: shapes or dtypes do not fit together.
        KernelUnavailable: the kernel cannot be compiled here.
    """
    o, state, _ = torch.ops.attlas.weighted_average(q_BHND, k_BHND, v_BHNE, state_BHDE)
    return o, state


@library.custom_op("attlas::weighted_average", mutates_args=(), device_types="cpu")
def _average(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    o, final_state, totals = _average_fake(q, k, v, state)
    no_decay = q.new_zeros(q.shape[1])
    _call(_library().attlas_decay_forward, no_decay, None, q, k, v, state, o, final_state, totals=totals)
    return o, final_state, totals


@_average.register_fake
def _average_fake(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, q.new_zeros(q.shape[1], dtype=torch.float32), None, None)
    final_state = q.new_empty(*q.shape[:2], q.shape[3], v.shape[3] + 1)
    if q.dtype != torch.float32 or (state is not None and state.shape != final_state.shape):
        shape = None if state is None else tuple(state.shape)
        raise BadInput(f"averages are of float32, their state is {tuple(final_state.shape)}; got {q.dtype}, {shape}")
    return _like(v), final_state, q.new_empty(q.shape[:3])


def _save_average(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[0], output[2])


def _differentiate_average(
    ctx: Any, grad_o: Tensor, grad_final: Tensor, grad_totals: Tensor
) -> tuple[Tensor | None, ...]:
    """As of the product with values and a column of ones, whose gradient is that of the totals."""
    q, k, v, state, o, totals = ctx.saved_tensors
    there = totals > 0
    divided = grad_o / totals.where(there, 1).unsqueeze(-1)
    grad_totals = grad_totals - (divided * o).sum(-1).where(there, 0)
    grad = torch.cat([divided, grad_totals.unsqueeze(-1)], -1)
    ones = F.pad(v, (0, 1), value=1.0)
    dq, dk, dv, dstate = _backward(q, k, ones, q.new_zeros(q.shape[1]), state, None, grad, grad_final)
    return dq, dk, dv[..., :-1], None if state is None else dstate


_average.register_autograd(_differentiate_average, setup_context=_save_average)


# FLOP = 2 MAC. A token multiplies its key into the state and its query with it.
@register_flop_formula(torch.ops.attlas.decayed_linear_attention)
def _forward_flop(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, tokens, size = q
    return 2 * 2 * batch * heads * tokens * size * v[3]


# The state once more, its gradient, and from these two dq, dk and dv.
@register_flop_formula(torch.ops.attlas.decayed_linear_attention_backward)
def _backward_flop(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, tokens, size = q
    return 5 * 2 * batch * heads * tokens * size * v[3]


@register_flop_formula(torch.ops.attlas.weighted_average)
def _average_flop(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, heads, tokens, size = q
    return 2 * 2 * batch * heads * tokens * size * (v[3] + 1)
