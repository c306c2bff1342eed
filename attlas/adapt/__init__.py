"""Attlas in models that exist."""

from attlas.adapt import decoding, function_space, in_timm, multihead, rescale, retrieval, upcycle

__all__ = ["decoding", "function_space", "in_timm", "multihead", "rescale", "retrieval", "upcycle"]
