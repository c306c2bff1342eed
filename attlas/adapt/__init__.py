"""Attlas in models that exist."""

from attlas.adapt import multihead, rescale, upcycle

__all__ = ["multihead", "rescale", "upcycle"]
