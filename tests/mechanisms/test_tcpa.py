"""Token coordinated prompt attention: who sees which prompts, and what masking behind the softmax means."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attlas
from attlas.core.errors import BadInput

DIM, GRID = 24, attlas.Grid((3, 4), prefix=1)
TOKENS = 13


def build(**settings):
    layer = attlas.mixer("tcpa", DIM, 4, grid=GRID, **{"groups": 6, "prompts": 2, "chosen": 2} | settings)
    return layer.double().eval()


def tokens(batch=2):
    return torch.randn(batch, TOKENS, DIM, dtype=torch.float64)


def class_output(layer, x):
    return layer(x)[:, 0]


def with_other_values(layer):
    """Prompts of the image pool keep their keys and change their values, as seen by the projections."""
    original = layer.v_proj.forward

    def changed(x):
        v = original(x)
        first = TOKENS + 6 * 2
        return torch.cat([v[:, :first], v[:, first:] * 3 + 1], 1)

    layer.v_proj.forward = changed


def test_with_every_prompt_seen_it_is_attention_with_deep_prompts(monkeypatch):
    layer, x = build(), tokens()
    everything = torch.ones(2, TOKENS, 24, dtype=torch.bool)
    monkeypatch.setattr(layer, "_choices", lambda x, call: everything)
    prompts = torch.cat([layer.class_pool.prompts, layer.image_pool.prompts]).reshape(1, 24, DIM).expand(2, -1, -1)
    normed = layer.norm(torch.cat([x[:, :1], prompts, x[:, 1:]], 1))  # the order in the published code
    q, k, v = ((getattr(layer, f"{n}_proj"))(normed).view(2, 37, 4, 6).transpose(1, 2) for n in "qkv")
    o = layer.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    assert torch.allclose(layer(x), torch.cat([o[:, :1], o[:, 25:]], 1), rtol=0, atol=1e-12)


def test_values_of_image_prompts_do_not_reach_the_class_token():
    layer, x = build(), tokens()
    before, images = class_output(layer, x), layer(x)[:, 1:]
    with_other_values(layer)
    assert torch.allclose(class_output(layer, x), before, rtol=0, atol=1e-14)
    assert not torch.allclose(layer(x)[:, 1:], images, atol=1e-3)


@pytest.mark.parametrize("renormalise", [False, True])
def test_keys_of_image_prompts_do_unless_the_rest_is_normalised_again(renormalise):
    layer, x = build(renormalise=renormalise), tokens()
    before = class_output(layer, x)
    with torch.no_grad():
        layer.image_pool.prompts.normal_(std=4)
    assert torch.allclose(class_output(layer, x), before, rtol=0, atol=1e-12) == renormalise


def test_every_token_sees_as_many_prompts_as_it_chose_and_its_own():
    layer, x = build(), tokens()
    x[:, 1], x[:, 2] = layer.image_pool.keys[4].detach(), -layer.image_pool.keys[4].detach()
    x[:, 0] = layer.class_pool.keys[3].detach()
    v = torch.eye(24, dtype=torch.float64).expand(2, -1, -1)
    seen = []

    def values(x):
        return torch.cat([torch.zeros(2, TOKENS, DIM, dtype=torch.float64), v], 1)

    layer.v_proj.forward = values
    layer.out_proj.forward = lambda o: seen.append(o) or o
    layer.q_proj.forward = torch.zeros_like
    layer(x)
    used = seen[0] > 0  # (B, N, prompts): each channel is a prompt
    assert (used.sum(-1) == 2 * 2).all()
    assert not used[:, 0, 12:].any()
    assert not used[:, 1:, :12].any()
    assert used[:, 0, 6:8].all()
    assert used[:, 1, 12 + 8 : 12 + 10].all()
    assert not used[:, 2, 12 + 8 : 12 + 10].any()


def test_parameters_of_the_published_model():
    with torch.device("meta"):
        layers = [attlas.mixer("tcpa", 768, 12, grid=attlas.Grid((14, 14), prefix=1)) for _ in range(12)]
    learned = 0
    for layer in layers:
        for name, parameter in layer.named_parameters():
            learned += parameter.numel() if "pool" in name else 0
    assert learned == 12 * 2 * (20 * 768 + 20 * 4 * 768) == 1_843_200


def test_with_a_frozen_host_only_the_pools_learn():
    layer, x = build(), tokens()
    layer.requires_grad_(False)
    for pool in (layer.class_pool, layer.image_pool):
        pool.requires_grad_(True)
    layer.train()
    (layer(x).square().sum() + attlas.auxiliary_loss(layer)).backward()
    learning = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {f"{pool}_pool.{part}" for pool in ("class", "image") for part in ("keys", "prompts")}


def test_the_matching_loss_is_the_mean_distance_of_the_choices():
    layer, x = build(matching=0.3, prompt_dropout=0.0).train(), tokens()
    layer(x)
    expected = 0
    for pool, part in ((layer.class_pool, x[:, :1]), (layer.image_pool, x[:, 1:])):
        expected += (1 - F.cosine_similarity(part[:, :, None], pool.keys, -1).topk(2).values).mean()
    assert torch.allclose(layer.auxiliary, 0.3 * expected)
    layer.backend = "oracle"
    literal = layer(x)
    assert torch.allclose(layer.auxiliary, 0.3 * expected)
    layer.backend = "auto"
    assert torch.allclose(layer(x), literal, rtol=0, atol=1e-12)
    keep = torch.arange(TOKENS).expand(2, -1) < 9
    layer(x, mask=keep)
    padded = layer.auxiliary
    x[:, 9:] = 5.0
    layer(x, mask=keep)
    assert torch.equal(layer.auxiliary, padded)
    layer.eval()(x)
    assert layer.auxiliary is None


def test_the_random_phase_uses_every_group_and_ends_with_training():
    layer, x = build(random=True, chosen=1, prompt_dropout=0.0), tokens()
    calm = layer(x)
    assert torch.equal(layer(x), calm)
    layer.train()
    layer.image_pool.keys.grad = None
    for _ in range(10):
        layer(x)
        layer.auxiliary.backward()
    assert layer.image_pool.keys.grad.abs().sum(-1).min() > 0
    assert not torch.equal(layer(x), layer(x))
    layer.random = False
    assert torch.equal(layer(x), layer(x))


def test_prompts_are_dropped_in_training_alone():
    layer, x = build(prompt_dropout=0.5), tokens()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_clusters_that_need_different_biases_learn_more_than_from_shared_prompts():
    direction = F.normalize(torch.randn(DIM, dtype=torch.float64), dim=0)
    sign = torch.where(torch.arange(12) % 2 == 0, 1.0, -1.0).double()
    x = 0.1 * torch.randn(8, TOKENS, DIM, dtype=torch.float64)
    x[:, 1:] += 3 * sign[:, None] * direction
    target = 0.05 * sign[:, None] * torch.randn(DIM, dtype=torch.float64)

    def loss_of(**settings):
        torch.manual_seed(1)
        layer = build(prompt_dropout=0.0, **settings).train()
        layer.requires_grad_(False)
        nn.init.zeros_(layer.q_proj.weight)  # the host does not tell the clusters apart
        for proj in (layer.q_proj, layer.v_proj, layer.out_proj):
            nn.init.zeros_(proj.bias)
        layer.class_pool.requires_grad_(True)
        layer.image_pool.requires_grad_(True)
        optimizer = torch.optim.Adam((p for p in layer.parameters() if p.requires_grad), 0.05)
        for _ in range(100):
            loss = (layer(x)[:, 1:] - target).square().mean()
            optimizer.zero_grad()
            (loss + attlas.auxiliary_loss(layer)).backward()
            optimizer.step()
        return float(loss.detach())

    assert loss_of(groups=2, prompts=16, chosen=1) < 0.5 * loss_of(groups=1, prompts=32, chosen=1)


def test_a_grid_without_a_class_token_is_refused():
    with pytest.raises(BadInput, match=r"grid=Grid\(\(13,\), prefix=1\)"):
        build()(tokens(), grid=(13,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chosen": 7}, "chosen is 1 to 6"),
        ({"chosen": 0}, "chosen is 1 to 6"),
        ({"groups": 0}, "groups and prompts are counts"),
        ({"prompts": 0}, "groups and prompts are counts"),
        ({"matching": -1.0}, "matching is a coefficient"),
        ({"prompt_dropout": 1.0}, "prompt_dropout"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(BadInput, match=message):
        build(**settings)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_padding_that_is_no_number_never_matters(poison):
    layer, x, results = build().train(), tokens(), []
    layer.prompt_dropout = 0.0
    keep = torch.arange(TOKENS).expand(2, -1) < torch.tensor([[TOKENS], [9]])
    for value in (0.5, poison):
        x[~keep] = value
        y = layer(x, mask=keep)
        loss = y[keep].square().sum() + attlas.auxiliary_loss(layer)
        results.append([y[keep], *torch.autograd.grad(loss, list(layer.parameters()))])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
