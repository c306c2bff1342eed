"""What `swap` and the libraries agree on: where the attention of a model is, and how a mechanism gets there.

B batch, N queries, M keys, C channels, H query heads, G key/value heads, D head size, E value size.

A `Host` speaks for one library. It finds the attention modules of a model and describes each as a `Place`: the site
(dim, heads, head size, causality, grid), what calls bring with them, and how to build the module that stands there
with another mechanism inside. Everything else (patterns, checks, settings, ties, the report, undo) is `swap`'s.

The rules for a place's `put`:

- The model is never touched. `put` returns a new module with the same `forward` signature; `swap` assigns it.
- Weights are copied with `copy.deepcopy(..., memo)` and keep their names, so that a state_dict of the old module fits
  where its weights still have a meaning. One memo serves a whole swap: what was tied stays tied, and whatever belongs
  to the rest of the model (other modules, parameters that are used elsewhere too) is in it already, as itself.
- The mechanism arrives as a `Core` (an attend) or as a `Mixer`, in the dtype, on the device and in the mode of the
  old module, and becomes a submodule. `take_over` does the usual: everything the old module has, and the core.
- Parameters of the new module whose names the old one has count as carried, all others as new, unless `Put.converted`
  names them; names of the old one that are gone count as dropped.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from attlas.blocks.attention import ACTIVATIONS, make_norm
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Mechanism, Mixer, Site
from attlas.core.spec import Pattern, Takes
from attlas.ops.softmax import repeat_heads

AROUND = ("qk_norm", "qk_activation", "output_norm", "gate")
"""Settings of `attlas.Attention` that hold for a `Core` too; projections and positions are the host's."""

ANYWHERE = frozenset({"softmax"})
"""Mechanisms that do not ask where tokens lie, and so take any number of them."""

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Where a module keeps what others hung on it. Old and new module share these, so that a handle holds for both."""

MARK = "swapped_mechanism"
"""The attribute with the mechanism's name that `swap` gives to every module it puts into a model."""

Module = TypeVar("Module", bound=nn.Module)


class Core(nn.Module):
    """An attend between the projections of a host, with what its publication puts around it.

    Norms and an activation of queries and keys, a norm and a gate of the output are those of `attlas.Attention`; by
    default a mechanism has the ones of its paper, and most have none.

    Args:
        mechanism: the attend.
        rescale: a factor on the queries: a host's scale of the scores, where the mechanism has no setting for it.
        value_dim: features of a value, where they are not as many as those of a key.
        qk_norm, qk_activation, output_norm, gate: as in `attlas.Attention`.
    """

    def __init__(
        self,
        mechanism: Attend,
        *,
        rescale: float = 1.0,
        value_dim: int | None = None,
        qk_norm: str | None = None,
        qk_activation: str | None = None,
        output_norm: str | None = None,
        gate: str | None = None,
    ) -> None:
        super().__init__()
        site = mechanism.site
        width = site.heads * (value_dim or site.head_dim)
        if qk_activation not in ACTIVATIONS or gate not in (None, "linear", "sigmoid", "silu"):
            raise BadInput(
                f"qk_activation is one of {', '.join(map(repr, ACTIVATIONS))} and gate None, 'linear', 'sigmoid' or "
                f"'silu', got {qk_activation!r} and {gate!r}"
            )
        self.mechanism = mechanism
        self.rescale = rescale
        self.q_norm, self.k_norm = make_norm(qk_norm, site.head_dim), make_norm(qk_norm, site.head_dim)
        self.qk_activation = ACTIVATIONS[qk_activation]()
        self.output_norm = make_norm(output_norm, width)
        self.gate_proj = nn.Linear(site.dim, width) if gate else None
        self.gate_activation = ACTIVATIONS[None if gate == "linear" else gate]()

    def forward(
        self,
        q_BHND: Tensor,
        k_BGMD: Tensor,
        v_BGME: Tensor,
        *,
        tokens: Tensor,
        mask: Mask | Tensor | None = None,
        grid: Grid | None = None,
        cross: bool = False,
    ) -> Tensor:
        """Attend and merge the heads: (B, N, H E), ready for the host's output projection.

        Args:
            q_BHND, k_BGMD, v_BGME: projected, normed and rotated by the host; heads are repeated where needed.
            tokens: (B, N, C), what the queries were made of.
            mask: a `Mask`; causality of a causal site is implied.
            grid: how the queries lie; by default the site's grid.
            cross: keys and values come from another sequence.
        """
        v = v_BGME
        q = self.q_norm(self.qk_activation(q_BHND)).to(v.dtype)
        k = self.k_norm(self.qk_activation(k_BGMD)).to(v.dtype)
        if self.rescale != 1:
            q = q * self.rescale
        if not self.mechanism.spec.grouped:
            k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
        if grid is None:
            anywhere = self.mechanism.spec.name in ANYWHERE
            grid = Grid((q.shape[2],)) if anywhere else grid_of_call(self.mechanism.site.grid, q.shape[2])
        o_BHNE = self.mechanism(q, k, v, mask=mask, grid=grid, cross=cross, tokens=tokens)
        o = self.output_norm(o_BHNE.transpose(1, 2).flatten(2)).to(v.dtype)
        return o if self.gate_proj is None else o * self.gate_activation(self.gate_proj(tokens))


