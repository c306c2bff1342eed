import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from attlas.core.errors import BackendUnavailable, BadInput
from attlas.core.mask import Mask
from attlas.ops import flash
from attlas.ops.dispatch import Backend, Op
from attlas.ops.flash import flash_attention, merge, tiles, visits
from attlas.ops.flops import flop_counter
from attlas.ops.softmax import softmax_attention

DOUBLE = torch.float64


def qkv(queries=13, keys=17, heads=6, groups=2, size=4, value=5, batch=2, dtype=DOUBLE):
    shapes = (batch, heads, queries, size), (batch, groups, keys, size), (batch, groups, keys, value)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def keep(keys=17):
    real = torch.rand(2, keys) > 0.3
    real[0, :5] = False
    return real


def masks():
    top_left = torch.ones(13, 17).tril().bool()
    return {
        "none": Mask(),
        "causal": Mask.causal_(),
        "causal from the top left": Mask.pairs_(top_left),
        "padding": Mask.padding(keep()),
        "causal, padding": Mask.causal_() & Mask.padding(keep()),
        "window": Mask.causal_() & Mask.window(3),
        "prefix": Mask.causal_() | Mask.prefix(6),
        "documents": Mask.document(torch.randint(0, 3, (2, 17))),
        "pairs of each head": Mask.pairs_(torch.rand(2, 6, 13, 17) > 0.5),
        "pairs, causal, padding": Mask.pairs_(torch.rand(2, 13, 17) > 0.5) & Mask.causal_() & Mask.padding(keep()),
        "bias of each head": Mask.biased(torch.randn(6, 13, 17, dtype=DOUBLE)) & Mask.causal_(),
        "bias of all heads": Mask.biased(torch.randn(2, 1, 13, 17, dtype=DOUBLE)) & Mask.padding(keep()),
    }


def relative(x, y):
    return ((x - y).abs().max() / y.abs().max().clamp(min=1)).item()


def with_gradients(o, inputs):
    weights = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o).sin()
    return [o, *torch.autograd.grad((o * weights).sum(), inputs)]


@pytest.mark.parametrize("tile", [(4, 5), (5, 4), (1, 17), (128, 128)], ids=str)
@pytest.mark.parametrize("name", masks())
def test_output_and_gradients_are_those_of_naive_attention(name, tile):
    mask, inputs = masks()[name], qkv()
    o, lse = flash_attention(*inputs, mask, tile=tile)
    naive = softmax_attention(*inputs, mask, backend="oracle")
    for mine, exact in zip(with_gradients(o, inputs), with_gradients(naive, inputs), strict=True):
        assert relative(mine, exact) < 1e-10
    o2, lse2 = flash_attention(*inputs, mask, backend="oracle")
    assert relative(o, o2) < 1e-10
    assert torch.equal(lse.isinf(), lse2.isinf())
    assert relative(lse.nan_to_num(neginf=0), lse2.nan_to_num(neginf=0)) < 1e-10


@pytest.mark.parametrize(("queries", "keys"), [(17, 13), (1, 9), (9, 1), (0, 4), (4, 0)])
def test_more_queries_than_keys_and_nothing_at_all(queries, keys):
    inputs = qkv(queries, keys)
    for mask in (Mask(), Mask.causal_()):
        o, _ = flash_attention(*inputs, mask, tile=(4, 3))
        naive = softmax_attention(*inputs, mask, backend="oracle")
        for mine, exact in zip(with_gradients(o, inputs), with_gradients(naive, inputs), strict=True):
            torch.testing.assert_close(mine, exact, rtol=0, atol=1e-10)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 24), st.integers(1, 24), st.booleans())
@settings(max_examples=40, deadline=None)
def test_tiles_change_nothing(queries, keys, height, width, causal):
    inputs = qkv(queries, keys, batch=1)
    mask = Mask(causal=causal)
    o, lse = flash_attention(*inputs, mask, tile=(height, width))
    whole, whole_lse = flash_attention(*inputs, mask)
    for mine, exact in zip(with_gradients(o, inputs), with_gradients(whole, inputs), strict=True):
        assert relative(mine, exact) < 1e-12
    torch.testing.assert_close(lse, whole_lse)


def test_float32_is_within_1e_5_and_half_precision_sums_in_float32():
    inputs = qkv(70, 90)
    exact = with_gradients(softmax_attention(*inputs, Mask.causal_(), backend="oracle"), inputs)
    single = [x.detach().float().requires_grad_() for x in inputs]
    o, lse = flash_attention(*single, Mask.causal_(), tile=(16, 16))
    assert max(relative(x, y) for x, y in zip(with_gradients(o, single), exact, strict=True)) < 1e-5

    for dtype in (torch.bfloat16, torch.float16):
        half = [x.detach().to(dtype).requires_grad_() for x in inputs]
        o, lse = flash_attention(*half, Mask.causal_(), tile=(16, 16))
        assert (o.dtype, lse.dtype) == (dtype, torch.float32)
        # Against the same rounded inputs in float64: what is left is the rounding of the result itself.
        rounded = [x.detach().double() for x in half]
        assert relative(o, softmax_attention(*rounded, Mask.causal_(), backend="oracle")) < torch.finfo(dtype).eps
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(flash_attention(*half, Mask.causal_(), tile=(16, 16))[0], o)


