"""Any mechanism into a model that exists.

    report = attlas.swap(model, "agent", where="blocks.*.attn")
    print(report)
    report.undo()

Models of timm and transformers, and `torch.nn`'s `MultiheadAttention` with the Transformer layers made of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn

from attlas.adapt.swap.host import AROUND, HOOKS, MARK, Core, Host, Place, Put, dtype_and_device
from attlas.adapt.swap.report import Report, Row, Verdict
from attlas.blocks.factory import resolve, settings_of
from attlas.core.errors import AttlasError, BadInput, UnknownName, Unsupported
from attlas.core.grid import Grid
from attlas.core.mechanism import Attend, Mechanism, Mixer
from attlas.core.registry import mechanisms, nearest
from attlas.core.spec import Pattern, Takes

HOSTS = {"torch": "torch_nn", "timm": "timm_models", "transformers": "transformers_models"}
"""The module here that knows a library, with its `HOST`; read only if the library is loaded."""

SHOWN = 12
"""How many mechanisms an error names."""

WRAPPERS = frozenset({"DistributedDataParallel", "FullyShardedDataParallel"})
"""Classes that took note of a model's parameters, and would go on with the old ones."""

TRIED = 16
"""Tokens of the trial call where the site has no grid."""

__all__ = ["Report", "Row", "Verdict", "places", "swap"]


def hosts() -> list[Host]:
    """The hosts of the libraries that are loaded."""
    loaded = [name for library, name in HOSTS.items() if library in sys.modules]
    return [import_module(f"{__name__}.{name}").HOST for name in loaded]


def places(model: nn.Module) -> list[Place]:
    """The attention modules of a model, in its own order, without those that were swapped."""
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    found = {place.name: place for host in hosts() for place in host.places(model)}
    for place in found.values():
        if place.name.endswith("._orig_mod"):
            place.obstacle = "it was compiled by itself: compile after the swap"
    return sorted(found.values(), key=lambda place: order[place.name])


def swap(
    model: nn.Module,
    mechanism: str,
    where: str | Sequence[str] = "*",
    *,
    causal: bool = False,
    grid: Grid | Sequence[int] | None = None,
    dry_run: bool = False,
    backend: str = "auto",
    **settings: Any,
) -> Report:
    """Put a mechanism into the attention modules of a model, in place.

    Weights that have a meaning for the mechanism are carried over (copied: undo finds the old ones as they were), with
    dtype, device, mode, `requires_grad`, dropout and scale. Make the optimizer after the swap.

    >>> layer = nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    >>> model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    >>> swap(model, "softmax", where="layers.0").swapped
    ['layers.0.self_attn']

    Args:
        model: a model of timm, transformers or torch.nn, or one that has such parts.
        mechanism: by name, see `attlas.mechanisms()`.
        where: wildcard patterns of module names, as in `model.named_modules()`: of the attention modules or of
            modules around them. Several are a sequence, or one string with commas.
        causal: build the mechanism causal where the module does not say what it is (those of torch.nn); needed by
            mechanisms that cannot be told by a mask. It then is causal in every call, so `where` should name the
            decoder.
        grid: how tokens lie where the model does not say, as a shape or a `Grid` with prefix tokens.
        dry_run: build and check everything, change nothing.
        backend: of the mechanism's ops.
        **settings: of the mechanism, and `qk_norm`, `qk_activation`, `output_norm`, `gate` of `attlas.Attention`.

    Returns:
        A report: what is exact, approximate, new and left, with `undo`.

    Raises:
        UnknownName: no such mechanism, or no attention module whose name matches.
        Unsupported: the mechanism cannot go anywhere here; the message names some that could.
        BadInput: modules that are swapped already, unknown settings.
    """
    with torch.inference_mode(False):  # whose parameters could never be trained
        return _swap(model, mechanism, where, causal, grid, dry_run, backend, settings)