@dataclass(frozen=True)
class Put:
    """The module that a place wants in the model, and what the report should know about it.

    Attributes:
        module: to be assigned.
        converted: old parameter names whose values went into parameters of another name or layout: {new: old}.
        notes: sentences for the report.
    """

    module: nn.Module
    converted: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Place(ABC):
    """One attention module of a model. Hosts subclass it; one instance per module, also where it is used twice.

    Attributes:
        name: of the module in `model.named_modules()`.
        module: the attention module itself, which `put` must not change.
        site: what a mechanism is built for. `grid` where it is known (with prefix tokens), else None.
        pattern: how the calls are.
        needs: what of a mask every call brings, which the mechanism must honour for the model to mean the same.
        scale: of the scores, where it is not D ** -0.5.
        dropout: share of the attention weights that is dropped in training.
        obstacle: why nothing can be swapped here; the module is then left, with this reason.
        causal_open: the module does not say whether its calls are causal, so that `swap(causal=True)` may.
        appended: how many keys the module puts behind those of the call.
        value_dim: features of a value, where they are not as many as those of a key.
    """

    name: str
    module: nn.Module
    site: Site
    pattern: Pattern = Pattern.NONCAUSAL_SELF
    needs: frozenset[Takes] = frozenset()
    scale: float | None = None
    dropout: float = 0.0
    obstacle: str | None = None
    causal_open: bool = False
    appended: int = 0
    value_dim: int | None = None

    def refuses(self, cls: type[Mechanism]) -> str | None:
        """Why this mechanism cannot go here although its declaration fits."""
        return None

    def site_for(self, cls: type[Mechanism]) -> Site:
        """The site as this mechanism meets it; most places have one for all."""
        return self.site

    def needs_of(self, cls: type[Mechanism]) -> frozenset[Takes]:
        """`needs` as this mechanism meets them."""
        return self.needs

    def settings_for(self, cls: type[Mechanism]) -> dict[str, Any]:
        """Settings that this place suggests to the mechanism; the user's own win."""
        return {}

    def teacher(self, new: nn.Module) -> nn.Module:
        """What answers the calls of the new module as the old one would; asked before the model changes."""
        return self.module

    @abstractmethod
    def put(self, core: Core, memo: dict[int, Any]) -> Put:
        """The new module with this attend, weights carried."""

    def put_mixer(self, mixer: Mixer, memo: dict[int, Any]) -> Put:
        """The new module with a mechanism that has projections of its own; a place that cannot says so.

        Raises:
            BadInput: why not.
        """
        raise BadInput("a mechanism with projections of its own cannot go between these")

    def exact(self, mechanism: Attend) -> bool:
        """Whether this attend, as it was built for this place, computes the function of the old module."""
        return same_as_softmax(mechanism, self.scale)


