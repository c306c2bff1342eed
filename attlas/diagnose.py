"""What runs here, and why: `doctor` looks at the machine, `explain` at a layer and its input."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attlas.kernels.cpu import build
from attlas.ops.dispatch import Choice, record_choices


@dataclass(frozen=True)
class Finding:
    """One thing that `doctor` looked at: what it is, whether it is usable, and what to do if not."""

    what: str
    usable: bool
    detail: str


def doctor() -> list[Finding]:
    """What this machine can run: torch, our C++ kernels, optional packages.

    It compiles the kernels if that was not done yet, which takes seconds.
    """
    findings = [
        Finding(
            "torch",
            True,
            f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        ),
        Finding(
            "GPU",
            torch.cuda.is_available(),
            torch.cuda.get_device_name() if torch.cuda.is_available() else "none; everything runs on the CPU",
        ),
    ]
    for name in build.names():
        usable, detail = build.status(name)
        findings.append(Finding(f"C++ kernel {name}", usable, detail))
    for package, purpose in (
        ("joblib", "attlas compare"),
        ("sklearn", "the digits task"),
    ):
        found = importlib.util.find_spec(package) is not None
        findings.append(Finding(package, found, f"for {purpose}" + ("" if found else "; pip install 'attlas[bench]'")))
    return findings


@dataclass(frozen=True)
class Explanation:
    """Which backend every op of a call ran on, and why not a faster one. `str()` of it is for people."""

    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        if not self.choices:
            return "no op with a choice of backend ran: the mechanism is plain torch"
        lines = []
        for choice in dict.fromkeys(self.choices):
            times = self.choices.count(choice)
            lines.append(f"{choice.op}: {choice.backend}" + (f" ({times} calls)" if times > 1 else ""))
            lines += [f"  not {name}: {reason}" for name, reason in choice.passed_over]
        return "\n".join(lines)


def explain(module: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Run `module(*args, **kwargs)` once and say which backend ran each op, and why not a faster one.

    >>> layer = attlas.mixer("softmax", dim=32, heads=4)  # doctest: +SKIP
    >>> print(attlas.explain(layer, x))                   # doctest: +SKIP
    """
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), record_choices() as choices:
            module(*args, **kwargs)
    finally:
        module.train(training)
    return Explanation(tuple(choices))
