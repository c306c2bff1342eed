"""What only VOLO holds: two kinds of stages, places after the first, the class token at the end, votes of places."""

import pytest
import torch

import attlas
from attlas import Grid, models
from attlas.blocks.class_attention import ClassBlock
from attlas.blocks.drop_path import DropPath
from attlas.blocks.mlp import Mlp
from attlas.core.errors import BadInput


def built(**settings):
    torch.manual_seed(0)
    return models.create("volo_micro", num_classes=5, **settings).double().eval()


def image(*sides):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, *(sides or (64, 64)), dtype=torch.float64, generator=generator)


def test_one_fine_stage_of_outlookers_then_transformers():
    net = models.create("volo_d1", num_classes=0, img_size=32)
    assert [stage.blocks[0].mixer.spec.name for stage in net.stages] == ["volo", "softmax", "softmax", "softmax"]
    assert [len(stage.blocks) for stage in net.stages] == [4, 4, 8, 2]
    assert (net.channels, net.strides) == ((192, 384, 384, 384), (8, 16, 16, 16))


def test_places_are_added_after_the_outlookers():
    net = built()
    before = net.feature_maps(image())
    with torch.no_grad():
        net.downsamples[1].places.weight.normal_()
    after = net.feature_maps(image())
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_logits_are_the_class_tokens_vote_and_half_of_the_loudest_places():
    net = built()
    own, places = net.head.votes(net.forward_features(image()))
    assert (own.shape, places.shape) == ((2, 5), (2, 16, 5))
    torch.testing.assert_close(net(image()), own + places.max(1).values / 2)
    assert models.create("volo_micro", num_classes=0)(image().float()).shape == (2, 48)


def test_class_attention_renews_the_class_token_alone():
    block = ClassBlock(attlas.mixer("crossvit", 16, 2, bias=False), Mlp(16, 32)).double()
    x, grid = torch.randn(2, 7, 16, dtype=torch.float64), Grid((2, 3), prefix=1)
    y = block(x, grid)
    assert torch.equal(y[:, 1:], x[:, 1:])
    z, mixer = block.norm1(x), block.mixer
    q, k, v = (
        proj(part).unflatten(-1, (2, 8)).transpose(1, 2)
        for proj, part in ((mixer.q_proj, z[:, :1]), (mixer.k_proj, z), (mixer.v_proj, z))
    )
    heard = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    token = x[:, :1] + mixer.out_proj(heard)
    torch.testing.assert_close(y[:, :1], token + block.mlp(block.norm2(token)))


def test_outlookers_are_never_dropped():
    net = built(drop_path=0.3)
    rates = [[block.drop_path.rate for block in stage.blocks] for stage in net.stages]
    assert rates == [[0.0], [pytest.approx(0.1)], [pytest.approx(0.2)], [pytest.approx(0.3)]]
    assert all(module.rate == 0 for module in net.head.modules() if isinstance(module, DropPath))


def test_sides_that_do_not_divide_lose_their_rest():
    net = built(img_size=(72, 56))
    assert net.downsamples[1].places.grid == Grid((4, 3))
    maps = net.feature_maps(image(72, 56))
    assert [tuple(each.shape[2:]) for each in maps] == [(9, 7), (4, 3), (4, 3), (4, 3)]


def official():
    """Weights of the smallest size under the names of sail-sg/volo."""
    state = {}

    def add(name, *shape, bias=True):
        state[name + ".weight"] = torch.randn(*shape)
        if bias:
            state[name + ".bias"] = torch.randn(shape[0])

    for index, (chans, kernel) in enumerate(((3, 7), (16, 3), (16, 3))):
        add(f"patch_embed.conv.{3 * index}", 16, chans, kernel, kernel, bias=False)
        norm = f"patch_embed.conv.{3 * index + 1}"
        add(norm, 16)
        state |= {f"{norm}.running_mean": torch.randn(16), f"{norm}.running_var": torch.rand(16)}
        state[f"{norm}.num_batches_tracked"] = torch.tensor(1)
    add("patch_embed.proj", 24, 16, 4, 4)
    add("network.1.proj", 48, 24, 2, 2)
    for name, dim in (("network.0.0", 24), *((f"network.{i}.0", 48) for i in (2, 3, 4))):
        add(f"{name}.attn.proj", dim, dim)
        if dim == 24:
            add(f"{name}.attn.v", dim, dim, bias=False)
            add(f"{name}.attn.attn", 81 * 2, dim)
        else:
            add(f"{name}.attn.qkv", 3 * dim, dim, bias=False)
    for name in ("post_network.0", "post_network.1"):
        add(f"{name}.attn.kv", 96, 48, bias=False)
        add(f"{name}.attn.q", 48, 48, bias=False)
        add(f"{name}.attn.proj", 48, 48)
    for name in [key.removesuffix(".attn.proj.bias") for key in state if key.endswith(".attn.proj.bias")]:
        dim = len(state[f"{name}.attn.proj.bias"])
        add(f"{name}.norm1", dim)
        add(f"{name}.norm2", dim)
        add(f"{name}.mlp.fc1", 2 * dim, dim)
        add(f"{name}.mlp.fc2", dim, 2 * dim)
    for name in ("head", "aux_head"):
        add(name, 5, 48)
    add("norm", 48)
    return state | {"cls_token": torch.randn(1, 1, 48), "pos_embed": torch.randn(1, 4, 4, 48)}


def test_official_names():
    state = official()
    net = models.create("volo_micro", num_classes=5, weights=state, source="official")
    assert torch.equal(net.head.place_classifier.weight, state["aux_head.weight"])
    assert torch.equal(net.head.stage.blocks[1].mixer.v_proj.weight, state["post_network.1.attn.kv.weight"][48:])
    assert torch.equal(net.stages[0].blocks[0].mixer.weight_proj.bias, state["network.0.0.attn.attn.bias"])
    assert torch.equal(net.stages[3].blocks[0].norm2.weight, state["network.4.0.norm2.weight"])
    assert torch.equal(net.downsamples[1].places.weight[5], state["pos_embed"][0, 1, 1])


def test_a_mechanism_for_each_stage():
    net = built(mixer=("pool", "linear", "linear", "softmax"), mixer_settings={})
    assert [stage.blocks[0].mixer.spec.name for stage in net.stages] == ["pool", "linear", "linear", "softmax"]
    assert net(image()).isfinite().all()
    with pytest.raises(BadInput, match="each of the 4 stages"):
        built(mixer=("pool", "linear"))
