"""What only ViT and DeiT hold: two ways to pool, official names, and which paper is whose."""

import torch

from attlas import models
from tests.models.vision.official_names import assert_loads, fused, picture, renamed, shaken


def test_the_mean_of_all_places_instead_of_a_class_token():
    net = shaken("vit_micro", pool="mean")
    assert net.prefix is None
    features = net.forward_features(picture(64, 64))
    assert features.shape == (1, 64, 64)
    torch.testing.assert_close(net(picture(64, 64)), net.head(features.mean(1)))
    token = shaken("vit_micro")
    torch.testing.assert_close(token(picture(64, 64)), token.head(token.forward_features(picture(64, 64))[:, 0]))


def test_official_names():
    net = shaken("vit_micro")
    official = renamed(
        fused(net.state_dict(), ("q_proj", "k_proj", "v_proj"), "qkv"),
        *((rf"^stages\.{i}\.blocks\.0\.", f"blocks.{i}.") for i in range(4)),
        (r"\.mixer\.qkv\.", ".attn.qkv."),
        (r"\.mixer\.out_proj\.", ".attn.proj."),
        (r"^embed\.conv\.", "patch_embed.proj."),
        (r"^prefix$", "cls_token"),
        (r"^places\.weight$", "pos_embed"),
    )
    official |= {key: official[key].unsqueeze(0) for key in ("cls_token", "pos_embed")}
    assert {"blocks.3.attn.qkv.bias", "blocks.0.mlp.fc1.weight", "norm.bias", "head.bias"} <= set(official)
    assert official["pos_embed"].shape == (1, 65, 64)
    assert_loads(net, "vit_micro", official, picture(64, 64))


def test_deit_is_a_vit_with_a_paper_of_its_own():
    vit, deit = models.model("vit_tiny"), models.model("deit_tiny")
    assert (vit.paper, deit.paper) == ("arXiv:2010.11929", "arXiv:2012.12877")
    assert (vit.accepted["drop_path"], deit.accepted["drop_path"]) == (0.0, 0.1)
    assert {name: models.figures()[name].top1 for name in ("vit_base", "vit_large")} == {
        "vit_base": None,
        "vit_large": None,
    }
