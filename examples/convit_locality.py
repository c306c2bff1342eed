"""Where the heads of gated positional self-attention look, before and after learning digits from few images.

Two models of three layers differ in nothing but how their heads start: as the taps of a convolution, or at
random. Both learn from the same few images of 8 x 8 pixels, every pixel a token. The table compares them on all
held-out images; the picture shows the positional map of each head and what became of the gates.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attlas
from attlas.bench.tasks.digits import SIDE, split
from examples.shared import main

GRID = attlas.Grid((SIDE, SIDE))
STARTS = {"local": True, "random": False}


class Block(nn.Module):
    """x + GPSA(LN x), then x + MLP(LN x)."""

    def __init__(self, dim: int, heads: int, local: bool) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer = attlas.mixer("convit", dim, heads, grid=GRID, local_init=local)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Both branches."""
        x = x + self.mixer(self.norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Reader(nn.Module):
    """Pixels in, one of ten digits out."""

    def __init__(self, dim: int, heads: int, layers: int, local: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(1, dim)
        self.places = nn.Parameter(0.02 * torch.randn(SIDE * SIDE, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, local) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 10))

    def forward(self, images: Tensor) -> Tensor:
        """The scores of the digits, (images, 10)."""
        x = self.embed(images) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))

    def distances(self, images: Tensor) -> Tensor:
        """How far each head of each layer looks, (layers, heads), in pixels."""
        x, found = self.embed(images) + self.places, []
        for block in self.blocks:
            found.append(block.mixer.locality(block.norm(x)))
            x = block(x)
        return torch.stack(found)

    def maps(self) -> Tensor:
        """Where the positional part of each head looks from the middle, (layers, heads, height, width)."""
        middle = SIDE // 2 * SIDE + SIDE // 2
        scores = torch.stack([block.mixer.positional_scores(GRID)[:, middle] for block in self.blocks])
        return scores.softmax(-1).unflatten(-1, GRID.shape)


@dataclass
class Trained:
    """One start: accuracy of each seed at each check, and for the first seed what its heads look like."""

    accuracy: list[list[float]]
    before: Tensor
    after: Tensor
    gates: Tensor
    distances: tuple[Tensor, Tensor]


@dataclass
class Result:
    """Steps at which accuracy was taken, and what came of each start."""

    steps: list[int]
    starts: dict[str, Trained]


def run(
    *,
    images: int = 200,
    tests: int = 360,
    seeds: int = 3,
    dim: int = 36,
    heads: int = 9,
    layers: int = 3,
    steps: int = 240,
    batch: int = 40,
) -> Result:
    """Train both starts on the first `images` images, test on `tests` others and print how they compare."""
    (pixels, digits), (test_pixels, test_digits) = split()
    data = (pixels[:images], digits[:images], test_pixels[:tests], test_digits[:tests])
    sizes = (dim, heads, layers)
    checks = [steps * part // 8 for part in range(1, 9)]
    starts = {name: _train(local, data, sizes, seeds, batch, checks) for name, local in STARTS.items()}
    print(f"accuracy on held-out digits after learning from {images}, mean and range of {seeds} seeds")
    print("start   " + "".join(f"{f'step {step}':>20}" for step in checks[1::2]) + "    gate   distance")
    for name, trained in starts.items():
        scores = torch.tensor(trained.accuracy)[:, 1::2]
        cells = zip(scores.mean(0), scores.amin(0), scores.amax(0), strict=True)
        row = "".join(f"{f'{mean:.3f} ({low:.3f}–{high:.3f})':>20}" for mean, low, high in cells)
        was, became = (float(each.mean()) for each in trained.distances)
        print(f"{name:<8}{row}   {float(trained.gates.mean()):.3f}  {was:.2f} to {became:.2f}")
    return Result(checks, starts)


def _train(
    local: bool, data: tuple[Tensor, ...], sizes: tuple[int, int, int], seeds: int, batch: int, checks: list[int]
) -> Trained:
    pixels, digits, test_pixels, test_digits = data
    accuracy, seen = [], None
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = Reader(*sizes, local)
        before = (model.maps().detach(), model.distances(test_pixels[:100]).detach())
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        accuracy.append([])
        for step in range(1, checks[-1] + 1):
            chosen = torch.randint(len(pixels), (batch,))
            loss = F.cross_entropy(model(pixels[chosen]), digits[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in checks:
                with torch.no_grad():
                    accuracy[-1].append(float((model(test_pixels).argmax(1) == test_digits).double().mean()))
        if seen is None:
            gates = torch.stack([block.mixer.gates for block in model.blocks]).detach()
            far = model.distances(test_pixels[:100]).detach()
            seen = (before[0], model.maps().detach(), gates, (before[1], far))
    assert seen is not None
    return Trained(accuracy, *seen)


def draw(result: Result, path: Path) -> None:
    """Maps of the first layer's heads before and after, gates of all layers, and the curves of accuracy."""
    import matplotlib.pyplot as plt

    local = result.starts["local"]
    heads = local.before.shape[1]
    figure = plt.figure(figsize=(1.15 * heads + 1, 6.4), layout="constrained")
    maps, below = figure.subfigures(2, 1, height_ratios=(1.0, 1.25))
    axes = maps.subplots(2, heads, squeeze=False)
    for row, (name, shown) in enumerate((("start", local.before), ("learned", local.after))):
        for head in range(heads):
            ax = axes[row, head]
            ax.imshow(shown[0, head].numpy(), cmap="magma", vmin=0)
            ax.plot(SIDE // 2, SIDE // 2, "+", color="white", markersize=8)
            ax.set(
                xticks=[], yticks=[], title=f"head {head}" if row == 0 else f"gate {float(local.gates[0, head]):.2f}"
            )
        axes[row, 0].set_ylabel(name)
    maps.suptitle("Local start, first layer: where the positional part of each head looks from the pixel +")
    curves, gates = below.subplots(1, 2)
    for (name, trained), colour in zip(result.starts.items(), ("tab:orange", "tab:blue"), strict=True):
        scores = np.array(trained.accuracy)
        curves.plot(result.steps, scores.mean(0), color=colour, label=f"{name} start", marker="o")
        curves.fill_between(result.steps, scores.min(0), scores.max(0), color=colour, alpha=0.2)
        layers = np.arange(len(trained.gates)) + 1
        gates.plot(layers, trained.gates.numpy(), "o", color=colour, alpha=0.4)
        gates.plot(layers, trained.gates.mean(1).numpy(), color=colour, label=f"{name} start")
    curves.set(xlabel="step", ylabel="accuracy", title="held-out digits, mean and range of seeds")
    gates.axhline(float(torch.tensor(1.0).sigmoid()), color="grey", linestyle=":", label="at the start")
    gates.set(xlabel="layer", ylabel="σ(λ)", title="gates: 1 is position alone, 0 content alone", xticks=layers)
    for ax in (curves, gates):
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
