"""The command line, as a user types it."""

import pytest
from typer.testing import CliRunner

import attlas
from attlas import cli
from attlas.cli.settings import read_grids


@pytest.fixture
def run(monkeypatch):
    """Run a command line; returns (exit code, everything printed)."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli, "console", cli.Console(width=200, soft_wrap=True))

    def run(*arguments):
        result = CliRunner().invoke(cli.app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


def test_list_shows_what_matches(run):
    _, everything = run("list")
    for name in attlas.mechanisms():
        assert f"{name} " in everything
    _, linear = run("list", "--pattern", "causal self", "--family", "linear")
    assert "lightning" in linear
    assert "softmax" not in linear.replace("softmax(", "")
    with pytest.raises(attlas.core.errors.UnknownName, match="did you mean 'linear'"):
        run("list", "--family", "liner")


@pytest.mark.parametrize("name", attlas.mechanisms())
def test_show_says_everything_about_each(run, name):
    size = "729" if name == "video_ccam" else "64"  # a video is whole frames
    code, text = run("show", name, "--size", size, "--dim", "32", "--heads", "4")
    spec = attlas.core.registry.mechanism(name).spec
    assert code == 0
    for expected in (spec.title, spec.paper, spec.complexity, "GFLOP", "parameters"):
        assert expected in text


def test_explain_names_the_backend(run):
    _, text = run("explain", "softmax", "--size", "64", "--dim", "32", "--heads", "4")
    assert "softmax_attention: torch" in text
    with pytest.raises(attlas.core.errors.BadInput, match="dtype is one of"):
        run("explain", "softmax", "--dtype", "int4")
    with pytest.raises(attlas.core.errors.BadInput, match="written as 4096, 14x14"):
        run("explain", "softmax", "--size", "big")


def test_doctor_runs(run):
    code, text = run("doctor")
    assert code == 0
    assert "torch" in text


def test_a_users_mistake_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attlas", "show", "sofmax"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "did you mean 'softmax'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "grids"),
    [
        ("256..2000", [(256,), (512,), (1024,)]),
        ("7..7, 14x14,8X14x14,", [(7,), (14, 14), (8, 14, 14)]),
        ("512,1000,512", [(512,), (1000,)]),
    ],
)
def test_sizes_are_numbers_grids_and_ranges(text, grids):
    assert read_grids(text) == grids


def test_list_models_shows_what_was_published(run):
    _, text = run("list", "models", "vit_*,poolformer_s12")
    for said in ("86,567,656", "17.58", "77.91", "2010.11929", "for tests and quick training", "11,915,176"):
        assert said in text
    assert "deit_tiny" not in text
    with pytest.raises(attlas.core.errors.BadInput, match="of mechanisms"):
        run("list", "models", "--family", "linear")
    with pytest.raises(attlas.core.errors.BadInput, match="separate them by commas: soft,pool"):
        run("list", "soft", "pool")
