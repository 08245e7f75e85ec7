"""float16 and bfloat16: storage alone, so a call is that on float32, rounded once more."""

import subprocess
import sys

import numpy as np
import pytest

from bn_fast import batchnorm_backward, batchnorm_forward, reference
from bn_fast._core import isa, isa_available

from . import oracle
from .arrays import LAYOUTS, SHAPES, TALL, problem
from .judge import assert_same_bits, roundings
from .problems import assert_same_on_any_threads, engine

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None

HALVES = [
    np.float16,
    pytest.param(
        bfloat16,
        marks=pytest.mark.skipif(bfloat16 is None, reason="needs ml_dtypes: pip install ml_dtypes"),
        id="bfloat16",
    ),
]
EPS = {np.float16: 2.0**-10, bfloat16: 2.0**-7}
ALL = np.arange(1 << 16, dtype=np.uint16).reshape(1, -1)

pytestmark = pytest.mark.parametrize("dtype", HALVES)


def call(x, dout, gamma, beta, axis, param=None):
    """out, dx, dgamma, dbeta."""
    with np.errstate(all="ignore"):
        out, cache = batchnorm_forward(x, gamma, beta, param, axis=axis)
        return [out, *batchnorm_backward(dout, cache)]


def half_problem(shape, axis, dtype, layout="C"):
    x, dout, gamma, beta = problem(shape, axis, dtype, layout)
    return x, dout, gamma.astype(np.float32), beta.astype(np.float32)


def assert_rounded(got, single, dtype):
    """The float32 call's results, with out and dx rounded."""
    assert got[0].dtype == got[1].dtype == dtype
    with np.errstate(over="ignore"):
        assert_same_bits(got, [*(a.astype(dtype) for a in single[:2]), *single[2:]])


# ---------------------------------------------------------------- conversions


def frozen(n):
    return {"mode": "test", "eps": 0, "running_mean": np.zeros(n), "running_var": np.ones(n)}


def test_every_value_is_read_right(dtype):
    values = ALL.view(dtype)
    n = values.size
    _, cache = batchnorm_forward(np.zeros_like(values), np.ones(n), np.zeros(n), frozen(n))
    dbeta = batchnorm_backward(values, cache)[2]  # of one row: the row
    np.testing.assert_array_equal(dbeta, values[0].astype(np.float32))


def test_every_value_is_written_as_it_was_read(dtype):
    values = ALL.view(dtype)
    n = values.size
    out, _ = batchnorm_forward(values, np.ones(n), np.full(n, -0.0), frozen(n))
    number = ~np.isnan(values.astype(np.float32))
    np.testing.assert_array_equal(out[number].view(np.uint16), ALL[number])
    assert np.isnan(out[~number].astype(np.float32)).all()


def float32_values(dtype):
    """Around all values of the half type, all halfway points and their neighbors, and others."""
    low, high = ALL[0, :0x7C00], ALL[0, 1:0x7C01]
    if dtype != np.float16:
        low, high = ALL[0, :0x7F80], ALL[0, 1:0x7F81]
    low, high = low.view(dtype).astype(np.float64), high.view(dtype).astype(np.float64)
    high[-1] = 2 * low[-1] - low[-2]  # the value that would follow the largest
    halfway = ((low + high) / 2).astype(np.float32)  # exact
    near = [
        np.nextafter(a, np.float32(to))
        for a in (low.astype(np.float32), halfway)
        for to in (0, np.inf)
    ]
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    small = rng.standard_normal(100_000).astype(np.float32) * np.float32(2.0**-16)
    special = np.float32([np.inf, np.nan])
    values = np.concatenate([low.astype(np.float32), halfway, *near, bits, small, special])
    return np.concatenate([values, -values])


def test_every_rounding_is_that_of_a_cast(dtype):
    beta = float32_values(dtype)
    n = beta.size
    out, _ = batchnorm_forward(np.zeros((1, n), dtype), np.ones(n), beta, frozen(n))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = beta.astype(dtype)
    number = ~np.isnan(beta)
    assert np.isnan(out[0, ~number].astype(np.float32)).all()
    # adding x = 0 makes +0 of -0; what rounds to -0 keeps its sign
    number &= beta != 0
    np.testing.assert_array_equal(out[0, number].view(np.uint16), expected[number].view(np.uint16))


# ---------------------------------------------------------------- values


# Rows of float32 of that many columns lie whole pages apart, and those of a half type do not.
PAGES = ((320, 1024), 1), ((64, 3072), 1)


