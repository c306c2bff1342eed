"""What ViG is beside what every network promises."""

import torch

from attlas import models
from attlas.bench.macs import macs
from tests.models.vision.official_names import State, assert_loads, fused, picture, renamed, shaken


def official(state: State) -> State:
    """Our weights under the names of hustvl/ViG; micro has one block per stage."""
    state = {**state, "places.weight": state["places.weight"][None]}
    return renamed(
        fused(state, ("gate", "value"), "gate_up"),
        (r"^stages\.(\d)\.blocks\.0\.", r"blocks.\1."),
        (r"\.norm1\.", ".attn_norm."),
        (r"\.norm2\.", ".mlp_norm."),
        (r"\.mlp\.gate_up\.", ".mlp.gate_proj."),
        (r"\.mlp\.out\.", ".mlp.down_proj."),
        (r"\.mixer\.convolution\.", ".attn.in_proj.0."),
        (r"\.mixer\.decay_proj\.", ".attn.gk_proj."),
        (r"\.mixer\.norm\.", ".attn.g_norm."),
        (r"\.mixer\.local_norm\.", ".attn.l_norm."),
        (r"\.mixer\.gate_proj\.", ".attn.g_proj."),
        (r"\.mixer\.out_proj\.", ".attn.o_proj."),
        (r"\.mixer\.", ".attn."),
        (r"^embed\.0\.conv\.", "patch_embed.proj.0."),
        (r"^embed\.0\.after\.", "patch_embed.proj.1."),
        (r"^embed\.2\.conv\.", "patch_embed.proj.3."),
        (r"^embed\.2\.after\.", "patch_embed.proj.4."),
        (r"^places\.weight$", "pos_embed"),
    )


def test_official_names() -> None:
    net = shaken("vig_micro")
    assert_loads(net, "vig_micro", official(net.state_dict()), picture(64, 64))


def test_cost_grows_with_the_tokens() -> None:
    with torch.device("meta"):
        net = models.create("vig_tiny")
        small, large = (macs(net, torch.empty(1, 3, side, side)) for side in (224, 448))
    assert large < 4.01 * small


def test_only_tiny_has_activations_in_its_mixers() -> None:
    with torch.device("meta"):
        tiny, small = (models.create(f"vig_{size}").stages[0].blocks[0].mixer for size in ("tiny", "small"))
    assert isinstance(tiny.local_activation, torch.nn.SiLU)
    assert isinstance(small.local_activation, torch.nn.Identity)
