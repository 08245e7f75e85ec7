"""A case's data, what is timed of it, and the judge of what comes out."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from cases import Case

from bn_fast import reference
from bn_fast._cache import Axes
from bn_fast.reference import oracle_backward, oracle_forward
from bn_fast.reference.batch import GRADIENTS

EPS = 1e-5  # everyone's default

# The oracle takes long double and copies: on large cases it judges some features, evenly spaced,
# at least 3. A feature's result depends on no other feature.
JUDGED_ELEMENTS = 1 << 20

# What is allowed of arrays of x's shape, and of the sums dgamma and dbeta, which cancel. Peers must
# only have computed the same thing: in float32 their sums over the first axis lose digits, up to
# 1e-2 of the largest value for a million rows.
EXACT = {"float32": (4e-6, 1.6e-5), "float64": (1e-14, 1e-12)}
ROUGH = {"float32": (1e-2, 1e-2), "float64": (1e-9, 1e-9)}

Results = dict[str, np.ndarray]


def named(*arrays: np.ndarray | None) -> Results:
    """Of out, dx, dgamma, dbeta and dresidual those that there are."""
    return {name: a for name, a in zip(("out", *GRADIENTS), arrays) if a is not None}


class Calls(NamedTuple):
    """What is timed; conversions and compilation come before. None: there is no such call."""

    forward: Callable[[], Any] | None
    backward: Callable[[], Any]
    results: Callable[[], Results]  # of both, as NumPy arrays; empty: nothing to judge


class Problem:
    """The arguments of one case, the same at every run; x lies `offset` deviations from 0."""

    def __init__(self, case: Case, offset: float = 1.5):
        rng = np.random.default_rng(0)
        n_features = case.shape[case.axis]  # or those that gamma and beta run along
        self.case = case
        self.axis = case.axis
        self.x = rng.standard_normal(case.shape, case.dtype)
        self.x *= 2
        self.x += 2 * offset
        self.dout = rng.standard_normal(case.shape, case.dtype)
        self.gamma = rng.uniform(0.5, 2, n_features).astype(case.dtype)
        self.beta = rng.standard_normal(n_features).astype(case.dtype)

    @cached_property
    def _judged(self) -> np.ndarray:
        n_features = len(self.gamma)
        n = max(JUDGED_ELEMENTS * n_features // self.x.size, 3)
        return np.unique(np.linspace(0, n_features - 1, n).astype(int))

    def choose(self, a: np.ndarray) -> np.ndarray:
        """The features that are judged."""
        return a.take(self._judged, 0 if a.ndim == 1 else self.axis)

    @cached_property
    def right(self) -> Results:
        """Those features' results of plain batch norm."""
        x, dout, gamma, beta = map(self.choose, (self.x, self.dout, self.gamma, self.beta))
        out, _, _ = oracle_forward(x, gamma, beta, eps=EPS, axis=self.axis)
        return named(out, *oracle_backward(dout, x, gamma, eps=EPS, axis=self.axis))

    def errors(self, results: Results, right: Results) -> dict[str, float]:
        """The largest errors, as fractions of the largest right value.

        dgamma and dbeta are sums of M terms of unit deviation, about sqrt(M) in size: that is the
        measure where few features have all come out near 0.
        """
        usual = np.sqrt(self.x.size / len(self.gamma))
        errors = {}
        for name in results.keys() & right.keys():
            got, expected = self.choose(results[name]), right[name]
            assert got.shape == expected.shape, f"{name} has the shape {got.shape}"
            largest = max(np.abs(expected).max(), usual if got.ndim == 1 else 0)
            errors[name] = float(np.abs(got.astype(np.longdouble) - expected).max() / largest)
        return errors

    def judge(
        self, who: str, results: Results, right: Results, rounding: float = 0.0
    ) -> dict[str, float]:
        """The errors; an AssertionError if one is too large, or NaN. `rounding` is what a storage
        of fewer digits may add."""
        exact = EXACT if who.startswith("bn_fast") else ROUGH
        limit, limit_of_sums = exact[str(self.case.dtype)]
        errors = self.errors(results, right)
        for name, error in errors.items():
            allowed = limit_of_sums if results[name].ndim == 1 else limit + rounding
            assert error <= allowed, (
                f"{who} is wrong on {self.case.name}: the error of {name} is {error:.1e},"
                f" {allowed:.1e} is allowed"
            )
        return errors


class NormProblem(Problem):
    """The same for a norm whose statistics lie within a sample."""

    def __init__(self, case: Case):
        super().__init__(case)
        self.norm, self.num_groups = case.norm, case.num_groups
        self.options = {} if case.num_groups is None else {"num_groups": case.num_groups}
        self.options["axis"] = case.axis
        self.parameters = (self.gamma,) if case.norm == "rms" else (self.gamma, self.beta)

    def _through_numpy(self, dtype: type) -> tuple[np.ndarray, Any]:
        forward = getattr(reference, f"{self.norm}norm_forward")
        return forward(self.x.astype(dtype, copy=False), *self.parameters, **self.options)

    @cached_property
    def axes(self) -> Axes:
        return self._through_numpy(self.x.dtype.type)[1].axes

    def choose(self, a: np.ndarray) -> np.ndarray:
        """All: a parameter's gradient is a sum over all rows."""
        return a

    @cached_property
    def right(self) -> Results:
        """Those of the reference in float64, whose sums are exact to float64's roundings."""
        out, cache = self._through_numpy(np.float64)
        backward = getattr(reference, f"{self.norm}norm_backward")
        return named(out, *backward(self.dout.astype(np.float64, copy=False), cache))


def make_problem(case: Case) -> Problem:
    return Problem(case) if case.norm == "batch" else NormProblem(case)
