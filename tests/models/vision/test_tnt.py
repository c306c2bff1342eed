"""What only TNT holds: who tells whom, its plain cases, and that it is the mechanism of the same name."""

import pytest
import torch
from torch import nn

import attlas
from attlas import Grid, models
from attlas.blocks.sentences import by_place, by_sentence
from attlas.core.errors import BadInput

GRIDS = Grid((16, 16)), Grid((4, 4), prefix=1)


def built(**settings):
    torch.manual_seed(0)
    return models.create("tnt_micro", num_classes=5, **settings).double().eval()


def image(size=64):
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def streams():
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(2, *shape, dtype=torch.float64, generator=generator) for shape in ((256, 8), (17, 48)))


def test_words_find_their_sentence_and_their_place():
    places = torch.arange(48.0).view(1, 48, 1)
    words = by_sentence(places, Grid((4, 12)), 4)
    assert words.shape == (1, 3, 16, 1)
    assert words[0, 1, :5, 0].tolist() == [4, 5, 6, 7, 16]
    assert torch.equal(by_place(words, Grid((4, 12)), 4), places)


@pytest.mark.parametrize(("paper_form", "others"), [(False, False), (True, True)])
def test_words_know_only_their_own_patch_unless_the_stem_reaches_over(paper_form, others):
    embed, changed = built(paper_form=paper_form).embed, image()
    changed[:, :, 16:32, 16:32] += 1
    (words, _), (fine, _) = embed(image())
    (after, _), _ = embed(changed)
    told = (by_sentence(words, fine, 4) != by_sentence(after, fine, 4)).flatten(2).any(2)
    assert told[:, 5].all()
    assert told[:, [i for i in range(16) if i != 5]].any() == others


def test_words_of_other_sentences_never_meet_in_a_block():
    block, (words, sentences) = built().stages[0].blocks[0], streams()
    told = block((words, sentences), GRIDS)
    words = words.clone()
    words[:, :4] += torch.randn(2, 4, 8, dtype=torch.float64)
    again = block((words, sentences), GRIDS)
    differ = (by_sentence(told[0], GRIDS[0], 4) != by_sentence(again[0], GRIDS[0], 4)).flatten(2).any(2)
    assert differ[:, 0].all()
    assert not differ[:, 1:].any()
    assert (told[1] != again[1]).any(2).all()


def test_without_bridges_sentences_are_a_plain_transformer():
    block, (words, sentences) = built(paper_form=True).stages[0].blocks[0], streams()
    with torch.no_grad():
        block.bridge.proj.weight.zero_()
        block.bridge.proj.bias.zero_()
    assert torch.equal(block((words, sentences), GRIDS)[1], block.outer(sentences, GRIDS[1]))


def test_the_class_token_is_told_nothing_by_words():
    block, (words, sentences) = built().stages[0].blocks[0], streams()
    heard = []
    block.outer.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    block((words, sentences), GRIDS)
    assert torch.equal(heard[0][:, 0], sentences[:, 0])
    assert (heard[0][:, 1:] != sentences[:, 1:]).all()


def test_the_paper_form_is_the_mechanism():
    block = built(paper_form=True).stages[0].blocks[0]
    mechanism = attlas.mixer("tnt", 48 + 16 * 8, 2, words=16, word_dim=8, word_heads=2, grid=GRIDS[1]).double()
    pairs = [(mechanism.bridge_norm, block.bridge.before), (mechanism.bridge, block.bridge.proj)]
    for theirs, ours in ((mechanism.inner, block.inner), (mechanism.outer, block.outer)):
        pairs += [(theirs.norm, ours.norm1), (theirs.mlp_norm, ours.norm2)]
        pairs += [(theirs.out_proj, ours.mixer.out_proj), (theirs.v_proj, ours.mixer.v_proj)]
        pairs += [(theirs.mlp[0], ours.mlp.fc1), (theirs.mlp[2], ours.mlp.fc2)]
        with torch.no_grad():
            theirs.qk_proj.weight.copy_(torch.cat([ours.mixer.q_proj.weight, ours.mixer.k_proj.weight]))
    for theirs, ours in pairs:
        nn.init.normal_(ours.weight, std=0.3)
        theirs.load_state_dict(ours.state_dict())
    words, sentences = streams()
    found = block((words, sentences), GRIDS)
    token = mechanism(mechanism.pack(sentences, by_sentence(words, GRIDS[0], 4)), grid=GRIDS[1])
    expected_sentences, expected_words = mechanism.unpack(token, prefix=1)
    torch.testing.assert_close(found[1], expected_sentences, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0], by_place(expected_words, GRIDS[0], 4), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in block.parameters()) == sum(p.numel() for p in mechanism.parameters())


