"""Draw what the queries of every mechanism see: docs/pages/figures/masks/*.svg, and the page that shows them."""

from collections import defaultdict
from pathlib import Path

import attlas
from attlas.analysis.visible import Specimen, specimen, svg
from attlas.core.registry import family_of, mechanism

PAGES = Path(__file__).parent.parent / "pages"
TELLING = {"criss_cross": {"recurrence": 1}}
"""Settings that show more than those of the declared example: two passes of criss-cross reach everything."""

INTRODUCTION = """\
# What each query sees

Every picture is measured, not drawn by hand: a query sees a key where the gradient of its output with respect to the
key's value is not zero, or with respect to the token for mechanisms that have no values. So a picture shows what the
code does; what depends on content is shown for the random tokens that were given.

On one axis the whole matrix is drawn, queries downwards and keys to the right; on a grid, what one query sees of it.
A lighter colour is seen by some heads only. Each layer is the mechanism's declared small example with random weights,
on a grid large enough to show something. Other sizes and settings, and your own photograph, are one command away:

```
attlas show neighborhood --mask --size 12x16 --query 3,4 --set window=5 --svg seen.svg
attlas show routing --mask --size 24 --seed 1
attlas show criss_cross --mask --size 16x16 --set recurrence=1 --image photo.jpg
```

and for any layer of yours `attlas.analysis.visible.visible_pairs(layer, x, grid=(12, 16))` is a tensor (batch, heads,
queries, keys).
"""


def write(pages: Path, names: list[str]) -> None:
    """The page and its pictures; pictures of names that are gone are removed."""
    folder = pages / "figures" / "masks"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        if old.stem not in names:
            old.unlink()
    families = defaultdict(list)
    for name in names:
        families[family_of(mechanism(name))].append(row(name, folder))
    parts = [INTRODUCTION]
    for family, rows in sorted(families.items()):
        parts.append(f"## {family.replace('_', ' ')}\n\n| mechanism | sees |\n| --- | --- |\n" + "\n".join(rows) + "\n")
    (pages / "masks.md").write_text("\n".join(parts))


def row(name: str, folder: Path) -> str:
    """Draw one mechanism; its row of the table."""
    made = specimen(name, params=TELLING.get(name))
    matrix = made.grid.rank == 1 or made.context is not None
    query = None if matrix else made.query()
    seen = made.pairs(queries=None if matrix else [query])
    what = f"visible pairs of {name}"
    shown = seen if matrix else seen[0, :, 0].double().mean(0)
    (folder / f"{name}.svg").write_text(svg(shown, grid=made.grid, query=query, title=what))
    return f"| [{name}](mechanisms/{name}.md)<br>{caption(made)} | ![{what}](figures/masks/{name}.svg) |"


def caption(made: Specimen) -> str:
    """Pattern, grid and settings, in a few words."""
    site = made.layer.site
    pattern = f"{'causal' if site.causal else 'noncausal'}{' cross' if made.context is not None else ''}"
    heads = f", {site.heads} heads" if site.heads > 1 else ""
    settings = "".join(f"<br>`{key}={value!r}`" for key, value in made.settings.items())
    return f"{pattern}, {made.grid}{heads}{settings}"


if __name__ == "__main__":
    write(PAGES, attlas.mechanisms())
