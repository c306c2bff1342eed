"""Attlas in models that exist."""

from attlas.adapt import decoding, function_space, multihead, rescale, retrieval, upcycle

__all__ = ["decoding", "function_space", "multihead", "rescale", "retrieval", "upcycle"]
