"""The C++ kernel of attention over some of the pairs as torch operators, with fake, autograd and FLOP formula.

B batch, H query heads, G key/value heads, N queries, M keys, D key size, E value size.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from attlas.core.axis import Axis, Block
from attlas.kernels.cpu import build
from attlas.kernels.cpu.arrays import LN_2, check_attention, dense_rows, like_queries, once_only, places
from attlas.kernels.cpu.tile_plan import Plan, plan_axes, plan_blocks


def neighborhood_attention(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    axes: Sequence[Axis | Block],
    keep_BM: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    prefix: int,
    context: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention inside windows of a grid, as `attlas.ops.neighborhood` says it.

    Args:
        q_BHND, k_BGMD, v_BGME: float32 or bfloat16, all the same, on the CPU; H is a multiple of G. A feature axis
            that is not contiguous costs a copy.
        axes: the rule of each axis.
        keep_BM: bool, False where a key is padding; nothing of it is read. All are kept if None.
        bias: (H, 2 reach + 1, ...), or None.
        prefix, context: keys in front without a position, with and without queries.
        scale: of the scores.

    Returns:
        o (B, H, N, E) in the dtype of v, and the logarithm of the sum of exp(scores), float32 (B, H, N), which has no
        gradient. A query that sees nothing gives 0 and -inf.

    Raises:
        BadInput: shapes or dtypes do not fit together.
        KernelUnavailable: the kernel cannot be compiled here.
    """
    layout = [prefix, context]
    for axis in axes:
        if isinstance(axis, Axis):
            layout += [0, axis.length, axis.window, axis.dilation, axis.stride, int(axis.causal)]
        else:
            layout += [1, axis.length, axis.window, axis.shift, axis.halo, 0]
    o, log2 = torch.ops.attlas.tiles(q_BHND, k_BGMD, v_BGME, keep_BM, bias, None, layout, False, scale)
    return o, log2 * LN_2


def block_sparse_attention(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    chosen: Tensor,
    keep_BM: Tensor | None = None,
    *,
    rows: int,
    columns: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over chosen blocks, as `attlas.ops.block_sparse` says it; otherwise as `neighborhood_attention`."""
    layout = [rows, columns]
    o, log2 = torch.ops.attlas.tiles(q_BHND, k_BGMD, v_BGME, keep_BM, None, chosen, layout, causal, scale)
    return o, log2 * LN_2


def refuses(q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor) -> str | None:
    """Why the kernels cannot take these, or None."""
    if q_BHND.device.type != "cpu":
        return f"it runs on the CPU, and the queries are on {q_BHND.device}"
    dtypes = {x.dtype for x in (q_BHND, k_BGMD, v_BGME)}
    if dtypes not in ({torch.float32}, {torch.bfloat16}):
        return f"it computes in float32 or bfloat16, not {', '.join(sorted(map(str, dtypes)))}"
    usable, detail = build.status("tiles")
    return None if usable else detail


_LISTS = Plan._fields[: Plan._fields.index("heads")]


class _Problem(ctypes.Structure):
    """`Problem`, its `Plan` written out: sizes, and what belongs to the whole call."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _LISTS),
        ("plan_batch", ctypes.c_int64),
        ("plan_head", ctypes.c_int64),
        ("step", ctypes.c_int32),
        ("once", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "queries", "keys", "key_size", "value_size")),
        ("query_offset", ctypes.c_int64),
        ("keep", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("biases", "shares", "most_groups", "work")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("causal", "is_bf16", "threads")),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = build.load("tiles")
    loaded.attlas_tiles_forward.argtypes = [ctypes.POINTER(_Problem), ctypes.c_void_p, ctypes.c_void_p]
    loaded.attlas_tiles_backward.argtypes = [ctypes.POINTER(_Problem), ctypes.c_void_p]
    return loaded


def _plan(q: Tensor, k: Tensor, bias: Tensor | None, chosen: Tensor | None, layout: list[int]) -> Plan:
    if chosen is not None:
        rows, columns = layout
        return plan_blocks(chosen, rows, columns, q.shape[2], k.shape[2])
    axes: list[Axis | Block] = []
    for i in range(2, len(layout), 6):
        kind, length, window, *rest = layout[i : i + 6]
        if kind:
            axes.append(Block(length, window, shift=rest[0], halo=rest[1]))
        else:
            axes.append(Axis(length, window, dilation=rest[0], stride=rest[1], causal=bool(rest[2])))
    return plan_axes(tuple(axes), q.shape[2], layout[0], layout[1], bias is not None)


def _problem(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    table: Tensor | None,
    causal: bool,
    scale: float,
    shares: int,
) -> _Problem:
    """The caller keeps all tensors alive, of which `keep` and `table` are contiguous."""
    lists = (getattr(plan, name) for name in _LISTS)
    batches, heads = plan.heads
    return _Problem(
        *(None if x is None else x.data_ptr() for x in lists),
        0 if batches == 1 else heads,
        0 if heads == 1 else 1,
        plan.step,
        plan.once,
        *q.shape[:2],
        k.shape[1],
        q.shape[2],
        k.shape[2],
        q.shape[3],
        v.shape[3],
        k.shape[2] - q.shape[2],
        None if keep is None else keep.data_ptr(),
        None if table is None else table.data_ptr(),
        0 if table is None else table.shape[1],
        shares,
        plan.groups,
        q.shape[0] * q.shape[1] * plan.work * (q.shape[3] + v.shape[3]),
        scale,
        causal,
        q.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )


