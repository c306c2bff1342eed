"""Attlas in models that exist."""
