"""The identities of `dcal_pairwise`."""

import pytest
import torch

import attlas
from attlas import Mask
from attlas.core.errors import BadInput, Unsupported


def qkv(batch=2, tokens=5, heads=2):
    return [torch.randn(batch, heads, tokens, 4, dtype=torch.float64) for _ in "qkv"]


def build():
    return attlas.make_attend("dcal_pairwise", 2, 4)


def test_an_image_beside_itself_is_softmax_attention():
    q, k, v = (t[:1].expand(3, -1, -1, -1) for t in qkv(1))
    bias = torch.randn(1, 1, 5, 5, dtype=torch.float64)
    for mask in (None, torch.arange(5).expand(3, -1) < 3, Mask.window(1), Mask.biased(bias)):
        expected = attlas.attend(q, k, v, mask=mask)
        assert torch.allclose(build().train()(q, k, v, mask=mask), expected, rtol=0, atol=1e-12)


def test_of_two_images_each_is_the_distractor_of_the_other():
    q, k, v = qkv()
    other_k, other_v = k.flip(0), v.flip(0)
    scores = torch.cat([q @ k.mT, q @ other_k.mT], -1) / 2
    expected = scores.softmax(-1) @ torch.cat([v, other_v], 2)
    assert torch.allclose(build().train()(q, k, v), expected, rtol=0, atol=1e-12)


def test_a_distractor_keeps_its_own_padding():
    q, k, v = qkv()
    keep = torch.tensor([[True] * 5, [True, True, False, False, False]])
    expected = torch.cat([q[:1] @ k[:1].mT, q[:1] @ k[1:, :, :2].mT], -1).div(2).softmax(-1)
    expected = expected @ torch.cat([v[:1], v[1:, :, :2]], 2)
    assert torch.allclose(build().train()(q, k, v, mask=keep)[:1], expected, rtol=0, atol=1e-12)


def test_nobody_is_its_own_distractor_and_all_others_are_drawn():
    q, k, _ = qkv(batch=4)
    who = torch.arange(4.0, dtype=torch.float64).exp2()[:, None, None, None].expand(4, 2, 5, 4)
    attend, partners = build().train(), set()
    for _ in range(40):
        both = 2 * attend(torch.zeros_like(q), k, who)[:, 0, 0, 0]  # even weights give the mean of the two
        found = tuple((both - who[:, 0, 0, 0]).log2().round().int().tolist())
        assert all(partner != own for own, partner in enumerate(found))
        partners.add(found)
    assert partners == {(1, 2, 3, 0), (2, 3, 0, 1), (3, 0, 1, 2)}


def test_no_distractor_in_eval_or_when_switched_off():
    q, k, v = qkv(batch=3)
    expected = attlas.attend(q, k, v)
    assert torch.equal(build().eval()(q, k, v), expected)
    plain = build().train()
    plain.distract = False
    assert torch.equal(plain(q, k, v), expected)


def test_shares_the_weights_of_a_softmax_layer():
    layer, plain = attlas.mixer("dcal_pairwise", 8, 2).eval(), attlas.mixer("softmax", 8, 2)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 8)
    assert torch.equal(layer(x), plain(x))
    assert not torch.allclose(layer.train()(x), plain(x))


def test_training_costs_twice_the_keys():
    attend = build()
    trained, read = attend.train().cost(2, 50), attend.eval().cost(2, 50)
    assert (trained.flops, trained.pairs) == (2 * read.flops, 2 * read.pairs)


def test_training_lowers_the_weight_of_the_distractor():
    torch.manual_seed(0)
    layer = attlas.mixer("dcal_pairwise", 16, 1)
    x = torch.randn(8, 6, 16) + 2 * torch.randn(8, 1, 16)  # the tokens of an image have its colour in common
    target = x.mean(1, keepdim=True).expand_as(x)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)

    @torch.no_grad()
    def mass():
        """The weight that a token gives to the distractor, averaged over all pairs of images."""
        q, k = layer.q_proj(x), layer.k_proj(x)
        given = torch.einsum("anc,bmc->abnm", q, k).div(4).exp().sum(-1)  # by n of image a to image b
        own = given.diagonal().T[:, None]
        return (given / (given + own))[~torch.eye(8, dtype=torch.bool)].mean()

    before = mass()
    for _ in range(150):
        optimizer.zero_grad()
        (layer.train()(x) - target).square().mean().backward()
        optimizer.step()
    assert before > 0.4
    assert mass() < 0.1


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="another image of the batch, got a batch of one: drop the last batch"):
        build().train()(*qkv(batch=1))
    with pytest.raises(Unsupported, match="causal"):
        attlas.mixer("dcal_pairwise", 8, 2, causal=True)