def test_gradcheck_through_output_lse_and_bias():
    q, k, v = qkv(5, 6, 2, 1, 3, 2, batch=1)
    bias = torch.randn(1, 2, 5, 6, dtype=DOUBLE, requires_grad=True)
    real = torch.tensor([[False, True, True, False, True, True]])

    def function(q, k, v, bias):
        o, lse = flash_attention(q, k, v, Mask.causal_() & Mask.padding(real) & Mask.biased(bias), tile=(2, 4))
        return o, lse.where(lse > -torch.inf, 0)

    assert torch.autograd.gradcheck(function, (q, k, v, bias))


def test_a_bias_shared_by_sequences_and_heads_gathers_their_gradients():
    inputs = qkv()
    bias = torch.randn(1, 1, 13, 17, dtype=DOUBLE, requires_grad=True)
    mask = Mask.causal_() & Mask.biased(bias)
    o, _ = flash_attention(*inputs, mask, tile=(4, 5))
    naive = softmax_attention(*inputs, mask, backend="oracle")
    assert relative(with_gradients(o, [bias])[1], with_gradients(naive, [bias])[1]) < 1e-10


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_scores_neither_overflow_nor_vanish(offset):
    q, k, v = (x.detach().float() for x in qkv())
    shifted = Mask.biased(torch.full((13, 17), offset))
    o, lse = flash_attention(q, k, v, shifted, tile=(4, 5))
    exact, exact_lse = flash_attention(q.double(), k.double(), v.double(), backend="oracle")
    assert relative(o, exact) < 1e-2  # one step of float32 at 1e4 is 1e-3
    assert relative(lse, exact_lse + offset) < 1e-6
    mixed = torch.where(torch.rand(13, 17) > 0.5, 1e4, -1e4)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o, lse = flash_attention(*inputs, Mask.biased(mixed), tile=(4, 5))
    assert all(x.isfinite().all() for x in [lse, *with_gradients(o, inputs)])


def test_a_query_that_sees_nothing_gives_0_and_minus_infinity_with_finite_gradients():
    inputs = qkv()
    seen = torch.rand(13, 17) > 0.4
    seen[[0, 6]] = False
    hidden = torch.zeros(13, 17, dtype=DOUBLE).masked_fill(~seen, -torch.inf)
    for mask in (Mask.pairs_(seen), Mask.biased(hidden)):
        o, lse = flash_attention(*inputs, mask, tile=(4, 5))
        assert (o[:, :, [0, 6]] == 0).all()
        assert (lse[:, :, [0, 6]] == -torch.inf).all()
        assert lse.isinf().sum() == 2 * 2 * 6
        gradients = torch.autograd.grad(o.sum() + lse.sum(), inputs)
        assert all(x.isfinite().all() for x in gradients)
        assert (gradients[0][:, :, [0, 6]] == 0).all()


def test_what_padding_holds_is_never_read():
    q, k, v = qkv()
    real = keep()
    mask = Mask.causal_() & Mask.padding(real)
    k2, v2 = (x.detach().masked_fill(~real[:, None, :, None], torch.nan).requires_grad_() for x in (k, v))
    clean = with_gradients(flash_attention(q, k, v, mask, tile=(4, 5))[0], (q, k, v))
    dirty = with_gradients(flash_attention(q, k2, v2, mask, tile=(4, 5))[0], (q, k2, v2))
    assert all(torch.equal(x, y) for x, y in zip(clean, dirty, strict=True))


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_only_inputs_output_and_lse_are_saved():
    inputs, saved = qkv(64, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        o, lse = flash_attention(*inputs, Mask.causal_(), tile=(8, 8))
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in (*inputs, o, lse)}


def test_memory_grows_linearly():
    def largest(tokens, attend):
        inputs = qkv(tokens, tokens, 2, 1, batch=1)
        with Largest() as mode:
            with_gradients(attend(*inputs, Mask.causal_()), inputs)
        return mode.numel

    def tiled(*args):
        return flash_attention(*args, tile=(8, 8))[0]

    assert largest(512, tiled) == 2 * largest(256, tiled) == 2 * 512 * 5  # the output itself
    assert largest(512, lambda *args: softmax_attention(*args, backend="oracle")) >= 2 * 512**2


