"""A case's data, and the judge of what an implementation makes of it."""

from functools import cached_property

import numpy as np
from cases import Case

from bn_fast.reference import oracle_backward, oracle_forward

EPS = 1e-5  # everyone's default

# The oracle takes long double and copies: on large cases it judges some features, evenly spaced,
# at least 3. A feature's result depends on no other feature.
JUDGED_ELEMENTS = 1 << 20


class Problem:
    """The arguments of one case, the same at every run."""

    def __init__(self, case: Case):
        rng = np.random.default_rng(0)
        n_features = case.shape[case.axis]
        self.case = case
        self.axis = case.axis
        self.x = rng.standard_normal(case.shape, case.dtype)
        self.x *= 2
        self.x += 3
        self.dout = rng.standard_normal(case.shape, case.dtype)
        self.gamma = rng.uniform(0.5, 2, n_features).astype(case.dtype)
        self.beta = rng.standard_normal(n_features).astype(case.dtype)

    @cached_property
    def judged(self) -> np.ndarray:
        n_features = len(self.gamma)
        n = max(JUDGED_ELEMENTS * n_features // self.x.size, 3)
        return np.unique(np.linspace(0, n_features - 1, n).astype(int))

    @cached_property
    def _right(self) -> tuple[np.ndarray, ...]:
        x, dout = (a.take(self.judged, self.axis) for a in (self.x, self.dout))
        gamma, beta = self.gamma[self.judged], self.beta[self.judged]
        out, _, _ = oracle_forward(x, gamma, beta, eps=EPS, axis=self.axis)
        return out, *oracle_backward(dout, x, gamma, eps=EPS, axis=self.axis)

    def errors(self, results: tuple[np.ndarray, ...]) -> dict[str, float]:
        """Largest errors of (out, dx, dgamma, dbeta), as fractions of the largest right value.

        dgamma and dbeta are sums of M terms of unit deviation, about sqrt(M) in size: that is the
        measure where few features have all come out near 0.
        """
        usual = np.sqrt(self.x.size / len(self.gamma))
        found = {}
        for name, got, right in zip(("out", "dx", "dgamma", "dbeta"), results, self._right):
            is_sum = got.ndim == 1
            got = got.take(self.judged, 0 if is_sum else self.axis)
            largest = max(np.abs(right).max(), usual if is_sum else 0)
            found[name] = float(np.abs(got - right).max() / largest)
        return found
