"""A pointer network draws convex hulls, and hulls of more points than it was trained on.

Random points in the unit square; the answer is the list of hull points counter-clockwise from the one that comes
first in the input, then the end symbol. An answer is exact when it is that list. Fairer is the area that the
predicted polygon shares with the hull: its corners are input points, so it lies inside the hull, and the shared
area is its own. A polygon that crosses itself counts as nothing.
"""

from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.models.pointer import PointerNetwork
from examples.shared import main


class Score(NamedTuple):
    """Shares of exact answers, of polygons that do not cross themselves, and of the area covered."""

    points: int
    exact: float
    simple: float
    area: float


class Result(NamedTuple):
    """Scores by number of points, and a few inputs with right and predicted answers to draw."""

    scores: list[Score]
    shown: list[tuple[Tensor, list[int], list[int]]]


def hulls(points_BN2: Tensor) -> Tensor:
    """The right answers (B, N + 1): slots of the hull, then N."""
    count = points_BN2.shape[1]
    to_BNN2 = points_BN2.unsqueeze(1) - points_BN2.unsqueeze(2)
    a, b = to_BNN2.unsqueeze(3), to_BNN2.unsqueeze(2)
    left_BNNN = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0] > 0  # is point k left of the line from i to j?
    same = torch.eye(count, dtype=torch.bool)
    edge_BNN = (left_BNNN | same.unsqueeze(1) | same).all(-1) & ~same
    after_BN, first_B1 = edge_BNN.int().argmax(-1), edge_BNN.any(-1).int().argmax(-1, keepdim=True)
    answer = [first_B1]
    for _ in range(count):
        at_B1 = after_BN.gather(1, answer[-1].clamp(max=count - 1))
        answer.append(torch.where((at_B1 == first_B1) | (answer[-1] == count), count, at_B1))
    return torch.cat(answer, 1)


def area(corners: list[list[float]]) -> float:
    """Of a polygon that does not cross itself; 0 for any other."""
    edges = list(zip(corners, corners[1:] + corners[:1], strict=True))
    if len(corners) < 3 or any(crosses(*first, *second) for first, second in combinations(edges, 2)):
        return 0.0
    return abs(sum(a[0] * b[1] - a[1] * b[0] for a, b in edges)) / 2


def crosses(a: list[float], b: list[float], c: list[float], d: list[float]) -> bool:
    """Whether ab and cd meet elsewhere than at the corner between neighbours."""
    if a == c or b == d:
        return True
    if b == c or a == d:
        return False

    def side(p: list[float], q: list[float], r: list[float]) -> bool:
        return (q[0] - p[0]) * (r[1] - p[1]) > (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) != side(a, b, d) and side(c, d, a) != side(c, d, b)


def before_end(slots: list[int], end: int) -> list[int]:
    """The answer without its end symbols."""
    return slots[: slots.index(end)] if end in slots else slots


def train(net: PointerNetwork, lengths: tuple[int, int], steps: int, batch: int) -> None:
    """Adam on fresh points, as many in each batch as `lengths` allows."""
    optimizer = torch.optim.Adam(net.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
    for _ in range(steps):
        count = int(torch.randint(lengths[0], lengths[1] + 1, ()))
        points = torch.rand(batch, count, 2)
        answers = hulls(points)
        # What follows the end symbol is filling and teaches nothing.
        targets = answers.masked_fill((answers == count).cumsum(1) > 1, -1)
        loss = F.nll_loss(net(points, answers).flatten(0, 1), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 2)
        optimizer.step()
        schedule.step()


def measure(net: PointerNetwork, count: int, tests: int, beam: int) -> tuple[Score, list[tuple[Tensor, list, list]]]:
    """The score at `count` points, and what it was made of."""
    points = torch.rand(tests, count, 2)
    rights, answers = hulls(points), net.decode(points, beam=beam).slots
    exact = float((rights == answers).all(1).float().mean())
    cases = [
        (where, before_end(right, count), before_end(answer, count))
        for where, right, answer in zip(points, rights.tolist(), answers.tolist(), strict=True)
    ]
    true, found = ([area(case[0][case[which]].tolist()) for case in cases] for which in (1, 2))
    simple = sum(a > 0 for a in found) / tests
    covered = sum(a / b for a, b in zip(found, true, strict=True)) / tests
    return Score(count, exact, simple, covered), cases


def run(
    lengths: tuple[int, int] = (5, 8),
    tested: tuple[int, ...] = (5, 8, 10, 12),
    dim: int = 128,
    steps: int = 2500,
    batch: int = 128,
    beam: int = 3,
    tests: int = 500,
    shown: int = 6,
) -> Result:
    """Train on `lengths` points, first to last, and measure on `tested` many."""
    net = PointerNetwork(2, dim)
    train(net, lengths, steps, batch)
    scores, kept = [], []
    print(f"trained on {lengths[0]} to {lengths[1]} points\npoints   exact  simple    area")
    for count in tested:
        score, cases = measure(net, count, tests, beam)
        scores.append(score)
        kept += cases[: shown // 2] if count in (lengths[1], tested[-1]) else []
        print(f"{count:6}{score.exact:8.1%}{score.simple:8.1%}{score.area:8.1%}")
    return Result(scores, kept)


def draw(result: Result, path: Path) -> None:
    """True hulls filled, predicted outlines over them, both for a trained and for the largest number of points."""
    import matplotlib.pyplot as plt

    columns = max(len(result.shown) // 2, 1)
    figure, axes = plt.subplots(2, columns, figsize=(2.6 * columns, 5.4), squeeze=False)
    for axis, (points, right, answer) in zip(axes.flat, result.shown, strict=False):
        axis.fill(*points[right].T, color="tab:blue", alpha=0.2, label="hull")
        closed = points[[*answer, *answer[:1]]]
        axis.plot(*closed.T, color="tab:red", linewidth=1.5, label="pointed to")
        axis.scatter(*points.T, color="black", s=14, zorder=3)
        axis.set(aspect="equal", xticks=[], yticks=[], xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        axis.set_title(f"{len(points)} points" + (", exact" if right == answer else ""), fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=2)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
