"""Times every implementation and every option on every case, after its results were checked.

From the root of the repository:

    python -m pytest benchmarks                        the smoke cases, timed
    python -m pytest benchmarks --benchmark-disable    the same, once each, untimed
    python -m pytest benchmarks --cases all            the full table
    python -m pytest benchmarks -k test_option         activation, residual, weights and the others

and to compare two commits, each installed and timed in its turn:

    python -m pytest benchmarks -k bn_fast --benchmark-save before
    python -m pytest benchmarks -k bn_fast --benchmark-compare --benchmark-columns median,iqr
"""

import pytest
import variants
from implementations import judge

import bn_fast


@pytest.fixture(scope="module")
def judged(problem, implementation):
    """The calls of an implementation, and its errors."""
    calls = implementation.prepare(problem)
    return calls, judge(implementation, calls, problem)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test(benchmark, problem, implementation, judged, direction):
    calls, errors = judged
    traffic = getattr(problem.case, f"{direction}_bytes")
    benchmark.group = f"{problem.case.name} {direction}"
    benchmark.extra_info |= {
        "implementation": implementation.name,
        "bytes": traffic,
        "errors": errors,
        **build(),
    }
    benchmark(getattr(calls, direction))
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["GB/s"] = traffic / benchmark.stats.stats.median / 1e9


def build():
    return {"isa": bn_fast.build_info()["isa"], "threads": bn_fast.get_num_threads()}


@pytest.fixture(scope="module")
def option_calls(problem, variant):
    if not variant.fits(problem.case):
        pytest.skip("needs ml_dtypes, or a case of float32")
    given = variants.Given(variant, problem)
    calls = variants.bn_fast_out(given)
    variants.judge("bn_fast", calls.results(), given)
    return calls


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_option(benchmark, problem, variant, option_calls, direction):
    call = getattr(option_calls, direction)
    if call is None:
        pytest.skip("the forward pass is the plain one")
    benchmark.group = f"{problem.case.name} {direction} options"
    benchmark.extra_info |= {"option": variant.name, **build()}
    benchmark(call)
