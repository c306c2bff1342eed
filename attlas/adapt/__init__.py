"""Attlas in models that exist."""

from attlas.adapt import decoding, function_space, multihead, rescale, upcycle

__all__ = ["decoding", "function_space", "multihead", "rescale", "upcycle"]
