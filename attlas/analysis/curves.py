"""Pictures of curves side by side, as SVG or PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attlas.core.errors import AttlasError, BadInput

Points = tuple[Sequence[float], Sequence[float]]
FORMATS = (".svg", ".png")
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title, x, y: what is written at it and at its axes.
        lines: x and y of each curve, by its name.
        references: likewise, for thin grey lines of theory.
        log_x, log_y: whether an axis shows doublings alike.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Points]
    references: Mapping[str, Points] = field(default_factory=dict)
    log_x: bool = True
    log_y: bool = True


def draw_curves(panels: Sequence[Panel], path: Path) -> None:
    """Write the panels beside one another; a name has one colour in all of them.

    Raises:
        BadInput: the path ends in neither .svg nor .png, or cannot be written.
        AttlasError: matplotlib is missing.
    """
    if path.suffix.lower() not in FORMATS:
        raise BadInput(f"a picture is written as {' or '.join(FORMATS)}, got {path.name!r}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator, StrMethodFormatter
    except ImportError:
        raise AttlasError("pictures need matplotlib: pip install 'attlas[examples]'") from None
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = [matplotlib.colormaps["tab10"](number) for number in range(10)]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "attlas", "font.size": 9}):
        figure = Figure(figsize=(3.9 * len(panels) + 1.4, 3.3), layout="constrained")
        handles, theory = {}, {}
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for name, (x, y) in panel.lines.items():
                place = names.index(name)  # where lines coincide, the gaps of the last show the others
                colour, style = colours[place % len(colours)], DASHES[place % len(DASHES)]
                handles[name] = axes.plot(x, y, color=colour, linestyle=style, marker="o", markersize=3)[0]
            for number, (name, (x, y)) in enumerate(panel.references.items()):
                style = DASHES[1 + number % (len(DASHES) - 1)]
                theory[name] = axes.plot(x, y, color="#777", linewidth=1, linestyle=style)[0]
            for log, scale, axis in (
                (panel.log_x, axes.set_xscale, axes.xaxis),
                (panel.log_y, axes.set_yscale, axes.yaxis),
            ):
                if log:
                    scale("log", base=2)
                    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
                    axis.set_minor_locator(NullLocator())
            axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
            axes.spines[["top", "right"]].set_visible(False)
        handles |= theory
        figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, handlelength=3)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise BadInput(
                f"the picture could not be written to {path}: {error.strerror}; give another --out"
            ) from None
