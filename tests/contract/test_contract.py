"""The contract suite over the registry: a file in `attlas/mechanisms/` is tested by being there."""

import pytest
import torch

from attlas.core.registry import mechanism
from attlas.core.spec import Pattern, Takes
from tests.contract import checks

CASES = checks.all_cases()
CAUSAL = [case for case in CASES if case.causal]
PADDED = [case for case in CASES if Takes.PADDING in mechanism(case.name).spec.masks]
STREAMING = [
    case
    for case in CASES
    if case.pattern == Pattern.CAUSAL_SELF and mechanism(case.name).spec.streams and case.grid.rank == 1
]
HALF = (torch.bfloat16, torch.float16)


def over(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


@over(CASES)
def test_forward_and_gradients_equal_the_oracle(case):
    checks.check_oracle(case)


@over([case for case in CASES if mechanism(case.name).spec.masks - {Takes.PADDING}])
def test_masks_equal_the_oracle(case):
    checks.check_masks(case)


@over(CASES)
def test_gradcheck(case):
    checks.check_gradcheck(case)


@over(CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_backend_equals_the_oracle(case, dtype):
    checks.check_backends(case, dtype)


@over(CAUSAL)
def test_causality(case):
    checks.check_causality(case)


@over([case for case in CAUSAL if not case.cross])
def test_queries_are_the_last_positions(case):
    checks.check_alignment(case)


@over(PADDED)
def test_padding_never_matters(case):
    checks.check_padding(case)


@over(PADDED)
def test_nan_in_padding_never_matters(case):
    checks.check_nan_padding(case)


@over(PADDED)
def test_a_query_that_sees_nothing_gives_zero(case):
    checks.check_sees_nothing(case)


@over(STREAMING)
def test_any_segmentation_equals_the_full_pass(case):
    checks.check_segments(case)


@over(STREAMING)
def test_gradients_of_a_stream_equal_those_of_the_full_pass(case):
    checks.check_stream_gradients(case)


@over(STREAMING)
def test_an_extended_state_stays_valid(case):
    checks.check_branching(case)


@over(CASES)
def test_batch_strides_and_dropout(case):
    checks.check_batch(case)


@over(CASES)
@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_half_precision(case, dtype):
    checks.check_dtype(case, dtype)


@over(CASES)
def test_autocast(case):
    checks.check_autocast(case)


@over(CASES)
def test_compile(case):
    checks.check_compile(case)


@over(CASES)
def test_export(case):
    checks.check_export(case)


@over(CASES)
def test_state_dict(case):
    checks.check_state_dict(case)


@over(CASES)
def test_cost_formula(case):
    checks.check_cost(case)


@over(CASES)
def test_pairs_are_those_that_gradients_see(case):
    checks.check_pairs(case)


@over(CASES)
def test_parameters(case):
    checks.check_parameters(case)


@pytest.mark.full
@over(CASES)
def test_inductor(case):
    checks.check_compile(case, backend="inductor")