def test_merged_halves_of_the_keys_are_attention_over_all():
    q, k, v = inputs = qkv(keys=18)
    o1, lse1 = flash_attention(q, k[:, :, :9], v[:, :, :9])
    o2, lse2 = flash_attention(q, k[:, :, 9:], v[:, :, 9:])
    o, lse = merge(o1, lse1, o2, lse2)
    whole, whole_lse = flash_attention(*inputs)
    torch.testing.assert_close(lse, whole_lse, rtol=0, atol=1e-12)
    for mine, exact in zip(with_gradients(o, inputs), with_gradients(whole, inputs), strict=True):
        assert relative(mine, exact) < 1e-12


def test_merging_is_associative_and_commutative_and_nothing_is_its_identity():
    parts = [(torch.randn(2, 3, 4, 5), 10 * torch.randn(2, 3, 4)) for _ in range(3)]
    parts[1][1][0, 0] = -torch.inf
    parts[1][0][0, 0] = 0
    first, second, third = parts
    left, right = merge(*merge(*first, *second), *third), merge(*first, *merge(*second, *third))
    swapped = merge(*second, *first)
    for x, y in zip((*left, *merge(*first, *second)), (*right, *swapped), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    nothing = torch.zeros(2, 3, 4, 5, requires_grad=True), torch.full((2, 3, 4), -torch.inf, requires_grad=True)
    for merged in (merge(*first, *nothing), merge(*nothing, *first)):
        assert all(torch.equal(x, y) for x, y in zip(merged, first, strict=True))
    o, lse = merge(*nothing, *nothing)
    assert (o == 0).all()
    assert (lse == -torch.inf).all()
    gradients = torch.autograd.grad(o.sum() + lse.sum(), nothing)
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_causal_visits_are_the_triangular_number_and_all_that_is_computed(blocks):
    tokens = 8 * blocks
    assert visits(tokens, tokens, (8, 8)) == blocks**2
    assert visits(tokens, tokens, (8, 8), causal=True) == blocks * (blocks + 1) // 2
    q, k, v = (x.detach() for x in qkv(tokens, tokens, 2, 1, size=4, value=5, batch=3))
    with flop_counter() as counter:
        flash_attention(q, k, v, Mask.causal_(), tile=(8, 8))
    per_tile = 2 * 8 * 8 * (4 + 5)
    assert counter.get_total_flops() == 3 * 2 * per_tile * blocks * (blocks + 1) // 2


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_causal_tiles_cover_the_visible_pairs_and_none_is_wholly_hidden(queries, keys, height, width):
    covered = torch.zeros(queries, keys, dtype=torch.bool)
    seen = Mask.causal_().pairs(queries, keys)[0, 0]
    for rows, columns in tiles(queries, keys, (height, width), causal=True):
        for column in columns:
            assert seen[rows, column].any()
            covered[rows, column] = True
    assert covered[seen].all()


def test_it_is_a_backend_of_softmax_attention():
    op = Op("softmax_attention", Backend("flash", flash.run, flash.refuses), softmax_attention.backends[-1])
    inputs = qkv()
    assert (
        relative(op(*inputs, Mask.causal_(), scale=0.3), softmax_attention(*inputs, Mask.causal_(), scale=0.3)) < 1e-12
    )
    with pytest.raises(BackendUnavailable, match="drops no weights"):
        op(*inputs, dropout=0.1, backend="flash")


def test_it_compiles_and_exports_whole():
    class Module(torch.nn.Module):
        def forward(self, q, k, v, real):
            return flash_attention(q, k, v, Mask.causal_() & Mask.window(9) & Mask.padding(real), tile=(8, 8))

    inputs, real = qkv(), keep()
    eager = Module()(*inputs, real)
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")(*inputs, real)
    exported = torch.export.export(Module(), (*(x.detach() for x in inputs), real)).module()(*inputs, real)
    for mine in (compiled, exported):
        assert all(torch.equal(x, y) for x, y in zip(mine, eager, strict=True))
    for x, y in zip(with_gradients(compiled[0], inputs), with_gradients(eager[0], inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_bad_input_is_named():
    q, k, v = qkv()
    with pytest.raises(BadInput, match=r"at least one query and one key, got \(0, 8\)"):
        flash_attention(q, k, v, tile=(0, 8))
    with pytest.raises(BadInput, match=r"H a multiple of G.*\(2, 5, 13, 4\)"):
        flash_attention(q[:, :5], k, v)
    with pytest.raises(BadInput, match="one number per pair"):
        flash_attention(q, k, v, Mask.biased(torch.zeros(1, 17)))
    with pytest.raises(BadInput, match="covers 16 keys, the call has 17"):
        flash_attention(q, k, v, Mask.padding(keep(16)))
