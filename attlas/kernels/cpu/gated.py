"""The C++ kernels of gated linear attention and of the delta rule as torch operators.

B batch, H heads, N tokens, D key size, E value size; gates (B, H, N, D) or (B, H, N, 1).
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from attlas.core.errors import BadInput
from attlas.kernels.cpu import build
from attlas.kernels.cpu.arrays import dense_rows, once_only, places


def gated_linear_attention(
    q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, log_decay_BHND: Tensor, state_BHDE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `attlas.ops.gated.gated_linear_attention` of tokens that all exist.

    Time O(N D E); no memory that grows with N besides the results.

    Raises:
        BadInput: shapes or dtypes do not fit together.
        KernelUnavailable: the kernel cannot be compiled here.
    """
    return torch.ops.attlas.gated_linear_attention(
        q_BHND, k_BHND, v_BHNE, log_decay_BHND.float(), None if state_BHDE is None else state_BHDE.float()
    )


def bidirectional_gated_attention(
    q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, log_decay_BHND: Tensor, log_decay_back_BHND: Tensor
) -> Tensor:
    """As `attlas.ops.gated.bidirectional_gated_attention` of tokens that all exist; nothing is turned around."""
    gates = log_decay_BHND.float(), log_decay_back_BHND.float()
    return torch.ops.attlas.bidirectional_gated_attention(q_BHND, k_BHND, v_BHNE, *gates).to(v_BHNE.dtype)


