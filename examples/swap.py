"""Agent attention into a trained ViT: what the swap costs, and how distillation wins it back.

A ViT of timm learns the handwritten digits. `attlas.swap` replaces the softmax attention of all its blocks by agent
attention: the projections are carried over, its position biases and its convolution of the values are new, and the
accuracy falls. Then `distil` teaches the new layers what the old ones said, first each for itself, then all together,
on the training pictures, without a label.

The picture shows the error of every layer and of the whole while it learns, relative to the variance of what the old
ones say, and the accuracy on held-out digits before, after the swap, and after distillation.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import attlas
from attlas.adapt.distil import Distilled, distil
from attlas.bench.tasks import digits
from examples.shared import main

SIDE, PATCH, BATCH = 8, 2, 64


class Result(NamedTuple):
    """Accuracy by stage, and the errors of the distillation."""

    accuracy: dict[str, float]
    errors: Distilled


class Pictures:
    """Batches of random training digits, gone through as often as wanted."""

    def __init__(self, images: Tensor, names: Tensor) -> None:
        self.images, self.names = images, names
        self.generator = torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for chosen in order.split(BATCH):
            yield self.images[chosen], self.names[chosen]


def data() -> list[tuple[Tensor, Tensor]]:
    """Pictures (B, 1, 8, 8) and digits: of the training, and held out."""
    return [(part.inputs.transpose(1, 2).unflatten(2, (SIDE, SIDE)), part.targets) for part in digits.split()]


def vit(dim: int = 64, depth: int = 4) -> nn.Module:
    """A small ViT of timm."""
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=SIDE, patch_size=PATCH, in_chans=1, num_classes=10, embed_dim=dim, depth=depth, num_heads=4
    )


def train(model: nn.Module, pictures: Pictures, steps: int) -> None:
    """With labels, from scratch."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    step = 0
    while step < steps:
        for images, names in pictures:
            optimizer.zero_grad()
            F.cross_entropy(model(images), names).backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == steps:
                return


def run(steps: int = 1000, layer_steps: int = 300, whole_steps: int = 200, **sizes: int) -> Result:
    """Train, swap, distil."""
    torch.manual_seed(0)
    (images, names), (held_out, answers) = data()
    pictures, model = Pictures(images, names), vit(**sizes)
    accuracy = {}

    def test(stage: str) -> None:
        model.eval()
        with torch.no_grad():
            accuracy[stage] = float((model(held_out).argmax(1) == answers).float().mean())
        print(f"{stage:20s} {100 * accuracy[stage]:5.1f} %")

    model.train()
    train(model, pictures, steps)
    test("softmax, trained")
    report = attlas.swap(model, "agent", where="blocks.*.attn", agents=4)
    print(report)
    test("agent, swapped")
    silent = Console(file=io.StringIO())
    errors = distil(model, report, pictures, layer_steps=layer_steps, whole_steps=whole_steps, console=silent)
    Console().print(errors)
    test("agent, distilled")
    return Result(accuracy, errors)


def draw(result: Result, path: Path) -> None:
    """Errors on the left, accuracy on the right."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(2, 1), layout="constrained")
    curves: Any = [*result.errors.layers.items(), ("the whole", result.errors.whole)]
    first = len(next(iter(result.errors.layers.values())))
    for index, (name, errors) in enumerate(curves):
        start = first if name == "the whole" else 0
        axes[0].plot(range(start, start + len(errors)), errors, label=name, color=f"C{index}", linewidth=1)
    axes[0].set(xlabel="batch", ylabel="error, relative to the variance", yscale="log", title="Distillation")
    axes[0].legend(frameon=False)
    bars = axes[1].bar(range(len(result.accuracy)), [100 * each for each in result.accuracy.values()], color="C0")
    axes[1].bar_label(bars, fmt="%.1f")
    axes[1].set_xticks(range(len(result.accuracy)), [stage.replace(", ", "\n") for stage in result.accuracy])
    axes[1].set(ylabel="accuracy on held-out digits, %", ylim=(0, 108), title="Accuracy")
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(__file__, run, draw)
