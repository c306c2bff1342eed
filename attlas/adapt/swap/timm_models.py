"""Attention of timm: ViT and its kin (DeiT, EVA, BEiT, rotary ones), Swin, MaxViT, VOLO, DaViT, MetaFormers, PVT v2.

B batch, N tokens, C channels, H heads, D head size, W windows of the batch, S tokens of a window.

A class is known by its full name, so that a subclass with a forward of its own is never taken for its parent. Other
attention of timm is found too, and left with the reason.

Windows: a mechanism that takes a bias stays in the windows of Swin, with their position bias and border masks. Any
other spans the whole grid, for what makes it cheap is its own, and a window would only cut its view; the position
bias, which belongs to the window, is dropped, except by `swin` itself, which has the same windows and table.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.adapt.swap.host import ANYWHERE, MARK, Core, Host, Place, Put, carry_projections, number, take_over
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Mechanism, Mixer, Site
from attlas.core.spec import Pattern, Takes

BIAS = frozenset({Takes.BIAS})

BIASES = ("relative_position_bias_table", "rel_pos")
"""Where modules of timm keep a learned position bias; None where it is shared by all."""


class _Sized(nn.Module):
    """What stands in a model that may be told another input size."""

    def set_window_size(self, window_size: Any) -> None:
        """Only the old module can."""
        raise BadInput("a model of timm changes its input size before attention is swapped: undo the swap first")


class _Swapped(_Sized):
    """Everything of a timm attention (see `take_over`), and a core."""

    core: Core
    num_heads: int

    def _qkv(self, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, N, D) each, by one projection or three, with the biases where timm keeps them."""
        module: Any = self
        if getattr(self, "qkv", None) is None:
            parts = [projection(x_BNC) for projection in (module.q_proj, module.k_proj, module.v_proj)]
        else:
            qkv = module.qkv(x_BNC)
            if getattr(self, "q_bias", None) is not None:
                qkv = qkv + torch.cat([module.q_bias, module.k_bias, module.v_bias]).to(qkv.dtype)
            parts = list(qkv.chunk(3, -1))
        size = parts[0].shape[-1] // self.num_heads
        q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in parts)
        if hasattr(self, "q_norm"):
            q, k = module.q_norm(q), module.k_norm(k)
        return q, k, v

    def _out(self, o_BNE: Tensor, x_BNC: Tensor) -> Tensor:
        """Norm and gate where there are any, projection, dropout."""
        module: Any = self
        if hasattr(self, "norm"):
            o_BNE = module.norm(o_BNE)
        if getattr(self, "gate", None) is not None:
            o_BNE = o_BNE * module.gate(x_BNC).sigmoid()
        o_BNC = module.proj(o_BNE)
        return module.proj_drop(o_BNC) if hasattr(self, "proj_drop") else o_BNC


def _mask(attn_mask: Tensor | None, is_causal: bool) -> Mask:
    if is_causal:
        return Mask.causal_()
    if attn_mask is None:
        return Mask()
    if attn_mask.dtype == torch.bool:  # three axes are heads and pairs, as they broadcast
        return Mask.pairs_(attn_mask[(None,) * (4 - attn_mask.ndim)])
    return Mask.biased(attn_mask)


class Global(_Swapped):
    """Attention of ViT with a mechanism inside."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As in timm."""
        q, k, v = self._qkv(x)
        return self._out(self.core(q, k, v, tokens=x, mask=_mask(attn_mask, is_causal)), x)


class Rotated(_Swapped):
    """Attention of EVA and of the rotary ViTs with a mechanism inside."""

    num_prefix_tokens: int
    rotate_half: bool = False

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As in timm."""
        q, k, v = self._qkv(x)
        if rope is not None:
            q, k = self._rotate(q, rope).type_as(v), self._rotate(k, rope).type_as(v)
        return self._out(self.core(q, k, v, tokens=x, mask=_mask(attn_mask, is_causal)), x)

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Turn neighbouring features, or those of two halves, of the tokens behind the prefix."""
        prefix, x = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        sin, cos = rope.chunk(2, -1)
        if self.rotate_half:
            first, second = x.chunk(2, -1)
            turned = torch.cat([-second, first], -1)
        else:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return torch.cat([prefix, (x * cos + turned * sin).to(x.dtype)], 2)