def gated_delta_rule(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    beta_BHN: Tensor,
    log_decay_BHN: Tensor,
    state_BHDE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `attlas.ops.delta.gated_delta_rule` of tokens that all exist."""
    state = None if state_BHDE is None else state_BHDE.float()
    return torch.ops.attlas.gated_delta_rule(q_BHND, k_BHND, v_BHNE, beta_BHN.float(), log_decay_BHN.float(), state)


def refuses(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernel cannot take these, or None."""
    given = [x for x in (q, k, v, *others) if x is not None]
    if any(x.device.type != "cpu" for x in given):
        return f"it runs on the CPU, and the queries are on {q.device}"
    if {x.dtype for x in (q, k, v)} not in ({torch.float32}, {torch.bfloat16}):
        return f"it computes in float32 or bfloat16, not {', '.join(sorted({str(x.dtype) for x in (q, k, v)}))}"
    if any(x.dtype == torch.float64 for x in given):
        return "it keeps gates and states in float32, not float64"
    usable, detail = build.status("gated")
    return None if usable else detail


class _Problem(ctypes.Structure):
    """`Problem`: sizes, and what belongs to the whole call."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "tokens", "key_size", "value_size", "gates")),
        *((name, ctypes.c_int32) for name in ("is_bf16", "reversed", "threads")),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = build.load("gated")
    for kind in ("gated_forward", "gated_both_ways", "gated_backward", "delta_forward", "delta_backward"):
        getattr(loaded, f"attlas_{kind}").argtypes = [ctypes.POINTER(_Problem), ctypes.c_void_p]
    return loaded


def _call(kind: str, gates: int, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None, back: bool = False) -> None:
    """Call a function of the library with its arrays in their order. Only inputs can need a copy."""
    rows = [None if x is None else dense_rows(x) for x in (q, k, v, *others)]
    problem = _Problem(*q.shape, v.shape[3], gates, q.dtype == torch.bfloat16, back, torch.get_num_threads())
    if getattr(_library(), f"attlas_{kind}")(problem, places(*rows)):
        raise MemoryError("the gated kernel found no memory for its workspace")


def check(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, state: Tensor | None, beta: Tensor | None = None) -> None:
    """Raise `BadInput` unless the shapes fit together; gates are (B, H, N) where there is a beta."""
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise BadInput(f"q and k are (B, H, N, D) and v is (B, H, N, E), got {shapes}")
    if not q.shape[3] or not v.shape[3]:
        raise BadInput(f"a head has at least one feature, got {q.shape[3]} of keys and {v.shape[3]} of values")
    batch, heads, tokens, size = q.shape
    allowed = [(batch, heads, tokens)] if beta is not None else [(batch, heads, tokens, n) for n in (size, 1)]
    for name, x, shapes_of_it in (
        ("log_decay", gates, allowed),
        ("beta", beta, [(batch, heads, tokens)]),
        ("state", state, [(batch, heads, size, v.shape[3])]),
    ):
        if x is not None and tuple(x.shape) not in shapes_of_it:
            raise BadInput(f"{name} is {' or '.join(map(str, shapes_of_it))}, got {tuple(x.shape)}")


def _rows(x_BHND: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised; (B, N, H, D) in memory where x is, so that merging the heads needs no copy."""
    if x_BHND.ndim == 4 and x_BHND.transpose(1, 2).is_contiguous():
        return torch.empty_like(x_BHND, dtype=dtype)
    return torch.empty_like(x_BHND, dtype=dtype, memory_format=torch.contiguous_format)


def _floats(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(_rows(x, torch.float32) for x in tensors)


def _state_of(k: Tensor, v: Tensor) -> Tensor:
    return k.new_empty(*k.shape[:2], k.shape[3], v.shape[3], dtype=torch.float32)


@library.custom_op("attlas::gated_linear_attention", mutates_args=(), device_types="cpu")
def _gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    results = _gated_fake(q, k, v, g, state)
    _call("gated_forward", g.shape[3], q, k, v, g, state, *results)
    return results


@_gated.register_fake
def _gated_fake(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    check(q, k, v, g, state)
    return _rows(v), _state_of(k, v)


@library.custom_op("attlas::gated_linear_attention_backward", mutates_args=(), device_types="cpu")
def _gated_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    final_state: Tensor | None,
    grad_o: Tensor,
    grad_final: Tensor | None,
    back: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _gated_backward_fake(q, k, v, g, state, final_state, grad_o, grad_final, back)
    _call("gated_backward", g.shape[3], q, k, v, g, state, final_state, grad_o, grad_final, *grads, back=back)
    return grads


@_gated_backward.register_fake
def _gated_backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    final_state: Tensor | None,
    grad_o: Tensor,
    grad_final: Tensor | None,
    back: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg = _floats(q, k, v, g)
    return dq, dk, dv, dg, _state_of(k, v)


def _save_gated(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _differentiate_gated(ctx: Any, grad_o: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, g, state, final_state = ctx.saved_tensors
    dq, dk, dv, dg, dstate = _gated_backward(q, k, v, g, state, final_state, grad_o, grad_final, False)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg, None if state is None else dstate


_gated.register_autograd(_differentiate_gated, setup_context=_save_gated)
_gated_backward.register_autograd(once_only)


@library.custom_op("attlas::bidirectional_gated_attention", mutates_args=(), device_types="cpu")
def _both_ways(q: Tensor, k: Tensor, v: Tensor, g: Tensor, g_back: Tensor) -> Tensor:
    o = _both_ways_fake(q, k, v, g, g_back)
    _call("gated_both_ways", g.shape[3], q, k, v, g, g_back, o)
    return o


@_both_ways.register_fake
def _both_ways_fake(q: Tensor, k: Tensor, v: Tensor, g: Tensor, g_back: Tensor) -> Tensor:
    check(q, k, v, g, None)
    if g_back.shape != g.shape:
        raise BadInput(f"both directions have gates of the same shape, got {tuple(g.shape)} and {tuple(g_back.shape)}")
    return _rows(v, torch.float32)


def _save_both_ways(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_both_ways(ctx: Any, grad_o: Tensor) -> tuple[Tensor, ...]:
    q, k, v, *gates = ctx.saved_tensors
    ahead, back = (
        _gated_backward(q, k, v, g, None, None, grad_o.to(q.dtype), None, way)
        for g, way in zip(gates, (False, True), strict=True)
    )
    return *(a.add_(b).to(q.dtype) for a, b in zip(ahead[:3], back[:3], strict=True)), ahead[3], back[3]


_both_ways.register_autograd(_differentiate_both_ways, setup_context=_save_both_ways)


@library.custom_op("attlas::gated_delta_rule", mutates_args=(), device_types="cpu")
def _delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    results = _delta_fake(q, k, v, beta, g, state)
    _call("delta_forward", 1, q, k, v, beta, g, state, *results)
    return results


@_delta.register_fake
def _delta_fake(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    check(q, k, v, g, state, beta)
    return _rows(v), _state_of(k, v)


@library.custom_op("attlas::gated_delta_rule_backward", mutates_args=(), device_types="cpu")
def _delta_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    state: Tensor | None,
    final_state: Tensor,
    grad_o: Tensor,
    grad_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _delta_backward_fake(q, k, v, beta, g, state, final_state, grad_o, grad_final)
    scratch = _floats(v, v, v)
    _call("delta_backward", 1, q, k, v, beta, g, state, final_state, grad_o, grad_final, *scratch, *grads)
    return grads


@_delta_backward.register_fake
def _delta_backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    state: Tensor | None,
    final_state: Tensor,
    grad_o: Tensor,
    grad_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dbeta, dg = _floats(q, k, v, beta, g)
    return dq, dk, dv, dbeta, dg, _state_of(k, v)


def _save_delta(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _differentiate_delta(ctx: Any, grad_o: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, beta, g, state, final_state = ctx.saved_tensors
    dq, dk, dv, dbeta, dg, dstate = _delta_backward(q, k, v, beta, g, state, final_state, grad_o, grad_final)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbeta, dg, None if state is None else dstate


_delta.register_autograd(_differentiate_delta, setup_context=_save_delta)
_delta_backward.register_autograd(once_only)


# FLOP = 2 MAC. Forward, a token multiplies its key into the state and its query with it; what is recalled is one
# product more. Backward there is the state once more, its gradient, and dq, dk and dv from the two; under the delta
# rule the state takes two products, its gradient three with dw, and dk comes from both.
def _flop(products: int) -> Any:
    def count(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        batch, heads, tokens, size = q
        return products * 2 * batch * heads * tokens * size * v[3]

    return count


for _operator, _products in (
    (torch.ops.attlas.gated_linear_attention, 2),
    (torch.ops.attlas.gated_linear_attention_backward, 5),
    (torch.ops.attlas.bidirectional_gated_attention, 4),
    (torch.ops.attlas.gated_delta_rule, 3),
    (torch.ops.attlas.gated_delta_rule_backward, 8),
):
    register_flop_formula(_operator)(_flop(_products))
