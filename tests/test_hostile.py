"""Data that costs careless code its digits: offsets, drift, outliers, huge, tiny, NaN, infinity."""

import numpy as np
import pytest

from bn_fast import batchnorm_backward, batchnorm_forward

from . import oracle
from .arrays import DTYPES, normal
from .judge import check, check_gradients, roundings

pytestmark = pytest.mark.filterwarnings("error")  # never a warning: NaN and inf say it

F32 = np.finfo(np.float32)


def ramp(shape):
    """From 0 to 1 over the rows."""
    return np.linspace(0, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


def outlier(noise):
    x = noise.copy()
    x[len(x) // 3] = 1e6
    return x


HOSTILE = {
    "plain": lambda noise: noise,
    "offset 1e2": lambda noise: noise + 1e2,
    "offset 1e4": lambda noise: noise + 1e4,
    "offset 1e6": lambda noise: noise + 1e6,
    "drift of 1000": lambda noise: noise + 1000 * ramp(noise.shape),
    "one row of 1e6": outlier,
}


@pytest.fixture(
    scope="module",
    params=[
        ((4096, 33), 1),
        ((70000, 20), 1),
        ((16, 24, 31, 29), 1),
        ((16, 31, 29, 24), 3),
        ((1000000, 24), 1),
    ],
    ids=str,
)
def noise(request):
    """x and dout to start from: float32, made once for each shape, and the axis."""
    shape, axis = request.param
    rng = np.random.default_rng(7)
    return rng.standard_normal(shape, "f4"), rng.standard_normal(shape, "f4"), axis


@pytest.mark.parametrize("kind", HOSTILE)
def test_float32_keeps_its_digits(noise, kind):
    x, dout, axis = noise
    x = HOSTILE[kind](x).astype(np.float32)
    n = x.shape[axis]
    gamma, beta = 1 + normal(n, np.float32, 1) / 4, normal(n, np.float32, 2)
    out, cache = batchnorm_forward(x, gamma, beta, axis=axis)
    dx, dgamma, _ = batchnorm_backward(dout, cache)
    # Of the largest arrays three features are judged, to save time.
    some = slice(None) if x.size < 1e7 else slice(0, n, 11)
    part = (slice(None),) * axis + (some,)
    expected = oracle.backward(dout[part], x[part], gamma[some], axis)
    expected_out = oracle.forward(x[part], gamma[some], beta[some], axis)
    assert roundings(out[part], expected_out) * F32.eps <= 4e-6
    assert roundings(dx[part], expected.dx) * F32.eps <= 4e-6
    assert roundings(dgamma[some], expected.dgamma) * F32.eps <= 1.6e-5


@pytest.mark.parametrize("shape", [(3000, 9), (20, 5, 11, 13)], ids=str)
@pytest.mark.parametrize("kind", ["offset", "drift", "outlier"])
def test_float64_keeps_its_digits(shape, kind):
    x = normal(shape, np.float64)
    if kind == "outlier":
        x[7] = 1e9
    else:
        x += 1e9 * (1 if kind == "offset" else ramp(shape))
    dout, gamma, beta = (normal(n, np.float64, 1) for n in (shape, shape[1], shape[1]))
    out, cache = batchnorm_forward(x, gamma, beta)
    check("out", out, oracle.forward(x, gamma, beta), x)
    check_gradients(batchnorm_backward(dout, cache), oracle.backward(dout, x, gamma), x)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.float32, 1), (np.float32, 1e36), (np.float64, 1), (np.float64, 1e300)]
)
def test_rows_that_mislead(dtype, scale):
    """The first, middle and last row, from which the engine guesses the mean, are the outliers.

    The rest is constant, so that roundings do not average out: shifted by such a guess, the
    variance would lose a factor of M/3. Where squares leave the range, the lanes are mended first.
    """
    x = np.tile(np.linspace(0.1, 0.9, 130), (4096, 1)).astype(dtype)
    x[[0, 2047, 4095]] += dtype(0.6)
    x *= dtype(scale)
    gamma, beta, dout = np.ones(130), np.zeros(130), normal(x.shape, dtype)
    for eps in (1e-5, 0.0):
        out, cache = batchnorm_forward(x, gamma, beta, {"mode": "train", "eps": eps})
        check("out", out, oracle.forward(x, gamma, beta, 1, eps), x)
        expected = oracle.backward(dout, x, gamma, 1, eps)
        check_gradients(batchnorm_backward(dout, cache), expected, x)


