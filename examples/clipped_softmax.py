"""Heads that do nothing: softmax, clipped softmax and gated attention, and what eight bits cost each.

Three small causal models of the bytes of Python's standard library, alike but for the attention. After training:
bits per byte; the same with the input of every linear layer rounded to eight bits, one range per tensor; the
largest activation and the kurtosis of what the layers add to the stream and of the stream itself; and the share
of visible weights that are exactly 0. The picture shows the weights of every head of the last layer on one
stretch, exact zeros in grey.

At this size and after a minute no model has outliers: the kurtosis stays near a Gaussian's 3 and eight bits cost
next to nothing. What shows is the means: most of the clipped weights are exact zeros, and gates dim whole rows.

Bondarenko et al., 2023 (arXiv:2306.12929). There the outliers grow over hundreds of thousands of steps, in models
a thousand times as large.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attlas
from attlas.analysis.outliers import inf_norm, int8, kurtosis
from attlas.bench.tasks.corpus import even_windows, random_windows
from examples.shared import main

SETTINGS: dict[str, dict[str, Any]] = {"softmax": {}, "clipped_softmax": {}, "gated_attention": {"pi_init": 0.25}}
MEASURES = ("bits", "bits, int8", "max norm", "kurtosis", "zeros")


class Result(NamedTuple):
    """`MEASURES` by mechanism, and the weights (H, N, N) of its last layer, gates included."""

    measured: dict[str, list[float]]
    maps: dict[str, Tensor]


class Layer(nn.Module):
    """Attention and an MLP, each behind a norm and added to the stream."""

    def __init__(self, mechanism: str, dim: int, heads: int, length: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mixer = attlas.mixer(mechanism, dim, heads, causal=True, length=length, **SETTINGS[mechanism])
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """The stream behind the layer."""
        x_BNC = x_BNC + self.mixer(self.norms[0](x_BNC))
        return x_BNC + self.mlp(self.norms[1](x_BNC))


class Model(nn.Sequential):
    """Bytes (B, N) to logits (B, N, 256)."""

    def __init__(self, mechanism: str, dim: int, heads: int, layers: int, length: int) -> None:
        position = attlas.positions.Learned(dim, length)
        stack = [Layer(mechanism, dim, heads, length) for _ in range(layers)]
        super().__init__(nn.Embedding(256, dim), Placed(position), *stack, nn.LayerNorm(dim), nn.Linear(dim, 256))
        nn.init.normal_(self[0].weight, std=0.5)  # type: ignore[arg-type]


class Placed(nn.Module):
    """Learned positions added to the tokens."""

    def __init__(self, position: attlas.positions.Learned) -> None:
        super().__init__()
        self.position = position

    def forward(self, x_BNC: Tensor) -> Tensor:
        """The first token stands at position 0."""
        return self.position.embed(x_BNC, 0)


def learn(mechanism: str, *, dim: int, heads: int, layers: int, length: int, steps: int, batch: int) -> Model:
    """A model trained on stretches of `length` bytes."""
    torch.manual_seed(0)
    model = Model(mechanism, dim, heads, layers, length)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for text in itertools.islice(random_windows(0, batch, length + 1), steps):
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def bits(model: Model, text: Tensor) -> float:
    """Bits per byte."""
    loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
    return loss.item() / torch.tensor(2.0).log().item()


def weights(layer: Layer, x_1NC: Tensor) -> Tensor:
    """The weights (H, N, N) of a layer's attention on one stream, read off with values that are unit vectors."""
    seen: list[Callable[[Tensor], Tensor]] = []

    def keep(attend: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen.append(lambda values: attend.forward(*args[:2], values, **kwargs))

    hook = layer.mixer.attend.register_forward_pre_hook(keep, with_kwargs=True)  # type: ignore[union-attr]
    layer(x_1NC)
    hook.remove()
    tokens = x_1NC.shape[1]
    return seen[0](torch.eye(tokens).expand(1, layer.mixer.site.heads, tokens, tokens))[0]


@torch.no_grad()
def measure(model: Model, text: Tensor) -> tuple[list[float], Tensor]:
    """`MEASURES` on held-out text, and the weights of the last layer on its first stretch."""
    layers = [module for module in model if isinstance(module, Layer)]
    outputs: list[Tensor] = []
    watched = [part for layer in layers for part in (layer, layer.mixer, layer.mlp)]
    hooks = [part.register_forward_hook(lambda module, args, output: outputs.append(output)) for part in watched]
    plain = bits(model, text)
    norm = max(inf_norm(x).mean().item() for x in outputs)
    peak = sum(kurtosis(x).mean().item() for x in outputs) / len(outputs)
    for hook in hooks:
        hook.remove()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [linear.register_forward_pre_hook(lambda module, args: (int8(args[0]),)) for linear in linears]
    rounded = bits(model, text)
    for hook in hooks:
        hook.remove()
    stream = model[1](model[0](text[:1, :-1]))
    maps = []
    for layer in layers:
        maps.append(weights(layer, stream))
        stream = layer(stream)
    visible = torch.ones(maps[0].shape[-2:], dtype=torch.bool).tril()
    zeros = (torch.stack(maps)[..., visible] == 0).float().mean().item()
    return [plain, rounded, norm, peak, zeros], maps[-1]


def run(dim: int = 64, heads: int = 4, layers: int = 2, length: int = 128, steps: int = 400, batch: int = 8) -> Result:
    """Train the three models, print the table."""
    text = even_windows(32, length + 1)
    measured, maps = {}, {}
    for mechanism in SETTINGS:
        model = learn(mechanism, dim=dim, heads=heads, layers=layers, length=length, steps=steps, batch=batch)
        measured[mechanism], maps[mechanism] = measure(model, text)
    print(f"{'':20}" + "".join(f"{name:>12}" for name in MEASURES))
    for mechanism, row in measured.items():
        print(f"{mechanism:20}" + "".join(f"{value:12.4f}" for value in row))
    return Result(measured, maps)


def draw(result: Result, path: Path) -> None:
    """A row for each mechanism, a column for each head."""
    import matplotlib.pyplot as plt

    heads = next(iter(result.maps.values())).shape[0]
    figure, axes = plt.subplots(
        len(result.maps), heads, figsize=(2.6 * heads, 2.8 * len(result.maps)), squeeze=False, layout="constrained"
    )
    colours = plt.get_cmap("viridis").with_extremes(bad="lightgrey")
    for row, (mechanism, map_HNN) in zip(axes, result.maps.items(), strict=True):
        for head, axis in enumerate(row):
            shown = map_HNN[head].where(map_HNN[head] > 0, torch.nan).log10().numpy()
            image = axis.imshow(shown, cmap=colours, vmin=-5, vmax=0)
            axis.set(xticks=[], yticks=[], title=f"head {head}")
        row[0].set_ylabel(mechanism)
    figure.colorbar(image, ax=axes, shrink=0.5, label="log10 of the weight; grey is exactly 0")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
