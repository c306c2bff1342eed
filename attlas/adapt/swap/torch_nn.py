"""`nn.MultiheadAttention`, alone or in the layers of `nn.Transformer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attlas.adapt.multihead import MultiheadAttention
from attlas.adapt.swap.host import MARK, Core, Host, Place, Put, carry_projections, number, take_over
from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Mixer, Site
from attlas.core.spec import Pattern, Takes

NESTED = "nested_before_swap"
"""An encoder's `use_nested_tensor` before the first of the swaps in it, and how many there are."""


class Swapped(MultiheadAttention):
    """A module of `torch.nn` with a mechanism inside; masks keep torch's meaning, and a causal one its effect."""

    core: Core

    def attend(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, cross: bool, tokens: Tensor
    ) -> Tensor:
        """The core, with heads unmerged again."""
        o_BNE = self.core(q, k, v, mask=mask, cross=cross, tokens=tokens)
        return o_BNE.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    @property
    def _takes(self) -> frozenset[Takes]:
        return self.core.mechanism.spec.masks


class Mixed(nn.Module):
    """A mechanism with projections of its own where self-attention stood."""

    _qkv_same_embed_dim = False
    in_proj_bias = None
    bias_k = None
    add_zero_attn = False

    def __init__(self, mixer: Mixer, num_heads: int, batch_first: bool) -> None:
        super().__init__()
        self.mixer, self.num_heads, self.batch_first = mixer, num_heads, batch_first
        self.causal = mixer.site.causal

    _mask = MultiheadAttention._mask
    _finite_bias = MultiheadAttention._finite_bias
    _is_triangle = MultiheadAttention._is_triangle

    @property
    def _takes(self) -> frozenset[Takes]:
        return self.mixer.spec.masks

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
    ) -> tuple[Tensor, None]:
        """As in torch, for self-attention on batches; there are no weights."""
        if key is not query or value is not query or query.ndim != 3:
            raise BadInput(f"{self.mixer.spec.name} mixes one batch of sequences: query, key and value are one tensor")
        x_BNC = query if self.batch_first else query.transpose(0, 1)
        mask = self._mask(x_BNC, x_BNC, key_padding_mask, attn_mask, is_causal)  # type: ignore[misc]
        y_BNC = self.mixer(x_BNC, mask=mask)
        return (y_BNC if self.batch_first else y_BNC.transpose(0, 1)), None


@dataclass(kw_only=True)
class TorchPlace(Place):
    """One `nn.MultiheadAttention`."""

    def put(self, core: Core, memo: dict[int, Any]) -> Put:
        """Everything the old module has, and the core."""
        new: Any = take_over(Swapped, self.module, memo, core=core)
        new._qkv_same_embed_dim = False  # keeps torch off its fast path, which would compute softmax
        new.causal, new.mechanism = core.mechanism.site.causal, core.mechanism.spec.name
        new.dropout = 0.0  # it is one of weights, and the mechanism's if it has one
        return Put(new, notes=("it appends keys, so it is causal by masks only",) if self.appended else ())

    def put_mixer(self, mixer: Mixer, memo: dict[int, Any]) -> Put:
        """For self-attention."""
        module: Any = self.module
        if self.pattern.endswith("cross"):
            raise BadInput("a mechanism with projections of its own mixes one sequence, here are two")
        old: dict[str, tuple[str, Tensor]] = {}
        for kind in ("weight", "bias"):
            stacked = getattr(module, f"in_proj_{kind}")
            if stacked is not None:
                parts = zip("qkv", stacked.chunk(3), strict=True)
                old |= {f"{letter}_proj.{kind}": (f"in_proj_{kind}", values) for letter, values in parts}
                old[f"out_proj.{kind}"] = (f"out_proj.{kind}", getattr(module.out_proj, kind))
        return Put(Mixed(mixer, module.num_heads, module.batch_first), carry_projections(mixer, old))


class TorchHost(Host):
    """`torch.nn`."""

    library = "torch"

    def places(self, model: nn.Module) -> Iterable[Place]:
        """Every `nn.MultiheadAttention`; those of subclasses are left."""
        modules = {name: module for name, module in model.named_modules() if not hasattr(module, MARK)}
        found: list[Place] = []
        for name, module in modules.items():
            if not isinstance(module, nn.MultiheadAttention):
                continue
            above, last = modules.get(name.rpartition(".")[0]), name.rpartition(".")[2]
            cross = isinstance(above, nn.TransformerDecoderLayer) and last == "multihead_attn"
            subclass = type(module) is not nn.MultiheadAttention
            heads, size = module.num_heads, module.head_dim
            appended = (module.bias_k is not None) + module.add_zero_attn
            found.append(
                TorchPlace(
                    name=name,
                    module=module,
                    site=Site(module.embed_dim, heads, heads, size),
                    pattern=Pattern.NONCAUSAL_CROSS if cross else Pattern.NONCAUSAL_SELF,
                    dropout=module.dropout,
                    causal_open=not cross and not appended,  # causality counts from the last key
                    appended=appended,
                    obstacle=f"{type(module).__qualname__} is a subclass whose forward swap does not know"
                    if subclass
                    else None,
                )
            )
        number(model, found)
        return found

    def enter(self, model: nn.Module, places: Sequence[Place]) -> Callable[[], None]:
        """No nested tensors in encoders around these modules, as long as any module in them is swapped."""
        olds = {place.name for place in places}
        encoders = []
        for name, module in model.named_modules():
            around = f"{name}." if name else ""
            if isinstance(module, nn.TransformerEncoder) and any(each.startswith(around) for each in olds):
                encoders.append(module)
        for encoder in encoders:
            nested, swaps = getattr(encoder, NESTED, (encoder.use_nested_tensor, 0))
            setattr(encoder, NESTED, (nested, swaps + 1))
            encoder.use_nested_tensor = False

        def leave() -> None:
            for encoder in encoders:
                nested, swaps = getattr(encoder, NESTED)
                setattr(encoder, NESTED, (nested, swaps - 1))
                if swaps == 1:
                    delattr(encoder, NESTED)
                    encoder.use_nested_tensor = nested

        return leave


HOST = TorchHost()
