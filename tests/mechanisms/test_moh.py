"""The identities of `moh`."""

import pytest
import torch
from torch import nn

import attlas
from attlas.core.errors import BadInput, Unsupported

DIM, HEADS, TOKENS = 32, 8, 12


def build(**settings):
    layer = attlas.mixer("moh", DIM, HEADS, **settings)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.normal_(std=0.5 if name.startswith("attend") else 0.2)
    return layer.double()


def tokens(batch=2):
    return torch.randn(batch, TOKENS, DIM, dtype=torch.float64)


def test_zero_routers_and_every_head_active_are_multi_head_attention():
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    ours = build(shared_heads=2, active_heads=6)
    with torch.no_grad():
        for router in ours.attend.children():
            router.weight.zero_()
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = tokens()
    assert torch.allclose(ours(x), theirs(x, x, x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shared", "active"), [(2, 3), (1, 4), (0, 3), (3, 5)])
def test_gates_are_few_and_their_sums_known(shared, active):
    attend, x = build(shared_heads=shared, active_heads=active).attend, tokens()
    gates = attend.gates(x)
    assert ((gates != 0).sum(-1) == shared + active).all()
    assert (gates[..., :shared] != 0).all()
    w = 2 * (x @ attend.split.weight.T).softmax(-1) if shared else torch.ones(2, TOKENS, 2).double()
    sums = gates[..., :shared].sum(-1), gates[..., shared:].sum(-1)
    if shared:
        assert torch.allclose(sums[0], shared * w[..., 0], rtol=0, atol=1e-12)
    assert torch.allclose(sums[1], active * w[..., 1], rtol=0, atol=1e-12)


def test_shared_heads_alone_are_weighed_to_their_number():
    gates = build(shared_heads=HEADS).attend.gates(tokens())
    assert torch.allclose(gates.sum(-1), torch.full((2, TOKENS), 8.0).double(), rtol=0, atol=1e-12)


def balance(layer, x, **kwargs):
    layer.train()
    layer(x, **kwargs)
    return layer.attend.auxiliary


def test_balance_is_k_when_routing_is_uniform_and_all_routed_heads_when_it_collapses():
    layer, x = build(shared_heads=2, active_heads=3, balance=1.0), tokens()
    with torch.no_grad():
        layer.attend.pick.weight.zero_()
    assert balance(layer, x).item() == pytest.approx(3)
    x[..., 0] = 1
    with torch.no_grad():
        layer.attend.pick.weight[:3, 0] = 100
    assert balance(layer, x).item() == pytest.approx(6)


def test_balance_learns_through_the_probabilities_alone():
    layer, x = build(shared_heads=2, active_heads=3, balance=1.0), tokens()
    pick = layer.attend.pick.weight
    (grad,) = torch.autograd.grad(balance(layer, x), pick)
    p = (x @ pick.T).softmax(-1)
    use = (layer.attend.gates(x)[..., 2:] != 0).double().mean((0, 1))
    (expected,) = torch.autograd.grad(6 * (p.mean((0, 1)) * use).sum(), pick)
    assert torch.allclose(grad, expected, rtol=0, atol=1e-12)


def test_balance_is_a_mean_over_real_tokens_and_layers():
    whole = build(layers=4)
    x = tokens()
    keep = torch.arange(TOKENS).expand(2, -1) < 5
    x[:, 5:] = 7.0
    loss = balance(whole, x, mask=keep)
    alone = build()
    alone.load_state_dict(whole.state_dict())
    assert loss.detach() * 4 == pytest.approx(balance(alone, x[:, :5]).detach())
    assert torch.equal(attlas.auxiliary_loss(whole), loss)
    whole.eval()
    whole(x)
    assert whole.attend.auxiliary is None


def test_skipping_what_is_gated_off_changes_nothing_and_saves_its_share():
    settings = {"shared_heads": 2, "active_heads": 3, "kv_heads": 4}
    layer, x = build(**settings), tokens()
    expected = layer(x)
    layer.attend.backend = "oracle"  # visits the kept (token, head) pairs only
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-12)
    cost, full = layer.attend.cost(1, TOKENS), attlas.mixer("softmax", DIM, HEADS).attend.cost(1, TOKENS)
    routing = 2 * TOKENS * DIM * (6 + 2 + 2)
    assert cost.pairs / full.pairs == 5 / 8
    assert (cost.flops - routing) / full.flops == 5 / 8
    assert cost.executed - routing == full.executed


def test_the_oracle_trains_with_the_same_balance_loss():
    layer, x = build(), tokens()
    expected = balance(layer, x)
    layer.attend.backend = "oracle"
    assert torch.equal(balance(layer, x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_picks_the_same_heads(dtype):
    layer, x = build().to(dtype), torch.randn(64, TOKENS, DIM, dtype=dtype)
    half = layer.attend.gates(x) != 0
    assert torch.equal(half, layer.double().attend.gates(x.double()) != 0)


def test_autocast_picks_the_same_heads():
    layer, x = build().float(), torch.randn(64, TOKENS, DIM)
    expected = layer.attend.gates(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.attend.gates(x), expected)


@pytest.mark.parametrize(
    ("name", "heads", "shared", "active"),
    [("moh", 12, 3, 6), ("moh", 16, 4, 8), ("moh:50", 16, 2, 6)],
    ids=["small 75 %", "base 75 %", "base 50 %"],
)
def test_published_head_plans(name, heads, shared, active):
    attend = attlas.mixer(name, 4 * heads, heads).attend
    assert (attend.shared, attend.active) == (shared, active)


def test_what_does_not_fit_is_refused():
    q = torch.randn(1, 4, 6, 8)
    with pytest.raises(Unsupported, match=r"learns pick\.weight.*make_attend or attlas\.mixer"):
        attlas.attend(q, q, q, "moh")
    attend = attlas.make_attend("moh", 4, 8)
    with pytest.raises(BadInput, match=r"pass tokens of shape \(1, 6, 32\).*got None"):
        attend(q, q, q)
    with pytest.raises(BadInput, match=r"got \(1, 1, 32\)"):
        attend(q, q, q, tokens=torch.randn(1, 1, 32))
    with pytest.raises(BadInput, match=r"shared_heads is 0 to 4.*got 5"):
        attlas.make_attend("moh", 4, 8, shared_heads=5)
    with pytest.raises(BadInput, match=r"active_heads is 1 to 2.*got 3"):
        attlas.make_attend("moh", 4, 8, shared_heads=2, active_heads=3)
    with pytest.raises(BadInput, match="balance is a coefficient"):
        attlas.make_attend("moh", 4, 8, balance=-1.0)
