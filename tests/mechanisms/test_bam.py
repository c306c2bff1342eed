"""The identities and counts of `bam`, and upcycling into it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attlas
from attlas.adapt.upcycle import upcycle
from attlas.core.errors import BadInput
from attlas.core.state import state_bytes

DIM, HEADS, TOKENS = 16, 4, 9


def dense(count, **settings):
    settings = {"bias": False, "out_bias": False, "causal": True, "position": attlas.positions.Rotary(4)} | settings
    return [attlas.mixer("softmax", DIM, HEADS, **settings).double() for _ in range(count)]


def tokens(batch=2):
    return torch.randn(batch, TOKENS, DIM, dtype=torch.float64)


def parameters(**settings):
    """Attention of one block of the small configuration, its router included."""
    with torch.device("meta"):
        layer = attlas.mixer("bam", 1024, 8, causal=True, **settings)
    return sum(p.numel() for p in layer.parameters())


def test_totals_of_the_small_configuration():
    d, outside = 1024, 2 * 256_000 * 1024 + 1024  # both embeddings and the last norm
    ffn, router = d * 4096 + 2048 * d, 4 * d
    with torch.device("meta"):
        one = attlas.mixer("softmax", d, 8, bias=False, out_bias=False)
    attention = sum(p.numel() for p in one.parameters())
    expert, shared = parameters(), parameters(kv="shared")
    assert attention == 4 * d * d
    assert expert == 4 * 4 * d * d + router
    assert shared == (4 + 4 + 1 + 1) * d * d + router

    def total(attention, experts, routers):
        return outside + 6 * (d + attention + experts * ffn + routers * router)

    assert total(attention, 1, 0) == 587_209_728
    assert total(attention, 4, 1) == 700_480_512  # attention averaged, experts behind it alone
    assert total(expert, 4, 1) == 776_002_560
    assert total(shared, 4, 1) == 738_253_824


def test_large_configuration_shares_keys_and_values_among_three_heads():
    d = 2304
    with torch.device("meta"):
        layer = attlas.mixer("bam", d, 18, causal=True, heads_per_kv=3)
    assert sum(p.numel() for p in layer.parameters()) == 4 * (2 * d * d + 2 * d * 768) + 4 * d


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("settings", [{}, {"kv_heads": 2}, {"position": None}, {"causal": False}], ids=str)
def test_copies_of_one_layer_are_that_layer_whatever_the_router_says(kv, settings):
    (seed,) = dense(1, **settings)
    mixture, x = upcycle([seed] * 3, kv), tokens()
    with torch.no_grad():
        mixture.router.weight.normal_()
    assert torch.allclose(mixture(x), seed(x), rtol=0, atol=1e-12)


def test_different_experts_add_up_under_their_gates():
    layers, x = dense(3), tokens()
    mixture = upcycle(layers)
    gates = (x @ mixture.router.weight.T).softmax(-1)
    expected = sum(gates[..., i, None] * layer(x) for i, layer in enumerate(layers))
    assert torch.allclose(mixture(x), expected, rtol=0, atol=1e-12)
    assert torch.allclose(mixture.gates(x).sum(-1), torch.ones(2, TOKENS).double())


def test_gates_of_one_token_weigh_answers_and_not_what_is_looked_at():
    mixture, x = upcycle(dense(3)), tokens()
    before = mixture(x)
    with torch.no_grad():
        mixture.router.weight.normal_()
    hooked = []
    for projection in mixture.out_proj:
        projection.register_forward_hook(lambda module, args, output: hooked.append(output))
    after = mixture(x)
    assert not torch.allclose(before, after)
    expected = (mixture.gates(x).unsqueeze(-2) * torch.stack(hooked, -1)).sum(-1)
    assert torch.allclose(after, expected, rtol=0, atol=1e-12)


def test_shared_keys_and_values_start_as_the_mean():
    layers = dense(3)
    mixture = upcycle(layers, "shared")
    for name in ("k_proj", "v_proj"):
        (kept,) = getattr(mixture, name)
        mean = sum(getattr(layer, name).weight for layer in layers) / 3
        assert torch.allclose(kept.weight, mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_decoding_is_the_full_pass(kv):
    mixture, x = upcycle(dense(3), kv), tokens()
    state, parts = mixture.initial_state(2), []
    for t in range(TOKENS):
        y, state = mixture.extend(x[:, t : t + 1], state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), mixture(x), rtol=0, atol=1e-12)


def test_one_cache_is_an_nth_of_n():
    sizes = {}
    for kv in ("expert", "shared"):
        mixture = upcycle(dense(3, kv_heads=2), kv)
        with torch.no_grad():
            _, state = mixture.extend(tokens(), mixture.initial_state(2))
        sizes[kv] = state_bytes(state)
    assert sizes["shared"] == 2 * TOKENS * 2 * 2 * 4 * 8
    assert sizes["expert"] == 3 * sizes["shared"]


def test_an_upcycled_layer_keeps_dtype_and_does_not_share_weights():
    (seed,) = dense(1)
    mixture = upcycle([seed.float(), seed])
    assert mixture.router.weight.dtype == torch.float32
    with torch.no_grad():
        mixture.q_proj[0].weight.zero_()
    assert seed.q_proj.weight.any()
    assert mixture.q_proj[1].weight.any()


def test_padding_may_hold_anything():
    mixture, x = upcycle(dense(2)), tokens()
    keep = torch.arange(TOKENS).expand(2, -1) < 6
    dirty = x.masked_fill(~keep.unsqueeze(-1), torch.nan)
    assert torch.allclose(mixture(dirty, mask=keep)[:, :6], mixture(x[:, :6]), rtol=0, atol=1e-12)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, DIM), nn.Linear(DIM, 12)
        self.mixer = dense(1)[0].float()

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.mixer(x))


def trained(model, languages, steps):
    """The model after training to name the token `back` places before, over the first or the last six symbols."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        first, back = languages[step % len(languages)]
        ids = torch.randint(first, first + 6, (16, 12))
        loss = F.cross_entropy(model(ids)[:, back:].flatten(0, 1), ids[:, :-back].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def loss_on(model, languages):
    torch.manual_seed(1)
    total = 0.0
    for first, back in languages:
        ids = torch.randint(first, first + 6, (100, 12))
        total += F.cross_entropy(model(ids)[:, back:].flatten(0, 1), ids[:, :-back].flatten()).item()
    return total / len(languages)


def test_experts_kept_apart_lose_less_than_their_average():
    languages = [(0, 1), (6, 3)]
    seed = trained(Model(), languages, 20)
    specialists = [trained(copy.deepcopy(seed), [language], 100) for language in languages]
    average = copy.deepcopy(seed)
    with torch.no_grad():
        for name, parameter in average.named_parameters():
            parameter.copy_(sum(s.get_parameter(name) for s in specialists) / 2)
    models = {"average": average}
    for kv in ("expert", "shared"):
        models[kv] = copy.deepcopy(average)
        models[kv].mixer = upcycle([s.mixer for s in specialists], kv)
    losses = {name: loss_on(trained(model, languages, 60), languages) for name, model in models.items()}
    assert losses["expert"] < losses["shared"] < losses["average"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="kv is 'expert' or 'shared', got 'one'"):
        attlas.mixer("bam", DIM, HEADS, kv="one")
    with pytest.raises(BadInput, match="heads_per_kv divides the 4 heads, got 3"):
        attlas.mixer("bam", DIM, HEADS, heads_per_kv=3)
    with pytest.raises(BadInput, match="at least one expert, got 0"):
        attlas.mixer("bam", DIM, HEADS, experts=0)
    with pytest.raises(BadInput, match="16 channels do not split into 3 heads"):
        attlas.mixer("bam", DIM, 3)
    with pytest.raises(BadInput, match="the head size 1 is odd: take base=None"):
        attlas.mixer("bam", DIM, 16)
    with pytest.raises(BadInput, match=r"context is \(batch, tokens, 16 channels\)"):
        attlas.mixer("bam", DIM, HEADS).double()(tokens(), tokens()[..., :4])


def test_what_cannot_be_upcycled_is_refused():
    with pytest.raises(BadInput, match="at least one dense layer"):
        upcycle([])
    with pytest.raises(BadInput, match="an expert is a softmax attention layer, got Linear"):
        upcycle([torch.nn.Linear(4, 4)])
    with pytest.raises(BadInput, match="an expert is a softmax attention layer, got Attention"):
        upcycle([attlas.mixer("sigmoid", DIM, HEADS)])
    with pytest.raises(BadInput, match="layer 1 has"):
        upcycle([*dense(1), *dense(1, kv_heads=2)])
    for extra, settings in {
        "biases": {"bias": True},
        "a gate": {"gate": "silu"},
        "norms": {"qk_norm": "rms"},
        "an activation": {"qk_activation": "silu"},
        "fewer query heads": {"query_heads": 2},
        "a scale": {"scale": 1.0},
        "Learned positions": {"position": attlas.positions.Learned(DIM, 9)},
    }.items():
        with pytest.raises(BadInput, match=f"no such thing as {extra}"):
            upcycle(dense(2, **settings))
