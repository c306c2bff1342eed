"""SG-Former beyond what all backbones promise."""

import pytest
import torch

from attlas import models
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from tests.models.vision.official_names import State, assert_loads, fused, picture, renamed, shaken


def official_names(state: State) -> State:
    found = {}
    for key, value in state.items():
        if ".hybrid.mixer.q_proj." in key or ".guided.mixer.k_proj." in key or ".guided.mixer.v_proj." in key:
            halves = value.chunk(2)
            found |= {key.replace("_proj.", f"{n}."): half for n, half in zip((1, 2), halves, strict=True)}
        else:
            found[key] = value
    for n in (1, 2):
        found = fused(found, (f"guided.mixer.k{n}", f"guided.mixer.v{n}"), f"guided.mixer.kv{n}")
    found = fused(found, ("hybrid.mixer.cell_k", "hybrid.mixer.cell_v"), "hybrid.mixer.kv1")
    found = fused(found, ("hybrid.mixer.k_proj", "hybrid.mixer.v_proj"), "hybrid.mixer.kv2")
    found = fused(found, ("mixer.k_proj", "mixer.v_proj"), "mixer.kv")
    found["downsamples.0.places.weight"] = found["downsamples.0.places.weight"][None]
    return renamed(
        found,
        (r"^downsamples\.0\.places\.weight", "pos_embed"),
        *((rf"^downsamples\.0\.embed\.convs\.{i}\.", f"patch_embed1.conv.{2 * i}.c.") for i in range(3)),
        *((rf"^downsamples\.0\.embed\.norms\.{i}\.", f"patch_embed1.conv.{2 * i}.bn.") for i in range(3)),
        (r"^downsamples\.0\.embed\.after\.", "patch_embed1.norm."),
        *((rf"^downsamples\.{i}\.conv(\d)\.", rf"patch_embed{i + 1}.conv\1.c.") for i in (1, 2, 3)),
        *((rf"^downsamples\.{i}\.norm(\d)\.", rf"patch_embed{i + 1}.conv\1.bn.") for i in (1, 2, 3)),
        *((rf"^stages\.{i}\.norm\.", f"norm{i + 1}.") for i in range(4)),
        *((rf"^stages\.{i}\.blocks\.0\.hybrid\.", f"block{i + 1}.0.") for i in range(3)),
        *((rf"^stages\.{i}\.blocks\.0\.guided\.", f"block{i + 1}.1.") for i in range(3)),
        (r"^stages\.3\.blocks\.", "block4."),
        (r"\.mixer\.reduce\.", ".attn.sr."),
        (r"\.mixer\.reduce_norm\.", ".attn.norm."),
        (r"\.mixer\.local(\.|_)proj\.", ".attn.lepe_linear."),
        (r"\.mixer\.(local\.)?conv\.", ".attn.lepe_conv."),
        (r"\.mixer\.(local\.)?out_proj\.", ".attn.proj."),
        *((rf"\.mixer\.merge\.{i}\.", f".attn.f{i + 1}.") for i in range(3)),
        (r"\.mixer\.q_proj\.", ".attn.q."),
        (r"\.mixer\.", ".attn."),
        (r"\.mlp\.conv\.", ".mlp.dwconv.dwconv."),
        (r"^head\.classifier\.", "head."),
    )


def test_official_names() -> None:
    net = shaken("sg_former_micro")
    assert_loads(net, "sg_former_micro", official_names(net.state_dict()), picture(64, 64))


def test_how_many_tokens_are_left_at_224() -> None:
    with torch.device("meta"):
        net = models.create("sg_former_small")
    guided = [stage.blocks[0].guided.mixer for stage in list(net.stages)[:3]]
    merged = [each.merged(tokens) for each, tokens in zip(guided, (56**2, 28**2, 14**2), strict=True)]
    assert merged == [[4, 28, 28], [4, 28, 28], [49, 98]]
    assert [len(stage.blocks) for stage in net.stages] == [1, 2, 8, 1]
    assert net.stages[3].blocks[0].mixer.of == "projection"


def test_significance_guides_and_is_cut_off_from_the_gradient() -> None:
    pair = shaken("sg_former_micro").stages[0].blocks[0]
    x = torch.randn(1, 256, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    _, significance = pair.hybrid.mixer(pair.hybrid.norm1(x.requires_grad_()), Grid((16, 16)))
    assert not significance.requires_grad
    # Means over cells of 8 x 8 places and over windows of 4 x 4, each of which shares out 1.
    assert significance.sum().item() == pytest.approx(8 * 8 + 16)
    other = pair.guided.mixer(x, significance.flip(1), Grid((16, 16)))
    assert not torch.allclose(other, pair.guided.mixer(x, significance, Grid((16, 16))))


def test_pictures_of_any_size() -> None:
    net = shaken("sg_former_micro")
    with torch.no_grad():
        assert net(picture(75, 100)).isfinite().all()


def test_another_mechanism_needs_no_pairs() -> None:
    net = models.create("sg_former_micro", mixer="softmax", depths=(1, 1, 1, 1), num_classes=3)
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    with pytest.raises(BadInput, match="come in pairs, got 3 in stage 1"):
        models.create("sg_former_micro", depths=(2, 3, 2, 1))
    with pytest.raises(BadInput, match="groups"):
        models.create("sg_former_micro", mixer="sg_former", depths=(2, 2, 2, 2))


def test_windows_larger_than_the_map_name_the_cure() -> None:
    net = models.create("sg_former_micro", window=7, img_size=128).eval()
    image = torch.randn(1, 3, 72, 128)
    with pytest.raises(BadInput, match=r"windows of 7 places .* a grid 5x8: build the network with img_size="):
        net(image)
    small = models.create("sg_former_micro", window=7, img_size=(72, 128)).eval()
    state = net.state_dict()
    state["downsamples.0.places.weight"] = small.state_dict()["downsamples.0.places.weight"]
    small.load_state_dict(state)
    assert small(image).isfinite().all()
