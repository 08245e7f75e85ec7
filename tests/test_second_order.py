"""batchnorm_double_backward: against the oracle, finite differences, PyTorch and its twin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bn_fast
import bn_fast.functional
from bn_fast import (
    batchnorm_backward,
    batchnorm_double_backward,
    batchnorm_forward,
    reference,
)
from bn_fast._core import isa

from . import judge, oracle
from .arrays import DTYPES, HALVES, LAYOUTS, SHAPES, TALL, normal, problem
from .judge import LIMIT, assert_same_bits, describe, roundings
from .problems import assert_same_on_any_threads, engine
from .strategies import arrays, few, problems

MODES = ["train", "test"]
RESULTS = "dx", "dgamma", "ddout"


def second_problem(shape, axis, dtype, layout="C"):
    """ddx, ddgamma, ddbeta, dout, x, gamma."""
    x, dout, gamma, beta = problem(shape, axis, dtype, layout)
    ddx = LAYOUTS[layout](normal(shape, dtype, 5) - dtype(0.25))
    return ddx, normal(shape[axis], dtype, 6), beta, dout, x, gamma


def given_statistics(mode, n):
    if mode == "train":
        return None, None
    return normal(n, np.float64, 7) + 3, 1 + normal(n, np.float64, 8) ** 2


def call(ddx, ddgamma, ddbeta, dout, x, gamma, axis=1, mean=None, var=None, eps=1e-5):
    param = {"mode": "train" if mean is None else "test", "eps": eps}
    if mean is not None:
        param |= {"running_mean": mean, "running_var": var}
    _, cache = batchnorm_forward(x, gamma, np.zeros(len(gamma)), param, axis=axis)
    return batchnorm_double_backward(ddx, ddgamma, ddbeta, dout, cache)


def check(arguments, limit=LIMIT, **given):
    got = call(*arguments, **given)
    expected, scales = oracle.double_backward(*arguments, **given)
    x = arguments[4]
    for name, a, b, scale in zip(RESULTS, got, expected, scales, strict=True):
        assert a.dtype == x.dtype.newbyteorder("=")
        error = roundings(a, b, scale)
        assert error <= limit, f"{name} is {error:.3g} eps off for x {describe(x)}"


@pytest.mark.parametrize(("shape", "axis"), [*SHAPES, *TALL[::3]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_values(shape, axis, dtype, mode):
    mean, var = given_statistics(mode, shape[axis])
    check(second_problem(shape, axis, dtype), axis=axis, mean=mean, var=var)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "axis"), [((37, 20), 1), ((6, 5, 14, 14), 1), ((6, 5, 4), 0)])
@pytest.mark.parametrize("mode", MODES)
def test_layouts(shape, axis, layout, mode):
    mean, var = given_statistics(mode, shape[axis])
    arguments = second_problem(shape, axis, np.float32, layout)
    check(arguments, axis=axis, mean=mean, var=var)
    mixed = [LAYOUTS["Fortran"](a) if a is not arguments[4] else a for a in arguments]
    check(mixed, axis=axis, mean=mean, var=var)


@pytest.mark.parametrize("half", [None, *HALVES])
@settings(few, max_examples=60)
@given(data=st.data())
def test_any_problem(half, data):
    check_any_problem(half, data)


def check_any_problem(half, data, wild=False):
    """Dtypes, axis, strides, mode, threads, and which gradients come in, together."""
    x, dout, gamma, ddbeta, axis = data.draw(problems(wild, [half] if half else DTYPES))
    n = len(gamma)
    given = [data.draw(arrays(x.shape)), normal(n, np.float64, 6), ddbeta]
    mean, var = given_statistics(data.draw(st.sampled_from(MODES)), n)
    for i, missing in enumerate(data.draw(st.tuples(*[st.booleans()] * 3))):
        given[i] = None if missing else given[i]
    got = call(*given, dout, x, gamma, axis, mean, var)
    with engine(isa, data.draw(st.integers(2, 3))):
        assert_same_bits(call(*given, dout, x, gamma, axis, mean, var), got)

    dtype = np.dtype(np.float64) if x.dtype.kind == "i" else x.dtype.newbyteorder("=")
    like = np.broadcast_to(np.zeros((), dtype), x.shape)
    zeros = np.zeros(x.shape), np.zeros(n), np.zeros(n)
    arguments = [zero if a is None else a for a, zero in zip(given, zeros, strict=True)]
    arguments = [arguments[0].astype(dtype), *arguments[1:], dout.astype(dtype), x, gamma]
    expected, scales = oracle.double_backward(*arguments, axis, mean, var)
    for name, a, b, scale in zip(RESULTS, got, expected, scales, strict=True):
        single = dtype.itemsize == 2 and name == "dgamma"
        judge.check(name, a, b, a.astype(np.float32) if single else like, 8, scale)


@pytest.mark.parametrize("mode", MODES)
def test_finite_differences_of_backward(mode):
    ddx, ddgamma, ddbeta, dout, x, gamma = second_problem((7, 3), 1, np.float64)
    gamma[1] = 0
    mean, var = given_statistics(mode, 3)

    def loss(x, gamma, dout):
        param = {"mode": mode, "running_mean": mean, "running_var": var}
        _, cache = batchnorm_forward(x, gamma, np.zeros(3), param)
        dx, dgamma, dbeta = batchnorm_backward(dout, cache)
        return (ddx * dx).sum() + (ddgamma * dgamma).sum() + (ddbeta * dbeta).sum()

    got = call(ddx, ddgamma, ddbeta, dout, x, gamma, mean=mean, var=var)
    for which, result in enumerate(got):
        expected = np.empty_like(result)
        for index in np.ndindex(result.shape):
            losses = []
            for step in (1e-5, -1e-5):
                arrays = [x.copy(), gamma.copy(), dout.copy()]
                arrays[which][index] += step
                losses.append(loss(*arrays))
            expected[index] = (losses[0] - losses[1]) / 2e-5
        np.testing.assert_allclose(result, expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())


@pytest.mark.parametrize("mode", MODES)
def test_oracle_against_finite_differences(mode):
    ddx, ddgamma, ddbeta, dout, x, gamma = second_problem((5, 2), 1, np.float64)
    mean, var = given_statistics(mode, 2)
    given = {"mean": mean, "var": var}

    def loss(x, gamma, dout):
        dx, dgamma, dbeta = reference.oracle_backward(dout, x, gamma, **given)
        return (ddx * dx).sum() + (ddgamma * dgamma).sum() + (ddbeta * dbeta).sum()

    got = reference.oracle_double_backward(ddx, ddgamma, ddbeta, dout, x, gamma, **given)
    for which, result in enumerate(got):
        for index in np.ndindex(result.shape):
            losses = []
            for step in (1e-5, -1e-5):
                arrays = [a.astype(np.longdouble) for a in (x, gamma, dout)]
                arrays[which][index] += np.longdouble(step)
                losses.append(loss(*arrays))
            np.testing.assert_allclose(result[index], (losses[0] - losses[1]) / 2e-5, 1e-8, 1e-8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(64, 5), (6, 5, 9, 9)])
def test_pytorch(mode, shape):
    torch = pytest.importorskip("torch")
    arguments = second_problem(shape, 1, np.float64)
    arguments[5][2] = 0  # gamma
    mean, var = given_statistics(mode, 5)
    ddx, ddgamma, ddbeta, dout, x, gamma = (torch.tensor(a, requires_grad=True) for a in arguments)
    beta = torch.zeros_like(gamma).requires_grad_()
    statistics = [None if a is None else torch.tensor(a) for a in (mean, var)]
    y = torch.nn.functional.batch_norm(x, *statistics, gamma, beta, training=mode == "train")
    first = torch.autograd.grad(y, [x, gamma, beta], dout, create_graph=True)
    second = torch.autograd.grad(first, [x, gamma, dout], [ddx, ddgamma, ddbeta])
    got = call(*arguments, mean=mean, var=var)
    for a, b in zip(got, second, strict=True):
        b = b.detach().numpy()
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13 * np.abs(b).max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_twin(mode, dtype):
    ddx, ddgamma, ddbeta, dout, x, gamma = second_problem((50, 6, 4), 1, dtype)
    mean, var = given_statistics(mode, 6)
    param = {"mode": mode, "running_mean": mean, "running_var": var}
    _, cache = reference.batchnorm_forward(x, gamma, gamma, param)
    twin = reference.batchnorm_double_backward(ddx, ddgamma, ddbeta, dout, cache)
    got = call(ddx, ddgamma, ddbeta, dout, x, gamma, mean=mean, var=var)
    foreign = batchnorm_double_backward(ddx, ddgamma, ddbeta, dout, cache)
    for a, b, c in zip(got, twin, foreign, strict=True):
        assert a.dtype == b.dtype == c.dtype == dtype
        atol = 50 * np.finfo(dtype).eps * np.abs(a).max()
        np.testing.assert_allclose(b, a, rtol=0, atol=atol)
        np.testing.assert_allclose(c, a, rtol=0, atol=atol)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("missing", range(1, 8))
def test_none_is_zeros(mode, missing):
    arguments = list(second_problem((40, 6), 1, np.float64))
    mean, var = given_statistics(mode, 6)
    zeros = list(arguments)
    for i in range(3):
        if missing >> i & 1:
            arguments[i] = None
            zeros[i] = np.zeros_like(zeros[i])
    got = call(*arguments, mean=mean, var=var)
    expected = call(*zeros, mean=mean, var=var)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14 * np.abs(b).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_hostile_data(dtype):
    ddx, ddgamma, ddbeta, dout, x, gamma = second_problem((600, 12), 1, dtype)
    x[:, 1] += dtype(1e5)
    dout[:, 2] += dtype(1e5)
    ddx[:, 3] += dtype(1e5)
    x[:, 4] *= dtype(1e18)
    x[:, 5] *= dtype(1e-3)
    dout[:, 6] *= dtype(1e25)
    ddx[:, 7] *= dtype(1e-25)
    gamma[8] = 0
    gamma[9] = dtype(1e20)
    x[0, 10] = 1e6
    for f in range(12):  # each feature by its own size
        own = slice(f, f + 1)
        arguments = [a[..., own] for a in (ddx, ddgamma, ddbeta, dout, x, gamma)]
        check(arguments, limit=8)
        whole = call(ddx, ddgamma, ddbeta, dout, x, gamma)
        alone = call(*arguments)
        for a, b in zip(whole, alone, strict=True):
            np.testing.assert_allclose(a[..., own], b, rtol=0, atol=4e-6 * np.abs(b).max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(300, 20), (9, 3, 7, 7), (4, 3, 300)], ids=str)
@pytest.mark.parametrize(
    ("x_size", "dout_size", "ddx_size", "gamma_size"),
    [
        (1e153, 1e200, 1e200, 1e-200),  # gamma / std sinks to 0; mean ddx dout leaves the range
        (1e153, 1e100, 1e100, 1e-160),
        (1e153, 1, 1e300, 1),
        (1e-153, 1e-200, 1e-200, 1),
    ],
)
def test_parts_that_leave_the_range(x_size, dout_size, ddx_size, gamma_size, shape, mode):
    """As long as the results do not."""
    ddx, ddgamma, ddbeta, dout, x, gamma = second_problem(shape, 1, np.float64)
    x, dout, ddx = x_size * x, dout_size * dout, ddx_size * ddx
    size = gamma_size / x_size * ddx_size  # of ddout
    gamma, ddgamma, ddbeta = gamma_size * gamma, size * ddgamma, size * ddbeta
    mean, var = given_statistics(mode, shape[1])
    if mode == "test":
        mean, var = x_size * mean, x_size**2 * var
    check((ddx, ddgamma, ddbeta, dout, x, gamma), limit=6, mean=mean, var=var, eps=0)


@pytest.mark.parametrize("x_size", [1e120, 1e182])
def test_x_hat_keeps_its_part_where_x_is_large(x_size):
    """Its coefficient, with inv_std squared, leaves the range, and comes back by x."""
    ddx, ddgamma, ddbeta, dout, x, gamma = second_problem((300, 20), 1, np.float64)
    check((ddx, ddgamma, ddbeta, dout, x_size * x, gamma), limit=6, eps=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_and_constant_features(dtype):
    ddx, ddgamma, ddbeta, dout, x, gamma = second_problem((1, 5), 1, dtype)
    dx, dgamma, ddout = call(ddx, ddgamma, ddbeta, dout, x, gamma)
    np.testing.assert_array_equal(dx, np.zeros((1, 5)))
    np.testing.assert_array_equal(dgamma, np.zeros(5))
    np.testing.assert_array_equal(ddout[0], ddbeta)
    ddx, ddgamma, ddbeta, dout, x, gamma = second_problem((30, 5), 1, dtype)
    x[:, 2] = 5
    for result in call(ddx, ddgamma, ddbeta, dout, x, gamma, eps=0):
        assert np.isfinite(result).all()


def test_nan_stays_in_its_feature():
    arguments = second_problem((50, 6), 1, np.float32)
    expected = call(*arguments)
    ddx, _, _, dout, x, _ = arguments
    ddx[3, 1] = dout[4, 2] = np.nan
    x[5, 3] = np.inf
    clean = [0, 4, 5]
    for a, b in zip(call(*arguments), expected, strict=True):
        np.testing.assert_array_equal(a[..., clean], b[..., clean])
        assert np.isnan(a[..., [1, 2, 3]]).any(axis=tuple(range(a.ndim - 1))).any()


def test_frozen_gradients_do_not_mix():
    """In test mode dx depends on dout alone."""
    arguments = second_problem((50, 6), 1, np.float32)
    arguments[0][3, 1] = np.nan
    dx = call(*arguments, mean=np.zeros(6), var=np.ones(6))[0]
    assert np.isfinite(dx).all()


def test_empty_batch():
    dx, dgamma, ddout = call(
        *(np.zeros(s) for s in ((0, 4), (4,), (4,), (0, 4), (0, 4), (4,)))
    )  # fmt: skip
    assert dx.shape == ddout.shape == (0, 4)
    np.testing.assert_array_equal(dgamma, np.zeros(4))


@pytest.mark.parametrize("axis", [1, 3])
def test_large_arrays(axis):
    """Past the caches: 28 MB."""
    arguments = second_problem((16, 44, 100, 100), axis, np.float32)
    bn_fast.set_num_threads(2)
    got = call(*arguments, axis=axis)
    bn_fast.set_num_threads(None)
    _, cache = reference.batchnorm_forward(
        arguments[4].astype(np.float64), arguments[5], arguments[5], axis=axis
    )
    twin = reference.batchnorm_double_backward(*arguments[:4], cache)
    for a, b in zip(got, twin, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [*SHAPES[::4], *TALL[::3]], ids=str)
def test_bits_do_not_depend_on_threads(shape, axis, dtype):
    arguments = second_problem(shape, axis, dtype)
    assert_same_on_any_threads(lambda: call(*arguments, axis=axis))


def test_float16_is_the_float32_call_rounded():
    arguments = second_problem((60, 7), 1, np.float16)
    arguments = [*arguments[:1], *(a.astype(np.float32) for a in arguments[1:3]), *arguments[3:]]
    arguments[5] = arguments[5].astype(np.float32)
    got = call(*arguments)
    single = call(*(a.astype(np.float32) for a in arguments))
    assert got[1].dtype == np.float32
    half = [a.astype(np.float16) if i != 1 else a for i, a in enumerate(single)]
    assert_same_bits(got, half)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("ddx", np.ones((4, 6)), ValueError, r"ddx must have the shape of x, \(6, 4\)"),
        ("ddx", "text", TypeError, "ddx"),
        ("ddx", np.ones((6, 4), complex), TypeError, "ddx"),
        ("ddgamma", np.ones(3), ValueError, r"ddgamma must have shape \(4,\)"),
        ("ddbeta", np.ones((4, 1)), ValueError, r"ddbeta must have shape \(4,\)"),
        ("ddbeta", 1.0, ValueError, "ddbeta"),
        ("dout", None, TypeError, "dout"),
        ("dout", np.ones((6, 5)), ValueError, "dout"),
        ("cache", None, TypeError, "cache"),
    ],
)
def test_refused(name, value, error, words):
    _, cache = batchnorm_forward(normal((6, 4), np.float64), np.ones(4), np.zeros(4))
    given = {"ddx": np.ones((6, 4)), "ddgamma": np.ones(4), "ddbeta": np.ones(4)}
    given |= {"dout": np.ones((6, 4)), "cache": cache} | {name: value}
    with pytest.raises(error, match=words):
        batchnorm_double_backward(**given)


def test_overwritten_cache_is_refused():
    x = normal((6, 4), np.float64)
    _, cache = batchnorm_forward(x, np.ones(4), np.zeros(4), out=x)
    with pytest.raises(ValueError, match="wrote its output over"):
        batchnorm_double_backward(x, None, None, x, cache)


def test_inputs_are_left_alone():
    arguments = second_problem((60, 7), 1, np.float64)
    before = [a.copy() for a in arguments]
    call(*arguments)
    assert_same_bits(arguments, before)