class Biased(_Swapped):
    """Attention of BEiT and of ViTs with relative positions with a mechanism inside; `biased` says if it takes them."""

    biased: bool

    def forward(
        self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, shared_rel_pos: Tensor | None = None
    ) -> Tensor:
        """As in timm."""
        q, k, v = self._qkv(x)
        shared = shared_rel_pos if shared_rel_pos_bias is None else shared_rel_pos_bias
        biases = [bias for bias in (self._own(), shared) if bias is not None]
        mask = Mask.biased(sum(biases[1:], biases[0])) if biases and self.biased else None
        return self._out(self.core(q, k, v, tokens=x, mask=mask), x)

    def _own(self) -> Tensor | None:
        if getattr(self, "rel_pos", None) is not None:
            return self.rel_pos.get_bias()  # type: ignore[operator, union-attr]
        return _table(self) if getattr(self, "relative_position_bias_table", None) is not None else None


def _table(module: Any) -> Tensor:
    """The bias (1, H, S, S) of a table of offsets."""
    bias_SSH = module.relative_position_bias_table[module.relative_position_index]
    return bias_SSH.permute(2, 0, 1).unsqueeze(0)


class Maps(Biased):
    """Attention of MaxViT (a map is a window) and VOLO (the whole image) with a mechanism inside."""

    head_first: bool = False

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """As in timm: x (maps, height, width, C)."""
        return super().forward(x.flatten(1, 2), shared_rel_pos=shared_rel_pos).unflatten(1, x.shape[1:3])

    def _qkv(self, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.head_first:
            return super()._qkv(x_BNC)
        module: Any = self
        q, k, v = module.qkv(x_BNC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(3, -1)
        return q, k, v


class Windows(_Swapped):
    """Window attention of Swin with a mechanism inside each window."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As in timm: x (W, S, C), mask (windows of one image, S, S) to be added."""
        q, k, v = self._qkv(x)
        bias = _bias(self)
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        return self._out(self.core(q, k, v, tokens=x, mask=Mask.biased(bias)), x)


def _bias(module: Any) -> Tensor:
    """The position bias (1, H, S, S) of a window: a table, or in version 2 a function of the offset."""
    if hasattr(module, "relative_position_bias_table"):
        return _table(module)
    offsets = module.cpb_mlp(module.relative_coords_table).flatten(0, -2)
    return 16 * offsets[module.relative_position_index].permute(2, 0, 1).unsqueeze(0).sigmoid()


def _cosines(module: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products are the scores of Swin V2, scale included."""
    scale = module.logit_scale.clamp(max=math.log(100.0)).exp()
    return (F.normalize(q, dim=-1) * scale).to(q.dtype), F.normalize(k, dim=-1)


class WindowsV2(Windows):
    """The same with the cosines of version 2."""

    def _qkv(self, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._qkv(x_BNC)
        return *_cosines(self, q, k), v


class WholeGrid(_Swapped):
    """A mechanism over the whole grid of a Swin block, whose one window is the grid while this stands in it."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As in timm, with one window."""
        q, k, v = self._qkv(x)
        return self._out(self.core(q, k, v, tokens=x), x)


class WholeGridV2(WholeGrid):
    """The same with the cosines of version 2."""

    def _qkv(self, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._qkv(x_BNC)
        return *_cosines(self, q, k), v


class Reduced(_Swapped):
    """Attention of PVT v2 and Twins to a smaller map of keys with a mechanism inside."""

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """As in timm: x (B, N, C) on a grid of this size."""
        module: Any = self
        source = x
        if getattr(self, "pool", None) is not None:
            source = module.act(module.norm(module.sr(module.pool(self._map(x, size))).flatten(2).transpose(1, 2)))
        elif module.sr is not None:
            source = module.norm(module.sr(self._map(x, size)).flatten(2).transpose(1, 2))
        heads = (self.num_heads, -1)
        q = module.q(x).unflatten(-1, heads).transpose(1, 2)
        k, v = (part.unflatten(-1, heads).transpose(1, 2) for part in module.kv(source).chunk(2, -1))
        cross = source is not x
        on = Grid((size[0], size[1])) if not cross and 2 in self.core.mechanism.spec.grids else None
        return module.proj_drop(module.proj(self.core(q, k, v, tokens=x, cross=cross, grid=on)))

    @staticmethod
    def _map(x: Tensor, size: Sequence[int]) -> Tensor:
        return x.transpose(1, 2).unflatten(-1, tuple(size))


class InWindows(nn.Module):
    """The old attention of a Swin block, answering calls over the whole grid: it cuts the block's windows itself."""

    def __init__(self, block: nn.Module, attn: nn.Module) -> None:
        super().__init__()
        self.block = copy.copy(block)
        self.block.__dict__ |= {"_modules": {"attn": attn}, "_parameters": {}, "_buffers": dict(block._buffers)}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `WholeGrid`."""
        block: Any = self.block
        return block._attn(x.unflatten(1, tuple(block.input_resolution))).flatten(1, 2)


class Mixed(_Sized):
    """A mechanism with projections of its own where attention stood."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **positions: Any) -> Tensor:
        """As in timm, also on maps; rotary positions and biases are not for it."""
        if x.ndim == 4:
            return self.mixer(x.flatten(1, 2)).unflatten(1, x.shape[1:3])
        return self.mixer(x, mask=_mask(attn_mask, is_causal))


@dataclass(kw_only=True)
class TimmPlace(Place):
    """A module whose swapped form is `new`."""

    new: type[_Swapped] = Global
    drops: bool = False
    """Whether patches are dropped in training."""

    def refuses(self, cls: type[Mechanism]) -> str | None:
        """What asks where tokens lie, while some are dropped."""
        if not self.drops or cls.spec.name in ANYWHERE:
            return None
        return (
            "patches are dropped in training (patch_drop_rate), and where those lie that are left is unknown: build "
            "the model without, or set patch_drop.prob = 0"
        )

    def put(self, core: Core, memo: dict[int, Any]) -> Put:
        """Everything, and the core."""
        return Put(take_over(self.new, self.module, memo, core=core))

    def put_mixer(self, mixer: Mixer, memo: dict[int, Any]) -> Put:
        """Only where as many channels come out as go in."""
        module: Any = self.module
        if module.proj.out_features != self.site.dim:
            raise BadInput(f"{self.site.dim} channels become {module.proj.out_features} here")
        notes = ("rotary positions are not used",) if self.new is Rotated else ()
        return Put(Mixed(mixer), carry_projections(mixer, _projections(module)), notes)


@dataclass(kw_only=True)
class ReducedPlace(TimmPlace):
    """Queries meet the keys of a smaller map, which a mechanism with projections of its own knows nothing of."""

    new: type[_Swapped] = Reduced

    def put_mixer(self, mixer: Mixer, memo: dict[int, Any]) -> Put:
        """Never."""
        raise BadInput("keys come from a smaller map here: only a mechanism on q, k, v can go in")


@dataclass(kw_only=True)
class BiasedPlace(TimmPlace):
    """A position bias is learned here, which only some mechanisms take."""

    new: type[_Swapped] = Biased

    def put(self, core: Core, memo: dict[int, Any]) -> Put:
        """Without the bias where the mechanism takes none."""
        new: Any = take_over(self.new, self.module, memo, core=core)
        new.biased = Takes.BIAS in core.mechanism.spec.masks
        if new.biased:
            return Put(new)
        for name in BIASES:
            if hasattr(new, name):
                setattr(new, name, None)
        return Put(new, notes=self._without_bias())

    def put_mixer(self, mixer: Mixer, memo: dict[int, Any]) -> Put:
        """Without the bias."""
        put = super().put_mixer(mixer, memo)
        return replace(put, notes=put.notes + self._without_bias())

    def _without_bias(self) -> tuple[str, ...]:
        """The remark, where there is a bias: of the module, or shared by all and brought by calls."""
        has = any(hasattr(self.module, name) for name in BIASES)
        return ("the position bias is not used: this mechanism takes none",) if has else ()

    def exact(self, mechanism: Attend) -> bool:
        """Only with the bias, where there is one."""
        takes = Takes.BIAS in mechanism.spec.masks or not self._without_bias()
        return takes and super().exact(mechanism)


@dataclass(kw_only=True)
class SwinPlace(TimmPlace):
    """Window attention, in a block that says where its windows lie."""

    block: Any

    @property
    def grid(self) -> Grid:
        """The whole grid of the block."""
        return Grid(tuple(self.block.input_resolution))

    def site_for(self, cls: type[Mechanism]) -> Site:
        """One window for a mechanism that takes a bias, else the whole grid."""
        return self.site if self._in_windows(cls) else replace(self.site, grid=self.grid, length=self.grid.tokens)

    def needs_of(self, cls: type[Mechanism]) -> frozenset[Takes]:
        """In windows the bias."""
        return BIAS if self._in_windows(cls) else frozenset()

    def settings_for(self, cls: type[Mechanism]) -> dict[str, Any]:
        """`swin` gets the windows that are there."""
        if cls.spec.name != "swin":
            return {}
        return {"window": tuple(self.block.window_size), "shift": tuple(self.block.shift_size)}

    @staticmethod
    def _in_windows(cls: type[Mechanism]) -> bool:
        return Takes.BIAS in cls.spec.masks and issubclass(cls, Attend)

    def teacher(self, new: nn.Module) -> nn.Module:
        """Over the whole grid something that cuts the windows."""
        return self.module if isinstance(new, Windows) else InWindows(self.block, self.module)

    def put(self, core: Core, memo: dict[int, Any]) -> Put:
        """In windows as it is; over the whole grid without the bias, or with the table as `swin` keeps it."""
        version_2 = hasattr(self.module, "logit_scale")
        if self._in_windows(type(core.mechanism)):
            return Put(take_over(WindowsV2 if version_2 else Windows, self.module, memo, core=core))
        self._check_grid()
        new: Any = take_over(WholeGridV2 if version_2 else WholeGrid, self.module, memo, core=core)
        for name in ("relative_position_bias_table", "relative_position_index", "cpb_mlp", "relative_coords_table"):
            if hasattr(new, name):
                delattr(new, name)
        if not self._same_windows(core.mechanism):
            window = "x".join(map(str, self.block.window_size))
            note = f"over the whole {self.grid}, no more in {window} windows with their position bias"
            if core.mechanism.spec.name == "swin":
                note = f"the position bias of the {window} windows is not carried"
            return Put(new, notes=(note,))
        swin: Any = core.mechanism
        old: Any = self.module
        with torch.no_grad():  # published offsets are query - key
            table_SSH = old.relative_position_bias_table.unflatten(0, swin.relative_bias.shape[1:])
            swin.relative_bias.copy_(table_SSH.permute(2, 0, 1).flip(1, 2))
        return Put(new, {"core.mechanism.relative_bias": "relative_position_bias_table"})

    def put_mixer(self, mixer: Mixer, memo: dict[int, Any]) -> Put:
        """Over the whole grid."""
        self._check_grid()
        notes = (f"over the whole {self.grid}",)
        return Put(Mixed(mixer), carry_projections(mixer, _projections(self.module)), notes)

    def exact(self, mechanism: Attend) -> bool:
        """In windows softmax; `swin` itself where no window reaches into padding."""
        if self._same_windows(mechanism):
            lengths = zip(self.grid.shape, self.block.window_size, strict=True)
            return mechanism.scale in (None, self.scale) and not any(length % window for length, window in lengths)
        return self._in_windows(type(mechanism)) and super().exact(mechanism)

    def _same_windows(self, mechanism: Attend) -> bool:
        """Whether it is `swin`, with the windows and the table of this block."""
        return (
            mechanism.spec.name == "swin"
            and hasattr(self.module, "relative_position_bias_table")
            and mechanism.window == tuple(self.block.window_size)
            and mechanism.shift == tuple(self.block.shift_size)
        )

    def _check_grid(self) -> None:
        if getattr(self.block, "dynamic_mask", False) or getattr(self.block, "always_partition", False):
            raise BadInput(
                "this model was built for images of any size (strict_img_size=False), so its grid is unknown: only a "
                "mechanism that takes a bias, which stays in the windows, can go in"
            )


def _projections(module: Any) -> dict[str, tuple[str, Tensor]]:
    """For `carry_projections`; not where heads come first."""
    sources = {"out_proj": ("proj", module.proj, 0, 1)}
    for part, letter in enumerate("qkv"):
        if getattr(module, "qkv", None) is None:
            sources[f"{letter}_proj"] = (f"{letter}_proj", getattr(module, f"{letter}_proj"), 0, 1)
        else:
            sources[f"{letter}_proj"] = ("qkv", module.qkv, part, 3)
    found = {}
    for name, (old, linear, part, parts) in sources.items():
        for kind in ("weight", "bias"):
            values = getattr(linear, kind)
            if values is not None:
                found[f"{name}.{kind}"] = (f"{old}.{kind}", values.chunk(parts)[part])
    if getattr(module, "q_bias", None) is not None:
        found |= {f"{letter}_proj.bias": (f"{letter}_bias", getattr(module, f"{letter}_bias")) for letter in "qkv"}
    return {} if getattr(module, "head_first", False) else found


def _plain(name: str, module: Any, grid: Grid | None) -> TimmPlace:
    return TimmPlace(name=name, module=module, site=_site(module, grid), dropout=_dropout(module))


def _dropout(module: Any) -> float:
    return module.attn_drop.p if hasattr(module, "attn_drop") else 0.0


def _rotated(name: str, module: Any, grid: Grid | None) -> TimmPlace:
    return replace(_plain(name, module, grid), new=Rotated)


def _biased(name: str, module: Any, grid: Grid | None) -> BiasedPlace:
    return BiasedPlace(name=name, module=module, site=_site(module, grid), dropout=module.attn_drop.p)


def _window(name: str, module: Any, grid: Grid | None) -> TimmPlace:
    return _plain(name, module, Grid(tuple(module.window_size)))


def _map(name: str, module: Any, grid: Grid | None) -> BiasedPlace:
    return replace(_biased(name, module, grid), new=Maps)


def _reduced(name: str, module: Any, grid: Grid | None) -> ReducedPlace:
    smaller = module.sr is not None or getattr(module, "pool", None) is not None
    return ReducedPlace(
        name=name,
        module=module,
        site=Site(module.q.in_features, module.num_heads, module.num_heads, module.q.out_features // module.num_heads),
        pattern=Pattern.NONCAUSAL_CROSS if smaller else Pattern.NONCAUSAL_SELF,
        dropout=module.attn_drop.p,
    )


KNOWN: dict[str, Callable[[str, Any, Grid | None], TimmPlace]] = {
    "timm.layers.attention.Attention": _plain,
    "timm.models.vision_transformer.Attention": _plain,
    "timm.layers.attention.AttentionRope": _rotated,
    "timm.models.eva.EvaAttention": _rotated,
    "timm.models.beit.Attention": _biased,
    "timm.models.vision_transformer_relpos.RelPosAttention": _biased,
    "timm.models.metaformer.Attention": _plain,
    "timm.models.davit.WindowAttention": _window,
    "timm.models.maxxvit.AttentionCl": _map,
    "timm.models.volo.Attention": _map,
    "timm.models.pvt_v2.Attention": _reduced,
    "timm.models.twins.GlobalSubSampleAttn": _reduced,
}
"""How to describe an attention of timm, by the full name of its class. Swin's needs its block too."""

SWIN = frozenset(f"timm.models.{each}.WindowAttention" for each in ("swin_transformer", "swin_transformer_v2"))

REASONS = {
    "timm.models.levit.Attention": "its keys are narrower than its values and batch norms stand inside",
    "timm.models.levit.AttentionDownsample": "its queries are a smaller map, with batch norms inside",
    "timm.models.cait.TalkingHeadAttn": "it mixes the heads before and after the softmax",
    "timm.models.cait.ClassAttn": "only the class token asks",
    "timm.models.crossvit.CrossAttention": "only the class token asks",
    "timm.models.volo.ClassAttention": "only the class token asks",
    "timm.models.volo.OutlookAttention": "its weights come from the query alone: there are no keys",
    "timm.models.edgenext.CrossCovarianceAttn": "it attends between channels, not between tokens",
    "timm.models.davit.ChannelAttention": "it attends between channels, not between tokens",
    "timm.models.twins.LocallyGroupedAttn": "it cuts its windows itself, and no grid is known",
    "timm.models.xcit.XCA": "it attends between channels, not between tokens",
    "timm.layers.attention_pool.AttentionPoolLatent": "it pools with a learned query",
}
"""Why some attention cannot be served; other unknown classes are left as unknown."""

LOOKS_LIKE_ATTENTION = re.compile(r"Attention|Attn|XCA$")


def _site(module: Any, grid: Grid | None) -> Site:
    fused = getattr(module, "qkv", None) is not None
    first = module.qkv if fused else module.q_proj
    heads = module.num_heads
    size = first.out_features // (3 * heads if fused else heads)
    length = None if grid is None else grid.tokens
    return Site(first.in_features, heads, getattr(module, "num_kv_heads", heads), size, length=length, grid=grid)


def _full_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


class TimmHost(Host):
    """timm."""

    library = "timm"

    def places(self, model: nn.Module) -> Iterable[Place]:
        """All known attention, and unknown one with an obstacle."""
        modules = {name: module for name, module in model.named_modules() if not hasattr(module, MARK)}
        found: list[Place] = []
        for name, module in modules.items():
            kind = _full_name(module)
            if kind in KNOWN or kind in SWIN:
                try:
                    place: TimmPlace = (
                        _swin(modules, name) if kind in SWIN else KNOWN[kind](name, module, _grid(modules, name))
                    )
                    place.drops = _drops(modules, name)
                except AttributeError as error:
                    place = TimmPlace(name=name, module=module, site=Site(1), obstacle=f"it was changed: {error}")
                found.append(place)
            elif kind.startswith("timm.") and LOOKS_LIKE_ATTENTION.search(kind.rpartition(".")[2]):
                why = REASONS.get(kind, f"swap does not know {kind}")
                found.append(TimmPlace(name=name, module=module, site=Site(1), obstacle=why))
        known = [place.name for place in found]
        innermost = [
            place
            for place in found
            if not (place.obstacle and any(other.startswith(f"{place.name}.") for other in known))
        ]
        number(model, innermost)
        return innermost

    def enter(self, model: nn.Module, places: Sequence[Place]) -> Callable[[], None]:
        """One window as large as the grid for the blocks of Swin whose mechanism wants the grid.

        And images with the proportions of the trained grid where a mechanism asks where patches lie.
        """
        handles = []
        for above, grid in _embedded(model, places):
            handles.append(above.patch_embed.register_forward_pre_hook(Proportions(grid.shape)))
        blocks = []
        for place in places:
            if isinstance(place, SwinPlace) and not isinstance(place.block.attn, Windows):
                block = place.block
                blocks.append((block, block.window_size, block.shift_size, block.window_area, block.attn_mask))
                block.window_size, block.shift_size = place.grid.shape, (0, 0)
                block.window_area, block.attn_mask = place.grid.tokens, None

        def leave() -> None:
            for handle in handles:
                handle.remove()
            for block, window, shift, area, mask in blocks:
                block.window_size, block.shift_size, block.window_area = window, shift, area
                block.attn_mask = mask if mask is None else mask.to(next(block.parameters()))

        return leave


class Proportions:
    """A hook before the patch embedding: a count of tokens says where they lie only if the grid keeps its shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __call__(self, embed: Any, args: tuple[Any, ...]) -> None:
        """Refuse images of another shape."""
        height, width = embed.dynamic_feat_size(args[0].shape[-2:])
        if height * self.shape[1] != width * self.shape[0]:
            raise BadInput(
                f"attention was swapped for a grid of {self.shape[0]}x{self.shape[1]} patches, and this image has "
                f"{height}x{width}: only grids of the same proportions are known; swap in a model built for such images"
            )


def _embedded(model: nn.Module, places: Sequence[Place]) -> list[tuple[Any, Grid]]:
    """The transformers around these places whose patch embedding says where patches lie, each once."""
    modules = dict(model.named_modules())
    found: dict[int, tuple[Any, Grid]] = {}
    for place in places:
        new: Any = modules[place.name]
        anywhere = isinstance(new, _Swapped) and new.core.mechanism.spec.name in ANYWHERE
        above = _above(modules, place.name)
        if not anywhere and above is not None and hasattr(above.patch_embed, "dynamic_feat_size"):
            found[id(above)] = above, Grid(tuple(above.patch_embed.grid_size))
    return list(found.values())


def _above(modules: dict[str, nn.Module], name: str) -> Any:
    """The transformer whose `blocks` hold this module, and whose patch embedding and prefix say how tokens lie."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        above: Any = modules[".".join(parts[:end])]
        shape = getattr(getattr(above, "patch_embed", None), "grid_size", None)
        if parts[end] == "blocks" and shape is not None and getattr(above, "num_prefix_tokens", None) is not None:
            return above
    return None


def _grid(modules: dict[str, nn.Module], name: str) -> Grid | None:
    """The grid of the windows around, or of the transformer around."""
    windows = getattr(modules.get(name.rpartition(".")[0]), "partition_size", None)
    if windows is not None:
        return Grid(tuple(windows))
    above = _above(modules, name)
    return None if above is None else Grid(tuple(above.patch_embed.grid_size), above.num_prefix_tokens)


def _drops(modules: dict[str, nn.Module], name: str) -> bool:
    return getattr(getattr(_above(modules, name), "patch_drop", None), "prob", 0) > 0


def _swin(modules: dict[str, nn.Module], name: str) -> TimmPlace:
    module: Any = modules[name]
    block: Any = modules[name.rpartition(".")[0]]
    if not hasattr(block, "input_resolution") or block.attn is not module:
        return replace(_plain(name, module, None), obstacle="it stands outside of a block of Swin")
    scale = 1.0 if hasattr(module, "logit_scale") else module.scale
    site = _site(module, Grid(tuple(block.window_size)))
    return SwinPlace(name=name, module=module, site=site, scale=scale, dropout=module.attn_drop.p, block=block)


HOST = TimmHost()
