"""ZeroTuning: one bias does what rescaling the weights would."""

import math

import pytest
import torch

import attlas
from attlas.core.errors import BadInput
from attlas.ops.softmax import attention_weights

TOKENS, HEADS, SIZE = 9, 4, 8


def random_qk(batch=2):
    return torch.randn(2, batch, HEADS, TOKENS, SIZE, dtype=torch.float64)


def weights(q, k, mask=None, **settings):
    """The weights of the mechanism, read off by values that are the unit vectors."""
    attend = attlas.make_attend("zerotuning", HEADS, SIZE, causal=True, **settings)
    v = torch.eye(TOKENS, dtype=torch.float64).expand(*q.shape[:2], -1, -1)
    return attend(q, k, v, mask=mask)


@pytest.mark.parametrize("gamma", [0.2, 0.9, 1.7, 30.0])
def test_the_bias_scales_the_first_weight_and_normalises_the_row(gamma):
    q, k = random_qk()
    a = attention_weights(q, k, attlas.Mask.causal_())
    scaled = torch.cat([gamma * a[..., :1], a[..., 1:]], -1) / (1 + (gamma - 1) * a[..., :1])
    got = weights(q, k, gamma=gamma)
    assert torch.allclose(got, scaled, rtol=0, atol=1e-12)
    assert torch.allclose(got.sum(-1), torch.ones_like(got[..., 0]))


def test_a_factor_of_one_is_softmax_attention():
    q, k = random_qk()
    assert torch.allclose(weights(q, k), attention_weights(q, k, attlas.Mask.causal_()), rtol=0, atol=1e-14)


def test_other_tokens_keep_their_ratios_and_the_first_grows_with_gamma():
    q, k = random_qk()
    rows = [weights(q, k, gamma=gamma) for gamma in (0.3, 1.0, 3.0)]
    others = [row[:, :, 1:, 1:] / row[:, :, 1:, 1:].sum(-1, keepdim=True) for row in rows]
    for other in others[1:]:
        assert torch.allclose(other, others[0], rtol=0, atol=1e-12)  # and so is their entropy
    firsts = torch.stack([row[:, :, 1:, 0] for row in rows])
    assert (firsts.diff(dim=0) > 0).all()
    assert torch.equal(rows[0][:, :, 0], rows[2][:, :, 0])  # the first query has nothing else to see


def test_the_stronger_the_sink_the_larger_the_change():
    scores = torch.linspace(-3, 3, TOKENS, dtype=torch.float64)
    q = torch.ones(1, HEADS, 1, SIZE, dtype=torch.float64)
    changes = []
    for score in scores:
        k = torch.zeros(1, HEADS, TOKENS, SIZE, dtype=torch.float64)
        k[:, :, 0] = score / math.sqrt(SIZE)
        before, after = (weights(q, k, gamma=gamma)[0, 0, 0, 1] for gamma in (1.0, 1.5))
        changes.append(float(1 - after / before))
    assert changes == sorted(changes)
    a = attention_weights(q, k)[0, 0, 0, 0]
    assert changes[-1] == pytest.approx(float(0.5 * a / (0.5 * a + 1)))


def test_only_the_chosen_heads_change():
    q, k = random_qk()
    plain, tuned = weights(q, k), weights(q, k, gamma=2.0, tuned=[1, 2])
    changed = (plain - tuned).abs().amax((0, 2, 3)) > 1e-6
    assert changed.tolist() == [False, True, True, False]


def test_the_first_token_is_the_first_real_one():
    q, k = random_qk()
    keep = torch.arange(TOKENS).expand(2, -1) >= torch.tensor([[0], [3]])
    padded = weights(q, k, mask=keep, gamma=2.5)
    attend = attlas.make_attend("zerotuning", HEADS, SIZE, causal=True, gamma=2.5)
    alone = attend(q[1:, :, 3:], k[1:, :, 3:], torch.eye(6, dtype=torch.float64).expand(1, HEADS, -1, -1))
    assert torch.allclose(padded[1:, :, 3:, 3:], alone, rtol=0, atol=1e-12)
    assert torch.allclose(padded[:1], weights(q[:1], k[:1], gamma=2.5), rtol=0, atol=1e-12)


