"""The statistics of one part of the data, which add up to those of the whole."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _checks
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

    __slots__ = ("_exponent", "_m2", "_m2_low", "_mean_low", "count", "m2", "mean")

    count: Count
    mean: Float64
    m2: Float64
    _mean_low: Float64
    # m2 = _m2 4^_exponent, where _m2 / count is near 1: variances of 1e400 have room.
    _m2: Float64
    _m2_low: Float64
    _exponent: Exponent

    def __init__(self, count: Count, mean: ArrayLike, m2: ArrayLike) -> None:
        count, mean, m2 = _checks.moments_of(count, mean, m2)
        zeros = np.zeros_like(mean)
        self._set(count, mean, zeros, m2, zeros, np.zeros(mean.shape, np.intc))

    def _set(
        self,
        count: Count,
        mean: Float64,
        mean_low: Float64,
        m2: Float64,
        m2_low: Float64,
        exponent: Exponent,
    ) -> None:
        if isinstance(count, np.ndarray):
            count = count.copy()
            count.flags.writeable = False
            nothing = count == 0
            mean = np.where(nothing, np.nan, mean)
            mean_low, m2, m2_low = (np.where(nothing, 0.0, a) for a in (mean_low, m2, m2_low))
        elif count == 0:
            mean = np.full_like(mean, np.nan)
            mean_low, m2, m2_low = np.zeros((3, *mean.shape))
        none = _size(m2) == _NO_SIZE
        step = np.where(none, 0, (_size(m2) - _count_size(count)) // 2)
        exponent = np.where(none, 0, exponent + step)
        with np.errstate(over="ignore", under="ignore"):
            m2, m2_low = np.ldexp(m2, -2 * step), np.ldexp(m2_low, -2 * step)
            whole = np.ldexp(m2, 2 * exponent)
        for name, values in (("mean", mean), ("m2", whole)):
            values.flags.writeable = False
            object.__setattr__(self, name, values)
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "_mean_low", mean_low)
        object.__setattr__(self, "_m2", m2)
        object.__setattr__(self, "_m2_low", m2_low)
        object.__setattr__(self, "_exponent", exponent)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} cannot be set: Moments do not change")

    def _scaled_var(self, ddof: float) -> Float64:
        """The variance over 4^_exponent."""
        divisor = self.count - _checks.ddof(ddof)
        if isinstance(divisor, np.ndarray):
            var = np.full_like(self._m2, np.nan)
            np.divide(self._m2, divisor, out=var, where=divisor > 0)
            return var
        return self._m2 / divisor if divisor > 0 else np.full_like(self._m2, np.nan)

    def var(self, ddof: float = 0) -> Float64:
        """Variance ``m2 / (count - ddof)``, in the shape of mean; NaN where that is not above 0."""
        with np.errstate(over="ignore", under="ignore"):
            return np.ldexp(self._scaled_var(ddof), 2 * self._exponent)

    def std(self, ddof: float = 0) -> Float64:
        """Standard deviation, the square root of the variance, also where float64 has room for the
        root alone."""
        with np.errstate(over="ignore", under="ignore"):
            return np.ldexp(np.sqrt(self._scaled_var(ddof)), self._exponent)

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
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):  # as in x: infinity, NaN
            return _merged(self, other)

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
            and np.array_equal(self._m2, other._m2, equal_nan=True)
            and np.array_equal(self._exponent, other._exponent)
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.count, *_rows(self), self._exponent)

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


def _moments(
    count: Count,
    mean: Float64,
    mean_low: Float64,
    m2: Float64,
    m2_low: Float64,
    exponent: Exponent,
) -> Moments:
    """Moments with what lies beyond float64's digits and range."""
    new = Moments.__new__(Moments)
    new._set(count, mean, mean_low, m2, m2_low, exponent)
    return new


