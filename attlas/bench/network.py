"""One small model for all tasks and mechanisms; nothing but the mixer differs. And image networks as they are.

    x = stem(tokens) + positions
    x = x + mixer(norm(x));  x = x + mlp(norm(x))      for each layer
    logits = head(norm(x)), of the mean over tokens where one question is asked of the whole sequence

The stem shows every token its direct neighbours and positions are learned vectors, for mechanisms that need
them and those that do not alike: what is compared is how far information travels beyond, and how well. The
MLP's width makes every model as large as the budget says.

B sequences, N tokens, F features of a token, C channels, Y classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.bench.records import QualityJob
from attlas.bench.tasks import TASKS
from attlas.bench.tasks.base import Task
from attlas.blocks.factory import mixer, resolve
from attlas.blocks.positions import Learned
from attlas.core.errors import BadInput, Unsupported
from attlas.core.mechanism import Mixer
from attlas.core.registry import mechanisms
from attlas.core.state import state_bytes
from attlas.models import create, models

REACH = 3
"""Positions on each axis that the stem reads: a token and its neighbours, or the last three if causal."""


class Stem(nn.Module):
    """Tokens to channels, each together with its neighbours on the grid.

    Values of a vocabulary become e + convolution(e), e their learned vectors; vectors are just convolved.
    """

    def __init__(self, task: Task, dim: int) -> None:
        super().__init__()
        self.grid = task.grid
        self.values = nn.Embedding(task.vocabulary, dim) if task.vocabulary else None
        if self.values is not None:
            nn.init.normal_(self.values.weight, std=0.5)
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(task.grid) - 1]
        self.near = convolution(dim if task.vocabulary else task.features, dim, REACH)
        self.border = [REACH - 1, 0] if task.causal else [REACH // 2, REACH // 2] * len(task.grid)

    def forward(self, inputs: Tensor) -> Tensor:
        """Values (B, N) or vectors (B, N, F) to (B, N, C)."""
        x = inputs if self.values is None else self.values(inputs)
        on_grid = x.transpose(1, 2).unflatten(2, self.grid)
        near = self.near(F.pad(on_grid, self.border)).flatten(2).transpose(1, 2)
        return near if self.values is None else x + near


class Network(nn.Module):
    """A pre-norm model of `layers` mixers and MLPs.

    Args:
        task: says what goes in, what comes out, and how the positions lie.
        mechanism: name for `attlas.mixer`.
        dim, heads, layers: sizes.
        params: settings of the mechanism.
        hidden: width of the MLPs.
        parameters: instead of `hidden`, the size of the whole model, met as nearly as a whole `hidden` can.

    Raises:
        BadInput: the budget leaves no MLP.
        AttlasError: what the mechanism says where it does not serve the task.
    """

    def __init__(
        self,
        task: Task,
        mechanism: str,
        *,
        dim: int,
        heads: int,
        layers: int,
        params: Mapping[str, Any] | None = None,
        hidden: int | None = None,
        parameters: int = 0,
    ) -> None:
        if resolve(mechanism)[0].spec.class_token:
            raise Unsupported(f"{mechanism} does not serve tasks that put no class token in front of their tokens")
        super().__init__()
        self.per_sequence = task.per_sequence
        self.grid = task.grid
        # What all models share is drawn first, so that one seed gives them the same of it.
        self.stem = Stem(task, dim)
        self.positions = Learned(dim, task.length)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, task.classes)
        self.mixer_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.mlp_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.mixers: Iterable[Mixer] = nn.ModuleList(  # type: ignore[assignment]
            mixer(
                mechanism,
                dim,
                heads,
                causal=task.causal,
                length=task.length,
                grid=task.grid,
                layer=layer,
                layers=layers,
                **params or {},
            )
            for layer in range(layers)
        )
        if hidden is None:
            hidden = self._fit(mechanism, dim, layers, parameters)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)) for _ in range(layers)
        )

    def _fit(self, mechanism: str, dim: int, layers: int, parameters: int) -> int:
        """The MLP width that brings the model nearest to its budget."""
        fixed = count_parameters(self) + layers * dim  # the bias behind the hidden layer
        per_unit = layers * (2 * dim + 1)
        hidden = round((parameters - fixed) / per_unit)
        if hidden < 1:
            raise BadInput(
                f"{parameters:,} parameters leave no MLP: with {mechanism} all else takes {fixed:,}; give at "
                f"least {fixed + per_unit:,}, or smaller dim or layers"
            )
        return hidden

    def forward(self, inputs: Tensor) -> Tensor:
        """Values (B, N) or vectors (B, N, F) to logits (B, N, Y), or (B, Y) for one answer per sequence."""
        x_BNC = self.positions.embed(self.stem(inputs), 0)
        layers = zip(self.mixer_norms, self.mixers, self.mlp_norms, self.mlps, strict=True)
        for mixer_norm, mix, mlp_norm, mlp in layers:
            x_BNC = x_BNC + mix(mixer_norm(x_BNC), grid=self.grid)
            x_BNC = x_BNC + mlp(mlp_norm(x_BNC))
        x_BNC = self.norm(x_BNC)
        return self.head(x_BNC.mean(1) if self.per_sequence else x_BNC)

    @torch.no_grad()
    def state_bytes(self) -> int:
        """Bytes that the mixers carry behind a sequence of the task's length; 0 where they do not stream."""
        x_1NC = self.positions.weight.unsqueeze(0)
        return sum(
            state_bytes(mix.extend(x_1NC, mix.initial_state(1, x_1NC))[1])
            for mix in self.mixers
            if mix.spec.streams and mix.site.causal
        )