@pytest.mark.parametrize("shape", [(1000, 130), (3000, 200), (10000, 100)], ids=str)
def test_rows_that_mislead_a_little(shape):
    """All three lie three deviations from the mean, which is not far enough to look again: of the
    sum of squares nine parts of ten are taken off, and every digit of them counts."""
    x, dout = normal(shape, np.float64), normal(shape, np.float64, 1)
    x[[0, (shape[0] - 1) // 2, -1]] = 2.9
    gamma, beta = np.ones(shape[1]), np.zeros(shape[1])
    param = {"mode": "train", "momentum": 0}
    out, cache = batchnorm_forward(x, gamma, beta, param)
    check("var", param["running_var"], oracle.normalized(x)[2], x, 3)
    check("out", out, oracle.forward(x, gamma, beta), x)
    check_gradients(batchnorm_backward(dout, cache), oracle.backward(dout, x, gamma), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [4, 5])
def test_dgamma_of_many_rows(dtype, seed):
    """Where the mean is off by a fraction of a rounding, M times that comes into dgamma.

    dgamma is of the size of sqrt(M), because dout does not follow x; the limit allows for the
    M independent roundings of its terms, whose sum is of the size of sqrt(M) as well.
    """
    n_rows = 1000000
    x = 3 + 2 * normal((n_rows, 2), dtype, seed)
    dout = normal((n_rows, 2), dtype, seed + 100) + dtype(0.5)
    _, cache = batchnorm_forward(x, np.ones(2), np.zeros(2))
    dgamma = batchnorm_backward(dout, cache)[1]
    expected = oracle.backward(dout, x, np.ones(2)).dgamma
    assert roundings(dgamma, expected, np.sqrt(n_rows)) <= 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 7), (40, 9), (5, 3, 7, 7)], ids=str)
def test_deviation_far_below_that_of_eps(dtype, shape):
    """A thousandth of the mean, which itself is far below sqrt(eps): dgamma keeps its digits."""
    x = dtype(1e-10) + dtype(1e-13) * normal(shape, dtype)
    gamma, beta = np.ones(shape[1], dtype), np.zeros(shape[1], dtype)
    for dout in (x, normal(shape, dtype, 1)):
        _, cache = batchnorm_forward(x, gamma, beta)
        check_gradients(batchnorm_backward(dout, cache), oracle.backward(dout, x, gamma), x)


SCALES = [
    (np.float32, 1e25),
    (np.float32, 1e30),
    (np.float32, 1e37),
    (np.float32, 1e-25),
    (np.float32, 1e-30),
    (np.float64, 1e160),
    (np.float64, 1e300),
    (np.float64, 1e-160),
    (np.float64, 1e-300),
]


@pytest.mark.parametrize("eps", [1e-5, 0.0])
@pytest.mark.parametrize("shape", [(300, 20), (9, 3, 7, 7), (4, 3, 300)], ids=str)
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_values_whose_squares_leave_the_range(dtype, scale, shape, eps):
    """In every feature, and in one with neighbors of ordinary size."""
    gamma, beta = 1 + normal(shape[1], dtype, 1) / 4, normal(shape[1], dtype, 2)
    dout = normal(shape, dtype, 3)
    for part in (slice(None), slice(1, 2)):
        x = normal(shape, dtype)
        x[:, part] *= dtype(scale)
        out, cache = batchnorm_forward(x, gamma, beta, {"mode": "train", "eps": eps})
        check("out", out, oracle.forward(x, gamma, beta, 1, eps), x)
        dx, dgamma, dbeta = batchnorm_backward(dout, cache)
        for f in (0, 1, 2):  # each by its own size, which the neighbors do not share
            own = slice(f, f + 1)
            expected = oracle.backward(dout[:, own], x[:, own], gamma[own], 1, eps)
            check_gradients((dx[:, own], dgamma[own], dbeta[own]), expected, x)


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(300, 20), (9, 3, 7, 7), (4, 3, 300)], ids=str)
def test_gamma_and_inv_std_whose_product_sinks_to_zero(shape, activation, mode):
    """Neither 1e-200 x_hat nor dx, with a dout of 1e200, is 0; nor is the gate shut."""
    x, dout = 1e153 * normal(shape, np.float64), 1e200 * normal(shape, np.float64, 1)
    gamma, beta = 1e-200 * (1 + normal(shape[1], np.float64, 2) / 8), np.zeros(shape[1])
    param, given = {"mode": mode}, {}
    if mode == "test":
        given = {"mean": np.full(shape[1], 1e152), "var": np.full(shape[1], 1e306)}
        param |= {"running_mean": given["mean"], "running_var": given["var"]}
    out, cache = batchnorm_forward(x, gamma, beta, param, activation=activation)
    z = oracle.forward(x, gamma, beta, **given)
    gate = z > 0 if activation else np.ones(shape, bool)
    check("out", out, np.where(gate, z, 0), x)
    expected = oracle.backward(dout * gate, x, gamma, **given, gated=True)
    check_gradients(batchnorm_backward(dout, cache), expected, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 20), (9, 3, 7, 7)], ids=str)
