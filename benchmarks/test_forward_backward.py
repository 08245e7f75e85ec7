"""Times every implementation and every option on every case, after its results were judged.

From the root of the repository:

    python -m pytest benchmarks                                  the smoke cases, timed
    python -m pytest benchmarks --benchmark-disable              the same, judged but not timed
    python -m pytest benchmarks -k implementation --cases all    the full table
    python -m pytest benchmarks -k option                        activation, residual, weights, ...

Blocks of calls take turns; the last column is the median over that of the baseline. Fewer CPUs, for
everyone alike: taskset -c 0 python -m pytest benchmarks. To compare two commits, each installed and
timed in its turn:

    python -m pytest benchmarks -k bn_fast --benchmark-save before
    python -m pytest benchmarks -k bn_fast --benchmark-compare
"""

from dataclasses import asdict
from functools import lru_cache, partial

import pytest
from cases import DIRECTIONS
from contest import Contest, clock
from variants import USERS, Given, judge

pytestmark = pytest.mark.benchmark(timer=clock)


def asked(request, name, **fixed):
    """The values of a parameter in the tests that are to run of this problem."""
    fixed["problem"] = request.getfixturevalue("problem").case
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    matching = (p for p in calls if name in p and all(p.get(k) == v for k, v in fixed.items()))
    return list(dict.fromkeys(p[name] for p in matching))


@pytest.fixture(scope="module")
def contest(problem, request):
    def prepare(one):
        calls = one.prepare(problem)
        return calls, problem.judge(one.name, calls.results(), problem.right)

    entrants = {one.name: partial(prepare, one) for one in asked(request, "implementation")}
    return Contest(entrants, DIRECTIONS, request.config.getoption("rounds"))


@pytest.fixture(scope="module")
def option_contest(problem, request):
    """That of a variant; one at a time is kept, for the sake of its arrays."""

    @lru_cache(maxsize=1)
    def contest_of(variant):
        def prepare(who):
            given = Given(variant, problem)
            calls = USERS[who](given)
            return calls, judge(who, calls.results(), given) if who != "plain" else {}

        entrants = {who: partial(prepare, who) for who in asked(request, "who", variant=variant)}
        return Contest(entrants, variant.directions, request.config.getoption("rounds"))

    return contest_of


def describe(benchmark, case, direction, option, **more):
    benchmark.group = f"{case.name} {direction}{option and f', {option}'}"
    fields = asdict(case) | {"dtype": str(case.dtype), "bytes": case.array_bytes}
    benchmark.extra_info |= {"case": case.name, **fields, "option": option, **more}


def test_implementation(benchmark, problem, implementation, direction, contest):
    describe(benchmark, problem.case, direction, "", is_peer=implementation.is_peer)
    contest.report(benchmark, implementation.name, direction)


def test_option(benchmark, problem, variant, who, direction, option_contest):
    if not variant.fits(problem.case):
        pytest.skip("half types are timed where the case is of float32")
    describe(benchmark, problem.case, direction, variant.name)
    option_contest(variant).report(benchmark, who, direction)
