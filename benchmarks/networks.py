"""How fast every image network is here: `python benchmarks/networks.py [--threads 2] [--largest 40]`.

What `attlas bench models` measures, all published networks for classification of at most so many million parameters, in
one run: images/s in batches of 8, time and memory of one picture, at 224 pixels. A family is measured only while its
small sizes agree with their oracles. An interrupted run goes on from its store. The table goes to benchmarks/results/,
the picture, throughput against parameters, to docs/pages/figures/.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import torch
from rich.console import Console

from attlas import models
from attlas.bench import machine
from attlas.bench.networks import network_jobs
from attlas.bench.records import NetworkJob, NetworkResult, Record
from attlas.bench.runner import run
from attlas.bench.store import Store
from attlas.cli.networks import no_larger

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent


def rows(records: list[Record]) -> dict[str, dict[str, object]]:
    """What is kept of each network, fastest first."""
    found = {}
    for record in records:
        job, result = record.job, record.result
        assert isinstance(job, NetworkJob)
        if isinstance(result, NetworkResult):
            found[job.network] = {
                "family": models.model(job.network).family,
                "parameters": result.parameters,
                "GMACs": result.macs / 1e9,
                "images per second": job.batch / result.batched.median,
                "ms, one picture": [1e3 * x for x in (result.single.lower, result.single.median, result.single.upper)],
                "peak bytes, one picture": result.peak_bytes,
            }
        elif record.failure is not None:
            found[job.network] = {"failed": f"{record.failure.error}: {record.failure.message}"}
    return dict(sorted(found.items(), key=lambda item: -float(item[1].get("images per second", 0))))  # type: ignore


def draw(found: dict[str, dict[str, object]], path: Path) -> None:
    """Throughput against parameters, a line for each family, named at its smallest network."""
    families: dict[str, list[tuple[float, float]]] = {}
    for row in found.values():
        if "family" in row:
            families.setdefault(str(row["family"]), []).append(
                (float(row["parameters"]) / 1e6, float(row["images per second"]))  # type: ignore
            )
    figure, axes = plt.subplots(figsize=(11, 7.5), layout="constrained")
    for index, (family, points) in enumerate(sorted(families.items())):
        x, y = zip(*sorted(points), strict=True)
        colour, marker = f"C{index % 10}", "os^Dv*P"[index % 7]
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=0.6, alpha=0.9)
        axes.annotate(family, (x[0], y[0]), (-4, 4), textcoords="offset points", fontsize=8, color=colour, ha="right")
    axes.set(
        xscale="log", yscale="log", xlabel="million parameters", ylabel="images/s at 224 pixels, batch 8, 2 threads"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--largest", type=float, default=40, help="million parameters")
    parser.add_argument("--store", type=Path, default=ROOT / "runs" / "networks")
    options = parser.parse_args()
    names = no_larger("*", options.largest, Console())
    at_224 = [name for name in names if models.figures()[name].img_size in (224, 240, 256)]
    records = run(network_jobs(at_224, threads=options.threads), Store(options.store))
    found = rows(records)
    version = torch.__version__.split("+")[0]
    path = ROOT / "benchmarks" / "results" / f"networks-threads{options.threads}-torch{version}.json"
    said = {"command": " ".join(sys.argv), "machine": machine.describe(), "side": 224, "batch": 8, "networks": found}
    path.write_text(json.dumps(said, indent=1) + "\n")
    draw(found, ROOT / "docs" / "pages" / "figures" / "networks.png")
    for name, row in found.items():
        if "failed" in row:
            print(f"{name:24s} {row['failed']}")
        else:
            print(f"{name:24s} {row['images per second']:8.1f} images/s {row['GMACs']:6.2f} GMACs")
    print(path)


if __name__ == "__main__":
    main()
