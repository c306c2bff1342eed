"""`attlas show NAME --mask`, as a user types it."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

import attlas
from attlas import cli
from attlas.cli import seen
from attlas.core.errors import BadInput


@pytest.fixture
def show(monkeypatch):
    """Run `attlas show NAME --mask` with these arguments; returns what was printed."""
    monkeypatch.setattr(cli, "console", cli.Console(width=200, soft_wrap=True))

    def show(name, *arguments):
        result = CliRunner().invoke(cli.app, ["show", name, "--mask", *map(str, arguments)])
        if result.exception is not None:
            raise result.exception
        return result.output

    return show


@pytest.mark.parametrize("name", attlas.mechanisms())
def test_every_mechanism_can_be_drawn(show, name, tmp_path):
    text = show(name, "--svg", tmp_path / "seen.svg")
    assert f"{name} with" in text
    picture = (tmp_path / "seen.svg").read_text()
    if name not in ("deconstruct_mlp", "activator", "identity"):  # which read no other token
        assert any(sign in text for sign in "█▄▀▒")
        assert re.search(r'<path d="M[^"]+" fill="#4457c2"', picture)
    assert ElementTree.fromstring(picture).attrib["aria-label"] == f"visible pairs of {name}"


def test_a_query_on_a_grid(show):
    text = show("neighborhood", "--size", "4x5", "--query", "0,4", "--set", "window=3", "--heads", 3)
    assert text.splitlines()[:4] == ["· · ████<>", "· · ██████", "· · ██████", "· · · · · "]
    assert "query (0, 4) on a grid 4x5 sees 9 of 20 keys" in text
    assert "neighborhood with window=3; random weights, random tokens" in text


def test_a_causal_matrix_and_one_of_its_rows(show):
    text = show("softmax", "--size", 4, "--causal", "--query", 2, "--heads", 2)
    assert text.splitlines()[:2] == ["█▄··", "███▄"]
    assert "query 2 on a grid 4 sees 3 of 4 keys; 20 of 32 pairs over 2 heads" in text


def test_the_seed_and_the_picture_choose_what_content_chooses(show, tmp_path):
    from PIL import Image

    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    first, again, other = (show("routing", "--size", 16, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other
    seen_there = show("agent_sd", "--image", path)
    assert "query (8, 8) on a grid 16x16" in seen_there
    assert "random weights, photo.png" in seen_there


def test_a_bar_appears_where_it_takes_long(show, monkeypatch):
    assert "asking gradients" not in show("softmax", "--size", 6)
    started = []
    monkeypatch.setattr(seen, "PATIENCE", -1.0)
    monkeypatch.setattr(seen.Progress, "start", lambda bar: started.append(bar))
    monkeypatch.setattr("attlas.analysis.visible.ENTRIES", 2**7)
    show("softmax", "--size", 6)
    assert started


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--query", "9,9", "--size", "8x8"), "2 coordinates inside of it, got \\(9, 9\\)"),
        (("--query", "there"), "a query is written as 5, or as 3,4"),
        (("--size", "big"), "a size is written as"),
        (("--set", "window=30", "--size", "8x8"), "window 30 .* the axis has 8"),
        (("--svg", "seen.png", "--size", "big"), "is an .svg"),
        (("--dim", "64"), "--dim is not read with --mask"),
        (("--heads", "0"), "heads are at least 1, got 0"),
        (("--heads", "-2"), "heads are at least 1, got -2"),
        (("--set", "window=30"), "window 30 .* the axis has 8"),
        (("--image", "nowhere.png"), "nowhere.png could not be read"),
        (("--image", __file__), "could not be read"),
        (("--set", "windo=3"), "has no setting 'windo'.*window"),
    ],
)
def test_mistakes_are_named(show, arguments, words):
    with pytest.raises(Exception, match=words) as caught:
        show("neighborhood", *arguments)
    assert isinstance(caught.value, attlas.core.errors.AttlasError)


def test_costs_are_those_of_the_settings_given_and_of_the_small_example_where_nothing_fits(monkeypatch):
    monkeypatch.setattr(cli, "console", cli.Console(width=200, soft_wrap=True))
    arguments = ["show", "biformer", "--size", "6x6", "--dim", "8", "--heads", "2"]
    text = CliRunner().invoke(cli.app, arguments).output
    assert "a grid 6x6 cannot be cut into (7, 7) regions" in text
    assert "in small, with dim 16, 2 heads, regions=2, top=2\n" in text
    assert text.count("GFLOP") == 1
    text = CliRunner().invoke(cli.app, [*arguments, "--set", "regions=3", "--set", "kernel=0"]).output
    assert "in small" not in text
    assert f"{2 * 36 * 4 * 4:,} visible pairs" in text  # 2 heads, 4 regions of 4


def test_what_belongs_to_the_mask_is_refused_without_it():
    result = CliRunner().invoke(cli.app, ["show", "softmax", "--svg", "seen.svg", "--causal", "--seed", "0"])
    assert isinstance(result.exception, BadInput)
    assert str(result.exception) == "--causal, --svg, --seed: only with --mask"
