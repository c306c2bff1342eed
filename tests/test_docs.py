"""The pages that are made from the code."""

import importlib.util
from pathlib import Path

import pytest

import attlas
from attlas.core.registry import mechanism

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", attlas.mechanisms())
def test_every_mechanism_has_a_page_with_its_picture(name):
    page = generate.page(name)
    spec = mechanism(name).spec
    for expected in (f"# {name}", spec.title, spec.paper, "## Settings", f"(../figures/masks/{name}.svg)"):
        assert expected in page


def test_the_readmes_example_runs():
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})


def test_the_readme_names_every_mechanism():
    text = (ROOT / "README.md").read_text()
    assert [name for name in attlas.mechanisms() if f"| `{name}` |" not in text] == []
