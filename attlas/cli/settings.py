"""Names, sizes and settings of mechanisms as they are written on the command line."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from attlas.blocks.factory import resolve
from attlas.core.errors import BadInput, UnknownName
from attlas.core.grid import Grid
from attlas.core.registry import mechanisms, nearest
from attlas.models import models


def values(pairs: list[str]) -> dict[str, Any]:
    """Settings written as name=value; values are Python literals where they parse as such."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise BadInput(f"a setting is written as name=value, got {pair!r}")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


def by_mechanism(pairs: list[str] | None, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """agent.agents=16 and the like, by mechanism, each of them among `names`."""
    names = list(names)
    settings: dict[str, dict[str, Any]] = {}
    for name, value in values(pairs or []).items():
        mechanism_name, dot, key = name.partition(".")
        if not dot:
            raise BadInput(f"a setting is written as mechanism.name=value, got {name!r}")
        if mechanism_name not in names:
            raise BadInput(f"settings for {mechanism_name}, but asked for are {', '.join(names)}")
        settings.setdefault(mechanism_name, {})[key] = value
    return settings


def parts(text: str) -> list[str]:
    """What is separated by commas, at least one."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise BadInput(f"a list is separated by commas and names at least one, got {text!r}")
    return found


def read_names(text: str, *, networks: bool = False) -> list[str]:
    """The mechanisms that names and wildcards mean; variants are kept as they are.

    With `networks`, what means no mechanism may mean image networks for classification: by wildcard those on _micro, by
    name any.
    """
    found: list[str] = []
    for name in parts(text):
        base, colon, _ = name.partition(":")
        if not networks or _matches(base, mechanisms()):
            found += [name] if colon and resolve(name) else mechanisms(base)
        elif _matches(name, models()):
            found += [each for each in models(name, task="classification") if each == name or each.endswith("_micro")]
        else:
            raise UnknownName(f"no mechanism or network is called {name!r}{nearest(name, mechanisms() + models())}")
    if not found:
        raise BadInput(f"{text!r} means networks of published sizes; name them in full, or those on _micro")
    return list(dict.fromkeys(found))


def _matches(glob: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in names)


def read_grid(text: str) -> tuple[int, ...]:
    """A grid written as 4096, 14x14 or 8x14x14."""
    try:
        sizes = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        raise BadInput(f"a size is written as 4096, 14x14 or 8x14x14, got {text!r}") from None
    return Grid(sizes).shape


def read_grids(text: str) -> list[tuple[int, ...]]:
    """Grids as by `read_grid`, or of one axis as by `read_sizes`."""
    found: list[tuple[int, ...]] = []
    for part in parts(text):
        if ".." not in part:
            found.append(read_grid(part))
        elif "x" in part.lower():
            raise BadInput(f"ranges are of one axis, got {part!r}: write {part.replace('..', ',')}")
        else:
            found += [(size,) for size in read_sizes(part)]
    return list(dict.fromkeys(found))


def read_sizes(text: str) -> list[int]:
    """Whole numbers written as by `read_numbers`."""
    found = read_numbers(text)
    if any(number % 1 for number in found):
        raise BadInput(f"sizes are whole numbers, got {text!r}")
    return [int(number) for number in found]


def read_numbers(text: str) -> list[float]:
    """Positive numbers separated by commas; 4..64 doubles from the first on, up to the last."""
    found: list[float] = []
    for part in parts(text):
        first, dots, last = part.partition("..")
        try:
            number, end = float(first), float(last if dots else first)
        except ValueError:
            raise BadInput(f"numbers are written as 4..64 or 8,24, got {text!r}") from None
        if not 0 < number <= end < math.inf:
            raise BadInput(f"numbers are positive and finite, and a range rises, got {part!r}")
        while number <= end:
            found.append(number)
            number *= 2
    return list(dict.fromkeys(found))
