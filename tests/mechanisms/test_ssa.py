"""Subsampled attention: dense in eval, the gathered form is the masked one, who shares a subset, ensembles."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attlas
from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.mechanisms.softmax.ssa import self_ensemble, subsampling

DOUBLE = {"dtype": torch.float64}


def pair(heads=4, kv_heads=4, causal=False, **settings):
    """The gathered form and the masked one, in training."""
    return [
        attlas.make_attend("ssa", heads, 8, kv_heads=kv_heads, causal=causal, backend=backend, **settings)
        for backend in ("auto", "oracle")
    ]


def drawn(attend, batch, keys, mask=None, queries=None):
    return attend.subsets(batch, queries or keys, keys, mask or Mask(causal=attend.site.causal), torch.device("cpu"))


@pytest.mark.parametrize("causal", [False, True])
def test_eval_and_a_share_of_one_are_dense(causal):
    q, k, v = (torch.randn(2, 4, 13, 8, **DOUBLE) for _ in "qkv")
    expected = attlas.attend(q, k, v, causal=causal)
    attend, _ = pair(causal=causal, share=1.0)
    assert torch.allclose(attend(q, k, v), expected, rtol=0, atol=1e-12)
    attend, _ = pair(causal=causal, share=0.2)
    assert not torch.allclose(attend(q, k, v), expected)
    assert torch.equal(attend.eval()(q, k, v), expected)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 4, 10, 40])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(13, 13), (5, 13)])
def test_gathered_equals_masked(kv_heads, window, causal, shape):
    queries, keys = shape
    gathered, masked = pair(kv_heads=kv_heads, causal=causal, window=window, share=0.3)
    q = torch.randn(3, 4, queries, 8, **DOUBLE, requires_grad=True)
    k, v = (torch.randn(3, kv_heads, keys, 8, **DOUBLE, requires_grad=True) for _ in "kv")
    keep = torch.arange(keys) >= torch.tensor([[0], [3], [keys]])
    masks = [None, Mask.padding(keep), Mask.window(2), Mask.biased(torch.randn(4, queries, keys, **DOUBLE))]
    masks.append(Mask.padding(keep) & Mask.pairs_(torch.rand(3, 1, queries, keys) > 0.4) & masks[3])
    for mask in masks:
        results = []
        for attend in (gathered, masked):
            torch.manual_seed(5)
            o = attend(q, k, v, mask=mask)
            results.append([o, *torch.autograd.grad(o.square().sum(), (q, k, v))])
        for a, b in zip(*results, strict=True):
            assert torch.isfinite(a).all()
            assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_heads_and_queries_share_a_subset_and_sequences_do_not():
    attend, _ = pair(share=0.25)
    q, k = (torch.randn(6, 4, 16, 8, **DOUBLE) for _ in "qk")
    one_hot = torch.eye(16, **DOUBLE).expand(6, 4, -1, -1)
    seen = attend(q, k, one_hot) > 0  # (B, H, N, M)
    assert torch.equal(seen, seen[:, :1, :1].expand_as(seen))
    assert (seen.sum(-1) == 4).all()
    assert len({tuple(row) for row in seen[:, 0, 0].tolist()}) > 1


def test_layers_draw_on_their_own():
    first, second = (layer.train() for layer in (attlas.mixer("ssa", 16, 2), attlas.mixer("ssa", 16, 2)))
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 12, 16)
    torch.manual_seed(0)
    outputs = first(x), second(x)
    assert not torch.equal(*outputs)
    torch.manual_seed(0)
    assert torch.equal(first(x), outputs[0])


def test_every_key_is_drawn_alike_and_padding_last():
    attend, _ = pair(share=0.25)
    places, _ = drawn(attend, 4000, 12)
    counts = places.flatten().bincount(minlength=12) / 4000
    assert torch.allclose(counts, torch.full((12,), 0.25), atol=0.04)
    keep = torch.arange(12).expand(50, -1) % 3 == 0
    places, _ = drawn(attend, 50, 12, Mask(keys=keep))
    assert keep.gather(1, places[:, 0]).all()
    assert places.shape == (50, 1, 3)


def test_a_causal_query_sees_itself_once_and_a_part_of_the_past():
    attend, _ = pair(causal=True, share=0.5)
    q, v = torch.zeros(1, 4, 10, 8, **DOUBLE), torch.eye(10, **DOUBLE).expand(1, 4, -1, -1)
    torch.manual_seed(3)
    weights = attend(q, q, v)[0, 0]
    torch.manual_seed(3)
    places, _ = drawn(attend, 1, 10)
    for n in range(10):
        seen = sorted({n} | {m for m in places[0, 0].tolist() if m < n})
        assert weights[n].nonzero()[:, 0].tolist() == seen
        assert torch.allclose(weights[n, seen], torch.tensor(1 / len(seen), **DOUBLE))


@pytest.mark.parametrize(("causal", "reach"), [(True, range(-7, 1)), (False, range(-5, 6))])
def test_windows_are_local(causal, reach):
    attend, _ = pair(causal=causal, share=0.5, window=8)
    q, v = torch.randn(20, 4, 30, 8, **DOUBLE), torch.eye(30, **DOUBLE).expand(20, 4, -1, -1)
    _, _, n, m = (attend(q, q, v) > 0).nonzero().T
    assert set((m - n).tolist()) == set(reach)


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.nbytes = max(self.nbytes, *sizes, 0)
        return result


@pytest.mark.parametrize("causal", [False, True])
def test_memory_falls_with_the_share(causal):
    q, k, v = (torch.randn(1, 8, 512, 8) for _ in "qkv")
    largest = {}
    for share in (1.0, 1 / 8):
        attend, _ = pair(heads=8, kv_heads=8, causal=causal, share=share)
        with _Largest() as seen:
            attend(q, k, v)
        largest[share] = seen.nbytes
    assert largest[1.0] >= 4 * 8 * 512 * 512
    assert largest[1.0] / largest[1 / 8] == pytest.approx(8, rel=0.03)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (attlas.mixer("ssa", 16, 2, share=0.3) for _ in range(2))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = x + self.first(x)
        return self.head((x + self.second(x)).mean(1))


def test_ensembles_average_selves_and_their_variance_falls():
    model, x = Classifier().eval(), torch.randn(2, 10, 16)
    dense = model(x)
    with torch.no_grad():
        torch.manual_seed(0)
        with subsampling(model):
            first, second = (model(x).softmax(-1) for _ in range(2))
        assert torch.equal(model(x), dense)
        torch.manual_seed(0)
        both = self_ensemble(model, 2, lambda logits: logits.softmax(-1))(x)
        assert torch.allclose(both, (first + second) / 2)
        assert not torch.equal(first, second)
        single, eight = (
            torch.stack([self_ensemble(model, passes)(x) for _ in range(150)]).var(0).mean() for passes in (1, 8)
        )
        assert float(single / eight) == pytest.approx(8, rel=0.3)
    assert torch.equal(model(x), dense)


def test_bad_input():
    with pytest.raises(BadInput, match=r"kept, in \(0, 1\], got 0"):
        attlas.mixer("ssa", 16, 2, share=0.0)
    with pytest.raises(BadInput, match="even number of positions, two blocks of queries, got 5"):
        attlas.mixer("ssa", 16, 2, window=5)
    with pytest.raises(BadInput, match="at least one pass, got 0"):
        self_ensemble(Classifier(), 0)
    with pytest.raises(BadInput, match=r"attlas.mixer\('ssa'"), subsampling(nn.Linear(2, 2)):
        pass
