"""Layers to be analysed, each with the tokens that it reads: random ones, or those of a trained small model.

B sequences, N tokens, C channels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attlas.bench.network import Network
from attlas.bench.records import QualityJob
from attlas.bench.tasks import task_named
from attlas.bench.training import descend, reproducibly
from attlas.blocks.factory import mixer, resolve
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.core.spec import Pattern


class Observed(NamedTuple):
    """A layer in float64 and the tokens (B, N, C) that it reads."""

    layer: Mixer
    tokens: Tensor
    grid: Grid


def on_random_tokens(
    name: str, *, dim: int, heads: int, tokens: int, sequences: int = 2, seed: int = 0, **params: Any
) -> Observed:
    """A layer without training on Gaussian tokens.

    Of one seed all mechanisms read the same tokens and make the same queries, keys and values of them, of variance 1,
    what their shells do to these apart. A mechanism that serves both patterns is noncausal.

    Args:
        name: of the mechanism.
        dim, heads: of the layer.
        tokens: of a sequence; a square number for mechanisms that need two axes.
        sequences: how many.
        seed: of tokens and weights.
        **params: of the mechanism.
    """
    spec = resolve(name)[0].spec
    shape: tuple[int, ...] = (tokens,)
    if 1 not in spec.grids:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise BadInput(f"{name} needs its tokens on a square: such as {side * side}, not {tokens}")
        shape = (side, side)
    grid = Grid(shape, prefix=int(spec.class_token))
    causal = Pattern.NONCAUSAL_SELF not in spec.patterns
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = mixer(name, dim, heads, causal=causal, grid=grid, length=grid.tokens, **params)
        torch.manual_seed(seed)
        x_BNC = torch.randn(sequences, grid.tokens, dim)
        for projection in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(layer, projection, None)
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
    return Observed(layer.double().eval(), x_BNC.double(), grid)


def in_trained_model(
    name: str, task: str, *, dim: int, heads: int, sequences: int = 2, steps: int = 100, seed: int = 0, **params: Any
) -> Observed:
    """The last layer of a small model that learned a task, on held-out data.

    Args:
        name: of the mechanism.
        task: name of the task, at its own length.
        dim, heads: of the layers.
        sequences: how many, of those held out.
        steps: of the training.
        seed: of weights and data.
        **params: of the mechanism.
    """
    made = task_named(task)(task_named(task).setting.length)
    setting = made.setting
    job = QualityJob(
        mechanism=name,
        task=task,
        seed=seed,
        label=name,
        steps=steps,
        batch=setting.batch,
        length=made.length,
        dim=dim,
        heads=heads,
        layers=setting.layers,
        parameters=0,  # the MLPs are as wide as the baseline's
        learning_rate=setting.learning_rate,
    )
    with reproducibly(seed, torch.get_num_threads()):
        model = Network(made, name, dim=dim, heads=heads, layers=job.layers, params=params, hidden=setting.ratio * dim)
        optimizer = torch.optim.AdamW(model.parameters(), job.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        descend(model, optimizer, made.batches(seed, job.batch), job, None)
    model.eval()
    *_, last = model.mixers
    read: list[Tensor] = []

    def catch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        read.append(args[0])

    handle = last.register_forward_pre_hook(catch)
    held_out = next(iter(made.held_out().values()))[0]
    with torch.no_grad():
        model(held_out.inputs[:sequences])
    handle.remove()
    return Observed(last.double(), read[0].double(), Grid(made.grid))
