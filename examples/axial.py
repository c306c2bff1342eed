"""An Axial Transformer draws bars: what each pixel knows, how close it comes to the entropy, and what sampling costs.

Images are 8 x 8, of horizontal or of vertical bars: a fair coin says which, then one for each line whether it is black.
There are 510 of them, so that the bits that the best model needs for a pixel are known, and those of a trained one can
be averaged over all images, not over samples.

- What does a pixel know? The outer blocks tell it the rows above, in full, the inner ones its own row so far: together
  all pixels before it. Causal attention along both axes, without the shift of one row, misses those above to the right.
- Does it learn the bars? Bits for a pixel against the entropy, and how many samples are images of bars.
- What does one image cost? Outer passes, and seconds, of sampling row by row and of sampling pixel by pixel.

Ho et al., 2019 (arXiv:1912.12180).
"""

import time
from math import log2
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import attlas
from attlas.models.axial import AxialTransformer, bits, gumbel
from examples.shared import main


class Result(NamedTuple):
    """What was found.

    Attributes:
        curve: bits for a pixel of each step's images.
        entropy, learned: bits for a pixel, of the best model and of the trained one, over all images.
        images: samples (B, side, side).
        bars: the share of the samples that are images of bars.
        costs: outer passes and seconds for these samples, by way of sampling.
        known: how much a change of each pixel moves the one in the middle, (side, side), by what it passes through.
    """

    curve: list[float]
    entropy: float
    learned: float
    images: Tensor
    bars: float
    costs: dict[str, tuple[int, float]]
    known: dict[str, Tensor]


def all_images(side: int) -> tuple[Tensor, Tensor]:
    """Every image of bars (510, side, side) for a side of 8, and its probability."""
    lines = (torch.arange(2**side).unsqueeze(1) >> torch.arange(side)) & 1
    across = lines.unsqueeze(2).expand(-1, -1, side)
    down = across.transpose(1, 2)[1:-1]  # all white and all black are there already
    chance = torch.full((2**side,), 0.5**side / 2)
    chance[[0, -1]] *= 2
    return torch.cat([across, down]), torch.cat([chance, chance[1:-1]])


def draw_images(count: int, side: int) -> Tensor:
    """Random images of bars."""
    lines = torch.randint(2, (count, side, 1)).expand(-1, -1, side)
    return torch.where(torch.rand(count, 1, 1) < 0.5, lines, lines.transpose(1, 2))


def share_of_bars(images: Tensor) -> float:
    """How many have equal rows or equal columns."""
    across = (images == images[:, :, :1]).all(2).all(1)
    down = (images == images[:, :1]).all(2).all(1)
    return (across | down).float().mean().item()


def train(model: AxialTransformer, steps: int, batch: int) -> list[float]:
    """Adam with a warm-up and a decay to 0; bits for a pixel by step."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    curve = []
    for _ in range(steps):
        x = draw_images(batch, model.width)
        loss = bits(model(x), x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
    return curve


@torch.no_grad()
def bits_of_all(model: AxialTransformer) -> tuple[float, float]:
    """The entropy and the model's bits for a pixel, over all images."""
    images, chance = all_images(model.width)
    pixels = images[0].numel()
    entropy = -sum(p * log2(p) for p in chance.tolist()) / pixels
    logs = model(images).log_softmax(-1).gather(3, images.unsqueeze(3)).sum((1, 2, 3)) / pixels
    return entropy, -float((chance * logs).sum()) / torch.tensor(2.0).log().item()


@torch.no_grad()
def what_is_known(model: AxialTransformer, count: int) -> dict[str, Tensor]:
    """How much the middle pixel's view moves when another pixel turns, over random images."""
    side = model.width
    row = column = side // 2
    plain = [attlas.mixer("axial", 16, 2, causal=True, grid=(side, side), axis=axis) for axis in (1, 0)]
    colours = torch.randn(2, 16)

    def both_masked(x: Tensor) -> Tensor:
        h = colours[x].flatten(1, 2)
        for layer in plain:
            h = h + layer(h)
        return h.unflatten(1, (side, side))

    views = {
        "outer blocks, moved down": model.context,
        "the whole model": model,
        "masked rows, then masked columns": both_masked,
    }
    x = torch.randint(2, (count, side, side))
    known = {}
    for name, view in views.items():
        moved = torch.zeros(side, side)
        first = view(x)[:, row, column]
        for place in range(side * side):
            other = x.clone()
            other[:, place // side, place % side] ^= 1
            moved[place // side, place % side] = (view(other)[:, row, column] - first).abs().mean()
        known[name] = moved
    return known


def run(
    side: int = 8,
    dim: int = 48,
    heads: int = 4,
    outer: int = 2,
    inner: int = 2,
    steps: int = 500,
    batch: int = 64,
    samples: int = 32,
) -> Result:
    """Train, sample, print the table."""
    torch.manual_seed(0)
    model = AxialTransformer(side, side, symbols=2, dim=dim, heads=heads, outer=outer, inner=inner)
    curve = train(model, steps, batch)
    entropy, learned = bits_of_all(model.eval())
    noise = gumbel(samples, side, side, 2)
    passes = []
    model.outer.register_forward_hook(lambda *_: passes.append(1))
    costs, drawn = {}, []
    for name, sample in (("row by row", model.sample), ("pixel by pixel", model.sample_slowly)):
        passes.clear()
        start = time.perf_counter()
        drawn.append(sample(noise))
        costs[name] = (len(passes), time.perf_counter() - start)
    if not torch.equal(*drawn):
        raise RuntimeError("both ways of sampling draw the same images, up to ties in float32: these differ")
    bars = share_of_bars(drawn[0])
    print(f"bits for a pixel: {learned:.3f}, the entropy is {entropy:.3f}")
    print(f"{bars:.0%} of {samples} samples are bars")
    print(f"{'sampling':16}{'outer passes':>14}{'seconds':>10}")
    for name, (count, seconds) in costs.items():
        print(f"{name:16}{count:14}{seconds:10.2f}")
    return Result(curve, entropy, learned, drawn[0], bars, costs, what_is_known(model, 8))


def draw(result: Result, path: Path) -> None:
    """What the middle pixel knows in three panels; the curve; samples."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12.5, 7.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    axes = top.subplots(1, 3)
    for axis, (name, moved) in zip(axes, result.known.items(), strict=True):
        side = moved.shape[0]
        axis.imshow(moved.log10().where(moved > 0, torch.nan).numpy(), cmap="viridis")
        axis.plot(side // 2, side // 2, "s", color="crimson", markersize=9)
        axis.set(title=f"{name}:\nsees {int((moved > 0).sum())} pixels", xticks=[], yticks=[])
    left, right = bottom.subfigures(1, 2)
    axis = left.subplots()
    axis.plot(result.curve, linewidth=1, label="training")
    axis.axhline(result.learned, color="C1", label=f"all images, {result.learned:.3f}")
    axis.axhline(result.entropy, color="black", linestyle=":", label=f"entropy, {result.entropy:.3f}")
    axis.set(title="bits for a pixel", xlabel="step", yscale="log")
    axis.legend()
    count = min(len(result.images), 24)
    (slow, slow_s), (fast, fast_s) = result.costs["pixel by pixel"], result.costs["row by row"]
    right.suptitle(
        f"samples, {result.bars:.0%} bars; {fast} outer passes, {fast_s:.2f} s (pixel by pixel {slow}, {slow_s:.2f} s)"
    )
    for axis, image in zip(right.subplots(3, -(-count // 3), squeeze=False).flat, result.images, strict=False):
        axis.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
    for axis in right.axes:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
