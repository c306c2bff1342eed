"""What MoH-ViT is beside what every network promises."""

import pytest
import torch

import attlas
from attlas import models
from attlas.core.errors import BadInput
from tests.models.vision.official_names import State, assert_loads, fused, picture, renamed, shaken


def official(state: State) -> State:
    """Our weights under the names of SkyworkAI/MoH."""
    state = {key: value[..., None, None] if "coarse_proj.weight" in key else value for key, value in state.items()}
    return renamed(
        fused(state, ("gate", "value"), "fc1"),
        (r"^downsamples\.(\d)\.conv\.", lambda at: f"patch_embed{int(at[1]) + 1}.proj."),
        (r"^downsamples\.(\d)\.after\.", lambda at: f"patch_embed{int(at[1]) + 1}.norm."),
        (r"^stages\.(\d)\.0\.blocks\.", lambda at: f"block{int(at[1]) + 1}."),
        (r"^stages\.(\d)\.1\.", lambda at: f"norm{int(at[1]) + 1}."),
        (r"\.mlp\.conv\.", ".mlp.dwconv.dwconv."),
        (r"\.mlp\.out\.", ".mlp.fc2."),
        (r"\.mixer\.query$", ".attn.query_embedding"),
        (r"\.mixer\.taps$", ".attn.learnable_tokens"),
        (r"\.mixer\.tap_bias$", ".attn.learnable_bias"),
        (r"\.mixer\.window_bias$", ".attn.relative_pos_bias_local"),
        (r"\.mixer\.bias\.fc", ".attn.cpb_fc"),
        (r"\.mixer\.coarse_proj\.", ".attn.sr."),
        (r"\.mixer\.coarse_norm\.", ".attn.norm."),
        (r"\.mixer\.out_proj\.", ".attn.proj."),
        (r"\.mixer\.(qkv|q|kv)_proj\.", r".attn.\1."),
        (r"\.mixer\.router\.pick\.", ".attn.wg."),
        (r"\.mixer\.router\.split\.", ".attn.wg_0."),
        (r"\.mixer\.router\.weigh\.", ".attn.wg_1."),
        (r"\.mixer\.", ".attn."),
        (r"^head\.classifier\.", "head."),
    )


def test_official_names() -> None:
    net = shaken("moh_vit_micro")
    assert_loads(net, "moh_vit_micro", official(net.state_dict()), picture(64, 64))


def test_shares_of_active_heads() -> None:
    shares = {}
    for name in ("small_75", "small_80", "base_50", "base_75"):
        with torch.device("meta"):
            net = models.create(f"moh_vit_{name}")
        routers = [block.mixer.router for stage in net.stages for block in stage[0].blocks]
        used = sum((each.shared + each.active) / (each.shared + each.routed) for each in routers)
        shares[name] = used / len(routers)
    assert shares["base_50"] < 0.65 < shares["small_75"] < shares["small_80"] < 0.9


def test_the_balance_loss_is_a_mean_over_the_blocks_that_pick() -> None:
    torch.manual_seed(0)
    net = models.create("moh_vit_micro").train()
    for module in net.modules():
        if type(module).__name__ == "HeadGates" and module.pick is not None:
            torch.nn.init.zeros_(module.pick.weight)
    net(torch.randn(1, 3, 64, 64))
    assert torch.allclose(attlas.auxiliary_loss(net), torch.tensor(0.01 * 2), rtol=1e-4)  # K = 2 of even use


def test_every_stage_is_told_of() -> None:
    for name in ("dims", "heads", "shared", "active"):
        with pytest.raises(BadInput, match=rf"^{name} .* of the 4 stages"):
            models.create("moh_vit_micro", **{name: (2, 2)})