def _swap(
    model: nn.Module,
    mechanism: str,
    where: str | Sequence[str],
    causal: bool,
    grid: Grid | Sequence[int] | None,
    dry_run: bool,
    backend: str,
    settings: dict[str, Any],
) -> Report:
    cls, variant = resolve(mechanism)
    if variant is not None:
        raise BadInput(f"{mechanism!r} sets head counts, and here those are the model's; swap in {cls.spec.name!r}")
    if wrapped := WRAPPERS & {type(module).__name__ for module in model.modules()}:
        raise BadInput(f"{min(wrapped)} holds on to the parameters that it found in the model: swap, then wrap")
    _check_settings(cls, settings)
    chosen, aliases = _choose(model, where)
    _describe(chosen, causal, grid)
    fits = _fit(model, chosen, cls, backend, settings, fork=dry_run)
    report = Report(mechanism, [row for _, row, _ in fits], dry_run)
    if not report.swapped:
        raise _nowhere(cls, fits)
    if not dry_run:
        news = [(place, put.module) for place, _, put in fits if put is not None]
        for _, new in news:
            setattr(new, MARK, mechanism)
        report.teachers = {place.name: place.teacher(new) for place, new in news}
        report._undo = _install(model, news, aliases)
        report.old = {place.name: place.module for place, _ in news}
    return report


def _describe(chosen: list[Place], causal: bool, grid: Grid | Sequence[int] | None) -> None:
    """Tell the places what their modules did not know."""
    if isinstance(grid, int):
        raise BadInput(f"grid is a shape such as (14, 14) or ({grid},), or a Grid, got {grid}")
    shape = grid if isinstance(grid, Grid) or grid is None else Grid(tuple(grid))
    for place in chosen:
        if causal and place.causal_open:
            place.site, place.pattern = replace(place.site, causal=True), Pattern.CAUSAL_SELF
        if shape is not None and place.site.grid is None and not place.pattern.endswith("cross"):
            place.site = replace(place.site, grid=shape, length=shape.tokens)


def _check_settings(cls: type[Mechanism], given: dict[str, Any]) -> None:
    known = set(settings_of(cls)) | (set(AROUND) if issubclass(cls, Attend) else set())
    for key in given:
        if key not in known:
            raise BadInput(f"{cls.spec.name} has no setting {key!r} that holds in a swap{nearest(key, known)}")


def _choose(model: nn.Module, where: str | Sequence[str]) -> tuple[list[Place], dict[str, list[str]]]:
    """The places that `where` means, and every name of each."""
    given = where.split(",") if isinstance(where, str) else where
    patterns = [each.strip() for each in given if each.strip()]
    if not patterns:
        raise BadInput(f"where names no module, got {where!r}; '*' means all")
    aliases: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(name)
    taken = {name: getattr(module, MARK) for name, module in model.named_modules() if hasattr(module, MARK)}
    free = {place.name: place for place in places(model)}
    if "" in free or "" in taken:
        raise BadInput("the model is itself an attention module, which nothing holds: swap in a model around it")
    if not free and not taken:
        known = ", ".join(HOSTS)
        raise Unsupported(
            f"no attention module that swap knows is in {type(model).__name__} (it knows those of {known})"
        )
    chosen: dict[str, Place] = {}
    for pattern in patterns:
        hit = {name for name in taken if _matches(pattern, [name])}
        found = [place for name, place in free.items() if _matches(pattern, aliases[id(place.module)])]
        if hit:
            name = min(hit)
            raise BadInput(
                f"{name} holds {taken[name]} by an earlier swap ({len(hit)} such modules match {pattern!r}): call "
                "undo() of that report first, or name other modules; a copy of a swapped model has no report, so swap "
                "in a copy of the original"
            )
        if not found:
            raise UnknownName(_no_match(model, pattern, list(free)))
        chosen |= {place.name: place for place in found}
    ordered = [place for name, place in free.items() if name in chosen]
    return ordered, {place.name: aliases[id(place.module)] for place in ordered}


