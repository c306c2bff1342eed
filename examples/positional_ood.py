"""Does attention that cannot see values compute on values ten times larger than it was trained on?

Both networks see sequences of numbers from [-2, 2] and learn a prefix sum, a prefix minimum or to sort; both have
the same layers, MLP(concat(x, attend(x))), and the same number of them. One takes its weights from positions
alone, the other is softmax attention that reads values and one-hot codes, its heads as wide as the model. Then
numbers come from [-2 c, 2 c]. As in the paper's experiment a sequence comes from an interval inside the range, and
test intervals that lie within the training range are drawn again.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from attlas.models.positional import PositionalTransformer
from examples.shared import main

TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "prefix sum": lambda x: x.cumsum(1),
    "prefix minimum": lambda x: x.cummin(1).values,
    "sorting": lambda x: x.sort(1).values,
}
MECHANISMS = {"positional": {}, "softmax": {"head_dim": 64}}
RANGE = 2.0


class Result(NamedTuple):
    """Mean squared errors over the mean square of the targets, [task][mechanism][scale]."""

    scales: tuple[int, ...]
    errors: dict[str, dict[str, list[float]]]


def draw_numbers(count: int, length: int, scale: float) -> Tensor:
    """(count, length, 1): each sequence uniform in an interval of its own inside ±2 scale, not all inside ±2."""
    ends = (2 * torch.rand(count, 2) - 1) * RANGE * scale
    if scale > 1:
        while (inside := (ends.abs() <= RANGE).all(1)).any():
            ends[inside] = (2 * torch.rand(int(inside.sum()), 2) - 1) * RANGE * scale
    low, high = ends.sort(1).values.unsqueeze(-1).unbind(1)
    return (low + (high - low) * torch.rand(count, length)).unsqueeze(-1)


def train(
    model: PositionalTransformer, task: Callable[[Tensor], Tensor], samples: int, steps: int, batch: int
) -> PositionalTransformer:
    """The model after Adam on a fixed set of samples."""
    x = draw_numbers(samples, model.length, 1)
    y = task(x)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(samples, (batch,))
        loss = (model(x[chosen]) - y[chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def error(model: PositionalTransformer, task: Callable[[Tensor], Tensor], scale: float, count: int) -> float:
    """Mean squared error over mean square of the targets."""
    x = draw_numbers(count, model.length, scale)
    y = task(x)
    return float((model(x) - y).square().mean() / y.square().mean())


def run(
    length: int = 8,
    samples: int = 5000,
    steps: int = 300,
    batch: int = 128,
    scales: Sequence[int] = tuple(range(1, 11)),
    tasks: Sequence[str] = tuple(TASKS),
    tests: int = 2000,
) -> Result:
    """Train both networks on every task and measure them at every scale."""
    errors: dict[str, dict[str, list[float]]] = {}
    print(f"relative squared error at scale {'':22}" + "".join(f"{scale:>10}" for scale in scales))
    for task in tasks:
        errors[task] = {}
        for mechanism, settings in MECHANISMS.items():
            torch.manual_seed(0)
            model = PositionalTransformer(length, mechanism=mechanism, **settings)
            train(model, TASKS[task], samples, steps, batch)
            row = errors[task][mechanism] = [error(model, TASKS[task], scale, tests) for scale in scales]
            parameters = sum(p.numel() for p in model.parameters())
            print(f"{task:15} {mechanism:11} {parameters:>7} parameters" + 9 * " " + "".join(f"{e:10.1e}" for e in row))
    return Result(tuple(scales), errors)


def draw(result: Result, path: Path) -> None:
    """One panel for each task, error over scale."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(result.errors), figsize=(4 * len(result.errors), 3.6), sharey=True, squeeze=False
    )
    for axis, (task, rows) in zip(axes[0], result.errors.items(), strict=True):
        for (mechanism, row), marker in zip(rows.items(), "os", strict=True):
            axis.plot(result.scales, row, marker=marker, label=mechanism)
        axis.set(title=task, xlabel="scale of the values (trained at 1)", yscale="log")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("squared error / square of the target")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
