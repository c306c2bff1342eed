"""Titans: a memory that learns at test time, alone, as a context, as a gate and as a layer."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput
from attlas.ops import neural_memory as module
from attlas.ops.linear_scan import linear_scan
from attlas.ops.neural_memory import MemoryState, ask, neural_memory
from attlas.ops.persistent_window import window_attention

HYBRIDS = {"titans_mac": {"segment": 5}, "titans_mag": {"window": 6, "chunk": 5}, "titans_mal": {"window": 6}}


def fresh(*widths, batch=2, heads=2, scale=0.5):
    """A random memory with momentum zero."""
    weights = tuple(torch.randn(batch, heads, i, o, dtype=torch.float64) * scale for i, o in itertools.pairwise(widths))
    return MemoryState(weights, weights, tuple(torch.zeros_like(w) for w in weights), 0)


def random_tokens(tokens, size=6, batch=2, heads=2):
    q, k, v = (torch.randn(batch, heads, tokens, size, dtype=torch.float64) for _ in range(3))
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


def random_rates(tokens, batch=2, heads=2):
    return [torch.rand(batch, heads, tokens, dtype=torch.float64) * most for most in (0.3, 0.9, 0.4)]


def test_a_matrix_without_momentum_and_forgetting_is_the_delta_rule():
    q, k, v = random_tokens(20)
    step = torch.rand(2, 2, 20, dtype=torch.float64) / 2
    o, state = neural_memory(q, k, v, step, 0 * step, 0 * step, fresh(6, 6, scale=0.0), chunk=1)
    delta = torch.zeros(2, 2, 6, 6, dtype=torch.float64)
    for t in range(20):
        error = v[:, :, t] - torch.einsum("bhi,bhio->bho", k[:, :, t], delta)
        delta = delta + 2 * step[:, :, t, None, None] * k[:, :, t, :, None] * error[:, :, None]
        assert torch.allclose(o[:, :, t], torch.einsum("bhi,bhio->bho", q[:, :, t], delta), atol=1e-12)
    assert torch.allclose(state.weights[0], delta, atol=1e-12)


def test_a_chunk_as_long_as_the_sequence_from_an_empty_matrix_is_linear_attention():
    q, k, v = random_tokens(12)
    none = torch.zeros(2, 2, 12, dtype=torch.float64)
    o, _ = neural_memory(q, k, v, none + 0.5, none, none, fresh(6, 6, scale=0.0), chunk=12)
    assert torch.allclose(o, (q @ k.mT).tril() @ v, atol=1e-12)


@pytest.mark.parametrize("widths", [(6, 6), (6, 24, 6), (6, 8, 10, 6)], ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_chunks_equal_the_recurrence_with_autograds_gradients(widths, chunk):
    tokens, rates = random_tokens(15), random_rates(15)
    for rate in rates:
        rate[:, :, 3], rate[:, :, 7] = 0.0, 1.0  # the exact ends: nothing is divided
    rates[0][:, :, 7] = 0.1
    start = fresh(*widths)
    (o, state), (expected, expected_state) = (
        neural_memory(*tokens, *rates, start, chunk=chunk, backend=b) for b in ("torch", "oracle")
    )
    assert torch.allclose(o, expected, rtol=1e-10, atol=1e-12)
    assert state.filled == expected_state.filled == 15 % chunk
    for got, wanted in zip(state[:3], expected_state[:3], strict=True):
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(got, wanted, strict=True))


def test_weights_of_all_tokens_are_two_scans():
    q, k, v = random_tokens(10)
    step, momentum, forget = random_rates(10)
    start = fresh(6, 6)
    (anchor,) = start.anchor
    u = -step[..., None, None] * 2 * k.unsqueeze(-1) * (k @ anchor - v).unsqueeze(-2)
    s = linear_scan(momentum[..., None, None], u, dim=2)
    m = linear_scan(1 - forget[..., None, None], s, anchor, dim=2)
    o, state = neural_memory(q, k, v, step, momentum, forget, start, chunk=10)
    assert torch.allclose(o, (q.unsqueeze(-2) @ m).squeeze(-2), atol=1e-12)
    assert torch.allclose(state.weights[0], m[:, :, -1], atol=1e-12)
    assert torch.allclose(state.momentum[0], s[:, :, -1], atol=1e-12)


def test_the_outer_loss_differentiates_through_the_inner_gradients():
    """Twice: the gradient of the closed form is itself differentiable."""
    q, k, v = (x[:1, :1] for x in random_tokens(3, size=2))
    start = fresh(2, 3, 2, batch=1, heads=1)
    rates = [x[:1, :1] for x in random_rates(3)]
    leaves = [x.requires_grad_() for x in (k, *start.anchor, *rates)]

    def run(k, first, second, *rates):
        state = MemoryState((first, second), (first, second), start.momentum, 0)
        return neural_memory(q, k, v, *rates, state, chunk=2)[0]

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_any_pieces_leave_the_same_memory():
    tokens, rates, start = random_tokens(23), random_rates(23), fresh(6, 12, 6)
    keep = torch.rand(2, 23) > 0.3
    o, end = neural_memory(*tokens, *rates, start, keep, chunk=7)
    state, parts, first = start, [], 0
    for size in (1, 9, 3, 1, 9):
        part = slice(first, first + size)
        piece = [x[:, :, part] for x in (*tokens, *rates)]
        y, state = neural_memory(*piece, state, keep[:, part], chunk=7)
        parts.append(y)
        first += size
    assert torch.allclose(torch.cat(parts, 2), o, atol=1e-12)
    for got, wanted in zip(state[:3], end[:3], strict=True):
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, wanted, strict=True))


def test_padding_is_neither_learned_nor_does_it_forget():
    q, k, v = random_tokens(9)
    rates, start = random_rates(9), fresh(6, 6)
    keep = torch.arange(9).expand(2, -1) < 5
    _, padded = neural_memory(q, k, v.masked_fill(~keep[:, None, :, None], torch.nan), *rates, start, keep, chunk=16)
    _, short = neural_memory(*(x[:, :, :5] for x in (q, k, v, *rates)), start, chunk=16)
    for got, wanted in zip(padded[1:3], short[1:3], strict=True):
        assert torch.allclose(got[0], wanted[0], atol=1e-12)


def stored_error(state, k, v):
    return (ask(k, state.weights) - v).square().mean().item()


def test_a_memory_of_two_layers_recalls_better_than_a_hebbian_matrix():
    k = F.normalize(torch.randn(1, 1, 32, 64), dim=-1)
    v = torch.randn(1, 1, 32, 64)
    one = torch.ones(1, 1, 32)
    learn = {"momentum_BHN": 0 * one, "forget_BHN": 0 * one}
    deep = (torch.randn(1, 1, 64, 256), torch.zeros(1, 1, 256, 64))
    start = MemoryState(deep, deep, tuple(torch.zeros_like(w) for w in deep), 0)
    _, state = neural_memory(k, k, v, one * 0.004, state=start, chunk=1, **learn)
    hebb = k.mT @ v
    assert stored_error(state, k, v) < 0.8 * (k @ hebb - v).square().mean()


def test_momentum_helps_where_pairs_repeat_in_noise():
    """The noisy value of one key, again and again: what repeats adds up, the memory takes it in sooner."""
    k = F.normalize(torch.randn(1, 1, 1, 16), dim=-1).expand(-1, -1, 24, -1)
    clean = torch.randn(1, 1, 1, 16)
    v = clean + torch.randn(1, 1, 24, 16)
    one = torch.ones(1, 1, 24)
    empty = (torch.zeros(1, 1, 16, 16),)
    errors = {}
    for momentum in (0.0, 0.6):
        state = MemoryState(empty, empty, empty, 0)
        _, state = neural_memory(k, k, v, one * 0.02, one * momentum, one * 0, state, chunk=1)
        errors[momentum] = stored_error(state, k[:, :, :1], clean)
    assert errors[0.6] < 0.6 * errors[0.0]


def test_window_attention_equals_its_oracle():
    for queries, keys, window, first in ((11, 11, 4, 2), (5, 9, 4, 0), (3, 3, 8, 1), (9, 20, 1, 3)):
        q = torch.randn(2, 2, queries, 4, dtype=torch.float64)
        k, v = (torch.randn(2, 2, keys, 4, dtype=torch.float64) for _ in range(2))
        firsts = [torch.randn(2, 2, first, 4, dtype=torch.float64) for _ in range(2)]
        keep = torch.rand(2, keys) > 0.3
        keep[:, -1] = True
        got, expected = (window_attention(q, k, v, *firsts, keep, window, backend=b) for b in ("torch", "oracle"))
        assert torch.allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("name", ["titans", *HYBRIDS])
def test_streaming_over_many_chunks_in_odd_pieces_and_a_state_that_does_not_grow(name):
    layer = attlas.mixer(name, 8, 2, causal=True, **HYBRIDS.get(name, {"chunk": 7})).double()
    x = torch.randn(2, 40, 8, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        state, parts, held = layer.initial_state(2, like=x), [], []
        for piece in x.split([1, 4, 5, 10, 13, 2, 5], 1):
            y, state = layer.extend(piece, state)
            parts.append(y)
            held.append(attlas.state_bytes(state))
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)
    # The ends of segments, where the context is empty: 5, 10, 20, 35, 40 tokens.
    assert len({held[i] for i in (1, 2, 3, 5, 6)}) == 1


@pytest.mark.parametrize("name", ["titans", *HYBRIDS])
def test_no_tokens_leave_the_state_as_it_is(name):
    for persistent in (0, 3):
        layer = attlas.mixer(name, 8, 2, causal=True, persistent=persistent, **HYBRIDS.get(name, {"chunk": 3}))
        x = torch.randn(2, 8, 8)
        for start in (0, 3, 5):
            _, state = layer.extend(x[:, :start], layer.initial_state(2))
            empty, after = layer.extend(x[:, :0], state)
            assert empty.shape == (2, 0, 8)
            assert torch.equal(layer.extend(x[:, start:], after)[0], layer.extend(x[:, start:], state)[0])


@pytest.mark.parametrize("name", ["titans", *HYBRIDS])
def test_in_front_of_a_sequence_padding_takes_no_place(name):
    """With chunks of one token; longer ones are counted in positions."""
    single = {"segment": 1} if name == "titans_mac" else {"chunk": 1}
    layer = attlas.mixer(name, 8, 2, causal=True, persistent=3, **single).double()
    with torch.no_grad():
        layer.memory.taps.add_(torch.randn_like(layer.memory.taps))
    x, keep = torch.randn(1, 12, 8, dtype=torch.float64), torch.arange(12).unsqueeze(0) >= 3
    assert torch.allclose(layer(x, mask=keep)[:, 3:], layer(x[:, 3:]), atol=1e-12)
    if "window" not in HYBRIDS.get(name, {}):
        keep = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 1]]).bool()
        assert torch.allclose(layer(x, mask=keep)[keep], layer(x[keep].unsqueeze(0))[0], atol=1e-12)


@pytest.mark.parametrize("name", ["titans_mag", "titans_mal"])
def test_the_window_keeps_none_of_the_tokens_behind_it_alive(name):
    layer = attlas.mixer(name, 8, 2, causal=True, window=3)
    with torch.no_grad():
        _, state = layer.extend(torch.randn(2, 100, 8), layer.initial_state(2))
    for kept in (*state.window, state.memory.tail):
        assert kept.untyped_storage().nbytes() == kept.nbytes


LAPSES = {
    "no SiLU behind the convolution": (module.F, "silu", lambda x: x),
    "another length of q and k": (module, "_unit", lambda x: 0.3 * F.normalize(x, dim=-1)),
    "no norm": (module, "rms_norm", lambda norm, x: x),
    "a sigmoid for the gate": (
        module.NeuralMemory,
        "_finish",
        lambda self, o, x: self.out_proj(
            module.rms_norm(self.norm, o.transpose(1, 2).flatten(2)) * self.gate_proj(x).sigmoid()
        ),
    ),
    "no convolution": (module, "short_convolution", lambda x, taps, tail, keep: (x, tail)),
    "another initial memory": (
        module.NeuralMemory,
        "start",
        lambda self, batch, like, start=module.NeuralMemory.start: start(self, batch, like)._replace(
            memory=fresh(*self.shapes[0], self.shapes[-1][1], batch=batch)
        ),
    ),
}


@pytest.mark.parametrize("lapse", LAPSES)
@pytest.mark.parametrize("name", ["titans", *HYBRIDS])
def test_the_oracle_shares_no_step_with_the_fast_path(name, lapse, monkeypatch):
    layer = attlas.mixer(name, 8, 2, causal=True, **HYBRIDS.get(name, {"chunk": 5})).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    keep = torch.arange(12) != torch.tensor([[4], [12]])
    layer.backend = "oracle"
    expected = layer(x, mask=keep)
    layer.backend = "auto"
    assert torch.allclose(layer(x, mask=keep)[keep], expected[keep], atol=1e-10)
    monkeypatch.setattr(*LAPSES[lapse])
    assert (layer(x, mask=keep) - expected)[keep].abs().max() > 1e-3
    layer.backend = "oracle"
    assert torch.equal(layer(x, mask=keep), expected)


def test_persistent_tokens_are_read_before_the_first_one():
    layer = attlas.mixer("titans", 8, 2, causal=True, chunk=3, persistent=4).double()
    bare = attlas.mixer("titans", 8, 2, causal=True, chunk=3, persistent=0).double()
    bare.load_state_dict({name: w for name, w in layer.state_dict().items() if name != "persistent"})
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    both = torch.cat([layer.persistent.expand(2, -1, -1), x], 1)
    assert torch.allclose(bare(both)[:, 4:], layer(x), atol=1e-12)


def test_memory_as_a_context_segment_by_segment():
    layer = attlas.mixer("titans_mac", 8, 2, causal=True, segment=4, persistent=2).double()
    x = torch.randn(1, 10, 8, dtype=torch.float64)
    memory = layer.memory
    state = memory.start(1, x)
    tail = x.new_zeros(1, 3, 8)
    rows = []
    for s in x.split(4, 1):
        h, tail = memory.recall(s, state, tail)
        ys = []
        for n in range(s.shape[1]):
            seen = torch.cat([layer.persistent, h[:, : n + 1], s[:, : n + 1]], 1)
            q, k, v = (
                proj(t).unflatten(-1, (2, 4)).transpose(1, 2)
                for proj, t in ((layer.q_proj, s[:, n : n + 1]), (layer.k_proj, seen), (layer.v_proj, seen))
            )
            ys.append(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = torch.cat(ys, 1)
        m, state = memory.read(y, state, backend="oracle")
        product = F.silu(layer.gate.y_norm(y)) * F.silu(layer.gate.m_norm(m))
        rows.append(layer.out_proj(product))
    assert torch.allclose(layer(x), torch.cat(rows, 1), atol=1e-10)


def test_the_memory_reaches_behind_the_window_and_the_window_alone_does_not():
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    other = x.clone()
    other[:, 2] = torch.randn(8)
    for name in HYBRIDS:
        layer = attlas.mixer(name, 8, 2, causal=True, **HYBRIDS[name]).double()
        assert (layer(x) - layer(other))[:, -1].abs().max() > 1e-7
    attention = layer.attention
    first = x.new_zeros(1, 0, 8)
    y, y_other = (attention.read(t, first, attention.start(1, t))[0] for t in (x, other))
    assert torch.equal(y[:, 8:], y_other[:, 8:])
    assert not torch.equal(y[:, 7], y_other[:, 7])


def test_a_layer_starts_with_steps_that_do_not_overshoot():
    """A chunk of one token repeated leaves the memory closer to its value, whatever the chunk."""
    for chunk in (1, 16, 64):
        layer = attlas.mixer("titans", 8, 2, causal=True, chunk=chunk, persistent=0)
        with torch.no_grad():
            state = layer.extend(torch.randn(1, 1, 8).expand(-1, 256, -1), layer.initial_state(1))[1]
        assert max(w.abs().max() for w in state.memory.weights) < 10


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_no_step_that_can_be_learned_makes_a_matrix_diverge(chunk):
    """The largest steps, nothing forgotten, and keys that are all alike, the hardest to descend on."""
    layer = attlas.mixer("titans", 8, 2, causal=True, depth=1, chunk=chunk)
    with torch.no_grad():
        layer.memory.rates.weight.zero_()
        layer.memory.rates.bias.copy_(torch.tensor([3.0, -20.0, -20.0]).repeat_interleave(2))
        _, state = layer.extend(3 * torch.randn(1, 1, 8) + torch.randn(1, 1024, 8) / 10, layer.initial_state(1))
    assert max(w.abs().max() for w in state.memory.weights) < 30


@pytest.mark.parametrize("name", ["titans", *HYBRIDS])
def test_what_has_no_meaning_is_refused(name):
    for wrong, match in (
        ({"depth": 0}, "depth must be at least 1"),
        ({"expansion": 0}, "expansion must be at least 1"),
        ({"kernel": 0}, "kernel must be at least 1"),
        ({"persistent": -1}, "persistent counts"),
        ({"max_step": 0.0}, "max_step is the largest step"),
        ({"max_step": float("nan")}, "max_step is the largest step"),
    ):
        with pytest.raises(BadInput, match=match):
            attlas.mixer(name, 8, 2, causal=True, **wrong)
    with pytest.raises(BadInput, match="heads must divide dim"):
        attlas.mixer(name, 8, 3, causal=True)
    other = {"titans": ("chunk", "chunk must"), "titans_mac": ("segment", "a segment holds")}
    setting, match = other.get(name, ("window", "the window holds"))
    with pytest.raises(BadInput, match=match):
        attlas.mixer(name, 8, 2, causal=True, **{setting: 0})
