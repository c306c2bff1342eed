import pytest
import torch

from attlas.core.errors import BadInput
from attlas.ops import topk
from attlas.ops.topk import statistical_threshold, statistical_topk


def test_about_k_of_normal_entries_exceed_the_threshold():
    x = 3 + 0.2 * torch.randn(100, 13824)
    counts = statistical_topk(x, 1106)[1].sum(-1).float()
    assert counts.mean() == pytest.approx(1106, rel=0.01)
    assert (counts - 1106).abs().max() < 0.08 * 1106


def test_statistics_are_over_the_visible_alone():
    x = torch.randn(6, 50, dtype=torch.float64)
    keep = torch.rand(6, 50) > 0.4
    expected = torch.stack([statistical_threshold(row[seen], 7) for row, seen in zip(x, keep, strict=True)])
    for poison in (1e9, torch.nan, torch.inf):
        hidden = x.masked_fill(~keep, poison)
        got = statistical_threshold(hidden, 7, keep)
        assert torch.allclose(got, expected, rtol=0, atol=1e-12)
        assert not (statistical_topk(hidden, 7, keep)[1] & ~keep).any()


def test_a_row_of_k_entries_or_fewer_has_no_threshold():
    x = torch.randn(3, 10)
    keep = torch.arange(10) < torch.tensor([[0], [4], [5]])
    assert (statistical_threshold(x, 10) == -torch.inf).all()
    assert (statistical_threshold(x, 4, keep) == -torch.inf).flatten().tolist() == [True, True, False]
    shifted, kept = statistical_topk(x, 4, keep)
    assert torch.equal(shifted[:2], x[:2])
    assert kept.sum(-1).tolist()[:2] == [0, 4]


def test_the_threshold_is_half_way_for_half_the_entries():
    x = torch.randn(4, 30, dtype=torch.float64)
    assert torch.allclose(statistical_threshold(x, 15)[:, 0], x.mean(-1))


@pytest.mark.parametrize("keep", [None, torch.tensor([True] * 9 + [False])])
def test_gradients_are_right_and_finite_without_a_spread(keep):
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: statistical_threshold(t, 3, keep), x)
    flat = torch.full((2, 10), 0.5, requires_grad=True)
    statistical_threshold(flat, 3, keep).sum().backward()
    assert torch.isfinite(flat.grad).all()


def test_half_precision_keeps_its_statistics_in_float32():
    x = torch.randn(8, 4096) + 100
    half = x.to(torch.bfloat16)
    got = statistical_threshold(half, 200)
    assert got.dtype == torch.float32
    assert torch.allclose(got, statistical_threshold(half.float(), 200))


def test_k_is_at_least_one():
    with pytest.raises(BadInput, match="k counts entries"):
        statistical_topk(torch.randn(3, 4), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 50])
def test_sorting_by_bits_is_sorting(dtype, length, monkeypatch):
    monkeypatch.setattr(topk, "LONG", 2)
    x = torch.randn(3, 2, length, generator=torch.Generator().manual_seed(0)).mul(2).round().to(dtype)  # many are equal
    x[0, 0, : length // 2] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, -1e-30]).repeat(5)[: length // 2]
    values, index = topk.descending(x)
    expected = x.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected.values)
    assert torch.equal(index, expected.indices)


def test_long_rows_may_be_none_and_are_exported_for_any_batch(monkeypatch):
    monkeypatch.setattr(topk, "LONG", 2)
    values, index = topk.descending(torch.randn(0, 3, 5))
    assert values.shape == index.shape == (0, 3, 5)

    class Sort(torch.nn.Module):
        def forward(self, x):
            return topk.descending(x)

    batch = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(Sort(), (torch.randn(3, 5),), dynamic_shapes=(batch,)).module()
    x = torch.randn(7, 5)
    assert torch.equal(exported(x)[1], topk.descending(x)[1])


def test_the_largest_are_counted_row_by_row_and_of_equal_ones_the_first():
    x = torch.tensor([[1.0, 3, 3, 2, 3], [0, 0, 0, 0, 0]])
    assert topk.largest(x, 2).int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert topk.largest(x, torch.tensor([[4], [0]])).int().tolist() == [[0, 1, 1, 1, 1], [0] * 5]
    assert topk.largest(x, 9).all()
