"""The choice of backend, in one place.

The automatic choice is a pure function of the arguments: the first backend, fastest first, that neither
refuses them nor yields to the next. A backend that is named never falls back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from attlas.core.errors import BackendUnavailable


@dataclass(frozen=True)
class Backend:
    """One way to compute an op.

    Attributes:
        name: `oracle`, `torch`, `cpu`, `triton`, or a third-party peer.
        run: the function.
        refuses: takes the same arguments and returns why it cannot serve them, or None.
        yields: likewise, why the next backend serves them faster, or None. It runs all the same where it is named.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *args, **kwargs: None
    yields: Callable[..., str | None] = lambda *args, **kwargs: None


@dataclass(frozen=True)
class Choice:
    """Which backend ran an op, and why each faster one did not."""

    op: str
    backend: str
    passed_over: tuple[tuple[str, str], ...]


_log: list[Choice] | None = None


class Op:
    """A function on tensors with several backends, fastest first, the oracle last."""

    def __init__(self, name: str, *backends: Backend) -> None:
        self.name = name
        self.backends = backends
        self.__doc__ = backends[-1].run.__doc__

    def choose(self, backend: str, *args: Any, **kwargs: Any) -> tuple[Backend, Choice]:
        """The backend that will run these arguments, and the record of why.

        Raises:
            BackendUnavailable: `backend` names one that is unknown or refuses; no other is tried.
        """
        passed: list[tuple[str, str]] = []
        chosen = self._choose(passed, backend, args, kwargs)
        return chosen, Choice(self.name, chosen.name, tuple(passed))

    def _choose(self, passed: list[tuple[str, str]], backend: str, args: Any, kwargs: Any) -> Backend:
        for candidate in self.backends:
            if backend not in ("auto", candidate.name):
                passed.append((candidate.name, "not asked for"))
                continue
            reason = candidate.refuses(*args, **kwargs)
            if reason is None and backend == "auto":
                reason = candidate.yields(*args, **kwargs)
            if reason is None:
                return candidate
            passed.append((candidate.name, reason))
        names = "; ".join(f"{name}: {reason}" for name, reason in passed)
        raise BackendUnavailable(f"{self.name} cannot run on backend {backend!r} ({names})")

    def __call__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> Any:
        """Run the op on the backend that `choose` gives."""
        passed: list[tuple[str, str]] = []
        chosen = self._choose(passed, backend, args, kwargs)
        if _log is not None:
            _log.append(Choice(self.name, chosen.name, tuple(passed)))
        return chosen.run(*args, **kwargs)


@contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collect which backend every op inside the block ran on, and why not a faster one."""
    global _log
    outer, _log = _log, []
    try:
        yield _log
    finally:
        _log = outer