class PictureNetwork(nn.Module):
    """A published network, or one of its small sizes, as it is: only classes and pictures are the task's.

    Args:
        task: says how large pictures are and how many classes there are.
        name: for `attlas.models.create`.
        params: settings of the network.

    Raises:
        BadInput: a task without pictures.
        AttlasError: what the network says where it does not serve them.
    """

    def __init__(self, task: Task, name: str, params: Mapping[str, Any] | None = None) -> None:
        if task.picture is None:
            able = ", ".join(each.name for each in TASKS.values() if each.picture)
            raise BadInput(f"{name} is a network for pictures, which the {task.name} task has none of; take {able}")
        super().__init__()
        chans, side = task.picture
        self.pictures = task.pictures
        self.net = create(name, **{"num_classes": task.classes, "in_chans": chans, "img_size": side, **(params or {})})

    @property
    def mixers(self) -> list[Mixer]:
        """The mechanisms inside, each without those that it is made of."""
        found: list[Mixer] = []
        waiting: list[nn.Module] = [self.net]
        while waiting:
            module = waiting.pop()
            if isinstance(module, Mixer):
                found.append(module)
            else:
                waiting += module.children()
        return found

    def forward(self, inputs: Tensor) -> Tensor:
        """Patches (B, N, F) to logits (B, Y)."""
        return self.net(self.pictures(inputs))

    def state_bytes(self) -> int:
        """Pictures come whole: nothing is carried."""
        return 0


def build(task: Task, job: QualityJob) -> Network | PictureNetwork:
    """The model of a job: the small model of its mechanism, or the image network of that name."""
    if is_network(job.mechanism):
        return PictureNetwork(task, job.mechanism, job.params)
    return Network(
        task,
        job.mechanism,
        dim=job.dim,
        heads=job.heads,
        layers=job.layers,
        params=job.params,
        parameters=job.parameters,
    )


def is_network(name: str) -> bool:
    """Whether it names an image network; where a mechanism has the same name, that is meant."""
    return name not in mechanisms() and name in models()


def count_parameters(model: nn.Module) -> int:
    """All learned numbers."""
    return sum(parameter.numel() for parameter in model.parameters())
