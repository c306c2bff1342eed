"""The mechanism that CONTRIBUTING.md shows is a real one: it passes the contract suite."""

import re
from pathlib import Path

import pytest

from attlas.core import registry
from attlas.core.registry import mechanism
from tests.contract import checks
from tests.contract.checks import Case

TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module", autouse=True)
def _example():
    (code,) = re.findall(r"<!-- example.*?-->\n```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(code, "CONTRIBUTING.md", "exec"), {"__name__": "contributing"})
    yield
    del registry._mechanisms["cosine_example"]


@pytest.mark.parametrize("pattern", ["noncausal self", "causal self", "noncausal cross", "causal cross"])
@pytest.mark.parametrize(
    "check",
    [
        checks.check_oracle,
        checks.check_masks,
        checks.check_gradcheck,
        checks.check_padding,
        checks.check_compile,
        checks.check_cost,
        checks.check_pairs,
        checks.check_parameters,
    ],
    ids=lambda check: check.__name__,
)
def test_the_example_holds_the_contract(check, pattern):
    for index in range(len(mechanism("cosine_example").spec.examples)):
        check(Case("cosine_example", index, registry.Pattern(pattern)))