@pytest.mark.parametrize(("shape", "axis"), [*SHAPES[::2], *TALL, *PAGES], ids=str)
def test_is_the_float32_call_rounded(dtype, shape, axis):
    x, dout, gamma, beta = half_problem(shape, axis, dtype)
    single = call(x.astype(np.float32), dout.astype(np.float32), gamma, beta, axis)
    assert_rounded(call(x, dout, gamma, beta, axis), single, dtype)


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "axis"), [((37, 20), 1), ((6, 5, 14, 14), 1), ((6, 5, 4), 0)])
def test_any_layout(dtype, shape, axis, layout, mode):
    if layout == "byte-swapped" and dtype != np.float16:
        pytest.skip("ml_dtypes has no byte-swapped bfloat16")
    x, dout, gamma, beta = half_problem(shape, axis, dtype, layout)
    param = {"mode": mode, "running_var": np.abs(gamma)}
    like = call(
        np.ascontiguousarray(x).astype(np.float32), np.ascontiguousarray(dout).astype(np.float32),
        gamma, beta, axis, dict(param),
    )  # fmt: skip
    got = call(x, dout, gamma, beta, axis, param)
    for a, b in zip(got, like, strict=True):
        limit = 0.51 * EPS[dtype] if a.dtype == dtype else 4 * np.finfo(np.float32).eps
        assert np.max(np.abs(a.astype(float) - b)) <= limit * np.max(np.abs(b))


@pytest.mark.parametrize("length", [512, 513, 1000])
def test_long_runs_element_by_element(dtype, length):
    """Rows of one feature's, wider than storage.pxi's HALF_PIECE of 512, gathered and scattered."""
    x, dout, gamma, beta = half_problem((2, 3, length), 1, dtype)
    expected = call(x, dout, gamma, beta, 1)
    sliced = LAYOUTS["sliced"]
    out, cache = batchnorm_forward(sliced(x), gamma, beta, out=sliced(x))
    got = [out, *batchnorm_backward(sliced(dout), cache, out=sliced(x))]
    assert_same_bits(got, expected)


@pytest.mark.parametrize(("shape", "axis"), SHAPES[::5], ids=str)
def test_error_is_one_rounding_of_the_half_type(dtype, shape, axis):
    x, dout, gamma, beta = half_problem(shape, axis, dtype)
    out, dx, dgamma, dbeta = call(x, dout, gamma, beta, axis)
    expected = oracle.backward(dout, x, gamma, axis)
    single = float(np.finfo(np.float32).eps)
    limit = 0.5 + 4 * single / EPS[dtype]  # the last rounding, and float32's four
    scale = expected.dx_scale if dx.size < 10 * dgamma.size else 0.0
    for got, exact, size in (
        (out, oracle.forward(x, gamma, beta, axis), 0.0), (dx, expected.dx, scale),
    ):  # fmt: skip
        assert roundings(got.astype(np.float32), exact, size) * single / EPS[dtype] <= limit
    assert roundings(dgamma, expected.dgamma, expected.dgamma_scale) <= 4
    assert roundings(dbeta, expected.dbeta, expected.dbeta_scale) <= 4


@pytest.mark.parametrize("name", isa_available)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((37, 100), 1), ((300, 200), 1), ((141, 33), 1), ((9, 6, 300), 1), ((40, 5, 7, 7), 1)],
    ids=str,
)
def test_rows_are_read_and_written_wherever_they_begin(dtype, shape, axis, name):
    """By kernels that take them as they are, past the caches too; nothing beside is written.  Rows
    that fill no tree, and features in wide lanes, come by way of the buffer."""
    x, dout, gamma, beta = half_problem(shape, axis, dtype)
    x[:, 2] = 3
    gamma[4] = 1e-38  # float32's constants do not hold it
    single = call(x.astype(np.float32), dout.astype(np.float32), gamma, beta, axis)
    expected = [single[0].astype(dtype), single[1].astype(dtype), *single[2:]]
    for caches in (None, (2**12, 2**12, 2**13)):
        with engine(name, 2) as chosen:
            old = chosen.set_caches(*caches) if caches else None
            try:
                for place in (0, 1, 2, 15, 31, 32):
                    memory = np.full((4, x.size + 64), 7, dtype)
                    arrays = [row[place : place + x.size].reshape(shape) for row in memory]
                    arrays[0][...], arrays[1][...] = x, dout
                    y, cache = batchnorm_forward(arrays[0], gamma, beta, axis=axis, out=arrays[2])
                    got = [y, *batchnorm_backward(arrays[1], cache, out=arrays[3])]
                    assert_same_bits(got, expected)
                    assert (memory[:, :place] == 7).all()
                    assert (memory[:, place + x.size :] == 7).all()
            finally:
                if old:
                    chosen.set_caches(*old)


def test_reference_agrees(dtype):
    x, dout, gamma, beta = half_problem((50, 7), 1, dtype)
    param, twin_param = {"mode": "train"}, {"mode": "train"}
    got = call(x, dout, gamma, beta, 1, param)
    out, cache = reference.batchnorm_forward(x, gamma, beta, twin_param)
    twin = [out, *reference.batchnorm_backward(dout, cache)]
    for a, b in zip(got, twin, strict=True):
        assert a.dtype == b.dtype
        eps = EPS[dtype] if a.dtype == dtype else 1e-6
        np.testing.assert_allclose(a.astype(float), b.astype(float), atol=eps * np.abs(b).max())
    for key in ("running_mean", "running_var"):
        assert param[key].dtype == twin_param[key].dtype == np.float32
        np.testing.assert_allclose(param[key], twin_param[key], rtol=1e-5)