def _matches(pattern: str, names: Sequence[str]) -> bool:
    """Whether the pattern means one of these modules, or one that holds it."""
    for name in names:
        parts = name.split(".")
        if any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1)):
            return True
    return False


def _no_match(model: nn.Module, pattern: str, names: list[str]) -> str:
    others = [(name, module) for name, module in model.named_modules() if name and fnmatchcase(name, pattern)]
    shown = ", ".join(names[:4]) + (f" ... {names[-1]} ({len(names)})" if len(names) > 4 else "")
    if others:
        name, module = others[0]
        return (
            f"{pattern!r} matches {len(others)} modules such as {name} ({type(module).__name__}), but among and inside "
            f"them is no attention that swap knows; there is {shown}"
        )
    return f"no module is called {pattern!r}{nearest(pattern, names)}; attention modules: {shown}"


Fitted = tuple[Place, Row, Put | None]


class _Built(NamedTuple):
    """A mechanism for a place, which nothing holds yet."""

    inner: Core | Mixer
    plain: bool  # nothing around it that the old module had not
    notes: list[str]


def _fit(
    model: nn.Module, chosen: list[Place], cls: type[Mechanism], backend: str, settings: dict[str, Any], fork: bool
) -> list[Fitted]:
    """Build everything; a place where the mechanism cannot go is left with the reason."""
    left: dict[str, str] = {}
    built: dict[str, _Built] = {}
    with torch.random.fork_rng(enabled=fork):
        for place in chosen:
            try:
                _check_place(cls, place)
                built[place.name] = _build(place, cls, backend, settings)
            except AttlasError as error:
                left[place.name] = str(error)
    puts: dict[str, Put] = {}
    while len(puts) < len(built):  # what is left belongs to the rest of the model, and may share weights with others
        memo = _rest_of(model, {id(place.module) for place in chosen if place.name in built})
        puts = {}
        for place in chosen:
            if place.name in built:
                try:
                    puts[place.name] = _put(place, built[place.name].inner, memo)
                except AttlasError as error:
                    left[place.name] = str(error)
        built = {name: each for name, each in built.items() if name in puts}
    rows = {place.name: _row(place, built[place.name], puts[place.name]) for place in chosen if place.name in puts}
    rows |= {
        place.name: Row(place.name, _kind(place), Verdict.LEFT, notes=(left[place.name],))
        for place in chosen
        if place.name in left
    }
    return [(place, rows[place.name], puts.get(place.name)) for place in chosen]


def _kind(place: Place) -> str:
    return type(place.module).__name__


def _rest_of(model: nn.Module, inside: set[int]) -> dict[int, Any]:
    """A memo for `copy.deepcopy` in which everything outside of these modules stands for itself."""
    memo: dict[int, Any] = {}

    def walk(module: nn.Module) -> None:
        if id(module) in inside or id(module) in memo:
            return
        memo[id(module)] = module
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = tensor
        for child in module.children():
            walk(child)

    walk(model)
    return memo


def _check_place(cls: type[Mechanism], place: Place) -> None:
    reason = place.obstacle or _misfit(cls, place)
    if "forward" in vars(place.module):
        reason = "its forward was replaced on the instance, by hand or by another library"
    if reason:
        raise Unsupported(reason)