def test_subnormals(dtype, shape):
    """Computed like any other number, not flushed to zero."""
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.random.default_rng(0).integers(0, 1000, shape).astype(dtype) * tiny
    gamma, beta, dout = np.ones(shape[1], dtype), np.zeros(shape[1], dtype), normal(shape, dtype)
    out, cache = batchnorm_forward(x, gamma, beta)
    # Not even the mean is a whole number of the smallest steps: half a step is lost, times inv_std.
    assert np.abs(out - oracle.forward(x, gamma, beta)).max() <= tiny / np.sqrt(1e-5)
    assert out.any()
    check("dx", batchnorm_backward(dout, cache)[0], oracle.backward(dout, x, gamma).dx, x)
    if dtype is np.float32:
        out, _ = batchnorm_forward(x, gamma, beta, {"mode": "train", "eps": 0})
        check("out", out, oracle.forward(x, gamma, beta, 1, 0), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3000, 9), (70000, 2), (20, 5, 11, 13)], ids=str)
@pytest.mark.parametrize("kind", ["offset", "drift", "outlier"])
def test_hostile_dout(dtype, shape, kind):
    """dx has nothing of dout's mean, however large it is."""
    x, dout = normal(shape, dtype), normal(shape, dtype, 1)
    if kind == "outlier":
        dout[7] = 1e6
    else:
        dout += dtype(1e6) * (dtype(1) if kind == "offset" else ramp(shape).astype(dtype))
    gamma, beta = normal(shape[1], dtype, 1), normal(shape[1], dtype, 2)
    _, cache = batchnorm_forward(x, gamma, beta)
    check_gradients(batchnorm_backward(dout, cache), oracle.backward(dout, x, gamma), x)


