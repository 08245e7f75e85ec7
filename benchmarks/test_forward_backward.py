"""Times every implementation on every case, after its results were checked.

From the root of the repository:

    python -m pytest benchmarks                        the smoke cases, timed
    python -m pytest benchmarks --benchmark-disable    the same, once each, untimed
    python -m pytest benchmarks --cases all            the full table
"""

import pytest
from implementations import judge, n_cpus

import bn_fast


@pytest.fixture(scope="module")
def judged(problem, implementation):
    """The calls of an implementation, and its errors."""
    calls = implementation.prepare(problem)
    return calls, judge(implementation, calls, problem)


def measure(benchmark, call, traffic, problem, implementation, errors):
    benchmark.group = f"{problem.case.name} {call.__name__}"
    benchmark.extra_info |= {
        "implementation": implementation.name,
        "bytes": traffic,
        "isa": bn_fast.build_info()["isa"],
        "threads": n_cpus(),
        "errors": errors,
    }
    benchmark(call)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["GB/s"] = traffic / benchmark.stats.stats.median / 1e9


def test_forward(benchmark, problem, implementation, judged):
    calls, errors = judged
    traffic = problem.case.forward_bytes
    measure(benchmark, calls.forward, traffic, problem, implementation, errors)


def test_backward(benchmark, problem, implementation, judged):
    calls, errors = judged
    traffic = problem.case.backward_bytes
    measure(benchmark, calls.backward, traffic, problem, implementation, errors)
