"""Agent-DeiT, Agent-PVT and Agent-Swin beyond what all backbones promise."""

import pytest
import torch

from attlas import models
from attlas.core.errors import BadInput
from tests.models.vision.official_names import State, assert_loads, fused, picture, renamed, shaken

QKV = ("q_proj", "k_proj", "v_proj")


def agent_names(state: State) -> State:
    """Convolution and biases under their official names and axes."""
    found = {}
    for key, value in state.items():
        if "_places.axes.0" in key:
            value = value.unsqueeze(3) if "key" in key else value.transpose(1, 2).unsqueeze(2)
        elif "_places.axes.1" in key:
            value = value.unsqueeze(2) if "key" in key else value.transpose(1, 2).unsqueeze(1)
        elif key.endswith("_places.prefix") and "query" in key:
            value = value.transpose(1, 2)
        axes = "_places.axes" in key or "_places.prefix" in key
        found[key] = value.unsqueeze(0) if axes else value
    return renamed(
        found,
        (r"\.mixer\.attend\.convolution\.", ".attn.dwc."),
        (r"\.mixer\.attend\.key_places\.table", ".attn.an_bias"),
        (r"\.mixer\.attend\.key_places\.axes\.0", ".attn.ah_bias"),
        (r"\.mixer\.attend\.key_places\.axes\.1", ".attn.aw_bias"),
        (r"\.mixer\.attend\.key_places\.prefix", ".attn.ac_bias"),
        (r"\.mixer\.attend\.query_places\.table", ".attn.na_bias"),
        (r"\.mixer\.attend\.query_places\.axes\.0", ".attn.ha_bias"),
        (r"\.mixer\.attend\.query_places\.axes\.1", ".attn.wa_bias"),
        (r"\.mixer\.attend\.query_places\.prefix", ".attn.ca_bias"),
        (r"\.mixer\.out_proj\.", ".attn.proj."),
    )


def test_official_names_of_agent_deit() -> None:
    size = (48, 64)  # not a square, so that no axis can stand for the other
    net = shaken("agent_deit_micro", img_size=size)
    state = fused(net.state_dict(), QKV, "attn_qkv")
    state["prefix"], state["places.weight"] = state["prefix"][None], state["places.weight"][None]
    official = renamed(
        agent_names(state),
        (r"^embed\.conv\.", "patch_embed.proj."),
        (r"^prefix$", "cls_token"),
        (r"^places\.weight$", "pos_embed"),
        *((rf"^stages\.{i}\.blocks\.0\.", f"blocks.{i}.") for i in range(4)),
        (r"\.mixer\.attn_qkv\.", ".attn.qkv."),
    )
    assert official["blocks.0.attn.ha_bias"].shape == (1, 2, 6, 1, 9)
    assert official["blocks.0.attn.wa_bias"].shape == (1, 2, 1, 8, 9)
    assert official["blocks.0.attn.ca_bias"].shape == (1, 2, 1, 9)
    assert_loads(net, "agent_deit_micro", official, picture(*size), img_size=size)


def test_official_names_of_agent_pvt() -> None:
    size = (64, 96)
    net = shaken("agent_pvt_micro", img_size=size)
    state = fused(net.state_dict(), QKV[1:], "attn_kv")
    official = renamed(
        agent_names({key: value[None] if key.endswith("places.weight") else value for key, value in state.items()}),
        *((rf"^downsamples\.{i}\.embed\.conv\.", f"patch_embed{i + 1}.proj.") for i in range(4)),
        *((rf"^downsamples\.{i}\.embed\.after\.", f"patch_embed{i + 1}.norm.") for i in range(4)),
        *((rf"^downsamples\.{i}\.places\.weight", f"pos_embed{i + 1}") for i in range(4)),
        *((rf"^stages\.{i}\.blocks\.", f"block{i + 1}.") for i in range(4)),
        (r"\.mixer\.attn_kv\.", ".attn.kv."),
        (r"\.mixer\.q_proj\.", ".attn.q."),
        (r"^head\.classifier\.", "head."),
    )
    assert official["block1.0.attn.ah_bias"].shape == (1, 1, 4, 16, 1)
    assert official["block1.0.attn.aw_bias"].shape == (1, 1, 4, 1, 24)
    assert_loads(net, "agent_pvt_micro", official, picture(*size), img_size=size)


def test_official_names_of_agent_swin() -> None:
    size = (64, 96)
    net = shaken("agent_swin_micro", img_size=size)
    state = fused(net.state_dict(), QKV, "attn_qkv")
    for key, value in state.items():
        if key.endswith("relative_bias"):
            state[key] = value.flip(1, 2).flatten(1).T
    official = renamed(
        agent_names(state),
        (r"^downsamples\.0\.conv\.", "patch_embed.proj."),
        (r"^downsamples\.0\.after\.", "patch_embed.norm."),
        *((rf"^downsamples\.{i + 1}\.", f"layers.{i}.downsample.") for i in range(3)),
        (r"^stages\.", "layers."),
        (r"\.mixer\.attn_qkv\.", ".attn.qkv."),
        (r"\.mixer\.attend\.relative_bias", ".attn.relative_position_bias_table"),
        (r"^head\.before\.", "norm."),
        (r"^head\.classifier\.", "head."),
    )
    official["layers.2.blocks.1.attn.relative_position_index"] = torch.zeros(4, 4)
    assert_loads(net, "agent_swin_micro", official, picture(*size), img_size=size)


def mechanisms(name: str) -> list[list[str]]:
    with torch.device("meta"):
        net = models.create(name)
    return [[block.mixer.spec.name for block in stage.blocks] for stage in net.stages]


def test_which_blocks_have_agents() -> None:
    first, second, *others = mechanisms("agent_deit_base")
    assert (first, second, others) == (["agent"] * 3, ["agent"] + ["softmax"] * 2, [["softmax"] * 3] * 2)
    assert mechanisms("agent_pvt_tiny") == [["agent"] * 2] * 4
    assert mechanisms("agent_swin_tiny") == [["agent"] * 2, ["agent"] * 2, ["agent"] * 6, ["swin"] * 2]
    assert mechanisms("agent_swin_small") == [["agent"] * 2, ["agent"] * 2, ["swin"] * 18, ["swin"] * 2]
    assert mechanisms("agent_swin_base") == [["agent"] * 2, ["agent"] * 2, ["agent"] * 2 + ["swin"] * 16, ["swin"] * 2]
    with torch.device("meta"):
        net = models.create("agent_swin_base")
    shifts = [block.mixer.attend.shift for block in list(net.stages[2].blocks)[2:6]]
    assert shifts == [(0, 0), (3, 3), (0, 0), (3, 3)]
    assert [stage.blocks[0].mixer.attend.agents for stage in list(net.stages)[:3]] == [9, 16, 49]


def test_another_mechanism() -> None:
    assert mechanisms("agent_pvt_micro") == [["agent"]] * 4
    for name in ("agent_deit_micro", "agent_pvt_micro", "agent_swin_micro"):
        assert models.create(name, mixer="softmax", num_classes=3)(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="mixed says how many of"):
        models.create("agent_deit_micro", mixed=5)
    with pytest.raises(BadInput, match="mixed says how many of"):
        models.create("agent_swin_micro", mixed=(1, 1))
    with pytest.raises(BadInput, match="take 4 or 9"):
        models.create("agent_pvt_micro", agents=(5, 4, 4, 4))
