"""What every example does around its own work: arguments, threads, seed, and where the picture goes."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def main(file: str, run: Callable[[], Any], draw: Callable[[Any, Path], None]) -> None:
    """Run an example from the command line: `run()` computes and prints, `draw(result, path)` makes the picture.

    Args:
        file: the example's `__file__`; the picture is named after it.
        run: the experiment at its full size, without arguments.
        draw: saves a picture of what `run` returned.
    """
    name = Path(file).stem
    parser = argparse.ArgumentParser(prog=f"python -m examples.{name}")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder of the picture")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    result = run()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.png"
    draw(result, path)
    print(f"{path}, after {time.perf_counter() - start:.0f} s")
