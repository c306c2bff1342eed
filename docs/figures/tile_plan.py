"""Draw how a neighbourhood becomes tiles: docs/pages/figures/tile_plan.svg."""

from pathlib import Path

import torch

from attlas.core.axis import Axis
from attlas.kernels.cpu.tile_plan import plan_axes

FIGURES = Path(__file__).parent.parent / "pages" / "figures"
CELL, SHOWN = 12, (0, 1, 9)
INSIDE, SEEN, EMPTY = "#d1495b", "#4457c2", "#8882"


def draw(length: int = 24, window: int = 7) -> str:
    """Three tiles of a plane: queries, and how many of them see each key."""
    plan = plan_axes((Axis(length, window),) * 2, length * length, 0, 0, False)
    panels = []
    for number, tile in enumerate(SHOWN):
        queries = plan.query[plan.query_begin[tile] : plan.query_end[tile]].tolist()
        runs = range(int(plan.run_begin[tile]), int(plan.run_end[tile]))
        keys = [int(plan.run_first[run]) + i for run in runs for i in range(int(plan.run_count[run]))]
        words = torch.full((len(keys),), (1 << len(queries)) - 1)
        if plan.pattern is not None and plan.seen is not None and plan.pattern[tile] >= 0:
            words = plan.seen[plan.pattern[tile] : plan.pattern[tile] + len(keys)]
        share = {key: int(word).bit_count() / len(queries) for key, word in zip(keys, words.tolist(), strict=True)}
        left = number * (length + 2) * CELL
        cells = [f'<rect x="{left}" width="{length * CELL}" height="{length * CELL}" fill="{EMPTY}"/>']
        for key, seen in share.items():
            x, y = left + key % length * CELL, key // length * CELL
            opacity = 0.15 + 0.85 * seen
            cells.append(
                f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{SEEN}" opacity="{opacity:.2f}"/>'
            )
        for query in queries:
            x, y = left + query % length * CELL + 3, query // length * CELL + 3
            cells.append(f'<rect x="{x}" y="{y}" width="{CELL - 6}" height="{CELL - 6}" fill="{INSIDE}"/>')
        pairs = round(sum(share.values()) * len(queries))
        text = f"{len(queries)} queries, {len(keys)} keys: {pairs} of {len(queries) * len(keys)} pairs are seen"
        cells.append(f'<text x="{left}" y="{length * CELL + 16}">{text}</text>')
        panels += cells
    width, height = (len(SHOWN) * (length + 2) - 2) * CELL, length * CELL + 22
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="tiles of a neighbourhood" font-family="system-ui, sans-serif" font-size="11" '
        f'fill="#777">{"".join(panels)}</svg>\n'
    )


if __name__ == "__main__":
    (FIGURES / "tile_plan.svg").write_text(draw())
