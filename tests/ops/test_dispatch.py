import pytest
import torch

import attlas
from attlas.core.errors import BackendUnavailable
from attlas.ops.dispatch import Backend, Op, record_choices
from attlas.ops.softmax import softmax_attention


def only_float64(x):
    return None if x.dtype == torch.float64 else f"takes float64, got {x.dtype}"


DOUBLE = Op(
    "double",
    Backend("fast", lambda x: x + x, only_float64),
    Backend("torch", lambda x: 2 * x),
    Backend("oracle", lambda x: torch.tensor([2 * value for value in x.tolist()])),
)


def test_the_first_backend_that_does_not_refuse_runs():
    with record_choices() as choices:
        DOUBLE(torch.ones(2, dtype=torch.float64))
        DOUBLE(torch.ones(2))
    assert [choice.backend for choice in choices] == ["fast", "torch"]
    assert choices[1].passed_over == (("fast", "takes float64, got torch.float32"),)


def test_the_choice_is_the_same_every_time_and_outside_a_recording():
    x = torch.ones(2)
    first, record = DOUBLE.choose("auto", x)
    assert DOUBLE.choose("auto", x) == (first, record)
    assert DOUBLE(x).tolist() == [2, 2]


def test_a_named_backend_runs_or_raises():
    x = torch.ones(2)
    assert DOUBLE(x, backend="oracle").tolist() == [2, 2]
    with pytest.raises(BackendUnavailable, match=r"fast: takes float64.*torch: not asked for"):
        DOUBLE(x, backend="fast")
    with pytest.raises(BackendUnavailable, match="'cuda'"):
        DOUBLE(x, backend="cuda")


def test_a_backend_that_yields_runs_where_it_is_named():
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    backend, choice = softmax_attention.choose("auto", q, k, v)
    assert backend.name == "torch"
    assert choice.passed_over[0][0] == "cpu"
    assert "so little work" in choice.passed_over[0][1]
    expected = softmax_attention(q, k, v, backend="torch")
    assert torch.allclose(softmax_attention(q, k, v, backend="cpu"), expected, atol=1e-6)
    q, k, v = torch.randn(3, 1, 8, 128, 64)
    assert softmax_attention.choose("auto", q, k, v)[0].name == "cpu"
    q, k, v = torch.randn(1, 8, 1, 64, requires_grad=True), torch.randn(1, 8, 5000, 64), torch.randn(1, 8, 5000, 64)
    assert softmax_attention.choose("auto", q, k, v)[0].name == "torch"
    with torch.no_grad():
        assert softmax_attention.choose("auto", q, k, v)[0].name == "cpu"


def test_recordings_nest():
    with record_choices() as outer:
        DOUBLE(torch.ones(1))
        with record_choices() as inner:
            DOUBLE(torch.ones(1))
        DOUBLE(torch.ones(1))
    assert (len(outer), len(inner)) == (2, 1)


def test_explain_says_what_ran_and_leaves_the_layer_as_it_was():
    layer = attlas.mixer("softmax", 8, 2)
    x = torch.randn(1, 4, 8)
    assert str(attlas.explain(layer, x)).startswith("softmax_attention: torch")
    assert layer.training
    assert "plain torch" in str(attlas.explain(attlas.mixer("pool", 8), x))
    stacked = torch.nn.Sequential(layer, layer)
    assert "(2 calls)" in str(attlas.explain(stacked, x))


def test_doctor_names_every_kernel_and_package():
    findings = {finding.what: finding for finding in attlas.doctor()}
    assert findings["torch"].usable
    assert "C++ kernel decay" in findings
    assert all(finding.detail for finding in findings.values())
