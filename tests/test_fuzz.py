"""Wild problems for every kind of call, against the oracle, for as long as one likes."""

import os
import time
from collections import Counter

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from . import (
    calls,
    oracle,
    test_norm_neighbor,
    test_options,
    test_pieces,
    test_properties,
    test_second_order,
)
from .arrays import DTYPES, HALVES
from .strategies import EPS, MODES, SIZES, neighbors, norm_problems, problems


def plain(data):
    mode, eps = data.draw(st.sampled_from(MODES)), data.draw(st.sampled_from(EPS))
    test_properties.check_problem(data.draw(problems(wild=True)), mode, eps)


def options(data):
    test_options.check_any_options(None, data, wild=True)


def second_order(data):
    test_second_order.check_any_problem(None, data, wild=True)


def half_types(data):
    half = data.draw(st.sampled_from(HALVES))
    check = data.draw(
        st.sampled_from([test_options.check_any_options, test_second_order.check_any_problem])
    )
    check(half, data)


def native(a):
    """The array as the engine takes it, its memory order kept."""
    return a if a.dtype in DTYPES and a.dtype.isnative else a.astype(np.float64, order="K")


def pieces(data):
    x, dout, gamma, beta, axis = data.draw(problems())
    x = native(x)
    dout = dout.astype(x.dtype, order="K")
    axis %= x.ndim
    along = data.draw(st.sampled_from([d for d in range(x.ndim) if d != axis]))
    cuts = data.draw(st.lists(st.integers(0, x.shape[along]), max_size=5))
    out, *gradients = test_pieces.in_pieces(x, dout, gamma, beta, cuts, axis=axis, along=along)
    terms = float(np.abs(gamma).max() + np.abs(beta).max())
    test_pieces.check("out", out, oracle.forward(x, gamma, beta, axis), x, 6, terms)
    test_pieces.gradients_fit(gradients, dout, x, gamma, axis, 8)


def neighbor(data):
    calls.check_first(*data.draw(neighbors(calls.FIRST, calls.first_may_be)))


def neighbor_of_pieces(data):
    calls.check_second(*data.draw(neighbors(calls.SECOND, calls.second_may_be)))


def norms(data):
    eps = data.draw(st.sampled_from(EPS))
    test_properties.check_norm_problem(data.draw(norm_problems(wild=True)), eps)


def neighbor_of_norms(data):
    row = {}
    for name, values in test_norm_neighbor.ROW.items():
        may_be = test_norm_neighbor.may_be
        row[name] = data.draw(st.sampled_from([v for v in values if may_be(row | {name: v})]))
    case = row["case"]
    most = (1 << 17) // max(1, int(np.prod(case.shape)))
    longer = st.sampled_from([n for n in SIZES if n <= max(most, 1)])
    n = data.draw(longer) if 0 not in np.atleast_1d(case.axis) % len(case.shape) else 1
    row["case"] = case._replace(shape=(case.shape[0] * n, *case.shape[1:]))
    test_norm_neighbor.check_norm(row, data.draw(st.integers(0, 1000)))


KINDS = {
    "norms": norms,
    "neighbor of norms": neighbor_of_norms,
    "neighbor": neighbor,
    "neighbor of pieces": neighbor_of_pieces,
    "plain": plain,
    "options": options,
    "half types": half_types,
    "second order": second_order,
    "pieces": pieces,
}


def fuzz(kind, seed, n, count):
    @hypothesis.seed(seed)
    @hypothesis.settings(
        test_properties.few,
        max_examples=n,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data())
    def example(data):
        count[kind] += 1
        KINDS[kind](data)

    example()


@pytest.mark.long
def test_fuzz():
    """For FUZZ_MINUTES, from FUZZ_SEED on; hypothesis shows the smallest problem that fails."""
    end = time.monotonic() + 60 * float(os.environ.get("FUZZ_MINUTES", "30"))
    first = seed = int(os.environ.get("FUZZ_SEED", "1"))
    count = Counter()
    try:
        while time.monotonic() < end:
            for kind in KINDS:
                fuzz(kind, seed, 100, count)
            seed += 1
    finally:
        print(f"fuzz: {dict(count)} problems, seeds {first} to {seed}")