def _misfit(cls: type[Mechanism], place: Place) -> str | None:
    """Why this mechanism cannot serve the place, as far as its declaration says."""
    spec, site = cls.spec, place.site_for(cls)
    if refusal := place.refuses(cls):
        return refusal
    if place.pattern not in spec.patterns:
        hint = " (if all calls are causal, say causal=True)" if place.causal_open and not site.causal else ""
        return f"{spec.name} does not serve {place.pattern} attention{hint}"
    missing = place.needs_of(cls) - spec.masks
    if missing:
        return f"{spec.name} does not take the {' and '.join(sorted(missing))} of the masks that come here"
    if site.grid is None and 1 not in spec.grids:
        return f"{spec.name} needs a grid of {' or '.join(map(str, spec.grids))} axes, here is a sequence"
    if site.grid is not None:
        if site.grid.rank not in spec.grids:
            return f"{spec.name} serves no {site.grid}"
        if site.grid.prefix and not spec.prefix:
            return f"{spec.name} takes no prefix tokens, here is a {site.grid}"
        if spec.class_token and not site.grid.prefix:
            return f"{spec.name} needs a class token, here is a {site.grid}"
    if issubclass(cls, Mixer) and type(place).put_mixer is Place.put_mixer:
        return f"{spec.name} has projections of its own and mixes tokens; only a mechanism on q, k, v can go here"
    return None


def _build(place: Place, cls: type[Mechanism], backend: str, settings: dict[str, Any]) -> _Built:
    dtype, device = dtype_and_device(place.module)
    site, own, notes = place.site_for(cls), settings_of(cls), []
    params = {key: value for key, value in place.settings_for(cls).items() if key in own} | settings
    around = {key: value for key, value in dict(cls.spec.shell).items() if key in AROUND}
    around |= {key: params.pop(key) for key in AROUND if key in params and key not in own}
    rescale = 1.0
    if place.scale is not None and "scale" not in params:
        if "scale" in own:
            params["scale"] = place.scale
        else:
            rescale = place.scale * site.head_dim**0.5
    if place.dropout and "weight_dropout" not in params:
        if "weight_dropout" in own:
            params["weight_dropout"] = place.dropout
        else:
            notes.append(f"no dropout of weights ({place.dropout:g}) in training: {cls.spec.name} has none")
    mechanism = cls(site, backend, **params)
    inner: Core | Mixer
    if isinstance(mechanism, Attend):
        inner = Core(mechanism, rescale=rescale, value_dim=place.value_dim, **around)
    else:
        assert isinstance(mechanism, Mixer)
        inner = mechanism
    inner = inner.to(device=device, dtype=dtype)
    try:
        _try(inner, place, dtype, device)
    except (RuntimeError, NotImplementedError) as error:  # torch's own, such as a dtype without a kernel
        raise BadInput(f"{type(error).__name__}: {error}") from error
    inner.train(place.module.training)
    if place.causal_open and not site.causal and Takes.PAIRS not in cls.spec.masks:
        notes.append("a causal attn_mask is refused; if all calls are causal, say causal=True")
    return _Built(inner, not set(around.values()) - {None}, notes)


def _put(place: Place, inner: Core | Mixer, memo: dict[int, Any]) -> Put:
    for module in place.module.modules():
        memo |= {id(hooks): hooks for hooks in _hooks(module)}
    try:
        put = place.put(inner, memo) if isinstance(inner, Core) else place.put_mixer(inner, memo)
    except RuntimeError as error:
        raise BadInput(f"its weights cannot be copied: {error}") from error
    for name, hooks in zip(HOOKS, _hooks(place.module), strict=True):
        setattr(put.module, name, hooks)
    put.module.training = place.module.training  # what is inside has its modes already
    return put


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    return [getattr(module, name) for name in HOOKS]


def _try(inner: Core | Mixer, place: Place, dtype: torch.dtype, device: torch.device) -> None:
    """One call at the sizes of the site: what a mechanism refuses, it refuses now."""
    site = inner.mechanism.site if isinstance(inner, Core) else inner.site
    tokens = site.grid.tokens if site.grid is not None else min(site.length or TRIED, TRIED)
    cross = place.pattern.endswith("cross")
    make: dict[str, Any] = {"dtype": dtype, "device": device}
    inner.eval()
    with torch.no_grad():
        x_BNC = torch.zeros(1, tokens, site.dim, **make)
        if isinstance(inner, Core):
            q = torch.zeros(1, site.heads, tokens, site.head_dim, **make)
            k = torch.zeros(1, site.kv_heads, tokens + place.appended, site.head_dim, **make)
            v = k if place.value_dim is None else k.new_zeros(*k.shape[:3], place.value_dim)
            inner(q, k, v, tokens=x_BNC, cross=cross)
        else:
            inner(x_BNC, x_BNC if cross else None)


