import torch

from examples.landmark import CHUNK, EVERY, FACTS, KEYS, LANDMARK, QUERIES, TOP_K, VALUES, draw, run, texts


def test_texts_hold_the_fact_of_every_question():
    text = texts(50, 32)
    facts, asked = text.tokens.gather(1, text.places), text.tokens[:, -QUERIES:]
    assert torch.equal(facts // VALUES, asked - FACTS)
    assert torch.equal(facts % VALUES, text.answers)
    assert ((asked >= FACTS) & (asked < FACTS + KEYS)).all()
    assert (text.tokens < LANDMARK).all()
    assert ((text.tokens < FACTS).sum(1) == QUERIES).all()
    assert text.distances.min() >= 1
    assert text.distances.max() < 32


def test_it_reads_few_blocks_and_draws(tmp_path):
    result = run(dim=16, heads=2, length=16, times=2, steps=2, batch=4, tests=8)
    blocks = 32 // EVERY
    assert result.keys == {"landmark": blocks + TOP_K * (EVERY + 1) + CHUNK, "window": 28, "softmax": 32}
    assert set(result.overall) == set(result.accuracy) == set(result.keys)
    assert all(0 <= value <= 1 for values in result.accuracy.values() for value in values)
    assert result.shares.shape == (QUERIES, blocks - 2)
    assert (result.shares > 0).all()
    assert (result.facts <= result.shares.shape[1]).all()
    everything = 2 * 8 * 2 * sum(range(0, blocks, 2)) * (EVERY + 1) * 2 * 8 * 4  # layers, texts, heads, blocks, bytes
    assert 0 < result.bytes_read < everything
    draw(result, tmp_path / "landmark.png")
    assert (tmp_path / "landmark.png").stat().st_size > 10_000
