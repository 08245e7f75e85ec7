"""How results are judged: in roundings (units of the dtype's eps) of the largest value."""

from typing import NamedTuple

import numpy as np

# What the engine must keep, in eps of the result's dtype. It needs about 2.5 at most; each result
# takes three or four roundings: x - shift, times scale, (minus the other term,) plus bias.
LIMIT = 4

# Half types are storage alone: float32's roundings, and then one of their own.
HALF_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
HALF_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126}  # below it roundings get no smaller


def describe(a):
    order = "C" if a.flags.c_contiguous else "F" if a.flags.f_contiguous else "strided"
    return f"{a.dtype} {a.shape}, {order}, strides {a.strides}"


def roundings(got, expected, scale=0.0):
    """The largest error in eps of the largest value, or of `scale` if that is larger."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    if got.size == 0:
        return 0.0
    error = np.max(np.abs(got.astype(np.longdouble) - expected))
    largest = max(np.max(np.abs(expected)), scale)
    return 0.0 if error == 0 else float(error / (largest * np.finfo(got.dtype).eps))


def check(name, got, expected, like, limit=LIMIT, scale=0.0):
    """Values within `limit` roundings of the expected ones (NaN never is), in the dtype of x."""
    assert type(got) is np.ndarray
    assert got.dtype == like.dtype.newbyteorder("=")
    if half := HALF_EPS.get(got.dtype.name):
        limit += 0.5 * half / float(np.finfo(np.float32).eps)
        scale = max(scale, HALF_NORMAL[got.dtype.name])
        is_float16 = got.dtype == np.float16
        got = got.astype(np.float32)
        if is_float16:
            got, expected = _without_overflow(got, expected, scale)
    error = roundings(got, expected, scale)
    assert error <= limit, f"{name} is {error:.3g} eps off (limit {limit}) for x {describe(like)}"


def _without_overflow(got, expected, scale):
    """What float16 can hold; infinity, as of a cast, must stand for the rest."""
    if got.size == 0 or np.max(np.abs(expected)) < 65000:
        return got, expected
    beyond = np.abs(expected) > 65520  # halfway to the value that would follow the largest
    near = np.abs(np.abs(expected) - 65520) < 1 + 1e-6 * scale
    np.testing.assert_array_equal(got[beyond & ~near], np.inf * np.sign(expected[beyond & ~near]))
    return (np.where(beyond | near, 0, a) for a in (got, expected))


def check_gradients(got, expected, like, limit=LIMIT, cancels=False):
    """dx, dgamma, dbeta against an `oracle.Gradients`.

    Where M is small dx is judged by its largest term: its projection takes two of M degrees of
    freedom from dout, which may leave little. So it may with repeated values (`cancels`).
    """
    dx, dgamma, dbeta = got
    cancels = cancels or dx.size < 10 * dgamma.size
    check("dx", dx, expected.dx, like, limit, expected.dx_scale if cancels else 0.0)
    if like.dtype.name in HALF_EPS:
        like = dgamma.astype(np.float32)
    check("dgamma", dgamma, expected.dgamma, like, limit, expected.dgamma_scale)
    check("dbeta", dbeta, expected.dbeta, like, limit, expected.dbeta_scale)


def one_nan(a):
    """NaN - NaN has the sign of one of them: which one, IEEE 754 leaves to the CPU."""
    return np.where(np.isnan(a), a.dtype.type(np.nan), a)


def assert_same_bits(got, expected):
    """Equal to the last bit, the sign of zero and the payload of NaN included."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def slopes(loss, a, h=1e-4):
    """The gradient of loss() where a is moved, by central differences: off by h**2 times the third
    derivative."""
    gradient = np.empty_like(a)
    for i in np.ndindex(a.shape):
        value = a[i]
        a[i] = value + h
        high = loss()
        a[i] = value - h
        gradient[i] = (high - loss()) / (2 * h)
        a[i] = value
    return gradient


class Exact(NamedTuple):
    """What a result should be, the size of what was added up for it, and what may be lost anyway.

    apart: elements that are judged by their own size, not by that of all. loose: NaN and infinity
    may stand for one another.
    """

    value: np.ndarray
    scale: float = 0.0
    floor: float = 0.0
    apart: np.ndarray | None = None
    loose: bool = False


def fault(name, got, exact, lanes, limit=LIMIT):
    """What is wrong with a result that lanes of this dtype have computed; "" if nothing is.

    NaN must be NaN and infinity infinity, of the same sign; what the result's dtype cannot hold
    must be infinite, too.
    """
    value = np.asarray(exact.value, np.longdouble)
    assert got.shape == value.shape
    half = HALF_EPS.get(got.dtype.name, 0.0)
    tiny = HALF_NORMAL.get(got.dtype.name) or float(np.finfo(got.dtype).tiny)
    eps = 2.0 ** (-52 if lanes.itemsize == 8 else -23)
    with np.errstate(all="ignore"):
        target = value.astype(np.float32 if half else got.dtype).astype(got.dtype)
    top = 65520 if got.dtype == np.float16 else float(np.nextafter(np.inf, 0, dtype=_wide(got)))
    got, target = (a.astype(np.longdouble) for a in (got, target))
    edge = np.abs(np.abs(value) / top - 1) < limit * eps + half  # may be the largest or infinity
    finite = np.isfinite(target) & ~edge
    faults = []
    for part in [finite] if exact.apart is None else [finite & exact.apart, finite & ~exact.apart]:
        size = np.abs(value[part])
        tolerance = limit * eps * max(size.max(initial=0), exact.scale, tiny) + exact.floor
        error = np.abs(got[part] - value[part]) - half / 2 * np.maximum(size, tiny)
        if not (error <= tolerance).all():
            worst = np.argmax(np.where(np.isnan(error), np.inf, error))
            faults.append(
                f"{error[worst] / tolerance * limit:.3g} eps off (limit {limit}):"
                f" {got[part][worst]:.9g} for {value[part][worst]:.9g}"
            )
    right = got == target if not exact.loose else ~np.isfinite(got)
    # Too large for the dtype, and yet no more than its terms' roundings: of either sign. With M = 2
    # and eps = 0 the second order's dx is 0, and x 1e-30 apart makes 1e60 of its terms.
    unsure = np.isfinite(value) & np.isfinite(exact.scale) & ~np.isnan(got)
    right |= unsure & (np.abs(value) <= limit * eps * exact.scale)
    wrong = ~finite & ~edge & ~(right | (np.isnan(got) & np.isnan(target)))
    if wrong.any():
        faults.append(f"{got[wrong][0]:.9g} for {target[wrong][0]:.9g}")
    return f"{name} is {' and '.join(faults)}" if faults else ""


def _wide(a):
    return np.float64 if a.dtype.itemsize == 8 else np.float32
