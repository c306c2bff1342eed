"""Any mechanism by name: as a layer (`mixer`), as a module on q, k, v (`make_attend`), as a function."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

import attlas.mechanisms  # noqa: F401  (registers every mechanism)
from attlas.blocks.attention import Attention
from attlas.core.errors import BadInput, Unsupported
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Mechanism, Mixer, Site
from attlas.core.registry import mechanism, nearest

SHELL = frozenset(inspect.signature(Attention).parameters) - {"attend", "projected"}
"""Keyword arguments of `mixer` that are settings of the shell."""


def mixer(
    name: str,
    dim: int,
    heads: int = 1,
    *,
    causal: bool = False,
    kv_heads: int | None = None,
    query_heads: int | None = None,
    head_dim: int | None = None,
    length: int | None = None,
    grid: Grid | Sequence[int] | None = None,
    layer: int = 0,
    layers: int = 1,
    backend: str = "auto",
    **settings: Any,
) -> Mixer:
    """Build any mechanism as a layer on tokens (batch, tokens, dim).

    >>> layer = mixer("softmax", dim=32, heads=4, causal=True)
    >>> layer = mixer("softmax:xsqa", dim=32, heads=8)

    Args:
        name: of the mechanism, with a published variant behind a colon where it has any.
        dim: channels.
        heads: nominal heads: the head size is dim / heads. Mechanisms without heads do not read it.
        causal: no output depends on a later token.
        kv_heads: key/value heads, as many as heads by default.
        query_heads: query heads that are built; fewer than heads is sparse query attention.
        head_dim: overrides dim / heads.
        length: number of tokens that it is trained on, for mechanisms that depend on it.
        grid: the grid that it is trained on; also the default grid of every call.
        layer, layers: which layer of how many, for mechanisms that differ along the depth.
        backend: `auto` (a pure choice, see `attlas.explain`) or one by name, which never falls back.
        **settings: of the shell (see `attlas.Attention`) and of the mechanism (see `attlas show NAME`).

    Raises:
        UnknownName: no such mechanism, variant or setting; the message offers the nearest.
        BadInput: heads that do not divide.
        Unsupported: the mechanism is not causal.
    """
    cls, variant = resolve(name)
    if variant is not None:
        shares = cls.spec.variants[variant]
        counts = {name: max(1, int(heads * share)) for name, share in shares.items()}
        query_heads = counts.pop("query_heads", query_heads)
        kv_heads = counts.pop("kv_heads", kv_heads)
        settings = counts | settings
    for what, value in (("dim", dim), ("heads", heads), ("kv_heads", kv_heads), ("query_heads", query_heads)):
        if value is not None and value < 1:
            raise BadInput(f"{what} must be at least 1, got {value}")
    if isinstance(grid, Sequence):
        grid = Grid(tuple(grid))
    if issubclass(cls, Mixer):
        for what, value in (("kv_heads", kv_heads), ("query_heads", query_heads), ("head_dim", head_dim)):
            if value is not None:
                raise BadInput(f"{name} makes its heads itself and takes no {what}; see `attlas show {name}`")
        _check_settings(cls, settings, frozenset())
        site = Site(dim, heads, heads, 0, causal, length, grid, layer, layers)
        return cls(site, backend, **settings)
    if head_dim is None:
        if dim % heads:
            raise BadInput(f"heads must divide dim: {dim} channels do not split into {heads} heads")
        head_dim = dim // heads
    built = heads if query_heads is None else query_heads
    shared = built if kv_heads is None else kv_heads
    if max(built, shared) % min(built, shared):
        raise BadInput(f"{built} query heads and {shared} key/value heads: one must be a multiple of the other")
    wide = max(built, shared)
    site = Site(dim, wide, shared, head_dim, causal, length, grid, layer, layers)
    _check_settings(cls, settings, SHELL)
    shell = {key: value for key, value in settings.items() if key in SHELL}
    params = {key: value for key, value in settings.items() if key not in SHELL}
    built_attend = cls(site, backend, **params)
    assert isinstance(built_attend, Attend)
    return Attention(built_attend, projected=(built, shared), **dict(cls.spec.shell) | shell)


def make_attend(
    name: str,
    heads: int,
    head_dim: int,
    *,
    kv_heads: int | None = None,
    causal: bool = False,
    length: int | None = None,
    grid: Grid | Sequence[int] | None = None,
    layer: int = 0,
    layers: int = 1,
    backend: str = "auto",
    **params: Any,
) -> Attend:
    """Build a mechanism as a module on q, k, v, without projections; arguments are those of `mixer`.

    Raises:
        Unsupported: the mechanism works on tokens; use `mixer`.
    """
    cls, variant = resolve(name)
    if variant is not None:
        raise BadInput(f"{name!r} sets head counts of a layer; here the shapes of q and k do that")
    if not issubclass(cls, Attend):
        raise Unsupported(f"{name} mixes tokens and has no q, k, v; use attlas.mixer({name!r}, dim=...)")
    if isinstance(grid, Sequence):
        grid = Grid(tuple(grid))
    _check_settings(cls, params, frozenset())
    site = Site(heads * head_dim, heads, kv_heads or heads, head_dim, causal, length, grid, layer, layers)
    return cls(site, backend, **params)


def attend(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    name: str = "softmax",
    *,
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    grid: Grid | Sequence[int] | None = None,
    backend: str = "auto",
    **params: Any,
) -> Tensor:
    """The bare function of a mechanism that learns nothing: (q, k, v) -> o.

    Args:
        q_BHND, k_BGMD, v_BGME: (batch, heads, tokens, features); fewer key/value heads are shared.
        name: of the mechanism.
        causal: no output depends on a later position. Queries are the last N of M positions.
        mask: a `Mask`, or a tensor that `Mask.of` understands.
        grid: how the queries lie.
        backend: `auto`, or one by name, which never falls back.
        **params: of the mechanism.

    Raises:
        Unsupported: the mechanism has parameters of its own; use `mixer` or `make_attend`.
    """
    if q_BHND.ndim != 4 or k_BGMD.ndim != 4:
        raise BadInput(
            f"q, k, v are (batch, heads, tokens, features), got {tuple(q_BHND.shape)}, {tuple(k_BGMD.shape)}"
        )
    heads, kv_heads = q_BHND.shape[1], k_BGMD.shape[1]
    cls, _ = resolve(name)
    if kv_heads != heads and not cls.spec.grouped:
        if kv_heads < 1 or heads % kv_heads:
            raise BadInput(f"query heads must be a multiple of key/value heads, got {heads} and {kv_heads}")
        k_BGMD, v_BGME = (x.repeat_interleave(heads // kv_heads, 1) for x in (k_BGMD, v_BGME))
    keys = k_BGMD.shape[2]
    built = make_attend(
        name, heads, q_BHND.shape[3], kv_heads=kv_heads, causal=causal, length=keys, backend=backend, **params
    )
    if built.state_dict():
        learned = ", ".join(built.state_dict())
        raise Unsupported(f"{name} learns {learned}: build it once, with attlas.make_attend or attlas.mixer")
    cross = q_BHND.shape[2] != keys and not causal
    return built(q_BHND, k_BGMD, v_BGME, mask=mask, grid=grid, cross=cross)


def resolve(name: str) -> tuple[type[Mechanism], str | None]:
    """The class and the variant that `name` or `name:variant` means."""
    base, _, variant = name.partition(":")
    cls = mechanism(base)
    if variant and variant not in cls.spec.variants:
        raise BadInput(f"{base} has no variant {variant!r}{nearest(variant, cls.spec.variants)}")
    return cls, variant or None


def settings_of(cls: type[Mechanism]) -> dict[str, Any]:
    """The mechanism's own settings and their published defaults."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _check_settings(cls: type[Mechanism], given: dict[str, Any], shell: frozenset[str]) -> None:
    known = set(settings_of(cls)) | shell
    for key in given:
        if key not in known:
            own = ", ".join(settings_of(cls)) or "none"
            raise BadInput(
                f"{cls.spec.name} has no setting {key!r}{nearest(key, known) if known else ''} "
                f"(its own settings: {own})"
            )
