"""The statistics of one part of the data, which add up to those of the whole."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _checks

__all__ = ["Moments"]

Float64 = NDArray[np.float64]


class Moments:
    r"""Count, mean and sum of squared deviations of each feature; those of two parts add up.

    Parameters
    ----------
    count : float
        M, how many values each feature has; at least 0.
    mean, m2 : array_like, shape (C,)
        Mean, and ``sum((x - mean)**2)``, of each feature. Without values m2 is 0 and mean is not
        read.

    Attributes
    ----------
    count : float
    mean, m2 : ndarray, float64, shape (C,), read-only
        mean is NaN where there are no values.

    Raises
    ------
    TypeError
        If an argument is not real-valued.
    ValueError
        If count or m2 is negative, or the shapes differ.

    See Also
    --------
    bn_fast.moments : the moments of an array

    Notes
    -----
    Two parts merge by the formulas of Chan, Golub and LeVeque [1]_, with d = mean_b - mean_a:

    .. math:: M = M_a + M_b \qquad \mu = \mu_a + d \frac{M_b}{M} \qquad
              S = S_a + S_b + d^2 \frac{M_a M_b}{M}

    Both results are kept to twice the digits of float64 until they are asked for, so that however
    many parts there are, and however small, as many as one row each, they merge to what the whole
    would give, but for a few roundings of each part's own m2. A part without values changes
    nothing. ``a + b``, ``a.merge(b)`` and ``sum(parts)`` merge from left to right; another order
    may change the last digit, and the same order always gives the same bits.

    Moments cannot be changed. They are equal if count, mean and m2 are, NaN being equal to NaN, and
    can be pickled and copied.

    References
    ----------
    .. [1] T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample Variance:
       Analysis and Recommendations", The American Statistician 37(3), 1983.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast import moments
    >>> x = np.arange(20.0).reshape(10, 2)
    >>> moments(x[:3]) + moments(x[3:])
    Moments(count=10, mean=[ 9. 10.], m2=[330. 330.])
    >>> total = sum(moments(x[i : i + 4]) for i in range(0, 10, 4))  # as from a large file
    >>> total.std()
    array([5.74456265, 5.74456265])
    """

    __slots__ = ("_m2_low", "_mean_low", "count", "m2", "mean")

    count: float
    mean: Float64
    m2: Float64
    _mean_low: Float64
    _m2_low: Float64

    def __init__(self, count: float, mean: ArrayLike, m2: ArrayLike) -> None:
        given = _checks.moments_of(count, mean, m2)
        self._set(*given, np.zeros_like(given[1]), np.zeros_like(given[1]))

    def _set(
        self, count: float, mean: Float64, m2: Float64, mean_low: Float64, m2_low: Float64
    ) -> None:
        if count == 0:
            mean = np.full_like(mean, np.nan)
            m2, mean_low, m2_low = np.zeros((3, mean.size))
        for name, values in (("mean", mean), ("m2", m2)):
            values.flags.writeable = False
            object.__setattr__(self, name, values)
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "_mean_low", mean_low)
        object.__setattr__(self, "_m2_low", m2_low)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} cannot be set: Moments do not change")

    def var(self, ddof: float = 0) -> Float64:
        """Variance ``m2 / (count - ddof)``, shape (C,); NaN where that is not above 0."""
        divisor = self.count - _checks.ddof(ddof)
        return self.m2 / divisor if divisor > 0 else np.full_like(self.m2, np.nan)

    def std(self, ddof: float = 0) -> Float64:
        """Standard deviation, the square root of ``var(ddof)``."""
        return np.sqrt(self.var(ddof))

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both parts together."""
        if not isinstance(other, Moments):
            raise TypeError(f"other must be Moments, got {type(other).__name__}")
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"other must have as many features, {self.mean.size}, got {other.mean.size}"
            )
        if other.count == 0:
            return self
        if self.count == 0:
            return other
        count = self.count + other.count
        share = other.count / count
        with np.errstate(invalid="ignore", over="ignore"):  # as in x: infinity, NaN
            d, d_low = _two_sum(other.mean, -self.mean)
            # The means' low parts may be 1e-8 of d: without its digits in order d^2 lost some.
            d, d_low = _two_sum(d, d_low + (other._mean_low - self._mean_low))
            step, step_low = _two_product(d, share)
            # What the division left: count share = other.count is off by less than a rounding.
            rest = _quotient_rest(other.count, count, share)
            step_low += d_low * share + d * rest
            mean, mean_low = _add(self.mean, self._mean_low, step, step_low)
            if not np.isfinite(d).all():  # infinite, or the two are farther apart than float64 goes
                plain = self.mean * (self.count / count) + other.mean * share
                mean = np.where(np.isfinite(d), mean, plain)
                mean_low = np.where(np.isfinite(d), mean_low, 0.0)
            square, square_low = _two_product(d, self.count * step)
            square_low += self.count * (d * step_low + d_low * step)
            square_low += d * _product_rest(self.count, step)
            m2, m2_low = _add(self.m2, self._m2_low, other.m2, other._m2_low)
            m2, m2_low = _add(m2, m2_low, square, square_low)
        return _moments(count, mean, m2, mean_low, m2_low)

    def __add__(self, other: object) -> "Moments":
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def __radd__(self, other: object) -> "Moments":
        return self if isinstance(other, int) and other == 0 else NotImplemented  # of sum()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        return (
            self.count == other.count
            and np.array_equal(self.mean, other.mean, equal_nan=True)
            and np.array_equal(self.m2, other.m2, equal_nan=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        parts = self.count, self.mean, self.m2, self._mean_low, self._m2_low
        return _moments, parts

    def __repr__(self) -> str:
        count = int(self.count) if self.count == int(self.count) else self.count
        mean, m2 = (
            np.array2string(a, precision=4, threshold=6, edgeitems=2, separator=" ")
            for a in (self.mean, self.m2)
        )
        return f"Moments(count={count}, mean={mean}, m2={m2})"


def _moments(
    count: float, mean: Float64, m2: Float64, mean_low: Float64, m2_low: Float64
) -> Moments:
    """Moments with what lies beyond float64's digits."""
    new = Moments.__new__(Moments)
    new._set(count, mean, m2, mean_low, m2_low)
    return new


def moments_beyond(count: float, mean: Float64, m2: Float64, mean_low: Float64) -> Moments:
    """Moments whose mean has more digits than float64; the arrays may be shared."""
    return _moments(count, mean.copy(), m2.copy(), mean_low.copy(), np.zeros_like(m2))


def pack(m: Moments) -> Float64:
    """All of it as one row of numbers, to send to other processes."""
    return np.concatenate([[m.count], m.mean, m.m2, m._mean_low, m._m2_low])


def mean_low(m: Moments) -> Float64:
    """What the mean has beyond float64."""
    return m._mean_low


def merge_packed(rows: Float64) -> Moments:
    """The rows' moments merged in their order."""
    parts = [_moments(float(row[0]), *row[1:].reshape(4, -1).copy()) for row in rows]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    return whole


# Double-double arithmetic (Knuth 1969; Dekker 1971): a result and its rounding error, both float64.


def _two_sum(a: Float64, b: Float64) -> tuple[Float64, Float64]:
    s = a + b
    t = s - a
    return s, _finite((a - (s - t)) + (b - t))


def _product_rest(a: Any, b: Any) -> Any:
    """a b minus its rounding to float64; 0 where halves of 26 bits cannot tell."""
    a_high = a * 134217729.0
    a_high = a_high - (a_high - a)
    b_high = b * 134217729.0
    b_high = b_high - (b_high - b)
    a_low, b_low = a - a_high, b - b_high
    return _finite(((a_high * b_high - a * b) + a_high * b_low + a_low * b_high) + a_low * b_low)


def _two_product(a: Any, b: Any) -> tuple[Any, Any]:
    return a * b, _product_rest(a, b)


def _quotient_rest(a: float, b: float, quotient: float) -> float:
    """a/b minus its rounding."""
    rest: float = ((a - b * quotient) - _product_rest(b, quotient)) / b
    return rest


def _add(a: Float64, a_low: Float64, b: Float64, b_low: Float64) -> tuple[Float64, Float64]:
    high, low = _two_sum(a, b)
    total, rest = _two_sum(high, low + (a_low + b_low))
    return np.where(np.isfinite(total), total, high), rest


def _finite(a: Any) -> Any:
    return np.where(np.isfinite(a), a, 0.0)