def test_a_query_that_cannot_see_the_first_token_is_left_alone():
    q, k = random_qk()
    window = attlas.Mask.window(2, 0)
    plain, tuned = (weights(q, k, mask=window, gamma=gamma) for gamma in (1.0, 4.0))
    assert torch.allclose(plain[:, :, 3:], tuned[:, :, 3:], rtol=0, atol=1e-14)
    assert (tuned[:, :, 1:3, 0] > plain[:, :, 1:3, 0]).all()


def test_decoding_from_a_padded_prompt_equals_the_full_pass():
    layer = attlas.mixer("zerotuning", 32, HEADS, causal=True, gamma=1.8).double().eval()
    x = torch.randn(2, TOKENS, 32, dtype=torch.float64)
    keep = torch.arange(TOKENS).expand(2, -1) >= torch.tensor([[0], [2]])
    whole = layer(x, mask=keep)
    with torch.no_grad():
        y, state = layer.extend(x[:, :5], layer.initial_state(2), keep=keep[:, :5])
        parts = [y]
        for t in range(5, TOKENS):
            y, state = layer.extend(x[:, t : t + 1], state)
            parts.append(y)
    assert torch.allclose(torch.cat(parts, 1)[keep], whole[keep], rtol=0, atol=1e-12)


def test_the_factor_of_least_output_entropy_corrects_a_model_with_a_strong_sink():
    # A reader finds its answer among the tokens, the sink says nothing, and a prior drowns what is left.
    classes, samples = 6, 200
    answer = torch.randint(classes, (samples,))
    k = torch.zeros(samples, 1, classes + 1, SIZE)
    k[:, :, 0], k[torch.arange(samples), 0, 1 + answer] = 4.0, 2.5
    v = torch.cat([torch.zeros(1, classes), 12 * torch.eye(classes)]).expand(samples, 1, -1, -1)
    q = torch.ones(samples, 1, 1, SIZE)[..., :] / math.sqrt(SIZE)
    prior = torch.randn(samples, classes)

    def judge(gamma):
        o = attlas.attend(q, k, v, "zerotuning", gamma=gamma)[:, 0, 0]
        p = (o + prior).softmax(-1)
        entropy = -(p * p.log()).sum(-1).mean()
        return float(entropy), float((p.argmax(-1) == answer).float().mean())

    results = {gamma: judge(gamma) for gamma in (0.05, 0.25, 0.5, 1.0, 2.0)}
    best = min(results, key=lambda gamma: results[gamma][0])
    assert results[best][1] > results[1.0][1] + 0.1


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.inf, math.nan])
def test_a_factor_that_has_no_logarithm_is_refused(gamma):
    with pytest.raises(BadInput, match="gamma is a positive factor"):
        attlas.make_attend("zerotuning", HEADS, SIZE, gamma=gamma)


@pytest.mark.parametrize("heads", [[4], [-1]])
def test_heads_that_are_not_there_are_refused(heads):
    with pytest.raises(BadInput, match="heads by numbers from 0 to 3"):
        attlas.make_attend("zerotuning", HEADS, SIZE, tuned=heads)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_padding_that_is_no_number_never_matters(poison):
    layer = attlas.mixer("zerotuning", 32, HEADS, causal=True, gamma=1.8).eval()
    x, keep = torch.randn(2, TOKENS, 32), torch.arange(TOKENS).expand(2, -1) >= torch.tensor([[0], [2]])
    outputs = []
    for value in (0.5, poison):
        x[~keep] = value
        outputs.append(layer(x, mask=keep)[keep])
    assert torch.equal(*outputs)
