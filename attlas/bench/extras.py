"""Optional packages of the workbench, imported when they are wanted."""

from __future__ import annotations

import importlib
from typing import Any

from attlas.core.errors import AttlasError


class MissingExtra(AttlasError, ImportError):
    """A package of the `bench` extra is not installed."""


def extra(module: str, purpose: str) -> Any:
    """Import a module of the `bench` extra, wanted for `purpose`.

    Raises:
        MissingExtra: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(root := module.partition(".")[0], root)
        raise MissingExtra(f"{purpose} needs {package}: pip install 'attlas[bench]'") from error
