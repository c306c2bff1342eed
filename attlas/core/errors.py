"""Errors. Each names what was asked, what is possible, and the cure."""


class AttlasError(Exception):
    """Base of every error that Attlas raises on purpose."""


class UnknownName(AttlasError, LookupError):
    """A name that nothing is registered under; the message offers the nearest ones."""


class BadInput(AttlasError, ValueError):
    """A value, shape or dtype that has no meaning here."""


class Unsupported(AttlasError, ValueError):
    """Something meaningful that this mechanism cannot do; the message names mechanisms that can."""


class BackendUnavailable(AttlasError, RuntimeError):
    """A backend that was asked for by name and cannot run; the message lists each with its reason."""


def share(name: str, value: float) -> float:
    """`value`, a share in [0, 1) such as a dropout; anything else raises `BadInput` naming it."""
    if not 0 <= value < 1:
        raise BadInput(f"{name} is a share in [0, 1), got {value}")
    return value
