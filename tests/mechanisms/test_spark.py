"""Spark attention: what is kept, and how it is weighed."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput

HEADS, SIZE = 2, 8


def random_qkv(tokens=40, batch=2):
    return torch.randn(3, batch, HEADS, tokens, SIZE, dtype=torch.float64)


def weights(q, k, mask=None, **settings):
    """The weights of the mechanism, read off by values that are the unit vectors."""
    v = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return attlas.attend(q, k, v, "spark", mask=mask, **settings)


def test_with_every_key_active_it_is_the_dense_formula():
    q, k, v = random_qkv()
    a, b = q[..., :4] @ k[..., :4].mT / 2, q[..., 4:] @ k[..., 4:].mT / 2
    expected = (a.softmax(-1) * F.softplus(b)) @ v
    assert torch.allclose(attlas.attend(q, k, v, "spark", active=40), expected, rtol=0, atol=1e-12)
    assert torch.allclose(attlas.attend(q, k, v, "spark"), expected, rtol=0, atol=1e-12)  # 256, as published


def test_about_k_keys_stay_and_they_are_the_best():
    q, k, _ = torch.randn(3, 1, HEADS, 1000, 64)
    kept = weights(q, k, active=100) > 0
    counts = kept.sum(-1).float()
    assert abs(counts.mean() - 100) < 3
    predicted = q[..., :32] @ k[..., :32].mT
    lowest_kept = predicted.masked_fill(~kept, torch.inf).amin(-1)
    highest_dropped = predicted.masked_fill(kept, -torch.inf).amax(-1)
    assert (lowest_kept > highest_dropped).all()


def test_later_keys_have_no_part_in_the_statistics():
    q, k, _ = random_qkv()
    whole = weights(q, k, causal=True, active=5)
    fewer = weights(q[:, :, :25], k[:, :, :25], causal=True, active=5)
    assert torch.allclose(whole[:, :, :25, :25], fewer, rtol=0, atol=1e-14)
    kept = (whole > 0).sum(-1)
    assert torch.equal(kept[0, 0, :5], torch.arange(1, 6))  # who sees no more than 5 keys keeps them all
    assert (kept[:, :, 10:] < torch.arange(11, 41)).all()


@pytest.mark.parametrize("poison", [1e6, torch.nan, torch.inf])
def test_padding_has_no_part_in_the_statistics(poison):
    q, k, v = random_qkv()
    keep = torch.arange(40).expand(2, -1) >= torch.tensor([[7], [0]])
    expected = attlas.attend(q[:1, :, 7:], k[:1, :, 7:], v[:1, :, 7:], "spark", active=5)
    k[0, :, :7] = v[0, :, :7] = poison
    got = attlas.attend(q, k, v, "spark", active=5, mask=keep)
    assert torch.allclose(got[:1, :, 7:], expected, rtol=0, atol=1e-12)


def test_every_query_keeps_its_best_key():
    q = torch.ones(1, HEADS, 1, SIZE)
    k = torch.ones(1, HEADS, 40, SIZE)
    k[:, :, ::2] = -1  # two values alone: no score is two deviations above the mean
    kept = weights(q, k, active=1) > 0
    assert kept[..., 1::2].all()
    assert not kept[..., ::2].any()
    assert (weights(q, torch.zeros_like(k), active=1) > 0).all()


def test_gradients_away_from_the_threshold():
    qkv = [x[:1, :, :12].clone().requires_grad_() for x in random_qkv()]
    assert torch.autograd.gradcheck(lambda q, k, v: attlas.attend(q, k, v, "spark", active=3), qkv, fast_mode=True)


def test_useful_flops_count_what_is_meant_to_stay():
    def by_hand(seen, stay):
        return 2 * HEADS * (4 * seen + (4 + 8) * stay)

    attend = attlas.make_attend("spark", HEADS, SIZE, active=5)
    assert attend.cost(1, 40).flops == by_hand(1600, 200)
    causal = attlas.make_attend("spark", HEADS, SIZE, active=5, causal=True)
    assert causal.cost(1, 40).flops == by_hand(820, sum(min(n, 5) for n in range(1, 41)))
    assert causal.cost(1, 4).flops == by_hand(10, 10)
    long = attlas.make_attend("spark", 1, 256, causal=True)
    dense = attlas.make_attend("softmax", 1, 256, causal=True)
    assert long.cost(1, 8192).flops < 0.35 * dense.cost(1, 8192).flops


def test_rotary_positions_turn_each_part_by_itself():
    layer = attlas.mixer(
        "spark", 32, 4, causal=True, active=3, predictor=2, position=attlas.positions.PartRotary(2, 6)
    ).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    rotated = layer.position.rotate(x.unflatten(-1, (4, 8)).transpose(1, 2), 3)
    alone = attlas.positions.Rotary(2).rotate(x.unflatten(-1, (4, 8)).transpose(1, 2)[..., :2], 3)
    assert torch.equal(rotated[..., :2], alone)
    with torch.no_grad():
        first, state = layer.extend(x[:, :5], layer.initial_state(2))
        second, _ = layer.extend(x[:, 5:], state)
    assert torch.allclose(torch.cat([first, second], 1), layer(x), rtol=0, atol=1e-12)
    with pytest.raises(BadInput, match="do not make a head size of 8"):
        attlas.mixer("spark", 32, 4, position=attlas.positions.PartRotary(4, 8))(x.float())


@pytest.mark.parametrize("predictor", [0, 8])
def test_a_predictor_without_features_or_without_rest_is_refused(predictor):
    with pytest.raises(BadInput, match="predictor is 1 to 7"):
        attlas.make_attend("spark", HEADS, SIZE, predictor=predictor)


def test_no_key_to_keep_is_refused():
    with pytest.raises(BadInput, match="active counts the keys"):
        attlas.make_attend("spark", HEADS, SIZE, active=0)
