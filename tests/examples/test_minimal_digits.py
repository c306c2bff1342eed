from examples.minimal_digits import FORMS, Reader, draw, run


def test_every_form_has_the_parameters_that_the_paper_counts():
    dim, depth = 24, 2
    layers = {form: Reader(dim, depth, **settings).sizes()[0] for form, settings in FORMS.items()}
    squares = [12 * dim**2, 4 * dim**2, 2 * dim**2, dim**2, dim * (dim + 1) // 2, dim * (dim + 1) // 2]
    assert list(layers.values()) == [depth * square for square in squares]


def test_it_learns_more_than_chance_and_draws(tmp_path):
    rows = run(dim=16, depth=1, steps=60, batch=32, seeds=1, rate=1e-2)
    assert [row.form for row in rows] == list(FORMS)
    assert rows[0].mean > 0.3  # chance is 0.1
    draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