class Host(ABC):
    """One library. Instances have no state; a host is asked only if `library` is in `sys.modules`."""

    library: ClassVar[str]

    @abstractmethod
    def places(self, model: nn.Module) -> Iterable[Place]:
        """The attention modules of this library in the model, in order, without those that carry `MARK`."""

    def enter(self, model: nn.Module, places: Sequence[Place]) -> Callable[[], None]:
        """Whatever must change outside of the swapped modules, such as a mask function of the whole model.

        Called once per swap, after all modules were assigned, with the places that were swapped; the function that
        comes back undoes it, and is called before the old modules return. Swaps may be undone in any order.
        """
        return _nothing


def _nothing() -> None:
    """Undo nothing."""


def take_over(cls: type[Module], old: nn.Module, memo: dict[int, Any], **submodules: nn.Module) -> Module:
    """A module of class `cls` with copies of everything that `old` has, and these submodules.

    `cls` writes `forward` for the attributes that it finds, and has no `__init__` of its own.
    """
    new = cls.__new__(cls)
    kept = {name: value for name, value in old.__dict__.items() if name != "_compiled_call_impl"}
    new.__dict__ = copy.deepcopy(kept, memo)
    for name, module in submodules.items():
        setattr(new, name, module)
    return new


def carry_projections(mixer: Mixer, old: Mapping[str, tuple[str, Tensor]]) -> dict[str, str]:
    """Copy projections into a mechanism that has the same ones under Attlas' names, and say what came from where.

    Args:
        mixer: whose parameters are filled where one has this name and shape.
        old: the old parameter's name and the values, by `q_proj.weight`, `q_proj.bias`, ... `out_proj.bias`.

    Returns:
        {"mixer.q_proj.weight": old name, ...}, for `Put.converted`.
    """
    own = dict(mixer.named_parameters())
    fits = {name: source for name, source in old.items() if name in own and own[name].shape == source[1].shape}
    with torch.no_grad():
        for name, (_, values) in fits.items():
            own[name].copy_(values)
    return {f"mixer.{name}": source for name, (source, _) in fits.items()}


def same_as_softmax(mechanism: Attend, scale: float | None = None) -> bool:
    """Whether it is softmax over everything visible, in other words or not, at the grid of its site.

    Softmax itself, and `neighborhood` whose window holds the whole grid and which was given no bias.
    """
    size, site = mechanism.site.head_dim, mechanism.site
    wanted = size**-0.5 if scale is None else scale
    if mechanism.spec.name not in ("softmax", "neighborhood"):
        return False
    own: Any = mechanism.scale
    if not math.isclose(size**-0.5 if own is None else own, wanted):
        return False
    if mechanism.spec.name == "softmax":
        return True
    if site.grid is None or mechanism.relative_bias is not None or site.causal:
        return False
    axes = mechanism._axes(site.grid)
    return all(axis.window == axis.length and not axis.causal for axis in axes)


def number(model: nn.Module, places: Sequence[Place]) -> None:
    """Tell the places that have no obstacle which layer of how many they are; those swapped before count too."""
    open_ = {place.name: place for place in places if not place.obstacle}
    layers = [name for name, module in model.named_modules() if name in open_ or hasattr(module, MARK)]
    for layer, name in enumerate(layers):
        if name in open_:
            open_[name].site = replace(open_[name].site, layer=layer, layers=len(layers))


def grid_of_call(grid: Grid | None, tokens: int) -> Grid | None:
    """The grid of a call with this many tokens: the trained one, or one with the same proportions.

    Raises:
        BadInput: neither fits.
    """
    if grid is None or grid.tokens == tokens:
        return grid
    zoom = ((tokens - grid.prefix) / grid.positions) ** (1 / grid.rank) if tokens > grid.prefix else 0.0
    shape = tuple(round(length * zoom) for length in grid.shape)
    if math.prod(shape) + grid.prefix != tokens or min(shape) < 1:
        raise BadInput(
            f"this attention was swapped for a {grid}; {tokens} tokens are no such grid at another size, so where they "
            "lie is unknown (images of another shape, or tokens that were dropped)"
        )
    return Grid(shape, grid.prefix)


def dtype_and_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Those of the first floating parameter."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            return parameter.dtype, parameter.device
    return torch.get_default_dtype(), torch.get_default_device()
