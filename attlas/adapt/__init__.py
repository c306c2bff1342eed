"""Attlas in models that exist."""

from attlas.adapt import function_space, multihead, rescale, upcycle

__all__ = ["function_space", "multihead", "rescale", "upcycle"]
