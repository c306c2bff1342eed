"""A mixture of attention experts out of dense layers that were trained apart.

Source: Zhang et al., "BAM! Just Like That", 2024 (arXiv:2408.08274), its attention layer. That shared keys and values
start as the mean of the dense ones is our reading.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from attlas.blocks.attention import Attention
from attlas.blocks.factory import mixer
from attlas.blocks.positions import Position, Rotary
from attlas.core.errors import BadInput
from attlas.core.mechanism import Mixer

DENSE = 'attlas.mixer("softmax", ..., bias=False, out_bias=False), with position=attlas.positions.Rotary(...) or none'


def upcycle(layers: Sequence[Attention], kv: str = "expert") -> Mixer:
    """The `bam` layer whose experts are these softmax layers, one each, with a random router.

    Args:
        layers: dense layers of one shape, without biases; their weights are copied, not their dropout.
        kv: "expert" keeps the keys and values of each, "shared" has the mean of all.

    Returns:
        A layer that is causal as they are, with their positions, dtype and device.

    Raises:
        BadInput: layers that the mixture cannot express, or that differ in shape.
    """
    if not layers:
        raise BadInput(f"upcycle takes at least one dense layer: {DENSE}")
    for layer in layers:
        _check(layer)
    first = layers[0]
    shapes = [_shape(layer) for layer in layers]
    for index, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise BadInput(f"dense layers have one shape: layer 0 has {shapes[0]}, layer {index} has {shape}")
    site = first.site
    mixture = mixer(
        "bam",
        site.dim,
        site.heads,
        causal=site.causal,
        length=site.length,
        layer=site.layer,
        layers=site.layers,
        backend=first.backend,
        experts=len(layers),
        kv=kv,
        heads_per_kv=site.heads // first.kv_heads,
        base=first.position.base if isinstance(first.position, Rotary) else None,
    ).to(first.q_proj.weight)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            dense = torch.stack([getattr(layer, name).weight for layer in layers])
            experts = getattr(mixture, name)
            if len(experts) < len(layers):
                dense = dense.mean(0, keepdim=True)
            for expert, weight in zip(experts, dense, strict=True):
                expert.weight.copy_(weight)
    return mixture


def _check(layer: nn.Module) -> None:
    if not isinstance(layer, Attention) or layer.spec.name != "softmax":
        raise BadInput(f"an expert is a softmax attention layer, got {type(layer).__name__}; build {DENSE}")
    projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj)
    extras = {
        "biases": any(projection.bias is not None for projection in projections),
        "a gate": layer.gate_proj is not None,
        "norms": any(not isinstance(norm, nn.Identity) for norm in (layer.q_norm, layer.k_norm, layer.output_norm)),
        "an activation of q and k": not isinstance(layer.qk_activation, nn.Identity),
        "fewer query heads than nominal ones": layer.query_heads * layer.site.head_dim != layer.site.dim,
        "channels of another context": layer.context_dim != layer.site.dim,
        "a scale of its own": layer.attend.scale is not None,
        f"{type(layer.position).__name__} positions": type(layer.position) not in (Position, Rotary),
    }
    for extra, there in extras.items():
        if there:
            raise BadInput(f"an expert of bam has no such thing as {extra}: build {DENSE}")


def _shape(layer: Attention) -> tuple[object, ...]:
    base = layer.position.base if isinstance(layer.position, Rotary) else None
    return layer.site.dim, layer.query_heads, layer.kv_heads, layer.site.causal, base
