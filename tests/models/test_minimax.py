"""MiniMax: its declaration, its layers, its stream, and CISPO."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput
from attlas.models.minimax import Experts, MiniMax, MiniMaxConfig, MiniMaxLayer, cispo_loss, group_advantages

DOUBLE = {"dtype": torch.float64}
TINY = {"vocabulary": 16, "dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "rotary": 4, "experts": 4, "hidden": 24}


def tiny(layers=8, **settings):
    torch.manual_seed(0)
    return MiniMax(MiniMaxConfig(layers=layers, **TINY | settings))


def test_the_declaration_counts_456_billion_of_which_a_token_meets_46():
    with torch.device("meta"):
        model = MiniMax(MiniMaxConfig())
    assert sum(p.numel() for p in model.parameters()) == 456_089_655_296
    assert model.activated() == 45_944_913_920
    assert model.config.residual == pytest.approx(3.5565588200778455)


def test_every_eighth_layer_is_softmax_attention():
    config = MiniMaxConfig()
    assert [config.is_softmax(i) for i in range(80)] == 10 * (7 * [False] + [True])
    names = [layer.mixer.spec.name for layer in tiny(16).layers]
    assert names == 2 * (7 * ["lightning"] + ["softmax"])


def test_lightning_layers_forget_less_with_depth():
    model = tiny(8)
    slopes = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625])
    for i in range(7):
        assert torch.allclose(model.layers[i].mixer.attend.slopes, slopes * (1 - i / 7 + 1e-5))


def test_the_lightning_layer():
    mixer = tiny().double().layers[0].mixer
    with torch.no_grad():
        mixer.output_norm.weight.normal_()
    x = torch.randn(2, 9, 32, **DOUBLE)
    q, k, v = (F.silu(getattr(mixer, f"{n}_proj")(x)).unflatten(-1, (4, 8)).transpose(1, 2) for n in "qkv")
    place = torch.arange(9)
    decay = torch.exp(-mixer.attend.slopes.double()[:, None, None] * (place[:, None] - place).clamp(min=0)).tril()
    o = ((q @ k.mT * decay) @ v).transpose(1, 2).flatten(2)
    o = F.rms_norm(o, (32,), mixer.output_norm.weight, 1e-6) * mixer.gate_proj(x).sigmoid()
    assert torch.allclose(mixer(x), mixer.out_proj(o), atol=1e-12)


def test_the_residual_path_carries_the_normed_input():
    layer = MiniMaxLayer(tiny().config, 0).double()
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.normal_(std=0.2)
    x = torch.randn(2, 5, 32, **DOUBLE)
    assert torch.allclose(layer(100 * x), layer(10 * x), atol=1e-5)
    alpha = 16**0.25
    r = F.rms_norm(x, (32,), eps=1e-5)
    h = alpha * r + layer.mixer(r)
    r = F.rms_norm(h, (32,), eps=1e-5)
    assert torch.allclose(layer(x), alpha * r + layer.experts(r), atol=1e-12)


def test_a_token_goes_to_its_two_best_experts():
    experts = Experts(6, 10, 5, 2).double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    x = torch.randn(2, 7, 6, **DOUBLE, requires_grad=True)
    likes = experts.gate(x).softmax(-1)
    kept = likes * (likes >= likes.topk(2).values[..., 1:])
    triples = zip(experts.w1, experts.w2, experts.w3, strict=True)
    every = torch.stack([(F.silu(x @ a.T) * (x @ c.T)) @ b.T for a, b, c in triples], -2)
    expected = (kept / kept.sum(-1, keepdim=True)).unsqueeze(-2) @ every
    assert torch.allclose(experts(x), expected.squeeze(-2), atol=1e-12)
    weights, chosen = experts.choose(x)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 7).double())
    assert chosen.shape == (2, 7, 2)


@pytest.mark.parametrize("real", [12, 9])
def test_it_streams_token_by_token(real):
    model = tiny().double().eval()
    ids = torch.randint(16, (2, 12))
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[0, : 12 - real] = False
    with torch.no_grad():
        whole = model(ids, keep)
        state, parts = model.initial_state(2), []
        for piece, live in zip(ids.split([4] + 8 * [1], 1), keep.split([4] + 8 * [1], 1), strict=True):
            logits, state = model.extend(piece, state, keep=live)
            parts.append(logits)
    assert torch.allclose(torch.cat(parts, 1)[keep], whole[keep], atol=1e-10)


def test_only_softmax_layers_remember_more_with_length():
    model, sizes = tiny(), []
    state = model.initial_state(1)
    with torch.no_grad():
        for _ in range(2):
            _, state = model.extend(torch.randint(16, (1, 20)), state)
            sizes.append([attlas.state_bytes(s.attend) for s in state.layers])
    assert sizes[0][:7] == sizes[1][:7] == 7 * [4 * 4 * 8 * 8]
    assert sizes[1][7] == 2 * sizes[0][7] == 4 * 2 * 2 * 8 * 40


def test_nothing_of_the_future_reaches_a_logit():
    model, ids = tiny().double(), torch.randint(16, (1, 10))
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 16
    assert torch.equal(model(ids)[:, :6], model(other)[:, :6])


def test_logits_are_made_in_float32():
    logits = tiny(2).bfloat16()(torch.randint(16, (1, 4)))
    assert logits.dtype == torch.float32


def test_it_learns_to_count_in_steps_that_it_has_seen():
    model, place = tiny(2, period=2), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.95))
    losses = []
    for _ in range(50):
        start, step = torch.randint(16, (32, 1)), torch.tensor([1, 3, 6])[torch.randint(3, (32, 1))]
        ids = (start + step * place) % 16
        loss = F.cross_entropy(model(ids)[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.5
    assert losses[-1] < 0.6  # below log 3: the last token alone does not tell the step


def test_cispo_gives_gradients_to_tokens_that_ppo_drops():
    old = torch.full((2, 3), -2.0)
    now = (old + torch.tensor([[0.0, 1.0, -1.0], [0.0, 1.0, -1.0]])).requires_grad_()
    advantage = torch.tensor([1.0, -1.0])
    (cispo,) = torch.autograd.grad(cispo_loss(now, old, advantage), now)
    ratio = (now - old).exp()
    clipped = torch.minimum(ratio * advantage[:, None], ratio.clamp(0.8, 1.2) * advantage[:, None])
    (ppo,) = torch.autograd.grad(-clipped.mean(), now)
    assert ppo[0, 1] == 0
    assert cispo.ne(0).all()
    assert torch.allclose(cispo[0, 1], torch.tensor(-1.2 / 6))


def test_cispo_without_a_bound_is_reinforce_with_importance_weights():
    now, old = (torch.randn(3, 4, **DOUBLE) for _ in range(2))
    advantage, keep = torch.randn(3, **DOUBLE), torch.rand(3, 4) > 0.3
    loss = cispo_loss(now, old, advantage, keep, above=float("inf"))
    expected = -((now - old).exp() * advantage[:, None] * now)[keep].mean()
    assert torch.allclose(loss, expected)
    unread = now.masked_fill(~keep, torch.nan).requires_grad_()
    (grad,) = torch.autograd.grad(cispo_loss(unread, old, advantage, keep), unread)
    assert torch.isfinite(grad).all()
    assert not grad[~keep].any()


def test_advantages_are_standard_scores_of_a_group():
    advantage = group_advantages(torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1]]))
    assert torch.allclose(advantage, torch.tensor([[1.0, -1, -1, 1], [0, 0, 0, 0]]))


def test_rewards_may_be_whole_numbers():
    for rewards in (torch.tensor([1, 0, 1, 0]), torch.tensor([True, False, True, False])):
        assert torch.allclose(group_advantages(rewards), torch.tensor([1.0, -1, 1, -1]))


@pytest.mark.parametrize("sampled", [-torch.inf, -3.0])
def test_a_token_that_cannot_be_counts_as_none(sampled):
    now = torch.tensor([[-1.0, -torch.inf, -2.0]], requires_grad=True)
    old, advantage = torch.tensor([[-1.0, sampled, -2.0]]), torch.ones(1)
    loss = cispo_loss(now, old, advantage)
    assert loss == cispo_loss(now[:, ::2], old[:, ::2], advantage)
    assert torch.equal(*torch.autograd.grad(loss, now), torch.tensor([[-0.5, 0.0, -0.5]]))


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="at most all 4 experts, got 5"):
        MiniMaxConfig(**TINY | {"active": 5})
    with pytest.raises(BadInput, match="layers and period are at least 1, got 8 and 0"):
        MiniMaxConfig(layers=8, period=0, **TINY)
    for shapes in (((2, 3), (2, 3), (3,)), ((2, 3), (2, 4), (2,)), ((2, 3), (2, 3), (2, 1))):
        with pytest.raises(BadInput, match="one for each response"):
            cispo_loss(*(torch.zeros(shape) for shape in shapes))
