"""Published networks, made of blocks and any mechanism."""

from attlas.models.create import create, load_weights
from attlas.models.registry import figures, model, models

__all__ = ["create", "figures", "load_weights", "model", "models"]
