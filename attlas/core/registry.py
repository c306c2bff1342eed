"""Mechanisms by name. A file under `attlas/mechanisms/` registers itself by being there."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

from attlas.core.errors import BadInput, UnknownName
from attlas.core.spec import Pattern, Spec, Takes

if TYPE_CHECKING:
    from attlas.core.mechanism import Mechanism

_mechanisms: dict[str, type[Mechanism]] = {}
LISTED = 30
"""How many names an error lists where none is near."""
Class = TypeVar("Class", bound="type[Mechanism]")


def register(spec: Spec) -> Callable[[Class], Class]:
    """Class decorator: make a mechanism known under `spec.name`."""

    def add(cls: Class) -> Class:
        known = _mechanisms.get(spec.name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise BadInput(f"{spec.name!r} is already the name of {known.__module__}.{known.__qualname__}")
        cls.spec = spec
        _mechanisms[spec.name] = cls
        return cls

    return add


def mechanism(name: str) -> type[Mechanism]:
    """The class registered under `name`; an unknown name raises with the nearest ones."""
    if name not in _mechanisms:
        raise UnknownName(f"no mechanism is called {name!r}{nearest(name, _mechanisms)}")
    return _mechanisms[name]


def family_of(cls: type[Mechanism]) -> str:
    """The family folder that the mechanism's file stands in."""
    return cls.__module__.rpartition(".")[0].rpartition(".")[2]


def mechanisms(
    names: str = "*",
    *,
    family: str | None = None,
    pattern: Pattern | str | None = None,
    grid: int | None = None,
    mask: Takes | str | None = None,
    streams: bool | None = None,
) -> list[str]:
    """Names of the mechanisms that match a wildcard and can do all that is asked.

    Args:
        names: names or wildcards separated by commas, as in "soft*,pool".
        family: folder name, such as "linear".
        pattern: "causal self", "noncausal self", "causal cross" or "noncausal cross".
        grid: rank of the grid, 1 to 3.
        mask: "padding", "pairs" or "bias".
        streams: whether it carries a state through a sequence.
    """
    wanted_pattern = None if pattern is None else _member(Pattern, pattern)
    wanted_mask = None if mask is None else _member(Takes, mask)
    globs = [glob.strip() for glob in names.split(",")]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in _mechanisms):
            raise UnknownName(f"no mechanism is called {glob!r}{nearest(glob, _mechanisms)}")
    families = sorted({family_of(cls) for cls in _mechanisms.values()})
    if family is not None and family not in families:
        raise UnknownName(f"no family is called {family!r}{nearest(family, families)}")
    return sorted(
        name
        for name, cls in _mechanisms.items()
        if any(fnmatchcase(name, glob) for glob in globs)
        and (family is None or family_of(cls) == family)
        and (wanted_pattern is None or wanted_pattern in cls.spec.patterns)
        and (grid is None or grid in cls.spec.grids)
        and (wanted_mask is None or wanted_mask in cls.spec.masks)
        and (streams is None or cls.spec.streams == streams)
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message that offers names close to `name`."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return f"; known: {', '.join(known[:LISTED])}{more}"


def _member(enum: type[StrEnum], value: str) -> StrEnum:
    try:
        return enum(value)
    except ValueError:
        known = ", ".join(repr(str(each)) for each in enum)
        raise BadInput(f"{value!r} is none of {known}") from None
