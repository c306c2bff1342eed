"""What only focal modulation holds: nested surroundings, their gates, and a mean behind them."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput

DIM = 6


def build(**settings):
    torch.manual_seed(0)
    layer = attlas.mixer("focalnet", DIM, **{"grid": (11, 12)} | settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer.eval()


def tokens(*grid):
    torch.manual_seed(1)
    return torch.randn(2, *grid, DIM, dtype=torch.float64).flatten(1, -2)


def close_gates(layer, *levels):
    """Set gates to 0, whatever the token; the last one is the global one."""
    rows = [2 * DIM + level for level in levels]
    with torch.no_grad():
        layer.in_proj.weight[rows] = 0
        layer.in_proj.bias[rows] = 0


def support(layer, x):
    moved = torch.autograd.functional.jacobian(lambda t: layer(t).sum(-1), x[:1])
    return moved[0, :, 0].abs().sum(-1) > 0


@pytest.mark.parametrize(("settings", "reach"), [({}, 3), ({"levels": 1}, 1), ({"window": 1, "levels": 3}, 3)])
def test_levels_see_a_square_of_all_their_kernels(settings, reach):
    layer = build(**settings)
    close_gates(layer, layer.in_proj.out_features - 2 * DIM - 1)
    place = attlas.Grid((11, 12)).places()
    near = ((place[:, None] - place).abs() <= reach).all(-1)
    assert torch.equal(support(layer, tokens(11, 12)), near)


def test_the_mean_sees_everything():
    assert support(build(grid=(9, 10)), tokens(9, 10)).all()


def test_the_global_gate_alone_modulates_all_positions_alike():
    layer, x = build(levels=2), tokens(11, 12)
    close_gates(layer, 0, 1)
    projected = layer.in_proj(x)
    q, z, gate = projected[..., :DIM], projected[..., DIM : 2 * DIM], projected[..., -1:]
    z = z.mT.unflatten(2, (11, 12))
    for kernel, weight in zip((3, 5), layer.convs, strict=True):
        z = F.gelu(F.conv2d(z, weight, padding=kernel // 2, groups=DIM))
    context = F.gelu(z.mean((2, 3)))[:, None]
    expected = layer.out_proj(q * layer.context_proj(gate * context))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_a_picture_in_the_middle_of_nothing_may_be_moved():
    layer = build()
    with torch.no_grad():
        layer.in_proj.bias.zero_()
        layer.context_proj.bias.zero_()
    x = torch.zeros(1, 11, 12, DIM, dtype=torch.float64)
    x[:, 4:6, 4:7] = torch.randn(1, 2, 3, DIM, dtype=torch.float64)
    moved = x.roll((1, 2), (1, 2))
    first, second = (layer(t.flatten(1, 2)).unflatten(1, (11, 12)) for t in (x, moved))
    torch.testing.assert_close(second, first.roll((1, 2), (1, 2)), rtol=0, atol=1e-12)


def test_normalize_divides_by_the_number_of_levels():
    plain, normalized = build(levels=3), build(levels=3, normalize=True)
    normalized.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain.context_proj.weight /= 4
    torch.testing.assert_close(normalized(tokens(11, 12)), plain(tokens(11, 12)), rtol=0, atol=1e-12)


def test_gates_are_neither_normalised_nor_squashed():
    """Twice all gates and no bias behind them: twice the output."""
    layer, x = build(), tokens(11, 12)
    with torch.no_grad():
        layer.context_proj.bias.zero_()
        layer.out_proj.bias.zero_()
        before = layer(x)
        layer.in_proj.weight[2 * DIM :] *= 2
        layer.in_proj.bias[2 * DIM :] *= 2
    torch.testing.assert_close(layer(x), 2 * before, rtol=1e-12, atol=1e-12)


def test_a_padded_picture_gives_what_it_gives_alone():
    layer, grid = build(), (5, 6)
    x = tokens(*grid).unflatten(1, grid)
    padded = F.pad(x, (0, 0, 2, 1, 0, 3), value=torch.nan)
    keep = F.pad(torch.ones(2, *grid, dtype=torch.bool), (2, 1, 0, 3))
    got = layer(padded.flatten(1, 2), mask=keep.flatten(1), grid=keep.shape[1:])
    expected = layer(x.flatten(1, 2), grid=grid)
    torch.testing.assert_close(got[keep.flatten(1)].view_as(expected), expected, rtol=0, atol=1e-12)


def test_the_state_does_not_grow():
    layer = attlas.mixer("focalnet", DIM, causal=True).double()
    x, state = tokens(40), layer.initial_state(2)
    sizes = set()
    with torch.no_grad():
        for piece in x.split(7, 1):
            _, state = layer.extend(piece, state)
            sizes.add(attlas.state_bytes(state))
    assert sizes == {8 * 2 * ((2 + 4 + 1) * DIM + 1)}
    assert sum(t.untyped_storage().nbytes() for t in (*state.tails, state.total, state.tokens)) == min(sizes)


def test_a_long_stream_counts_its_tokens():
    """Float32 has no 2^24 + 1."""
    layer = attlas.mixer("focalnet", DIM, causal=True)
    state = layer.initial_state(1)
    state = state._replace(tokens=state.tokens + 2**24)
    with torch.no_grad():
        _, state = layer.extend(torch.randn(1, 3, DIM), state)
    assert state.tokens.item() == 2**24 + 3


@pytest.mark.parametrize("backend", ["torch", "oracle"])
@pytest.mark.parametrize("grid", [(2, 3), attlas.Grid((5,), prefix=1)])
def test_a_causal_layer_refuses_at_the_call_what_a_stream_does_not_know(backend, grid):
    layer = attlas.mixer("focalnet", DIM, causal=True, backend=backend).double()
    with pytest.raises(BadInput, match="runs along one axis without prefix tokens"):
        layer(tokens(6), grid=grid)
    with pytest.raises(BadInput, match="runs along one axis without prefix tokens"):
        layer.cost(1, 6, grid=grid)


def test_the_norm_stands_behind_the_product_with_the_query():
    layer, x = build(levels=1, norm=True), tokens(11, 12)
    projected = layer.in_proj(x)
    q, z, gates = projected.split((DIM, DIM, 2), -1)
    z = F.gelu(F.conv2d(z.mT.unflatten(2, (11, 12)), layer.convs[0], padding=1, groups=DIM)).flatten(2).mT
    modulator = gates[..., :1] * z + gates[..., 1:] * F.gelu(z.mean(1, keepdim=True))
    y = q * layer.context_proj(modulator)
    centred = y - y.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.norm.weight + layer.norm.bias
    torch.testing.assert_close(layer(x), layer.out_proj(normal), rtol=0, atol=1e-12)


def test_time_is_linear_in_the_tokens():
    layer = build()
    small, large = (layer.cost(1, side**2, grid=(side, side)).executed for side in (28, 56))
    assert large == 4 * small


def linear(inputs, outputs):
    return inputs * outputs + outputs


@pytest.mark.parametrize(
    ("dim", "levels", "depths", "count"),
    [
        (96, 2, (2, 2, 6, 2), 28_427_116),
        (96, 3, (2, 2, 6, 2), 28_647_928),
        (96, 2, (2, 2, 18, 2), 49_891_216),
        (128, 3, (2, 2, 18, 2), 88_749_768),
    ],
)
def test_parameters_of_the_published_models(dim, levels, depths, count):
    """All of the model but the mixers is written out: patches, norms, MLPs and the head."""
    total = linear(3 * 4**2, dim) + 2 * dim
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        if stage:
            total += linear(2 * width, width) + 2 * width
        mixer = attlas.mixer("focalnet", width, levels=levels, grid=(7, 7))
        own = sum(p.numel() for p in mixer.parameters())
        total += depth * (4 * width + own + linear(width, 4 * width) + linear(4 * width, width))
    assert total + 2 * width + linear(width, 1000) == count


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"levels": 0}, "levels is at least 1"),
        ({"step": 1}, "step even"),
        ({"window": 4}, "window counts taps .* take 3 or 5, got 4"),
        ({"grid": None}, "pass grid=.* when building it"),
        ({"causal": True}, "runs along one axis without prefix tokens, got a grid 11x12"),
        ({"causal": True, "grid": attlas.Grid((6,), prefix=1)}, "without prefix tokens, got a grid 6 after 1"),
        ({"dropout": -0.1}, "dropout is a share"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, words):
    with pytest.raises(BadInput, match=words):
        build(**settings)


def test_a_grid_of_other_axes_is_refused():
    with pytest.raises(BadInput, match="built for 2 axes"):
        build()(tokens(8), grid=(8,))
