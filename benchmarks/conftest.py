"""pytest's options and fixtures for the benchmarks, and their table."""

import math
import sys
import time
from pathlib import Path

import pytest

# The benchmarks import each other by plain names, in pytest as in `python benchmarks/plot.py`.
# Only this folder is added: bn_fast must be the installed one.
sys.path.insert(0, str(Path(__file__).parent))

from cases import DIRECTIONS, select
from implementations import IMPLEMENTATIONS, n_cpus
from problem import make_problem
from results import milliseconds, ratio
from variants import VARIANTS

import bn_fast

begun: list[float] = []  # when each case was


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        action="append",
        help="which cases: all, smoke (the default), a kind, or a name with wildcards; repeatable",
    )
    parser.addoption("--rounds", type=int, default=9, help="blocks of each call (default: 9)")
    parser.addoption("--seconds", type=float, default=math.inf, help="no case is begun later")
    parser.addoption(
        "--baseline",
        action="append",
        help="whose median the others' are divided by (default: floor, and plain for options)",
    )


def pytest_generate_tests(metafunc):
    if "problem" not in metafunc.fixturenames:
        return
    try:
        cases = select(metafunc.config.getoption("--cases") or ["smoke"])
    except ValueError as error:
        raise pytest.UsageError(f"--cases: {error}") from None

    if "implementation" not in metafunc.fixturenames:  # batch norm's options
        cases = [case for case in cases if case.norm == "batch"]
    names = [case.name for case in cases]
    metafunc.parametrize("problem", cases, ids=names, indirect=True, scope="module")
    if "implementation" in metafunc.fixturenames:
        rows = [(one, way) for one in IMPLEMENTATIONS if one.is_importable for way in DIRECTIONS]
        ids = [f"{one.name}-{way}" for one, way in rows]
        metafunc.parametrize(("implementation", "direction"), rows, ids=ids)
    else:
        rows = [
            (one, who, way)
            for one in VARIANTS
            if one.is_importable
            for who in one.users
            for way in one.directions
        ]
        ids = [f"{one.name}-{who}-{way}" for one, who, way in rows]
        metafunc.parametrize(("variant", "who", "direction"), rows, ids=ids)


@pytest.fixture(scope="module")
def problem(request):
    begun.append(time.monotonic())
    if begun[-1] - begun[0] > request.config.getoption("seconds"):
        pytest.skip("the seconds are over")
    bn_fast.set_result_cache(None)  # nothing is kept of results as large as the last case's
    return make_problem(request.param)


def pytest_sessionstart(session):
    session.config._benchmarksession.quiet = True  # its table is 200 columns wide


def pytest_benchmark_group_stats(benchmarks):
    """In the order of the cases."""
    groups = {}
    for row in benchmarks:
        groups.setdefault(row["group"], []).append(row)
    return list(groups.items())


def pytest_benchmark_update_machine_info(machine_info):
    machine_info |= {"threads": n_cpus(), "build": bn_fast.build_info()}


def pytest_terminal_summary(terminalreporter, config):
    """A table of at most 100 columns for each group of what was timed together."""
    for group, rows in config._benchmarksession.groups or []:
        medians = {row["extra_info"]["who"]: row["median"] for row in rows}
        wanted = [*(config.getoption("baseline") or []), "floor", "plain"]
        baseline = next((name for name in wanted if name in medians), None)
        title = f"÷ {baseline}" if baseline else ""
        terminalreporter.write_line("")
        terminalreporter.write_line(
            f"{group:<50}{'median ms':>11}{'IQR':>9}{'rounds':>8}{title:>16}", bold=True
        )
        for row in rows:
            who = row["extra_info"]["who"] + f" ({row['source']})" * bool(row["source"])
            over = ratio(row["median"] / medians[baseline]) if baseline else ""
            terminalreporter.write_line(
                f"  {who:<48}{milliseconds(row['median']):>11}{milliseconds(row['iqr']):>9}"
                f"{row['rounds']:>8}{over:>16}"
            )
