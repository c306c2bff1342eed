"""What FcaFormer is beside what every network promises."""

import pytest
import torch

from attlas import models
from attlas.blocks.convnext import ConvNeXtBlock
from attlas.core.errors import BadInput
from tests.models.vision.official_names import State, assert_loads, picture, renamed, shaken


def official(state: State) -> State:
    """Our weights under the names of hkzhang-git/FcaFormer."""
    found: State = {}
    for key, value in state.items():
        if key.endswith(("handed_bias", "handed_scale")):
            value = value[None, :, None]
        elif key.endswith("position_bias"):
            value = value.flatten(1)
        if "mix.q_proj" in key:
            key, value = key.replace("mix.q_proj", "qkv"), torch.cat([value, state[key.replace("q_proj", "kv_proj")]])
        if "kv_proj" not in key:
            found[key] = value
    return renamed(
        found,
        (r"^downsamples\.0\.convs\.(\d)\.", lambda at: f"patch_embed.seq.{2 * int(at[1])}.c."),
        (r"^downsamples\.0\.norms\.(\d)\.", lambda at: f"patch_embed.seq.{2 * int(at[1])}.bn."),
        (
            r"^downsamples\.(\d)\.(\d)\.(conv|norm)\.",
            lambda at: f"layer_{int(at[1]) - 1}.downsample.conv{int(at[2]) // 2 + 1}.{CONV[at[3]]}.",
        ),
        (r"^stages\.([01])\.blocks\.(\d)\.conv\.", r"layer_\1.blocks.\2.dwconv."),
        (r"^stages\.([01])\.blocks\.(\d)\.mlp\.fc(\d)\.", r"layer_\1.blocks.\2.pwconv\3."),
        (r"^stages\.([01])\.blocks\.(\d)\.scale\.weight", r"layer_\1.blocks.\2.gamma"),
        (r"^stages\.([01])\.", r"layer_\1."),
        (r"^stages\.([23])\.stage\.", r"layer_\1."),
        (r"^(layer_[23].*)\.norm\.(weight|bias)$", r"\1.norm1.\2"),
        (r"\.scale\.weight$", ".gamma_1"),
        (r"\.mlp_scale\.weight$", ".gamma_2"),
        (r"\.merge\.", ".dw_conv."),
        (r"\.mix\.handed_bias$", ".s_token_bias"),
        (r"\.mix\.handed_norm\.", ".s_norm."),
        (r"\.mix\.handed_scale$", ".s_scale_factors"),
        (r"\.mix\.position_bias$", ".attention_biases"),
        (r"\.mix\.out_proj\.", ".proj."),
        (r"\.local\.", ".local_conv.c."),
        (r"\.local_norm\.", ".local_conv.bn."),
        (r"\.mlp\.0\.", ".norm2."),
        (r"\.mlp\.1\.", ".mlp.norm."),
        (r"\.mlp\.2\.", ".mlp.fc1."),
        (r"\.mlp\.4\.", ".mlp.fc2."),
        (r"^head\.after\.", "norm_head."),
        (r"^head\.classifier\.", "head."),
    )


CONV = {"conv": "c", "norm": "bn"}


def test_official_names() -> None:
    net = shaken("fcaformer_micro")
    state = official(net.state_dict())
    assert state["layer_2.blocks.2.s_token_bias"].shape == (1, 2, 1, 2)
    assert_loads(net, "fcaformer_micro", state, picture(64, 64))


def test_blocks_hand_on_one_token_for_sixteen_within_their_stage() -> None:
    with torch.device("meta"):
        net = models.create("fcaformer_l1")
    handed = [[block.mix.handed for block in stage.stage.blocks] for stage in net.stages[2:]]
    assert handed == [[0, 16, 32, 48, 64, 80], [0, 4]]
    assert [block.merge is None for block in net.stages[2].stage.blocks] == [False] * 5 + [True]


def test_an_earlier_block_is_seen_by_all_later_ones() -> None:
    net, image = shaken("fcaformer_micro"), picture(64, 64)
    before = net(image)
    with torch.no_grad():
        net.stages[2].stage.blocks[0].merge.weight.add_(1)
    assert not torch.allclose(net(image), before)
    with torch.no_grad():
        for block in net.stages[2].stage.blocks[1:]:
            block.mix.handed_bias[:, 0] = -torch.inf  # the first block's token, no longer seen
        silent = net(image)
        net.stages[2].stage.blocks[0].merge.weight.add_(1)
    assert torch.allclose(net(image), silent)


def test_a_convnext_block_starts_as_the_identity() -> None:
    x = torch.randn(1, 8, 5, 6)
    assert torch.allclose(ConvNeXtBlock(8)(x), x, atol=1e-4)
    assert not torch.allclose(ConvNeXtBlock(8, scale=None)(x), x, atol=1e-2)


def test_one_size_of_picture() -> None:
    with pytest.raises(BadInput, match="build it with the img_size"):
        models.create("fcaformer_micro")(torch.randn(1, 3, 96, 96))
