"""The shell with a convolution beside the attention."""

import pytest
import torch

import attlas
from attlas.blocks.local_enhancement import LocallyEnhanced
from attlas.core.errors import BadInput, Unsupported
from attlas.core.grid import Grid
from attlas.ops.flops import flop_counter

GRID = Grid((3, 4))


def make(grid: Grid = GRID, name: str = "softmax", **settings: object) -> LocallyEnhanced:
    torch.manual_seed(0)
    return LocallyEnhanced(attlas.make_attend(name, 2, 8, grid=grid), **settings).double()  # type: ignore[arg-type]


def tokens(grid: Grid = GRID) -> torch.Tensor:
    return torch.randn(2, grid.tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, 8)).transpose(1, 2)


@pytest.mark.parametrize("of", ["values", "tokens", "projection"])
def test_what_stands_beside_the_attention(of: str) -> None:
    layer, x = make(of=of, kernel=3), tokens()
    q, k, v = (heads(proj(x)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    o = ((q @ k.mT) / 8**0.5).softmax(-1) @ v
    u = {"values": layer.v_proj, "tokens": lambda x: x, "projection": layer.local_proj}[of](x)
    beside = layer.conv(u.mT.unflatten(2, GRID.shape)).flatten(2).mT
    torch.testing.assert_close(layer(x), layer.out_proj(o.transpose(1, 2).flatten(2) + beside))


def test_norm_and_gate_act_on_the_sum() -> None:
    layer, x = make(output_norm="layer", gate="silu"), tokens()
    plain = make()
    plain.load_state_dict({key: layer.state_dict()[key] for key in plain.state_dict()})
    plain.out_proj = torch.nn.Identity()
    gate = torch.nn.functional.silu(layer.gate_proj(x))
    torch.testing.assert_close(layer(x), layer.out_proj(layer.output_norm(plain(x)) * gate))


def test_turned_scores_depend_on_differences_of_places() -> None:
    layer = make(turned=True)
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.bias.zero_()
    q, k = torch.randn(2, 8, dtype=torch.float64)
    from attlas.ops.rotary import rotate_axes

    places = GRID.places()
    turned_q, turned_k = (rotate_axes(t.expand(1, 1, 12, 8), places)[0, 0] for t in (q, k))
    scores = (turned_q @ turned_k.T).unflatten(0, GRID.shape).unflatten(2, GRID.shape)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[1, 1, 2, 3])
    # A picture of equal tokens has equal values: turning changes no average of them.
    x = tokens()[:, :1].expand(-1, 12, -1)
    torch.testing.assert_close(layer(x), layer.out_proj(layer.v_proj(x)))
    plain = make()
    plain.load_state_dict(layer.state_dict())
    assert not torch.allclose(plain(tokens()), layer(tokens()))


@pytest.mark.parametrize("of", ["values", "tokens", "projection"])
def test_prefix_tokens_and_padding(of: str) -> None:
    grid = Grid((3, 4), prefix=1)
    layer, x = make(grid, of=of, turned=True), tokens(grid)
    keep = torch.rand(2, grid.tokens, generator=torch.Generator().manual_seed(2)) > 0.3
    keep[:, 1] = True
    y = layer(x, mask=keep)
    noisy = x.masked_fill(~keep.unsqueeze(-1), torch.nan)
    torch.testing.assert_close(layer(noisy, mask=keep)[keep], y[keep])


@pytest.mark.parametrize("of", ["values", "projection"])
def test_count(of: str) -> None:
    layer, x = make(of=of).float(), tokens().float()
    with flop_counter() as counter, torch.no_grad():
        layer(x)
    assert counter.get_total_flops() == layer.cost(2, 12).executed
    assert layer.cost(2, 12).flops < layer.cost(2, 12).executed


def test_the_oracle_backend_serves_it() -> None:
    attend = attlas.make_attend("softmax", 2, 8, grid=GRID, backend="oracle")
    slow, fast = LocallyEnhanced(attend).double(), make()
    slow.load_state_dict(fast.state_dict())
    torch.testing.assert_close(slow(tokens()), fast(tokens()))


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="of='keys'"):
        make(of="keys")
    with pytest.raises(BadInput, match="grid="):
        LocallyEnhanced(attlas.make_attend("softmax", 2, 8))
    with pytest.raises(BadInput, match="its kernel is odd, got 4"):
        make(kernel=4)
    with pytest.raises(BadInput, match="no kv_heads"):
        LocallyEnhanced(attlas.make_attend("softmax", 2, 8, kv_heads=1, grid=GRID))
    with pytest.raises(Unsupported, match="second sequence"):
        make()(tokens(), tokens())


def test_a_bias_of_positions_is_added_to_the_scores() -> None:
    position = attlas.positions.RelativeBias(2, GRID.shape)
    with torch.no_grad():
        position.table.normal_()
    layer, x = make(position=position), tokens()
    q, k, v = (heads(proj(x)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    o = ((q @ k.mT) / 8**0.5 + position.bias(GRID)).softmax(-1) @ v
    beside = layer.conv(layer.v_proj(x).mT.unflatten(2, GRID.shape)).flatten(2).mT
    torch.testing.assert_close(layer(x), layer.out_proj(o.transpose(1, 2).flatten(2) + beside))
