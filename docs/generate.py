"""Write the pages that come from the code: one per mechanism, with the picture that figures/masks.py draws."""

import inspect
import sys
from pathlib import Path

import attlas
from attlas.blocks.factory import settings_of
from attlas.core.registry import family_of, mechanism

PAGES = Path(__file__).parent / "pages"


def main() -> None:
    folder = PAGES / "mechanisms"
    folder.mkdir(exist_ok=True)
    rows = []
    for name in attlas.mechanisms():
        (folder / f"{name}.md").write_text(page(name))
        spec = mechanism(name).spec
        rows.append(f"| [{name}]({name}.md) | {family_of(mechanism(name))} | `{spec.equation}` | {spec.year} |")
    header = "| mechanism | family | equation | year |\n| --- | --- | --- | --- |\n"
    (folder / "index.md").write_text("# Mechanisms\n\n" + header + "\n".join(rows) + "\n")
    root = PAGES.parent.parent
    (PAGES / "index.md").write_text((root / "README.md").read_text().replace("CONTRIBUTING.md", "contributing.md"))
    (PAGES / "contributing.md").write_text((root / "CONTRIBUTING.md").read_text())


def page(name: str) -> str:
    """The file's own docstring, its declaration, and its mask."""
    cls = mechanism(name)
    spec = cls.spec
    settings = [f"- `{key}` = `{value!r}`" for key, value in settings_of(cls).items()] or ["none"]
    text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    return "\n".join(
        [
            f"# {name}",
            f"*{spec.title}* ({spec.year}), {spec.paper}",
            f"\n{text}\n",
            f"**Patterns**: {', '.join(sorted(spec.patterns))}  ",
            f"**Grids**: {', '.join(f'{rank}-D' for rank in spec.grids)}  ",
            f"**Masks**: {', '.join(sorted(spec.masks)) or 'none'}  ",
            f"**Streams**: {'yes' if spec.streams else 'no'}  ",
            f"**Complexity**: {spec.complexity}\n",
            "## Settings\n",
            *settings,
            "\n## What each position sees\n",
            f"![visible pairs of {name}](../figures/masks/{name}.svg)\n",
        ]
    )


if __name__ == "__main__":
    main()
