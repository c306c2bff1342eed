"""How fast the softmax kernels are: `python benchmarks/softmax.py [--threads 2]`.

Decoding against the speed of memory, whole sequences against GEMM, both against PyTorch; `attlas.bench.decoding` says
what is measured and how. Nothing is reported while the oracle check is red. The result goes to benchmarks/results/
under a name that says the conditions.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from attlas.bench import decoding


def main() -> None:
    """Measure, print the ratios, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    result = decoding.measure(arguments.threads, arguments.rounds)
    decoding.show(result, Console())
    version = torch.__version__.split("+")[0]
    path = Path(__file__).parent / "results" / f"softmax-threads{arguments.threads}-torch{version}.json"
    decoding.write(result, path, "python " + " ".join(sys.argv))
    print(f"\n{path}")


if __name__ == "__main__":
    main()
