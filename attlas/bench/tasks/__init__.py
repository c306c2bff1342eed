"""Quality tasks: small enough for one core, and each asks for something that mechanisms differ in."""

from __future__ import annotations

from attlas.bench.tasks.base import Task
from attlas.bench.tasks.digits import Digits
from attlas.bench.tasks.images import Images
from attlas.bench.tasks.masked_text import MaskedText
from attlas.bench.tasks.recall import Recall
from attlas.bench.tasks.text import Text
from attlas.core.errors import UnknownName
from attlas.core.registry import nearest

TASKS: dict[str, type[Task]] = {task.name: task for task in (Text, MaskedText, Digits, Images, Recall)}


def task_named(name: str) -> type[Task]:
    """The task class of that name.

    Raises:
        UnknownName: there is none; the message offers the nearest.
    """
    if name not in TASKS:
        raise UnknownName(f"no task is called {name!r}{nearest(name, TASKS)}")
    return TASKS[name]
