"""Published networks by name, with what they were published with.

A file under `attlas/models/vision/` declares its networks with `published`; `create` builds one, `models` lists them,
`figures` reads what papers and repositories say about them.
"""

from __future__ import annotations

import csv
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module, resources
from pkgutil import iter_modules
from typing import Any

from torch import Tensor, nn

from attlas.core.errors import BadInput, UnknownName
from attlas.core.registry import nearest

State = dict[str, Tensor]
KeyMap = Callable[[State, nn.Module], State]
"""From a checkpoint's state dict and the network that it is for, to a state dict of that network."""


@dataclass(frozen=True)
class Published:
    """One network that can be created.

    Attributes:
        name: the short name users type.
        build: makes it, from keyword arguments.
        settings: the arguments that make it the published one.
        title, year, paper: of the publication.
        task: "classification", "restoration", "segmentation" or "generation".
        key_maps: from the checkpoints of other libraries, by "timm" or "official".
        reconstruction: no official code was found.
    """

    name: str
    build: Callable[..., nn.Module]
    settings: Mapping[str, Any]
    title: str
    year: int
    paper: str
    task: str = "classification"
    key_maps: Mapping[str, KeyMap] = field(default_factory=dict)
    reconstruction: bool = False

    @property
    def family(self) -> str:
        """The name of the file that declares it."""
        return self.build.__module__.rpartition(".")[2]

    @property
    def accepted(self) -> dict[str, Any]:
        """Keyword arguments that it takes, with the values that hold where nothing is said."""
        parameters = inspect.signature(self.build).parameters.values()
        return {each.name: self.settings.get(each.name, each.default) for each in parameters}


@dataclass(frozen=True)
class Figures:
    """What was published about a network, or counted from its official code.

    Attributes:
        parameters: a whole number where it is exact, else the printed digits in millions, such as "28.4M".
        gmacs: multiply-accumulates of one picture, in 10⁹; None where nobody says.
        img_size: of that picture.
        top1: ImageNet-1K accuracy in percent; None where there is none.
        timm: its name in timm, if it is there.
        source: where the figures stand.
    """

    parameters: str
    gmacs: float | None
    img_size: int
    top1: float | None
    timm: str
    source: str


_published: dict[str, Published] = {}


def published(
    models: Mapping[str, Mapping[str, Any]],
    *,
    title: str,
    year: int,
    paper: str,
    task: str = "classification",
    key_maps: Mapping[str, KeyMap] | None = None,
    reconstruction: bool = False,
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Decorator of a builder: each entry of `models` is the name of a network and its arguments."""

    def add(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        for name, settings in models.items():
            known = _published.get(name)
            if known is not None and known.build.__module__ != build.__module__:
                raise BadInput(f"{name!r} is already a network of {known.build.__module__}")
            _published[name] = Published(
                name, build, settings, title, year, paper, task, key_maps or {}, reconstruction
            )
        return build

    return add


@cache
def _load() -> None:
    package = import_module("attlas.models.vision")
    for module in iter_modules(package.__path__, "attlas.models.vision."):
        import_module(module.name)


def model(name: str) -> Published:
    """The declaration of a network; an unknown name raises with the nearest ones."""
    _load()
    if name not in _published:
        raise UnknownName(f"no network is called {name!r}{nearest(name, _published)}")
    return _published[name]


def models(names: str = "*", *, task: str | None = None) -> list[str]:
    """Names of the networks that match wildcards separated by commas, such as "davit_*,swin_tiny"."""
    _load()
    globs = [glob.strip() for glob in names.split(",")]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in _published):
            raise UnknownName(f"no network is called {glob!r}{nearest(glob, _published)}")
    tasks = sorted({each.task for each in _published.values()})
    if task is not None and task not in tasks:
        raise BadInput(f"task is one of {', '.join(tasks)}, got {task!r}")
    return sorted(
        name
        for name, each in _published.items()
        if any(fnmatchcase(name, glob) for glob in globs) and (task is None or each.task == task)
    )


@cache
def figures() -> Mapping[str, Figures]:
    """What was published about the networks, by name; the variants for tests have none."""
    text = (resources.files("attlas.models") / "published.csv").read_text(encoding="utf-8")
    number = lambda value: float(value) if value else None  # noqa: E731
    return {
        row["model"]: Figures(
            row["parameters"],
            number(row["gmacs"]),
            int(row["img_size"]),
            number(row["top1"]),
            row["timm"],
            row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    }
