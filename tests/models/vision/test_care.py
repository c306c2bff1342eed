"""What CARE Transformer is beside what every network promises."""

import torch

from attlas import models
from attlas.core.grid import Grid
from attlas.models.vision.care import Strips
from tests.models.vision.official_names import State, assert_loads, picture, renamed, shaken


def official(state: State) -> State:
    """Our weights under the names of zhouyuan888888/CARE-Transformer; the last block of micro is 3.1."""
    narrow = ("qk_proj.weight", "widen.weight", "narrow.weight")
    return renamed(
        {key: value[..., None, None] if key.endswith(narrow) else value for key, value in state.items()},
        (r"^downsamples\.0\.conv\.", "stem.0."),
        (r"^downsamples\.0\.after\.", "stem.1."),
        (r"^downsamples\.(\d)\.before\.", r"stages.\1.downsample.0."),
        (r"^downsamples\.(\d)\.conv\.", r"stages.\1.downsample.1."),
        (r"^stages\.3\.blocks\.1\.(norm|conv)\.", r"stages.3.blocks.1.inter_layer.inter2_\1."),
        (r"^stages\.3\.blocks\.1\.widen\.", "stages.3.blocks.1.inter_layer.inter2_fc1."),
        (r"\.mixer\.local_global\.", ".inter_layer.inter1_"),
        (r"\.mixer\.memory\.", ".inter_layer.inter2_"),
        (r"_widen\.", "_fc1."),
        (r"_narrow\.", "_fc2."),
        (r"\.mixer\.column\.", ".token_mixer.dwconvatt_1."),
        (r"\.mixer\.row\.", ".token_mixer.dwconvatt_2."),
        (r"\.mixer\.small\.", ".token_mixer.dwconv1."),
        (r"\.mixer\.large\.", ".token_mixer.dwconv2."),
        (r"\.mixer\.qk_proj\.", ".token_mixer.qk."),
        (r"\.scale\.weight$", ".gamma"),
        (r"^head\.norms\.0\.", "head.norm."),
        (r"^head\.classifiers\.0\.", "head.fc."),
        (r"^head\.norms\.1\.", "dist_head.norm."),
        (r"^head\.classifiers\.1\.", "dist_head.fc."),
    )


def test_official_names() -> None:
    net = shaken("care_micro")
    assert_loads(net, "care_micro", official(net.state_dict()), picture(64, 64))


def test_logits_are_the_mean_of_both_heads() -> None:
    net, image = shaken("care_micro"), picture(64, 64)
    first, second = net.head.both(net.forward_features(image))
    assert not torch.allclose(first, second)
    assert torch.allclose(net(image), (first + second) / 2)


def test_strips_see_a_cross_and_what_the_interactions_add() -> None:
    torch.manual_seed(0)
    strips, grid = Strips(8, (1, 1)).double().eval(), Grid((17, 17))
    for part in (strips.local_global, strips.memory):
        torch.nn.init.zeros_(part.narrow.weight)
        torch.nn.init.zeros_(part.narrow.bias)
    x = torch.randn(1, 289, 8, dtype=torch.float64, requires_grad=True)
    y = strips(x, grid=grid)
    assert torch.equal(y[..., :2], x[..., :2])  # the memory
    (grad,) = torch.autograd.grad(y[0, 8 * 17 + 8, 2:4].sum(), x)
    seen = grad[0, :, 2:4].abs().sum(-1).view(17, 17) > 0
    cross = torch.zeros(17, 17, dtype=torch.bool)
    cross[3:14, 8] = cross[8, 3:14] = True
    assert torch.equal(seen, cross)


def test_another_mechanism_in_the_deep_stages() -> None:
    net = models.create("care_micro", mixer="pool").eval()
    assert net(torch.randn(1, 3, 64, 64)).isfinite().all()
