"""The identities of iLLaMA's soft mask."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput
from attlas.core.grid import Grid


def qkv() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 7, 4, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_without_the_mask_it_is_softmax_attention() -> None:
    q, k, v = qkv()
    assert torch.allclose(
        attlas.attend(q, k, v, "illama", softness=1.0), attlas.attend(q, k, v, "softmax"), rtol=0, atol=1e-12
    )


def test_rows_sum_to_what_the_full_softmax_has_up_to_the_query() -> None:
    q, k, _ = qkv()
    ones = torch.ones_like(q)
    sums = attlas.attend(q, k, ones, "illama")[..., 0]
    full = (q @ k.mT / 2).softmax(-1)
    assert torch.allclose(sums, full.tril().sum(-1))
    assert (sums[..., :-1] < 1).all()
    assert torch.allclose(sums[..., -1], torch.ones(2, 3, dtype=torch.float64))


def test_the_last_token_is_that_of_causal_attention() -> None:
    q, k, v = qkv()
    causal = attlas.attend(q, k, v, "softmax", causal=True)
    masked = attlas.attend(q, k, v, "illama")
    assert torch.allclose(masked[:, :, -1], causal[:, :, -1])
    assert not torch.allclose(masked[:, :, 2], causal[:, :, 2])


def test_it_is_linear_in_the_softness() -> None:
    q, k, v = qkv()
    none, half, full = (attlas.attend(q, k, v, "illama", softness=rho) for rho in (0.0, 0.5, 1.0))
    assert torch.allclose(half, (none + full) / 2)


def test_later_keys_leak_through_the_sum_alone() -> None:
    q, k, v = qkv()
    v_late, k_late = v.clone(), k.clone()
    v_late[:, :, 5:] += 1
    k_late[:, :, 5:] += 1
    first = attlas.attend(q, k, v, "illama")[:, :, :5]
    assert torch.equal(attlas.attend(q, k, v_late, "illama")[:, :, :5], first)
    assert not torch.allclose(attlas.attend(q, k_late, v, "illama")[:, :, :5], first)


def test_bad_softness() -> None:
    with pytest.raises(BadInput, match=r"share in \[0, 1\], got 2"):
        attlas.mixer("illama", 8, 2, grid=Grid((3, 3)), softness=2)