def _merged(a: Moments, b: Moments) -> Moments:
    """Of two parts that have values; nothing is known of more values than float64 counts."""
    count = a.count + b.count
    share: Any = np.where(count < math.inf, b.count / count, math.nan)[()]
    # Means at both ends of the range are farther apart than it is wide, their halves are not.
    far = np.maximum(np.abs(a.mean), np.abs(b.mean)) > 1e307
    unit = np.where(far, 0.5, 1.0)
    d, d_low = _two_sum(b.mean * unit, -a.mean * unit)
    # The means' low parts may be 1e-8 of d: without its digits in order d^2 lost some.
    d, d_low = _two_sum(d, d_low + (b._mean_low - a._mean_low) * unit)
    # From here on in units of 2^exponent, in which the largest term of m2 is near count.
    square_size = 2 * (_size(d) + far) + np.frexp(a.count)[1] + np.frexp(share)[1]
    size = np.maximum(2 * a._exponent + _size(a._m2), 2 * b._exponent + _size(b._m2))
    size = np.maximum(size, square_size)
    exponent = np.where(size < _NO_SIZE // 2, 0, (size - _count_size(count)) // 2)
    d, d_low = (np.ldexp(v, far - exponent) for v in (d, d_low))
    step, step_low = _two_product(d, share)
    # What the division left: count share = b.count is off by less than a rounding.
    step_low += d_low * share + d * _quotient_rest(b.count, count, share)
    moved = (np.ldexp(v, exponent - far) for v in (step, step_low))
    mean, mean_low = _add(a.mean * unit, a._mean_low * unit, *moved)
    mean, mean_low = mean / unit, mean_low / unit
    if not np.isfinite(d).all():
        plain = a.mean * (a.count / count) + b.mean * share
        mean = np.where(np.isfinite(d), mean, plain)
        mean_low = np.where(np.isfinite(d), mean_low, 0.0)
    square, square_low = _two_product(d, a.count * step)
    square_low += a.count * (d * step_low + d_low * step)
    square_low += d * _product_rest(a.count, step)
    m2, m2_low = _add(*_in_units(a, exponent), *_in_units(b, exponent))
    m2, m2_low = _add(m2, m2_low, square, square_low)
    values: tuple[Any, ...] = mean, mean_low, m2, m2_low, exponent
    if not (np.all(a.count) and np.all(b.count)):  # of some features one part has none
        values = tuple(
            np.where(np.asarray(b.count) == 0, own, np.where(np.asarray(a.count) == 0, other, both))
            for own, other, both in zip(_all_rows(a), _all_rows(b), values, strict=True)
        )
    return _moments(count, *values)


def _all_rows(m: Moments) -> tuple[Any, ...]:
    return *_rows(m), m._exponent


def _in_units(m: Moments, exponent: Exponent) -> tuple[Float64, Float64]:
    """m2 and what it has beyond float64's digits, over 4^exponent."""
    step = 2 * (m._exponent - exponent)
    return np.ldexp(m._m2, step), np.ldexp(m._m2_low, step)


def _size(values: Float64) -> Exponent:
    """The exponent of each; of 0 and of what is not finite one below all others."""
    exponent = np.frexp(values)[1]
    return np.where(np.isfinite(values) & (values != 0), exponent, _NO_SIZE)


_NO_SIZE = -20000


def _count_size(count: Count) -> Any:
    """Its exponent, kept where as many squares near 1 neither overflow nor sink."""
    return np.clip(np.frexp(count)[1], -900, 900)


def from_statistics(count: Count, stats: Array, power: Exponent | int = 0) -> Moments:
    """Moments of x from what the engine found with eps = 0: mean and its low part; inv_std and var
    of 2^power x."""
    mean, low, inv_std, var = stats
    # The inverse deviation has its digits where the variance is beyond the range, or subnormal.
    lost = (inv_std > 0) & np.isfinite(inv_std) & ~((var >= np.finfo(float).tiny) & (var < np.inf))
    with np.errstate(all="ignore"):
        root, inverse = np.frexp(inv_std)
        size = np.where(_size(var) == _NO_SIZE, 0, _size(var))
        exponent = 2 + np.where(lost, -inverse, size // 2)  # 2: times the largest count is finite
        m2 = np.where(lost, 1 / (4 * root) ** 2, np.ldexp(var, -2 * exponent)) * count
    exponent = (exponent - power).astype(np.intc)
    return _moments(count, mean.copy(), low.copy(), m2, np.zeros_like(m2), exponent)


def mean_low(m: Moments) -> Float64:
    """What the mean has beyond float64."""
    return m._mean_low


def deviation(m: Moments, eps: float) -> Float64:
    """sqrt(var + eps), also where the variance leaves float64's range."""
    exponent = np.maximum(m._exponent, math.frexp(eps)[1] // 2) if eps else m._exponent
    with np.errstate(over="ignore", under="ignore"):
        var = np.ldexp(m._scaled_var(0), 2 * (m._exponent - exponent))
        std: Float64 = np.ldexp(np.sqrt(var + np.ldexp(eps, -2 * exponent)), exponent)
    return std


def statistics(m: Moments, eps: float) -> Array:
    """Mean, its low part, inv_std and var, shape (4, n_features), as the engine takes them: inv_std
    is 0 for a feature without deviation, which then becomes beta."""
    std = deviation(m, eps)
    with np.errstate(over="ignore"):
        inv_std = np.divide(1, std, out=np.zeros_like(std), where=std != 0)
    return np.array([m.mean, m._mean_low, inv_std, m.var()]).reshape(4, -1)


def pack(m: Moments) -> Float64:
    """All of it as one row of numbers, to send to other processes; its count is a number."""
    return np.concatenate([[m.count], *_rows(m), m._exponent])


def _rows(m: Moments) -> tuple[Float64, ...]:
    return m.mean, m._mean_low, m._m2, m._m2_low


def to_rows(m: Moments) -> Float64:
    """All of it as rows of a number for each feature, shape (6, C), the first the counts."""
    return np.vstack([np.broadcast_to(m.count, m.mean.shape), *_all_rows(m)])


def from_rows(rows: Array) -> Moments:
    """The same back; one count where all are alike."""
    counts, mean, low, m2, m2_low, exponent = np.array(rows)
    alike = counts.size == 0 or (counts == counts[0]).all()
    count = float(counts.max(initial=0)) if alike else counts
    return _moments(count, mean, low, m2, m2_low, exponent.astype(np.intc))


def merge_packed(rows: Float64) -> Moments:
    """The rows' moments merged in their order."""
    parts = []
    for row in rows:
        mean, low, m2, m2_low, exponent = row[1:].reshape(5, -1).copy()
        parts.append(_moments(float(row[0]), mean, low, m2, m2_low, exponent.astype(np.intc)))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part)
    return whole


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
    mean, low, m2, m2_low = (a.astype(np.float64) for a in arrays[1:5])
    count = arrays[0].astype(np.float64) if arrays[0].ndim else float(arrays[0])
    return _moments(count, mean, low, m2, m2_low, arrays[5].astype(np.intc))


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


def _quotient_rest(a: Any, b: Any, quotient: Any) -> Any:
    """a/b minus its rounding."""
    return ((a - b * quotient) - _product_rest(b, quotient)) / b


def _add(a: Float64, a_low: Float64, b: Float64, b_low: Float64) -> tuple[Float64, Float64]:
    high, low = _two_sum(a, b)
    total, rest = _two_sum(high, low + (a_low + b_low))
    return np.where(np.isfinite(total), total, high), rest


def _finite(a: Any) -> Any:
    return np.where(np.isfinite(a), a, 0.0)
