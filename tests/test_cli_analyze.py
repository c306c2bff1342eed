"""`attlas analyze`, as a user types it."""

import re

import pytest
from typer.testing import CliRunner

from attlas import cli
from attlas.cli import analyze
from attlas.core.errors import BadInput, UnknownName, Unsupported


@pytest.fixture
def run(monkeypatch):
    """Run `attlas analyze` with these arguments; returns what was printed."""
    monkeypatch.setattr(analyze, "console", cli.Console(width=200))

    def run(*arguments):
        result = CliRunner().invoke(cli.app, ["analyze", *map(str, arguments)])
        if result.exception is not None:
            raise result.exception
        return result.output

    return run


def row(text, title, name):
    """The numbers behind a name in the table of that title."""
    table = text.partition(title)[2]
    return [float(value) for value in re.search(rf"^{name} +(.*)$", table, re.MULTILINE)[1].split()]


SMALL = ("--tokens", 36, "--dim", 16)


def test_rank_tells_softmax_from_linear_and_says_what_has_no_matrix(run, tmp_path):
    text = run("rank", "softmax,linear,pool", "--sizes", "4..16", *SMALL, "--out", tmp_path / "rank.svg")
    assert row(text, "numerical rank of the matrix", "linear") == [4, 8, 16]
    assert min(row(text, "numerical rank of the matrix", "softmax")) > 20
    assert row(text, "numerical rank of the output", "pool") == [16, 16, 16]
    assert "pool mixes tokens by itself" in text
    assert "head size" in (tmp_path / "rank.svg").read_text()


def test_rank_in_a_trained_model(run):
    text = run("rank", "softmax", "--input", "digits", "--steps", 2, "--sizes", "8", "--dim", 16)
    assert row(text, "numerical rank of the matrix", "softmax")[0] > 8


def test_entropy_falls_for_softmax_alone(run, tmp_path):
    text = run("entropy", "softmax,pavlovian_hebb", "--norms", "1,32", *SMALL, "--out", tmp_path / "entropy.png")
    first, last = row(text, "entropy of a row", "softmax")
    assert last < 0.8 * first
    first, last = row(text, "entropy of a row", "pavlovian_hebb")
    assert first == last
    assert (tmp_path / "entropy.png").stat().st_size > 1000


def test_what_refuses_is_left_out_and_alone_is_an_error(run):
    text = run("entropy", "softmax,pool", "--norms", "1", *SMALL)
    assert "left out: pool mixes tokens by itself" in text
    with pytest.raises(Unsupported, match="pool mixes tokens by itself"):
        run("entropy", "pool", *SMALL)


def test_variants_are_mechanisms_too(run):
    text = run("rank", "softmax:gqa,softmax", "--sizes", "4", *SMALL)
    assert row(text, "numerical rank of the matrix", "softmax:gqa") > [20]


def test_the_ranks_are_held_against_the_head_and_the_channels(run):
    text = run("rank", "linear", "--sizes", "4..9", *SMALL)
    assert row(text, "numerical rank of the matrix", "head size") == [4, 8]
    assert row(text, "effective rank of the output", "channels") == [16, 16]


def test_settings_reach_the_mechanism(run):
    with pytest.raises(BadInput, match="rate times decay"):
        run("entropy", "pavlovian_oja", "--set", "pavlovian_oja.decay=3", *SMALL)


