"""pytest's options and fixtures for the benchmarks."""

import sys
from pathlib import Path

import pytest

# The benchmarks import each other by plain names, in pytest as in `python benchmarks/compare.py`.
# Only this folder is added: bn_fast must be the installed one.
sys.path.insert(0, str(Path(__file__).parent))

from cases import select
from implementations import IMPLEMENTATIONS
from problem import Problem
from variants import VARIANTS


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        action="append",
        help="which cases: all, smoke (the default), a kind, or a name with wildcards; repeatable",
    )


def pytest_generate_tests(metafunc):
    if "problem" in metafunc.fixturenames:
        try:
            cases = select(metafunc.config.getoption("--cases") or ["smoke"])
        except ValueError as error:
            raise pytest.UsageError(f"--cases: {error}") from None
        names = [case.name for case in cases]
        metafunc.parametrize("problem", cases, ids=names, indirect=True, scope="module")
    for argument, table in (("implementation", IMPLEMENTATIONS), ("variant", VARIANTS)):
        if argument in metafunc.fixturenames:
            available = [one for one in table if one.is_importable]
            names = [one.name for one in available]
            metafunc.parametrize(argument, available, ids=names, scope="module")


@pytest.fixture(scope="module")
def problem(request):
    return Problem(request.param)
