"""The statistics of one part of the data, which add up to those of the whole."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _checks
from ._core import core
from ._types import Array, Count

__all__ = ["Moments"]

Float64 = NDArray[np.float64]
Exponent = NDArray[np.intc]


class Moments:
    r"""Count, mean and sum of squared deviations of each feature; those of two parts add up.

    Parameters
    ----------
    count : float, or ndarray of the shape of mean
        M, how many values each feature has; at least 0.
    mean, m2 : array_like, shape (C,) or of more dimensions
        Mean, and ``sum((x - mean)**2)``, of each feature. Without values m2 is 0 and mean is not
        read.

    Attributes
    ----------
    count : float or ndarray
    mean, m2 : ndarray, float64, of the shape given, read-only
        mean is NaN where there are no values. m2 is infinite or 0 where it leaves float64's range;
        variances and standard deviations, and merged moments, do not on that account. count is an
        array, read-only too, where it was given as one or weights differed between features.

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
    nothing; a count beyond float64's range leaves NaN. ``a + b``, ``a.merge(b)`` and ``sum(parts)``
    merge from left to right; another order may change the last digit, and the same order always
    gives the same bits. To a type checker ``sum`` may be 0, of no parts: `normalize` takes it as it
    is, and ``functools.reduce(Moments.merge, parts)`` is Moments to it.

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

    __slots__ = ("_rows", "count", "mean")

    count: Count
    mean: Float64
    # Of shape (6, C): count, mean, its low part, m2, its low part and exponent; m2 in units of
    # 4^exponent, in which m2 / count is near 1: variances of 1e400 have room.
    _rows: Float64

    def __init__(self, count: Count, mean: ArrayLike, m2: ArrayLike) -> None:
        count, mean, m2 = _checks.moments_of(count, mean, m2)
        rows = np.zeros((6, *mean.shape))
        rows[0], rows[1], rows[3] = count, mean, m2
        core.settle_moments(rows)
        self._set(count, rows)

    def _set(self, count: Count, rows: Float64) -> None:
        rows.flags.writeable = False
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "mean", rows[1])
        object.__setattr__(self, "count", rows[0] if isinstance(count, np.ndarray) else count)

    @property
    def m2(self) -> Float64:
        """Sum of squared deviations."""
        with np.errstate(over="ignore", under="ignore"):
            m2: Float64 = np.ldexp(self._rows[3], 2 * _exponents(self))
        m2.flags.writeable = False
        return m2

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} cannot be set: Moments do not change")

    def var(self, ddof: float = 0) -> Float64:
        """Variance ``m2 / (count - ddof)``, in the shape of mean; NaN where that is not above 0."""
        var: Float64 = _deviations(self, _checks.finite(ddof, "ddof"))[1]
        return var

    def std(self, ddof: float = 0) -> Float64:
        """Standard deviation, the square root of the variance, also where float64 has room for the
        root alone."""
        std: Float64 = _deviations(self, _checks.finite(ddof, "ddof"))[2]
        return std

    def merge(self, other: Moments) -> Moments:
        """The moments of both parts together."""
        if not isinstance(other, Moments):
            raise TypeError(f"other must be Moments, got {type(other).__name__}")
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"other must have features of shape {self.mean.shape}, got {other.mean.shape}"
            )
        if not np.any(other.count):
            return self
        if not np.any(self.count):
            return other
        rows = core.merged_moments(self._rows, other._rows)
        differ = isinstance(self.count, np.ndarray) or isinstance(other.count, np.ndarray)
        return _moments(rows[0] if differ else self.count + other.count, rows)

    def __add__(self, other: object) -> Moments:
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def __radd__(self, other: object) -> Moments:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # of sum()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Moments):
            return NotImplemented
        return (
            self.mean.shape == other.mean.shape
            and bool(np.all(self.count == other.count))
            and np.array_equal(self.mean, other.mean, equal_nan=True)
            and np.array_equal(self._rows[3], other._rows[3], equal_nan=True)
            and np.array_equal(self._rows[5], other._rows[5])
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.count, *self._rows[1:5], _exponents(self))

    def __repr__(self) -> str:
        count: Any = self.count
        if not isinstance(count, np.ndarray):
            count = int(count) if math.isfinite(count) and count == int(count) else count
        count, mean, m2 = (
            np.array2string(a, precision=4, threshold=6, edgeitems=2, separator=" ")
            if isinstance(a, np.ndarray)
            else a
            for a in (count, self.mean, self.m2)
        )
        return f"Moments(count={count}, mean={mean}, m2={m2})"


