"""What only CrossViT holds: what the branches see of a picture and of each other."""

import pytest
import torch

from attlas import models
from attlas.core.errors import BadInput
from attlas.models.vision.crossvit import ConvPatches, shrunk


def built(**settings):
    torch.manual_seed(0)
    return models.create("crossvit_micro", num_classes=5, **settings).double().eval()


def image(size=64):
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_second_branch_sees_the_published_sizes():
    assert shrunk((240, 240), 16) == (224, 224)
    assert shrunk((408, 408), 16) == (384, 384)
    (_, second), (fine, coarse) = built().embed(image())
    assert (fine.shape, coarse.shape) == ((8, 8), (5, 5))
    resized = torch.nn.functional.interpolate(image(), (60, 60), mode="bicubic", align_corners=False)
    torch.testing.assert_close(second, built().embed.branches[1](resized)[0])


def test_an_exchange_leaves_patches_as_they_are():
    stage = built().stages[0]
    pair = torch.randn(2, 65, 32, dtype=torch.float64), torch.randn(2, 26, 48, dtype=torch.float64)
    for before, after in zip(pair, stage.exchange(*pair), strict=True):
        assert torch.equal(before[:, 1:], after[:, 1:])
        assert not torch.allclose(before[:, 0], after[:, 0])


def test_the_order_of_the_other_branchs_patches_is_nothing_to_a_visitor():
    stage = built().stages[0]
    first, second = torch.randn(2, 65, 32, dtype=torch.float64), torch.randn(2, 26, 48, dtype=torch.float64)
    shuffled = torch.cat([second[:, :1], second[:, 1 + torch.randperm(25)]], 1)
    torch.testing.assert_close(stage.exchange(first, second)[0], stage.exchange(first, shuffled)[0])


def test_without_exchanges_the_branches_do_not_meet():
    net = built()
    for stage in net.stages:
        stage.exchange = Apart()
    with torch.no_grad():
        before = net.forward_features(image())
        net.embed.branches[1].prefix.normal_()
        after = net.forward_features(image())
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


class Apart(torch.nn.Module):
    """No exchange."""

    def forward(self, first, second):
        return first, second


def test_logits_are_the_mean_of_both_votes():
    net = built()
    features = net.forward_features(image())
    votes = [vote(x[:, 0]) for vote, x in zip(net.head.classifiers, features, strict=True)]
    torch.testing.assert_close(net(image()), sum(votes) / 2)
    assert models.create("crossvit_micro", num_classes=0).num_features == 32 + 48


def official():
    """Weights of the smallest size under the names of IBM/CrossViT."""
    state = {}

    def add(name, *shape):
        state[name + ".weight"] = torch.randn(*shape)
        state[name + ".bias"] = torch.randn(shape[0])

    for own, (dim, other, patch, places) in enumerate(((32, 48, 8, 64), (48, 32, 12, 25))):
        add(f"patch_embed.{own}.proj", dim, 3, patch, patch)
        state[f"cls_token.{own}"], state[f"pos_embed.{own}"] = torch.randn(1, 1, dim), torch.randn(1, places + 1, dim)
        add(f"norm.{own}", dim)
        add(f"head.{own}", 5, dim)
        for level in range(2):
            for block in range((1, 2)[own]):
                name = f"blocks.{level}.blocks.{own}.{block}"
                add(f"{name}.norm1", dim)
                add(f"{name}.attn.qkv", 3 * dim, dim)
                add(f"{name}.attn.proj", dim, dim)
                add(f"{name}.norm2", dim)
                add(f"{name}.mlp.fc1", 2 * dim, dim)
                add(f"{name}.mlp.fc2", dim, 2 * dim)
            add(f"blocks.{level}.projs.{own}.0", dim)
            add(f"blocks.{level}.projs.{own}.2", other, dim)
            add(f"blocks.{level}.fusion.{own}.norm1", other)
            for proj in ("wq", "wk", "wv", "proj"):
                add(f"blocks.{level}.fusion.{own}.attn.{proj}", other, other)
            add(f"blocks.{level}.revert_projs.{own}.0", other)
            add(f"blocks.{level}.revert_projs.{own}.2", dim, other)
    return state


def test_official_names():
    state = official()
    net = models.create("crossvit_micro", num_classes=5, weights=state, source="official")
    visit = net.stages[1].exchange.visits[0]
    assert torch.equal(visit.ask.k_proj.weight, state["blocks.1.fusion.0.attn.wk.weight"])
    assert torch.equal(visit.come_back[2].bias, state["blocks.1.revert_projs.0.2.bias"])
    mixer = net.stages[0].branches[1].blocks[1].mixer
    assert torch.equal(mixer.k_proj.weight, state["blocks.0.blocks.1.1.attn.qkv.weight"][48:96])
    assert torch.equal(net.embed.branches[1].places.weight, state["pos_embed.1"][0])
    assert torch.equal(net.head.classifiers[0].weight, state["head.0.weight"])


@pytest.mark.parametrize(("size", "side"), [(12, 48), (16, 64)])
def test_patches_by_convolutions_are_as_many(size, side):
    patches = ConvPatches(3, 16, size)
    assert patches(torch.randn(1, 3, side, side)).shape == (1, 16, 4, 4)
    with pytest.raises(BadInput, match="does not divide"):
        patches(torch.randn(1, 3, side + 1, side))


def test_bad_input():
    with pytest.raises(BadInput, match="12 or 16"):
        ConvPatches(3, 16, 8)
    with pytest.raises(BadInput, match="64 x 64"):
        built()(torch.randn(1, 3, 60, 60, dtype=torch.float64))
    with pytest.raises(BadInput, match="each of the 2 stages"):
        built(mixer=("softmax", "linear", "softmax"))


def test_another_mechanism_in_each_branch():
    net = built(mixer=("linear", "softmax"))
    assert [stage.blocks[0].mixer.spec.name for stage in net.stages[0].branches] == ["linear", "softmax"]
    assert net(image()).isfinite().all()


def test_maps_of_pictures_that_are_not_square():
    net = models.create("crossvit_micro", features_only=True, img_size=(64, 96))
    maps = net(torch.randn(1, 3, 64, 96))
    assert [tuple(each.shape[2:]) for each in maps] == [(8, 12), (5, 7)]
    assert net.strides == (8, 13)
    assert net.backbone.stages[-1].exchange is None
