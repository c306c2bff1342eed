"""Draw three schedules of one decoding step, workers downwards and time to the right: docs/pages/figures/lean.svg."""

import sys
from pathlib import Path

from attlas.ops.lean import Schedule, fixed_split, one_worker_per_output, schedule

TARGET = Path(__file__).parent.parent / "pages" / "figures" / "lean.svg"
HEADS, TILES, WORKERS = 5, 8, 8
COLOURS = ["#4457c2", "#d1495b", "#2a9d8f", "#e9a23b", "#8d6a9f"]


def plans() -> dict[str, Schedule]:
    counts = [TILES] * HEADS
    return {
        "FlashAttention-2: one worker per head": one_worker_per_output(counts, WORKERS),
        "Flash-Decoding: every head in 4 parts": fixed_split(counts, WORKERS, 4),
        "stream-K: equal ranges of all tiles": schedule(counts, WORKERS),
    }


def draw(target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lean", "font.size": 9})
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 2.8), sharex=True, sharey=True, layout="constrained")
    for axes, (title, plan) in zip(panels, plans().items(), strict=True):
        for worker, spans in enumerate(plan.workers):
            start = 0
            for span in spans:
                colour = COLOURS[span.output]
                axes.barh(worker, len(span), left=start, color=colour, edgecolor="white", height=0.86)
                axes.text(
                    start + len(span) / 2,
                    worker,
                    f"{span.start + 1}-{span.stop}" if len(span) > 1 else str(span.stop),
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=7,
                )
                start += len(span)
        axes.axvline(plan.makespan, color="#555", linewidth=1, linestyle=":")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(f"tiles: done after {plan.makespan}, {plan.occupancy:.0%} busy")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("worker")
    panels[0].set_yticks(range(WORKERS))
    panels[0].invert_yaxis()
    figure.savefig(target, format="svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET)
