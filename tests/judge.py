"""How results are judged: in roundings (units of the dtype's eps) of the largest value."""

import numpy as np

# What the engine must keep, in eps of the result's dtype. It needs about 2.5 at most; each result
# takes three or four roundings: x - shift, times scale, (minus the other term,) plus bias.
LIMIT = 4


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
    error = roundings(got, expected, scale)
    assert error <= limit, f"{name} is {error:.3g} eps off (limit {limit}) for x {describe(like)}"


def check_gradients(got, expected, like, limit=LIMIT, cancels=False):
    """dx, dgamma, dbeta against an `oracle.Gradients`.

    Where M is small dx is judged by its largest term: its projection takes two of M degrees of
    freedom from dout, which may leave little. So it may with repeated values (`cancels`).
    """
    dx, dgamma, dbeta = got
    cancels = cancels or dx.size < 10 * dgamma.size
    check("dx", dx, expected.dx, like, limit, expected.dx_scale if cancels else 0.0)
    check("dgamma", dgamma, expected.dgamma, like, limit, expected.dgamma_scale)
    check("dbeta", dbeta, expected.dbeta, like, limit, expected.dbeta_scale)


def assert_same_bits(got, expected):
    """Equal to the last bit, the sign of zero and the payload of NaN included."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()