def _moments(count: Count, rows: Float64) -> Moments:
    """Moments of these rows, which they keep."""
    new = Moments.__new__(Moments)
    new._set(count, rows)
    return new


def _exponents(m: Moments) -> Exponent:
    exponents: Exponent = m._rows[5].astype(np.intc)
    return exponents


def _deviations(m: Moments, ddof: float, eps: float = 0) -> Float64:
    """1/sqrt(var + eps), 0 where that is without deviation; var; and sqrt(var + eps)."""
    return core.deviations_of_moments(m._rows, ddof, eps)


def from_statistics(count: Count, stats: Array, powers: NDArray[np.int64] | None = None) -> Moments:
    """Moments of x from what the engine found with eps = 0: mean and its low part; inv_std and var
    of 2^powers x."""
    return _moments(count, core.moments_of_statistics(np.asarray(count), stats, powers))


def mean_low(m: Moments) -> Float64:
    """What the mean has beyond float64."""
    low: Float64 = m._rows[2]
    return low


def deviation(m: Moments, eps: float) -> Float64:
    """sqrt(var + eps), also where the variance leaves float64's range."""
    std: Float64 = _deviations(m, 0, eps)[2]
    return std


def statistics(m: Moments, eps: float) -> Array:
    """Mean, its low part, inv_std and var, shape (4, n_features), as the engine takes them: inv_std
    is 0 for a feature without deviation, which then becomes beta."""
    return np.concatenate([m._rows[1:3], _deviations(m, 0, eps)[:2]]).reshape(4, -1)


def pack(m: Moments) -> Float64:
    """All of it as one row of numbers, to send to other processes; its count is a number."""
    return np.append(m.count, m._rows[1:])


def to_rows(m: Moments) -> Float64:
    """All of it as rows of a number for each feature, shape (6, C), the first the counts."""
    return m._rows


def from_rows(rows: Array) -> Moments:
    """The same back; one count where all are alike."""
    own = np.array(rows, np.float64, order="C")
    core.settle_moments(own)
    counts = own[0]
    alike = counts.size == 0 or (counts == counts[0]).all()
    return _moments(float(counts.max(initial=0)) if alike else counts, own)


def merge_packed(rows: Float64) -> Moments:
    """The rows' moments merged in their order."""
    return reduce(Moments.merge, map(_unpacked, rows))


def _unpacked(row: Float64) -> Moments:
    values = row[1:].reshape(5, -1)
    return _moments(float(row[0]), np.vstack([np.full_like(values[:1], row[0]), values]))


def _unpickled(*state: Any) -> Moments:
    """What a pickle kept, if it fits itself: that of another version may not."""
    kinds = "fffffi"  # as __reduce__ has them: 5 of float64, and the exponents
    arrays = [np.asarray(value) for value in state]
    shape = arrays[1].shape if len(arrays) > 1 else ()
    fits = (
        "".join(a.dtype.kind for a in arrays) == kinds
        and all(a.dtype.itemsize == 8 for a in arrays[:5])
        and [a.shape for a in arrays[1:]] == [shape] * 5
        and arrays[0].shape in ((), shape)
        and len(shape) >= 1
        and bool((arrays[0] >= 0).all())
        and not (arrays[3] < 0).any()
    )
    if not fits:
        raise ValueError("this pickle of Moments does not fit itself, or is of another version")
    rows = np.empty((6, *shape))
    rows[0], rows[1:] = arrays[0], arrays[1:]
    core.settle_moments(rows)
    return _moments(rows[0] if arrays[0].ndim else float(arrays[0]), rows)