def _row(place: Place, built: _Built, put: Put) -> Row:
    notes = [*put.notes, *built.notes]
    old, new = (dict(module.named_parameters()) for module in (place.module, put.module))
    converted = put.converted or {}
    for name, source in converted.items():
        if source in old:  # and no buffer
            new[name].requires_grad_(old[source].requires_grad)
    fresh = {name: each.numel() for name, each in new.items() if name not in old and name not in converted}
    kept = set(new) | set(converted.values())
    outside = [name for name, each in new.items() if old.get(name) is each]
    if outside:
        notes.append(f"{', '.join(outside)} is shared with modules that stay, and so with the old one")
    if any(_hooks(place.module)):
        notes.append("hooks on it were kept")
    carried = sum(each.numel() for name, each in new.items() if name not in fresh)
    if old and not carried:
        notes.append("none of its weights have a meaning here")
    inner = built.inner.mechanism if isinstance(built.inner, Core) else built.inner
    made_causal = place.causal_open and inner.site.causal
    if made_causal:
        notes.append("now causal whatever the call says")
    if fresh:
        verdict = Verdict.NEW
    elif not made_causal and isinstance(built.inner, Core) and built.plain and place.exact(built.inner.mechanism):
        verdict = Verdict.EXACT
    else:
        verdict = Verdict.APPROXIMATE
    return Row(
        name=place.name,
        kind=_kind(place),
        verdict=verdict,
        carried=carried,
        new=fresh,
        dropped={name: each.numel() for name, each in old.items() if name not in kept},
        notes=tuple(notes),
    )


def _nowhere(cls: type[Mechanism], fits: list[Fitted]) -> AttlasError:
    place, row, _ = fits[0]
    reasons = "; ".join(row.notes)
    if place.obstacle:
        return Unsupported(f"nothing could be swapped. {row.name}: {reasons}")
    able = [name for name in mechanisms() if _misfit(resolve(name)[0], place) is None and name != cls.spec.name]
    shown = ", ".join(able[:SHOWN]) + (f" and {len(able) - SHOWN} more" if len(able) > SHOWN else "")
    return Unsupported(
        f"{cls.spec.name} could go to none of the {len(fits)} modules. {row.name}: {reasons}. Mechanisms that could: "
        f"{shown or 'none'}"
    )


def _install(
    model: nn.Module, news: list[tuple[Place, nn.Module]], aliases: dict[str, list[str]]
) -> Callable[[], None]:
    """Assign the new modules and let the hosts do the rest; all or nothing. The function that comes back undoes it."""
    before = dtype_and_device(model)
    leave: list[Callable[[], None]] = []

    def back() -> None:
        for undo in reversed(leave):
            undo()
        for place, new in news:
            if place.module.training != new.training:
                place.module.train(new.training)
            _assign(model, aliases[place.name], place.module)

    def undo() -> None:
        for place, new in news:
            for name in aliases[place.name]:
                if _at(model, name) is not new:
                    raise BadInput(f"{name} is no longer what this swap put there: undo what came after first")
        dtype, device = dtype_and_device(model)
        for place, _ in news:  # the model may have been moved since
            place.module.to(device=device if device != before[1] else None, dtype=dtype if dtype != before[0] else None)
        back()

    try:
        for place, new in news:
            _assign(model, aliases[place.name], new)
        for host in hosts():
            mine = [place for place, _ in news if type(place).__module__ == type(host).__module__]
            if mine:
                leave.append(host.enter(model, mine))
    except BaseException:
        back()
        raise
    return undo


def _assign(model: nn.Module, names: list[str], module: nn.Module) -> None:
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module)


def _at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