def test_wide_features(dtype):
    x, dout, gamma, beta = half_problem((300, 12), 1, dtype)
    big = dtype(60000 if dtype == np.float16 else 3e38)
    x[:, 1] = big
    x[:, 2] *= dtype(5e3 if dtype == np.float16 else 2e37)
    x[:, 3] = 5
    x[7, 4] = np.nan
    x[8, 5] = np.inf
    x[:, 6] = np.where(np.arange(300) % 2, big, -big)
    gamma[7], gamma[8], beta[9] = 1e-38, 1e30, 1e5
    single = call(x.astype(np.float32), dout.astype(np.float32), gamma, beta, 1)
    got = call(x, dout, gamma, beta, 1)
    assert_rounded(got, single, dtype)
    np.testing.assert_array_equal(got[0][:, 1].astype(np.float32), beta[1].astype(dtype))
    if dtype == np.float16:
        assert np.isinf(got[0][:, 9]).all()  # beta = 1e5 is beyond 65504


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("axis", [1, 3])
def test_large_arrays(dtype, axis, n_threads):
    """Past the caches, prefetched, and in rows that share no lines: 22 MB."""
    x, dout, gamma, beta = half_problem((16, 70, 100, 100), axis, dtype)
    with engine(isa, n_threads):
        got = call(x, dout, gamma, beta, axis)
        single = call(x.astype(np.float32), dout.astype(np.float32), gamma, beta, axis)
    assert_rounded(got, single, dtype)


@pytest.mark.parametrize(("shape", "axis"), [*SHAPES[::4], *TALL[::3]], ids=str)
def test_bits_do_not_depend_on_threads(dtype, shape, axis):
    problem_ = half_problem(shape, axis, dtype)
    assert_same_on_any_threads(lambda: call(*problem_, axis))


# ---------------------------------------------------------------- arguments


def test_in_place_and_given_output(dtype):
    x, dout, gamma, beta = half_problem((70, 33), 1, dtype)
    expected = call(x, dout, gamma, beta, 1)
    out = np.empty_like(x)
    y, cache = batchnorm_forward(x, gamma, beta, out=out)
    assert y is out
    gradients = batchnorm_backward(dout, cache, out=dout)
    assert gradients[0] is dout
    assert_same_bits([y, *gradients], expected)
    y, _ = batchnorm_forward(x, gamma, beta, out=x)
    assert_same_bits([y], expected[:1])


def test_output_of_another_type_is_refused(dtype):
    x, _, gamma, beta = half_problem((5, 4), 1, dtype)
    with pytest.raises(TypeError, match="out must have the dtype of x"):
        batchnorm_forward(x, gamma, beta, out=np.empty((5, 4), np.float32))


def test_parameters_are_float32(dtype):
    x, dout, gamma, beta = half_problem((40, 5), 1, dtype)
    param = {"mode": "train"}
    out, cache = batchnorm_forward(x, gamma.astype(dtype), beta.astype(dtype), param)
    dx, dgamma, dbeta = batchnorm_backward(dout, cache)
    mean, inv_std, same, x_hat, kept = cache
    assert same is x
    assert x_hat.dtype == out.dtype == dx.dtype == dtype
    single = [dgamma, dbeta, mean, inv_std, kept, param["running_mean"], param["running_var"]]
    assert [a.dtype for a in single] == [np.float32] * 7
    assert_same_bits([kept.reshape(-1)], [gamma.astype(dtype).astype(np.float32)])
    again = batchnorm_backward(dout, (mean, inv_std, x, x_hat, kept))
    np.testing.assert_allclose(again[1], dgamma, rtol=1e-5)
    assert again[0].dtype == dtype
    half = {"mode": "train", "running_mean": np.zeros(5, dtype), "running_var": np.zeros(5, dtype)}
    batchnorm_forward(x, gamma, beta, half)
    assert half["running_var"].dtype == np.float32


def test_other_gradients_are_rounded(dtype):
    x, dout, gamma, beta = half_problem((40, 5), 1, dtype)
    _, cache = batchnorm_forward(x, gamma, beta)
    expected = batchnorm_backward(dout, cache)
    assert_same_bits(batchnorm_backward(dout.astype(np.float64), cache), expected)


def test_empty_batch(dtype):
    out, cache = batchnorm_forward(np.zeros((0, 4), dtype), np.ones(4), np.zeros(4))
    dx, dgamma, _ = batchnorm_backward(out, cache)
    assert out.dtype == dx.dtype == dtype
    np.testing.assert_array_equal(dgamma, np.zeros(4, np.float32))


def test_ml_dtypes_is_not_imported(dtype):
    code = (
        "import sys, numpy, bn_fast\n"
        "bn_fast.batchnorm_forward(numpy.ones((4, 3), 'f2'), numpy.ones(3), numpy.ones(3))\n"
        "assert 'ml_dtypes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
