import torch

from examples.urpe import draw, run


def test_only_absolute_positions_and_urpe_name_positions_of_equal_tokens(tmp_path):
    tokens = 8
    result = run(tokens=tokens, vocabulary=6, dim=32, layers=1, steps=120, batch=16)
    equal = result.accuracy["identification, equal tokens"]
    assert min(equal["absolute"], equal["URPE"]) > 0.4
    assert equal["relative bias"] == 1 / tokens
    assert equal["ALiBi"] == 1 / tokens
    assert torch.equal(result.factors[:, 1:, 1:], result.factors[:, :-1, :-1])
    assert result.factors.std() > 0.01
    draw(result, tmp_path / "urpe.png")
    assert (tmp_path / "urpe.png").stat().st_size > 10_000
