"""A drop-in for `torch.nn.MultiheadAttention` with any mechanism inside.

B batch, N queries, M keys, C channels, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.factory import make_attend, resolve, settings_of
from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend
from attlas.core.spec import Takes
from attlas.ops.softmax import attention_weights


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with `mechanism=`: same arguments, same state_dict, same masks.

    Masks follow torch here, and only here: a bool mask is True where attention is *not* allowed. Two
    things are more lenient than torch: `is_causal=True` needs no `attn_mask`, and a query that may attend
    to nothing gives the output of 0 instead of NaN. Causality is aligned to the last query. A call is cross-attention
    to the mechanism unless query and key are one tensor.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
            dtype: as in torch.
        mechanism: any attend by name, see `attlas.mechanisms()`.
        causal: build the mechanism causal; linear mechanisms need to know. `is_causal` is then implied, and
            an `attn_mask` that is the causal triangle is recognised and not needed. Not with add_bias_kv or
            add_zero_attn, which append keys: give `is_causal=True` or `attn_mask` there.
        backend: of the mechanism's ops.
        **params: of the mechanism.

    Raises:
        BadInput: head counts that do not fit, or a causal mechanism and appended keys.
        UnknownName: no such mechanism.
        Unsupported: the mechanism mixes tokens without queries and keys.
    """

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    bias_k: Tensor | None
    bias_v: Tensor | None
    attend: Attend

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mechanism: str = "softmax",
        causal: bool = False,
        backend: str = "auto",
        **params: Any,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise BadInput(f"num_heads must divide embed_dim, got {num_heads} and {embed_dim}")
        if causal and (add_bias_kv or add_zero_attn):
            raise BadInput(
                "add_bias_kv and add_zero_attn append keys, and a causal mechanism counts from the last key, so that "
                "tokens would see ahead: leave causal=True out and pass is_causal=True or attn_mask in the call"
            )
        if "weight_dropout" in settings_of(resolve(mechanism)[0]):
            params["weight_dropout"], dropout = dropout, 0.0
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout = dropout  # of the output, where the mechanism has no weights to drop
        self.batch_first = batch_first
        self.add_zero_attn = add_zero_attn
        self.causal = causal
        self.mechanism = mechanism
        make: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **make))
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.register_parameter("in_proj_weight", None)
            self.q_proj_weight = nn.Parameter(torch.empty(embed_dim, embed_dim, **make))
            self.k_proj_weight = nn.Parameter(torch.empty(embed_dim, self.kdim, **make))
            self.v_proj_weight = nn.Parameter(torch.empty(embed_dim, self.vdim, **make))
        self.register_parameter("in_proj_bias", nn.Parameter(torch.zeros(3 * embed_dim, **make)) if bias else None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, **make)
        for name in ("bias_k", "bias_v"):
            extra = nn.Parameter(torch.empty(1, 1, embed_dim, **make)) if add_bias_kv else None
            self.register_parameter(name, extra)
        self.attend = make_attend(mechanism, num_heads, self.head_dim, causal=causal, backend=backend, **params).to(
            **make
        )
        self._reset_parameters()

    _qkv_same_embed_dim = False
    """Keeps `nn.TransformerEncoderLayer` off its fast path, which would compute softmax instead of us."""

    def _reset_parameters(self) -> None:
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            if (weight := getattr(self, name)) is not None:
                nn.init.xavier_uniform_(weight)
        for extra in (self.bias_k, self.bias_v):
            if extra is not None:
                nn.init.xavier_normal_(extra)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in torch. Weights are returned for softmax; other mechanisms have none and return None."""
        batched, same = query.ndim == 3, query is key
        if not batched:
            query, key, value = (x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        mask = self._mask(query, key, key_padding_mask, attn_mask, is_causal)
        q, k, v = self._project(query, key, value)
        cross = not same and not self.causal
        o = self.attend(q, k, v, mask=mask, cross=cross, tokens=query)
        o = F.dropout(self.out_proj(o.transpose(1, 2).flatten(2)), self.dropout, self.training)
        weights = None
        if need_weights and self.mechanism == "softmax":
            weights = attention_weights(q, k, mask & Mask(causal=self.causal))
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        if not self.batch_first:
            o = o.transpose(0, 1)
        return (o if batched else o.squeeze(0 if self.batch_first else 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        heads = (self.num_heads, self.head_dim)
        q, k, v = (x.unflatten(-1, heads).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _mask(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Mask:
        batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
        extra = (self.bias_k is not None) + self.add_zero_attn  # keys that are appended, always visible
        mask = Mask()
        if attn_mask is not None:
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
            _check(attn_mask, "attn_mask", (queries, keys))
            if not (self.causal and self._is_triangle(attn_mask)):
                mask = Mask.pairs_(F.pad(_allowed(attn_mask), (0, extra), value=True))
                mask = mask & self._finite_bias(attn_mask, extra)
        elif is_causal and not self.causal:
            mask = Mask.pairs_(F.pad(_triangle(queries, keys, query.device), (0, extra), value=True))
        if key_padding_mask is not None:
            _check(key_padding_mask, "key_padding_mask", (batch, keys))
            mask = mask & Mask.padding(F.pad(_allowed(key_padding_mask), (0, extra), value=True))
            mask = mask & self._finite_bias(key_padding_mask[:, None, None, :], extra)
        return mask

    def _finite_bias(self, mask: Tensor, extra: int) -> Mask:
        """What a float mask of torch's convention adds where it is not -inf.

        Compiled code cannot look: a mechanism that takes a bias gets it, and for others a zero is asserted.
        """
        if not mask.is_floating_point():
            return Mask()
        finite = mask.masked_fill(mask == -torch.inf, 0)
        if not torch.compiler.is_compiling():
            return Mask.biased(F.pad(finite, (0, extra))) if finite.any() else Mask()
        if Takes.BIAS in self._takes:
            return Mask.biased(F.pad(finite, (0, extra)))
        torch._assert_async((finite == 0).all(), "this mechanism takes no bias, and a float mask adds one")
        return Mask()

    def _is_triangle(self, mask: Tensor) -> bool:
        """Whether the mask is causality and nothing else; compiled code asserts it where the mechanism needs it."""
        same = _allowed(mask) == _triangle(mask.shape[-2], mask.shape[-1], mask.device)
        if not torch.compiler.is_compiling():
            return bool(same.all()) and self._finite_bias(mask, 0).bias is None
        if Takes.PAIRS in self._takes:
            return False
        torch._assert_async(same.all(), "this mechanism takes no mask but the causal triangle")
        self._finite_bias(mask, 0)
        return True

    @property
    def _takes(self) -> frozenset[Takes]:
        """What of a mask the mechanism honours."""
        return self.attend.spec.masks


def _check(mask: Tensor, name: str, shape: tuple[int, int]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise BadInput(f"{name} is bool (True = not allowed) or float (added), got {mask.dtype}")
    if mask.shape[-2:] != shape:
        raise BadInput(f"{name} ends in {tuple(mask.shape[-2:])}, expected {shape}")


def _allowed(mask: Tensor) -> Tensor:
    """Where a mask of torch's convention allows attention."""
    return ~mask if mask.dtype == torch.bool else mask != -torch.inf


def _triangle(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
