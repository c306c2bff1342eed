"""What only ConViT holds: where the class token joins, what the layers before it are, and what may stand there."""

import pytest
import torch

from attlas import Grid, models
from attlas.core.errors import BadInput


def built(**settings):
    torch.manual_seed(0)
    return models.create("convit_micro", num_classes=5, **settings).double().eval()


def image(size=64):
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_class_token_joins_after_the_local_layers():
    net, seen = built(), []
    for stage in net.stages:
        for block in stage.blocks:
            block.register_forward_hook(lambda block, args, out: seen.append((block.mixer.spec.name, args[1])))
    net(image())
    assert seen == [("convit", Grid((8, 8)))] * 3 + [("softmax", Grid((8, 8), prefix=1))]
    assert net.places.weight.shape == (64, 64)


def test_maps_before_and_after_the_class_token_have_the_same_places():
    net = models.create("convit_tiny", num_classes=0)
    assert net.depths == [3, 3, 3, 1, 2]
    assert [stage.blocks[0].mixer.spec.name for stage in net.stages] == ["convit"] * 4 + ["softmax"]
    maps = models.create("convit_micro", features_only=True)(torch.randn(1, 3, 64, 64))
    assert [tuple(each.shape) for each in maps] == [(1, 64, 8, 8)] * 4


def test_the_class_token_has_no_part_in_local_features():
    net = built()
    before = net.feature_maps(image())
    with torch.no_grad():
        net.prefix.normal_()
    after = net.feature_maps(image())
    assert all(torch.equal(x, y) for x, y in zip(before[:3], after[:3], strict=True))
    assert not torch.allclose(before[3], after[3])


def test_local_layers_start_as_convolutions_that_look_near():
    near, far = (built(mixer_settings={"strength": strength}).stages[0].blocks[0].mixer for strength in (4.0, 0.1))
    x = torch.randn(1, 64, 64, dtype=torch.float64)
    assert (near.locality(x, (8, 8)) < far.locality(x, (8, 8))).all()
    assert torch.equal(near.v_proj.weight, torch.eye(64, dtype=torch.float64))


def test_closed_gates_leave_softmax_attention():
    net = built()
    plain = built(mixer="softmax", mixer_settings={"bias": False})
    state = {}
    for key, value in net.state_dict().items():
        if "qk_proj" in key:
            state[key.replace("qk_proj", "q_proj")], state[key.replace("qk_proj", "k_proj")] = value.chunk(2)
        elif "position_proj" not in key and "gate" not in key:
            state[key] = value
    plain.load_state_dict(state)
    assert not torch.allclose(net(image()), plain(image()))
    with torch.no_grad():
        for stage in net.stages[:3]:
            stage.blocks[0].mixer.gate.fill_(-60)
    torch.testing.assert_close(net(image()), plain(image()), rtol=1e-12, atol=1e-12)


def test_a_network_with_any_mechanism_before_the_class_token():
    net = built(mixer="neighborhood", mixer_settings={"window": 3})
    assert net(image()).shape == (2, 5)
    assert [stage.blocks[0].mixer.spec.name for stage in net.stages] == ["neighborhood"] * 3 + ["softmax"]


def test_pictures_need_not_be_square():
    assert built(img_size=(32, 64))(torch.randn(1, 3, 32, 64, dtype=torch.float64)).isfinite().all()


def test_bad_input():
    with pytest.raises(BadInput, match="before one of the 4 blocks"):
        models.create("convit_micro", local=4)
    with pytest.raises(BadInput, match="square number"):
        models.create("convit_micro", heads=2, mixer_settings={"local_init": True})
