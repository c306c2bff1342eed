"""Settings of mechanisms as they are written on the command line."""

from __future__ import annotations

import ast
from typing import Any

from attlas.core.errors import BadInput


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


def by_mechanism(pairs: list[str]) -> dict[str, dict[str, Any]]:
    """agent.agents=16 and the like, by mechanism."""
    settings: dict[str, dict[str, Any]] = {}
    for name, value in values(pairs).items():
        mechanism_name, dot, key = name.partition(".")
        if not dot:
            raise BadInput(f"a setting is written as mechanism.name=value, got {name!r}")
        settings.setdefault(mechanism_name, {})[key] = value
    return settings