@pytest.mark.parametrize(
    ("dtype", "m", "big"),
    [
        (np.float32, 1000, 1e9),
        (np.float32, 100_000, 1e9),
        (np.float32, 300_000, 1e9),
        (np.float64, 300_000, 1e17),
        (np.float64, 1000, 1e300),
    ],
)
@pytest.mark.parametrize("inner", [(), (4,), (500,)], ids=str)
@pytest.mark.parametrize("places", ["alike", "two", "apart", "zeros"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_outliers_where_the_shift_of_dout_is_guessed(dtype, m, big, inner, places, activation):
    """Three values say where dout lies. They may all say the wrong thing."""
    shape = (m // int(np.prod(inner)), 2, *inner)
    x = normal(shape, dtype)
    dout = np.ones((2, m), dtype)
    dout[1] += normal((m,), dtype, 1) / 4
    sampled = [0, (m - 1) // 2, m - 1]
    if inner == (500,) or m == 100_000:  # where runs, or their pieces, put the middle one
        sampled += [m // 2 - 1, (m // 500 - 1) // 2 * 500 + 249, 49_499 % m]
    value = {"alike": [big], "two": [big], "apart": [big, 2 * big, 3 * big], "zeros": [0]}[places]
    dout[:, sampled] = np.resize(value, len(sampled))
    if places == "two":
        dout[:, 0] = 1
    if places == "zeros":
        dout[:, 1:-1] *= dtype(big)
        dout[:, sampled] = 0
    dout = np.moveaxis(dout.reshape(2, shape[0], *inner), 0, 1).copy()
    gamma, beta = np.ones(2), np.full(2, 20.0)  # a gate that is open to all
    _, cache = batchnorm_forward(x, gamma, beta, activation=activation)
    got = batchnorm_backward(dout, cache)
    expected = oracle.backward(dout, x, gamma)
    check_gradients(got, expected, x)


@pytest.mark.parametrize("by_residual", [False, True])
@pytest.mark.parametrize(("dtype", "big"), [(np.float32, 1e9), (np.float64, 1e17)])
def test_a_second_look_at_dout_sees_what_comes_through(dtype, big, by_residual):
    """The three values mislead, and where the gate is shut there are more like them."""
    shape = (20_001, 130)
    sign = np.sign(normal(shape, dtype))
    sign[[0, 10_000, 20_000]] = 1
    x, residual = (normal(shape, dtype, 1), 10 * sign) if by_residual else (sign, None)
    dout = np.where(sign > 0, dtype(1), dtype(big))
    dout[[0, 10_000, 20_000]] = big
    gamma, beta = np.ones(130), np.zeros(130)
    _, cache = batchnorm_forward(x, gamma, beta, activation="relu", residual=residual)
    got = batchnorm_backward(dout, cache)
    check_gradients(got[:3], oracle.backward(dout * (sign > 0), x, gamma, gated=True), x)


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("shape", [(3, 5), (300, 70), (9, 3, 7, 7), (4, 3, 300)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.float32, 1e36), (np.float32, 2e38), (np.float64, 1e300), (np.float64, 1e308)],
)
@pytest.mark.parametrize(("offset", "spread"), [(0, 1e-3), (1, 1e-3), (0.5, 2)])
@pytest.mark.parametrize("along", [False, True])
def test_dout_near_the_end_of_the_range(dtype, scale, shape, offset, spread, activation, along):
    """dx is as exact as ever; a sum that leaves the range is infinite. Along x, dout has most of
    its size in dgamma; and where x hardly differs, its product with dout is smaller than that."""
    x = dtype(1e-2 if along else 1e3) * normal(shape, dtype)
    dout = offset + dtype(spread) * normal(shape, dtype, 1)
    dout = dtype(scale) * np.clip(dout + along * 50 * x, -1.5, 1.5, dtype=dtype)
    gamma, beta = 1 + normal(shape[1], dtype, 2) / 8, np.full(shape[1], 20.0)
    gamma *= dtype(1e-3 if along else 1)
    _, cache = batchnorm_forward(x, gamma, beta, activation=activation)
    dx, dgamma, dbeta = batchnorm_backward(dout, cache)
    expected = oracle.backward(dout, x, gamma)
    check("dx", dx, expected.dx, x, scale=expected.dx_scale if along or shape[0] < 10 else 0)
    largest = np.finfo(dtype).max
    for name, got, right in zip(("dgamma", "dbeta"), (dgamma, dbeta), expected[1:3], strict=True):
        with np.errstate(over="ignore"):
            held = np.abs(right) <= largest
        np.testing.assert_array_equal(np.isinf(got), ~held)
        check(name, got[held], right[held], x, scale=getattr(expected, f"{name}_scale"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (40, 70), (9, 3, 7, 7), (4, 3, 300)], ids=str)
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_gamma_leaves_the_sign_of_x_hat(dtype, shape, value):
    x = normal(shape, dtype) + 3
    gamma, beta = np.ones(shape[1], dtype), normal(shape[1], dtype, 1)
    gamma[0] = value
    out, _ = batchnorm_forward(x, gamma, beta)
    x_hat = oracle.normalized(x)[0]
    np.testing.assert_array_equal(out[:, 0], value * np.sign(x_hat[:, 0]).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 24, 15, 13), (1560, 24), (5000, 9)], ids=str)
@pytest.mark.parametrize("mean", [0, 0.5, 2])
@pytest.mark.parametrize("seed", range(1, 7))
def test_sums_of_a_dout_near_0_are_those_of_the_largest(dtype, shape, mean, seed):
    """A shift that says nothing would be rounded M times: 12 roundings for dbeta, NumPy has 1."""
    x, dout = normal(shape, dtype), normal(shape, dtype, seed) + dtype(mean)
    gamma, beta = np.ones(shape[1]), np.zeros(shape[1])
    _, dgamma, dbeta = batchnorm_backward(dout, batchnorm_forward(x, gamma, beta)[1])
    expected = oracle.backward(dout, x, gamma)
    assert roundings(dbeta, expected.dbeta) <= 4
    if mean == 0:  # else what x_hat takes off dout's mean is larger than what is left
        assert roundings(dgamma, expected.dgamma) <= 4


def numpy_train(x, dout, gamma, beta):
    """What NumPy makes of it: the formulas as they stand."""
    others = tuple(d for d in range(x.ndim) if d != 1)
    gamma, beta = (p.reshape(-1, *[1] * (x.ndim - 2)) for p in (gamma, beta))
    with np.errstate(all="ignore"):
        d = x - x.mean(axis=others, keepdims=True)
        r = 1 / np.sqrt((d * d).mean(axis=others, keepdims=True) + 1e-5)
        x_hat = d * r
        dgamma = (dout * x_hat).sum(axis=others, keepdims=True)
        dbeta = dout.sum(axis=others, keepdims=True)
        m = x.size // x.shape[1]
        dx = gamma * r * (dout - dbeta / m - x_hat * dgamma / m)
        return gamma * x_hat + beta, dx, dgamma.ravel(), dbeta.ravel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(40, 21), (300, 3), (40, 600), (9, 5, 7, 7), (2, 3, 400)], ids=str
)
@pytest.mark.parametrize("place", ["x", "dout", "gamma", "beta"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_feature(dtype, shape, place, value):
    n = shape[1]
    arrays = {"x": normal(shape, dtype), "dout": normal(shape, dtype, 1)}
    arrays |= {"gamma": normal(n, dtype, 2), "beta": normal(n, dtype, 3)}

    def run():
        out, cache = batchnorm_forward(arrays["x"], arrays["gamma"], arrays["beta"])
        return out, *batchnorm_backward(arrays["dout"], cache)

    clean = run()
    bad = n // 2
    if place in ("x", "dout"):
        arrays[place][(1, bad, *(2,) * (len(shape) - 2))] = value
    else:
        arrays[place][bad] = value
    hit = run()
    for name, a, b, expected in zip(
        ("out", "dx", "dgamma", "dbeta"), hit, clean, numpy_train(**arrays), strict=True
    ):
        axis = 1 if a.ndim > 1 else 0
        others = np.delete(a, bad, axis), np.delete(b, bad, axis)
        assert others[0].tobytes() == others[1].tobytes(), name
        own, expected = a.take(bad, axis), expected.take(bad, axis)
        np.testing.assert_array_equal(np.isfinite(own), np.isfinite(expected), err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 21), (9, 5, 7, 7)], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_frozen_statistics_keep_nan_in_its_element(dtype, shape, value):
    n = shape[1]
    x, dout = normal(shape, dtype), normal(shape, dtype, 1)
    ones = np.ones(n, dtype)
    place = (1, 2) + (3,) * (len(shape) - 2)
    results = []
    for bad in (False, True):
        if bad:
            x[place] = dout[place] = value
        out, cache = batchnorm_forward(x, ones, ones, {"mode": "test", "running_var": ones})
        results.append((out, *batchnorm_backward(dout, cache)))
    for clean, hit in zip(*results, strict=True):
        same = clean == hit
        if clean.ndim > 1:
            assert not same[place]
            assert same.sum() == same.size - 1
            np.testing.assert_array_equal(hit[place], dtype(value))
        else:
            assert not same[2]
            assert same.sum() == n - 1


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_nan_in_a_running_average_stays_in_its_feature(name):
    param = {"mode": "test", "running_mean": np.zeros(5), "running_var": np.ones(5)}
    param[name][3] = np.nan
    out, _ = batchnorm_forward(normal((6, 5), np.float64), np.ones(5), np.ones(5), param)
    assert np.isnan(out[:, 3]).all()
    assert np.isfinite(np.delete(out, 3, axis=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"), [((200_000, 3), 1), ((4, 3, 224, 224), 1), ((10_000, 40), 1)], ids=str
)
def test_sums_that_cancel(dtype, shape, axis):
    """A dout around 0: its sum is about sqrt(M) of its values, and every digit of that counts.

    The limit is of roundings of what the sum would be, sqrt(M): shifted sums with lanes as long as
    float32's lost up to 117 of them in float64.
    """
    x, dout = normal(shape, dtype, 5), normal(shape, dtype, 6)
    n_features = shape[axis]
    gamma = np.ones(n_features, dtype)
    _, cache = batchnorm_forward(x, gamma, gamma, axis=axis)
    _, dgamma, dbeta = batchnorm_backward(dout, cache)
    expected = oracle.backward(dout, x, gamma, axis=axis)
    m = x.size // n_features
    for name, got, sums in (("dgamma", dgamma, expected.dgamma), ("dbeta", dbeta, expected.dbeta)):
        check(name, got, sums, x, limit=10, scale=m**0.5)


@pytest.mark.parametrize("shape", [(40 * 384, 130), (40 * 384, 2, 5)], ids=str)
def test_sums_keep_twice_the_digits(shape):
    """2^53 + 1 - 2^53, over and over: what is rounded off a sum comes back, in every chunk of rows.

    The three stand in neighboring blocks of 128 rows, out of sight of the guess of the mean.
    """
    dout, x = np.zeros(shape), np.full(shape, -1.0)
    for k, value in enumerate([2.0**53, 1, -(2.0**53)]):
        dout[128 * k + 65 :: 384, 1, ...] = value
    x[1::2] = 1  # and eps = 3: x_hat = +- 1/2
    _, cache = batchnorm_forward(
        x, np.ones(shape[1]), np.zeros(shape[1]), {"mode": "train", "eps": 3}
    )
    _, dgamma, dbeta = batchnorm_backward(dout, cache)
    total = dout[65 + 128 :: 384, 1, ...].sum()
    assert dbeta[1] == total
    assert dgamma[1] == total / 2