def test_capacity_is_shown_against_theory(run, tmp_path):
    text = run(
        "capacity", "pavlovian_hebb,softmax", "--sizes", "8,16", "--limit", 96, "--out", tmp_path / "capacity.svg"
    )
    measured, theory = row(text, "pairs stored", "pavlovian_hebb"), row(text, "pairs stored", "Hebb in theory, ∝ D")
    assert measured == pytest.approx(theory, rel=0.2)
    assert "pavlovian_hebb grows as D^" in text
    assert "softmax reaches the limit of 96 pairs" in text
    assert "Hebb in theory" in (tmp_path / "capacity.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("rank", "softmax", "--sizes", "6", *SMALL), BadInput, "head sizes divide dim"),
        (("rank", "softmax", "--sizes", "4.5", *SMALL), BadInput, "sizes are whole numbers"),
        (("rank", "softmax", "--input", "images"), BadInput, "input is one of random, text, digits"),
        (("entropy", "softmax", "--norms", "few"), BadInput, "numbers are written as 4..64"),
        (("entropy", "softmax", "--norms", "-1"), BadInput, "numbers are positive"),
        (("entropy", "softmax", "--norms", "nan"), BadInput, "numbers are positive"),
        (("entropy", "softmax", "--norms", "1..nan"), BadInput, "numbers are positive"),
        (("entropy", "softmax", "--norms", ""), BadInput, "names at least one"),
        (("rank", "softmax", "--sizes", "4..inf"), BadInput, r"positive and finite, .* got '4\.\.inf'"),
        (("rank", "softmax", "--sizes", "64..4"), BadInput, r"a range rises, got '64\.\.4'"),
        (("rank", "softmax", "--set", "rala.kernel=0"), BadInput, "settings for rala, but asked for are softmax"),
        (("entropy", "softmax", "--set", "softmax:gqa.scale=1"), BadInput, "settings for softmax:gqa"),
        (("capacity", "softmax", "--set", "sofmax.scale=1"), BadInput, "settings for sofmax"),
        (("capacity", "softmax:gqa"), BadInput, "sets head counts of a layer"),
        (("rank", "softmax:gpa"), BadInput, "softmax has no variant 'gpa'"),
        (("rank", ""), BadInput, "names at least one"),
        (("capacity", "sofmax"), UnknownName, "did you mean 'softmax'"),
        (("entropy", "sofmax", "--out", "a.pdf"), BadInput, r"--out is written as \.svg or \.png, got 'a.pdf'"),
    ],
)
def test_mistakes_are_named(run, arguments, error, message):
    with pytest.raises(error, match=message):
        run(*arguments)


def test_tiles_name_the_smallest_stride_and_draw_the_bounds(run, tmp_path):
    text = run("tiles", "--out", tmp_path / "tiles.svg")
    bounds = {line.split()[0]: line.split()[-2:] for line in text.splitlines() if "%" in line}
    assert bounds["1x1x1"] == ["5.24", "47%"]
    assert bounds["16x8x8"] == ["11.11", "100%"]
    assert "16x8x8 is the smallest stride" in text
    drawn = (tmp_path / "tiles.svg").read_text()
    assert "30x48x80, window 18x24x24" in drawn
    assert "FLOPs alone, and stride 16x8x8" in drawn
    one = run("tiles", "64", "--window", 16, "--query-tile", 8, "--key-tile", 8, "--causal", 0, "--stride", 4)
    assert [line.split()[0] for line in one.splitlines() if "%" in line] == ["4"]
    assert "no stride up to the window" in one


def test_on_fewer_axes_tiles_default_to_the_last_sizes(run):
    assert run("tiles", "256x256") == run(
        "tiles", "256x256", "--window", "24x24", "--query-tile", "8x8", "--key-tile", "8x8"
    )
    assert run("tiles", 32768) == run("tiles", 32768, "--window", 24, "--query-tile", 8, "--key-tile", 8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("256x256", "--window", "18x24x24"), "window .* is for 3 axes, the grid has 2"),
        (("--causal", "4"), "causal axes are numbers from 0 to 2"),
        (("--causal", "01"), "causal axes are numbers from 0 to 2, .* got '01'"),
        (("--causal", "²"), "causal axes are numbers from 0 to 2"),
        (("--window", "0"), "--window is written as 18x24x24, or as one size of at least 1, got '0'"),
        (("--stride", "40"), "stride 40 is more than window 18"),
        (("--stride", "2x2"), "stride .* is for 2 axes"),
        (("--query-tile", "big"), "--query-tile is written as"),
        (("--causal", "4", "--out", "tiles.foo"), r"--out is written as \.svg or \.png, got 'tiles.foo'"),
    ],
)
def test_tiles_that_have_no_meaning_are_refused(run, arguments, words):
    with pytest.raises(BadInput, match=words):
        run("tiles", *arguments)