def test_another_size_changes_the_places_of_sentences_only():
    net = built()
    (words, sentences), (fine, coarse) = net.embed(image(96))
    assert (fine, coarse) == (Grid((24, 24)), Grid((6, 6), prefix=1))
    assert words.shape == (2, 576, 8)
    assert sentences.shape == (2, 37, 48)


def official():
    """Weights of the smallest size under the names of huawei-noah/Efficient-AI-Backbones."""
    state = {}

    def add(name, *shape, bias=True):
        state[name + ".weight"] = torch.randn(*shape)
        if bias:
            state[name + ".bias"] = torch.randn(shape[0])

    add("patch_embed.proj", 8, 3, 7, 7)
    add("proj_norm1", 128)
    add("proj", 48, 128)
    add("proj_norm2", 48)
    add("norm", 48)
    add("head", 5, 48)
    state |= {"cls_token": torch.randn(1, 1, 48), "outer_tokens": torch.zeros(1, 16, 48)}
    state |= {"outer_pos": torch.randn(1, 17, 48), "inner_pos": torch.randn(1, 16, 8)}
    for index in range(4):
        for stream, dim in (("inner", 8), ("outer", 48)):
            name = f"blocks.{index}.{stream}"
            add(f"{name}_norm1", dim)
            add(f"{name}_attn.qk", 2 * dim, dim, bias=False)
            add(f"{name}_attn.v", dim, dim, bias=False)
            add(f"{name}_attn.proj", dim, dim)
            add(f"{name}_norm2", dim)
            add(f"{name}_mlp.fc1", 4 * dim, dim)
            add(f"{name}_mlp.fc2", dim, 4 * dim)
        add(f"blocks.{index}.proj_norm1", 128)
        add(f"blocks.{index}.proj", 48, 128, bias=False)
        add(f"blocks.{index}.proj_norm2", 48)
    return state


def test_official_names():
    state = official()
    net = models.create("tnt_micro", num_classes=5, weights=state, source="official")
    block = net.stages[0].blocks[2]
    assert torch.equal(block.inner.mixer.k_proj.weight, state["blocks.2.inner_attn.qk.weight"][8:])
    assert torch.equal(block.bridge.proj.weight, state["blocks.2.proj.weight"])
    assert torch.equal(net.embed.bridge.before.weight, state["proj_norm1.weight"])
    assert torch.equal(net.embed.word_places, state["inner_pos"][0])


def test_a_mechanism_for_words_and_one_for_sentences():
    net = built(mixer=("pool", "linear"))
    block = net.stages[0].blocks[0]
    assert (block.inner.mixer.spec.name, block.outer.mixer.spec.name) == ("pool", "linear")
    assert net(image()).isfinite().all()


def test_bad_input():
    with pytest.raises(BadInput, match="whole words"):
        models.create("tnt_micro", patch=6)
    with pytest.raises(BadInput, match="64 x 64"):
        built()(torch.randn(1, 3, 60, 60, dtype=torch.float64))


def test_drop_path_of_the_published_networks():
    rates = {name: models.model(name).accepted["drop_path"] for name in models.models("tnt_*")}
    assert rates.pop("tnt_micro") == 0
    assert set(rates.values()) == {0.1}