def _table(bias: Tensor | None) -> Tensor | None:
    """The biases of each head in a row, and a 0 for keys that have none."""
    return None if bias is None else torch.nn.functional.pad(bias.flatten(1).float(), (0, 1))


@library.custom_op("attlas::tiles", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    chosen: Tensor | None,
    layout: list[int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, keep)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    if not q.numel() or not k.shape[2]:
        return like_queries(q, q.shape[1], q.shape[2], v.shape[3]).zero_(), lse
    plan = _plan(q, k, bias, chosen, layout)
    o = like_queries(q, q.shape[1], q.shape[2], v.shape[3], None if plan.once else torch.float32)
    totals = None
    if not plan.once:  # sums go on from tile to tile
        o.zero_()
        totals = torch.zeros_like(lse)
    keep, table = None if keep is None else keep.contiguous(), _table(bias)
    problem = _problem(plan, q, k, v, keep, table, causal, scale, 1)
    rows = [dense_rows(x) for x in (q, k, v)]
    found = _library().attlas_tiles_forward(
        problem, places(*rows, o, lse), None if totals is None else totals.data_ptr()
    )
    if found:
        raise MemoryError("the tile kernel found no memory for its scratch")
    return o.to(q.dtype), lse


@_forward.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    chosen: Tensor | None,
    layout: list[int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, keep)
    return like_queries(q, q.shape[1], q.shape[2], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@library.custom_op("attlas::tiles_backward", mutates_args=(), device_types="cpu")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    chosen: Tensor | None,
    o: Tensor,
    lse: Tensor,
    grad_o: Tensor,
    layout: list[int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not q.numel() or not k.shape[2]:
        return tuple(
            x.zero_() for x in _backward_fake(q, k, v, keep, bias, chosen, o, lse, grad_o, layout, causal, scale)
        )
    plan = _plan(q, k, bias, chosen, layout)
    batch, groups, threads = q.shape[0], k.shape[1], torch.get_num_threads()
    # Keys of a head belong to one unit of work; where these are too few for the threads, each has shares, summed here.
    owners = batch * groups
    shares = min(plan.groups, -(-2 * threads // owners)) if owners % threads and owners < 4 * threads else 1
    dq = like_queries(q, q.shape[1], q.shape[2], q.shape[3], torch.float32)
    dk, dv = (x.new_empty(shares * batch, *x.shape[1:], dtype=torch.float32) for x in (k, v))
    keep, table = None if keep is None else keep.contiguous(), _table(bias)
    dtable = q.new_zeros(batch * shares, q.shape[1], 0 if table is None else table.shape[1], dtype=torch.float32)
    problem = _problem(plan, q, k, v, keep, table, causal, scale, shares)
    rows = [dense_rows(x) for x in (q, k, v, o, lse, grad_o)]
    if _library().attlas_tiles_backward(problem, places(*rows, dq, dk, dv, dtable)):
        raise MemoryError("the tile kernel found no memory for its scratch")
    dk, dv = (x if shares == 1 else x.view(shares, *like.shape).sum(0) for x, like in ((dk, k), (dv, v)))
    dbias = dtable[:0] if bias is None else dtable.sum(0)[:, :-1].reshape(bias.shape).to(bias.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


@_backward.register_fake
def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    bias: Tensor | None,
    chosen: Tensor | None,
    o: Tensor,
    lse: Tensor,
    grad_o: Tensor,
    layout: list[int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq = like_queries(q, q.shape[1], q.shape[2], q.shape[3])
    dk, dv = (x.new_empty(x.shape) for x in (k, v))
    dbias = q.new_empty(0, q.shape[1], 0, dtype=torch.float32) if bias is None else bias.new_empty(bias.shape)
    return dq, dk, dv, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *arrays, layout, causal, scale = inputs
    ctx.save_for_backward(*arrays, *output)
    ctx.settings = (layout, causal, scale)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_o: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, keep, bias, chosen, o, lse = ctx.saved_tensors
    dq, dk, dv, dbias = torch.ops.attlas.tiles_backward(q, k, v, keep, bias, chosen, o, lse, grad_o, *ctx.settings)
    return dq, dk, dv, None, None if bias is None else dbias, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(once_only)


def _pair_flops(q: Tensor, k: Tensor, bias: Tensor | None, chosen: Tensor | None, layout: list[int]) -> int:
    """FLOP of one multiply-add per feature and pair; causality and padding are not looked at."""
    if not q.numel() or not k.shape[2]:
        return 0
    plan = _plan(q, k, bias, chosen, layout)
    batches, heads = plan.heads
    return 2 * plan.pairs * (q.shape[0] // batches) * (q.shape[1] // heads)


@register_flop_formula(torch.ops.attlas.tiles, get_raw=True)
def _forward_flop(
    q: Any, k: Any, v: Any, keep: Any, bias: Any, chosen: Any, layout: list[int], *args: Any, **kwargs: Any
) -> int:
    return _pair_flops(q, k, bias, chosen, layout) * (q.shape[3] + v.shape[3])


# The scores once more, the gradients of weights, values, queries and keys.
@register_flop_formula(torch.ops.attlas.tiles_backward, get_raw=True)
def _backward_flop(
    q: Any, k: Any, v: Any, keep: Any, bias: Any, chosen: Any, o: Any, lse: Any, grad_o: Any, layout: list[int],
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    return _pair_flops(q, k, bias, chosen, layout) * (3 * q.shape[3] + 2 * v.shape[3])
