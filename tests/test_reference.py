"""bn_fast.reference against itself, finite differences, exact arithmetic, and known answers."""

import ast
import inspect
import sys
from decimal import Decimal, localcontext
from importlib import import_module

import numpy as np
import pytest

import bn_fast
from bn_fast import reference

from .arrays import DTYPES, normal, problem
from .judge import assert_same_bits, roundings, slopes

SHAPES = [((8, 5), 1), ((5, 8), 0), ((3, 4, 2, 5), 1), ((3, 2, 5, 4), 3), ((3, 2, 5, 4), -1)]
MODES = ["train", "test"]
COLUMN_WISE = reference.batchnorm_backward_column_wise
DERIVATIONS = [
    reference.batchnorm_backward_three_pathways,
    COLUMN_WISE,
    reference.batchnorm_backward_element_wise,
]
LONGDOUBLE = np.finfo(np.longdouble)


def given(mode, n_features):
    """The statistics of test mode as the oracle takes them; none in train mode."""
    if mode == "train":
        return {}
    mean, noise = normal(n_features, np.float64, 5), normal(n_features, np.float64, 6)
    return {"mean": 3 + mean / 8, "var": 4 + noise**2}


def settings(mode, statistics, **others):
    return {"mode": mode, **others} | {f"running_{k}": v for k, v in statistics.items()}


# Values


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_agreement_with_the_oracle(shape, axis, dtype, mode):
    x, dout, gamma, beta = problem(shape, axis, dtype)
    statistics = given(mode, shape[axis])
    before = [a.tobytes() for a in (x, dout, gamma, beta)]
    param = settings(mode, statistics)
    out, cache = reference.batchnorm_forward(x, gamma, beta, param, axis=axis)
    expected, mean, var = reference.oracle_forward(x, gamma, beta, axis=axis, **statistics)
    for key, value in statistics.items():
        np.testing.assert_array_equal(param[f"running_{key}"], value)
    for got, known in (
        (out, expected),
        (cache.mean.reshape(-1), mean),
        (cache.inv_var.reshape(-1), 1 / np.sqrt(var + 1e-5)),
    ):
        assert got.dtype == dtype
        assert roundings(got, known) < 8

    expected = reference.oracle_backward(dout, x, gamma, axis=axis, **statistics)
    for derivation in DERIVATIONS:
        if derivation is COLUMN_WISE and (len(shape), axis) != (2, 1):
            continue
        for got, known in zip(derivation(dout, cache), expected, strict=True):
            assert got.dtype == dtype
            assert roundings(got, known) < 8
    assert before == [a.tobytes() for a in (x, dout, gamma, beta)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_finite_differences(shape, axis, mode):
    x, dout, gamma, beta = problem(shape, axis, np.float64)
    statistics = given(mode, shape[axis])

    def loss():
        param = settings(mode, statistics)
        return (dout * reference.batchnorm_forward(x, gamma, beta, param, axis=axis)[0]).sum()

    _, cache = reference.batchnorm_forward(x, gamma, beta, settings(mode, statistics), axis=axis)
    gradients = reference.batchnorm_backward(dout, cache)
    for got, a in zip(gradients, (x, gamma, beta), strict=True):
        np.testing.assert_allclose(got, slopes(loss, a), atol=1e-7)


def known_answers(n_rows, offset, unit, dtype=np.float64):
    """x, dout, gamma, beta and, for eps = 0, out, mean, var, dx, dgamma, dbeta without rounding.

    x_hat is 1, -1, 1, -1, ...; dout is 5 + 3 x_hat + t, where t = 1, 1, -1, -1, ... is orthogonal
    to 1 and to x_hat, so only t comes through to dx. The unit is a power of two.
    """
    x_hat, t = (np.resize(signs, n_rows) for signs in ([1, -1], [1, 1, -1, -1]))
    known = (2 * x_hat + 3, offset, unit**2, 2 * t / unit, 3 * n_rows, 5 * n_rows)
    known = [np.asarray(a, np.longdouble).reshape(-1, *[1] * np.ndim(a)) for a in known]
    columns = (offset + unit * x_hat)[:, None], (5 + 3 * x_hat + t)[:, None]
    return *(a.astype(dtype) for a in columns), np.array([2]), np.array([3]), known


@pytest.mark.parametrize("derivation", DERIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("offset", "unit"), [(0, 1.0), (-3, 2.0**20), (4096, 2.0**-8)])
def test_known_answers(offset, unit, dtype, derivation):
    x, dout, gamma, beta, known = known_answers(8, offset, unit, dtype)
    param = {"mode": "train", "eps": 0, "momentum": 0}
    out, cache = reference.batchnorm_forward(x, gamma, beta, param)
    results = out, param["running_mean"], param["running_var"], *derivation(dout, cache)
    assert_same_bits(results, [a.astype(dtype) for a in known])


@pytest.mark.parametrize("n_rows", [4, 1 << 20])
@pytest.mark.parametrize("offset", [0, 1e9, -1e12])
@pytest.mark.parametrize("unit", [1.0, 2.0**-10])
def test_known_answers_of_the_oracle(n_rows, offset, unit):
    x, dout, gamma, beta, known = known_answers(n_rows, offset, unit)
    results = (
        *reference.oracle_forward(x, gamma, beta, eps=0),
        *reference.oracle_backward(dout, x, gamma, eps=0),
    )
    for got, expected in zip(results, known, strict=True):
        assert got.dtype == np.longdouble
        np.testing.assert_array_equal(got, expected)


decimals = np.vectorize(lambda value: Decimal(float(value)), otypes=[object])
longdoubles = np.vectorize(lambda value: np.longdouble(str(value)), otypes=[np.longdouble])


def exact(x, dout, gamma, beta, eps, mean=None, var=None):
    """out, mean, var, dx, dgamma, dbeta for x of shape (M, C), to 60 digits."""
    with localcontext(prec=60):
        m = len(x)
        x, dout, gamma, beta = map(decimals, (x, dout, gamma, beta))
        frozen = mean is not None
        mean = decimals(mean) if frozen else x.sum(axis=0) / m
        var = decimals(var) if frozen else ((x - mean) ** 2).sum(axis=0) / m
        a = gamma / np.array([(v + Decimal(eps)).sqrt() for v in var])
        x_hat = (x - mean) * a / gamma
        dgamma, dbeta = (dout * x_hat).sum(axis=0), dout.sum(axis=0)
        dx = a * (dout if frozen else dout - dbeta / m - x_hat * dgamma / m)
        results = gamma * x_hat + beta, mean, var, dx, dgamma, dbeta
        return [longdoubles(a) for a in results]


HOSTILE = {
    "offset 1e9": lambda noise: noise + 1e9,
    "drift of 1e9": lambda noise: noise + np.linspace(0, 1e9, len(noise))[:, None],
    "first row of 1e9": lambda noise: np.where(np.arange(len(noise))[:, None] == 0, 1e9, noise),
    "tiny": lambda noise: noise * 1e-300,
    "huge": lambda noise: noise * 1e300,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", HOSTILE)
def test_oracle_against_60_digits(kind, mode):
    if kind == "huge" and LONGDOUBLE.maxexp == np.finfo(np.float64).maxexp:
        pytest.skip("long double has no more range than float64 here")
    x, dout, gamma, beta = problem((20000, 1), 1, np.float64)
    x, dout = HOSTILE[kind](x), dout + 1e6
    statistics = given(mode, 1)
    results = (
        *reference.oracle_forward(x, gamma, beta, **statistics),
        *reference.oracle_backward(dout, x, gamma, **statistics),
    )
    for got, expected in zip(results, exact(x, dout, gamma, beta, 1e-5, **statistics), strict=True):
        assert got.dtype == np.longdouble
        assert roundings(got, expected) < 8


# Edges


@pytest.mark.parametrize("eps", [0, 1e-5])
@pytest.mark.parametrize("axis", [1, -1])
def test_constant_features(axis, eps):
    """The plain sums are exact for 7.25 and such, those of the oracle need not be."""
    x, dout, gamma, beta = problem((4, 9, 301, 9), axis, np.float64)
    ones = np.ones_like(np.moveaxis(x, axis, -1))
    everywhere_beta = np.moveaxis(ones * beta, -1, axis)
    x[...] = 7.25
    out, cache = reference.batchnorm_forward(
        x, gamma, beta, {"mode": "train", "eps": eps}, axis=axis
    )
    gradients = reference.batchnorm_backward(dout, cache)
    x[...] = np.moveaxis(ones * gamma, -1, axis)
    oracle_out, mean, var = reference.oracle_forward(x, gamma, beta, eps=eps, axis=axis)
    np.testing.assert_array_equal(mean, gamma)
    assert not var.any()
    oracle_gradients = reference.oracle_backward(dout, x, gamma, eps=eps, axis=axis)
    for results in ((out, *gradients), (oracle_out, *oracle_gradients)):
        np.testing.assert_array_equal(results[0], everywhere_beta)
        dx, dgamma, dbeta = results[1:]
        assert np.isfinite(dx).all()
        assert dx.any() == (eps > 0)
        assert not dgamma.any()
        np.testing.assert_allclose(dbeta.astype(float), gradients[2])


@pytest.mark.parametrize("eps", [0, 1e-5])
def test_one_value_for_each_feature(eps):
    x, dout, gamma, beta = problem((1, 5), 1, np.float64)
    out, cache = reference.batchnorm_forward(x, gamma, beta, {"mode": "train", "eps": eps})
    np.testing.assert_array_equal(out, beta[None])
    np.testing.assert_array_equal(reference.batchnorm_backward(dout, cache)[0], 0)
    np.testing.assert_array_equal(reference.oracle_forward(x, gamma, beta, eps=eps)[0], beta[None])
    np.testing.assert_array_equal(reference.oracle_backward(dout, x, gamma, eps=eps)[0], 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("shape", "axis"), [((0, 3), 1), ((2, 3, 0), 1), ((4, 0), 1)])
def test_no_values(shape, axis):
    x, n_features = np.ones(shape, np.float32), shape[axis]
    ones = np.ones(n_features)
    param = settings("train", given("test", n_features))
    before = dict(param)
    out, cache = reference.batchnorm_forward(x, ones, ones, param, axis=axis)
    assert (out.shape, out.dtype) == (shape, np.float32)
    for key, value in before.items():
        np.testing.assert_array_equal(param[key], value)
    for dx, dgamma, dbeta in (
        reference.batchnorm_backward(x, cache),
        reference.oracle_backward(x, x, ones, axis=axis),
    ):
        assert dx.shape == shape
        np.testing.assert_array_equal(dgamma, 0 * ones)
        np.testing.assert_array_equal(dbeta, 0 * ones)
    assert reference.oracle_forward(x, ones, ones, axis=axis)[0].shape == shape


def test_variance_zero_given_divides_as_numpy_does():
    zero = {"mean": np.zeros(1), "var": np.zeros(1)}
    for forward in (
        lambda *args: reference.batchnorm_forward(*args, settings("test", zero, eps=0)),
        lambda *args: reference.oracle_forward(*args, eps=0, **zero),
    ):
        with pytest.warns(RuntimeWarning, match="divide by zero"):
            out = forward([[2], [-1]], [1], [0])[0]
        np.testing.assert_array_equal(out, [[np.inf], [-np.inf]])


# bn_param


def test_running_averages():
    x = np.array([[0, 1], [2, 5]], np.float32)  # mean 1, 3; biased variance 1, 4
    param = {"mode": "train"}
    reference.batchnorm_forward(x, [1, 1], [0, 0], param)
    np.testing.assert_allclose(param["running_mean"], [0.1, 0.3], rtol=1e-6)
    np.testing.assert_allclose(param["running_var"], [0.1, 0.4], rtol=1e-6)
    assert param["running_mean"].dtype == param["running_var"].dtype == np.float32

    param["momentum"] = 0.25
    reference.batchnorm_forward(x, [1, 1], [0, 0], param)
    np.testing.assert_allclose(param["running_mean"], [0.775, 2.325], rtol=1e-6)
    np.testing.assert_allclose(param["running_var"], [0.775, 3.1], rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_running_averages_are_new_arrays(mode, dtype):
    mean, var = np.array([1, 2], dtype), np.array([3, 4], dtype)
    param = settings(mode, {"mean": mean, "var": var}, momentum=0.5)
    reference.batchnorm_forward(np.ones((3, 2), np.float32), [1, 1], [0, 0], param)
    for key, old, before, after in (
        ("running_mean", mean, [1, 2], [1, 1.5]),
        ("running_var", var, [3, 4], [1.5, 2]),
    ):
        np.testing.assert_array_equal(old, before)
        np.testing.assert_array_equal(param[key], after if mode == "train" else before)
        assert param[key].dtype == np.result_type(dtype, np.float32)
        assert not np.shares_memory(param[key], old)


def test_test_mode_starts_from_zeros():
    param = {"mode": "test"}
    out, _ = reference.batchnorm_forward(np.ones((3, 2), np.float32), [1, 1], [0, 0], param)
    np.testing.assert_allclose(out, 1 / np.sqrt(1e-5), rtol=1e-6)
    for key in ("running_mean", "running_var"):
        assert param[key].dtype == np.float32
        np.testing.assert_array_equal(param[key], [0, 0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "Train"}, ValueError, "'train' or 'test', got 'Train'"),
        ({"mode": None}, ValueError, "'train' or 'test'"),
        ({"eps": -1e-5}, ValueError, "eps"),
        ({"eps": np.inf}, ValueError, "eps"),
        ({"eps": np.nan}, ValueError, "eps"),
        ({"momentum": np.nan}, ValueError, "momentum"),
        ({"running_mean": np.zeros(2)}, ValueError, r"running_mean.* \(3,\)"),
        ({"running_var": np.array([1, 1, -2.0])}, ValueError, "running_var.* -2.0 for feature 2"),
        ({"running_var": np.array("abc")}, TypeError, "running_var"),
    ],
)
def test_wrong_settings(change, error, message):
    x = np.ones((4, 3))
    param = {"mode": "train", "eps": 1e-3} | change
    before, out = dict(param), np.full_like(x, 8)
    with pytest.raises(error, match=message):
        reference.batchnorm_forward(x, np.ones(3), np.ones(3), param, out=out)
    assert param.keys() == before.keys()
    assert all(param[key] is before[key] for key in param)
    assert (out == 8).all()


def test_mode_is_required():
    with pytest.raises(KeyError, match="mode"):
        reference.batchnorm_forward(np.ones((4, 3)), np.ones(3), np.ones(3), {})


# Arguments


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        ([[1, 2], [3, 5]], np.float64),
        (np.array([[True, False], [True, True]]), np.float64),
        (np.array([[1, 2], [3, 5]], ">f4"), np.float32),
        (np.array([[1, 2], [3, 5]], ">f8"), np.float64),
    ],
    ids=["int", "bool", ">f4", ">f8"],
)
def test_dtypes(x, dtype):
    parameters = np.array([3, 4]), np.array([6, 7], np.float16)
    out, cache = reference.batchnorm_forward(x, *parameters)
    gradients = reference.batchnorm_backward([[1, 0], [0, 0]], cache)
    assert {a.dtype for a in (out, *cache, *gradients)} == {np.dtype(dtype)}
    expected = reference.oracle_forward(np.asarray(x, dtype), *parameters)[0]
    assert roundings(out, expected) < 8


ONES = np.ones((4, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((ONES.astype(complex), ONES[0], ONES[0]), TypeError, "x must be .* complex128"),
        ((ONES.astype(np.longdouble), ONES[0], ONES[0]), TypeError, "x must be .* float128|long"),
        ((None, ONES[0], ONES[0]), TypeError, "x must be .* object"),
        ((ONES, ONES[0], ONES[0].astype(complex)), TypeError, "beta must be"),
        ((ONES, ONES[0, :1], ONES[0]), ValueError, r"gamma must have shape \(3,\),.* got \(1,\)"),
        ((ONES, ONES[0], ONES[:3, :1]), ValueError, r"beta must have shape \(3,\),.*\(3, 1\)"),
        ((ONES[0], ONES[0], ONES[0]), ValueError, r"x must have 2 or more dimensions.*\(3,\)"),
    ],
)
def test_wrong_arrays(arguments, error, message):
    with pytest.raises(error, match=message):
        reference.batchnorm_forward(*arguments)


def test_wrong_axis_and_shapes():
    with pytest.raises(np.exceptions.AxisError):
        reference.batchnorm_forward(ONES, ONES[0], ONES[0], axis=2)
    with pytest.raises(ValueError, match="4 dimensions"):
        reference.spatial_batchnorm_forward(ONES, ONES[0], ONES[0])
    _, cache = reference.batchnorm_forward(ONES, ONES[0], ONES[0])
    with pytest.raises(ValueError, match=r"dout must have the shape of x, \(4, 3\), got \(3,\)"):
        reference.batchnorm_backward(ONES[0], cache)
    with pytest.raises(ValueError, match="dout must have the shape of x"):
        reference.oracle_backward(ONES.T, ONES, ONES[0])
    with pytest.raises(ValueError, match="both be given"):
        reference.oracle_forward(ONES, ONES[0], ONES[0], mean=ONES[0])
    _, cache = reference.batchnorm_forward(ONES[..., None], ONES[0], ONES[0])
    with pytest.raises(ValueError, match=r"shapes \(M, C\) and \(C,\)"):
        COLUMN_WISE(ONES[..., None], cache)


def test_out():
    """Written when all else has succeeded; an overlap with x spoils nothing."""
    x, dout, gamma, beta = problem((5, 4, 3), 1, np.float64)
    expected, cache = reference.batchnorm_forward(x, gamma, beta)
    gradients = reference.batchnorm_backward(dout, cache)
    buffer = np.zeros((6, 4, 3))
    for place in (slice(1, None), slice(0, -1)):  # the memory of x, and one that overlaps it
        given_x = buffer[1:]
        given_x[...] = x
        out, cache = reference.batchnorm_forward(given_x, gamma, beta, out=buffer[place])
        assert out.base is buffer
        assert_same_bits([out, cache.x], [expected, x])
        given_dout = buffer[1:]
        given_dout[...] = dout
        got = reference.batchnorm_backward(given_dout, cache, out=buffer[place])
        assert got[0].base is buffer
        assert_same_bits(got, gradients)

    for wrong, error in (
        (np.zeros((5, 4)), ValueError),
        (x.astype("f4"), TypeError),
        ([], TypeError),
    ):
        param = {"mode": "train"}
        with pytest.raises(error, match="out must"):
            reference.batchnorm_forward(x, gamma, beta, param, out=wrong)
        assert param == {"mode": "train"}
        with pytest.raises(error, match="out must"):
            reference.batchnorm_backward(dout, cache, out=wrong)


# The cache, and the reference beside the package


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_cache_is_the_traditional_five(shape, axis):
    x, dout, gamma, beta = problem(shape, axis, np.float64)
    out, cache = reference.batchnorm_forward(x, gamma, beta, axis=axis)
    mean, inv_var, cached_x, x_hat, cached_gamma = cache
    assert cached_x is x
    np.testing.assert_array_equal(x_hat, (x - mean) * inv_var)
    np.testing.assert_array_equal(cached_gamma * x_hat + beta.reshape(cached_gamma.shape), out)

    keepdims = [1] * x.ndim
    keepdims[axis] = -1
    mean, inv_var = mean.reshape(keepdims), inv_var.reshape(keepdims)
    expected = reference.batchnorm_backward(dout, cache)
    for plain in (tuple(cache), [mean, inv_var, x, x_hat, gamma]):
        assert_same_bits(reference.batchnorm_backward(dout, plain), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_each_backward_takes_the_cache_of_the_other(shape, axis, mode):
    x, dout, gamma, beta = problem(shape, axis, np.float64)
    statistics = given(mode, shape[axis])
    expected = reference.oracle_backward(dout, x, gamma, axis=axis, **statistics)
    for one, other in ((reference, bn_fast), (bn_fast, reference)):
        _, cache = one.batchnorm_forward(x, gamma, beta, settings(mode, statistics), axis=axis)
        for got, known in zip(other.batchnorm_backward(dout, cache), expected, strict=True):
            assert roundings(got, known) < 8


@pytest.mark.parametrize(
    "name",
    [
        "batchnorm_forward",
        "batchnorm_backward",
        "batchnorm_backward_alt",
        "spatial_batchnorm_forward",
        "spatial_batchnorm_backward",
    ],
)
def test_twins_take_the_same_arguments(name):
    twin, public = (inspect.signature(getattr(m, name)) for m in (reference, bn_fast))
    assert [(p.name, p.kind, p.default) for p in twin.parameters.values()] == [
        (p.name, p.kind, p.default) for p in public.parameters.values()
    ]


def test_spatial():
    x, dout, gamma, beta = problem((3, 4, 2, 5), 1, np.float64)
    out, cache = reference.spatial_batchnorm_forward(x, gamma, beta, {"mode": "train"})
    columns = x.transpose(0, 2, 3, 1).reshape(-1, 4)
    expected, _ = reference.batchnorm_forward(columns, gamma, beta)
    assert roundings(out.transpose(0, 2, 3, 1).reshape(-1, 4), expected) < 8
    gradients = reference.batchnorm_backward_alt(dout, cache)
    assert_same_bits(reference.spatial_batchnorm_backward(dout, cache), gradients)


def test_the_reference_imports_numpy_only():
    """And what checks and keeps arguments for it and the compiled functions alike."""
    own = {"._arrays", "._caches", ".batch", ".derivations", ".norms", ".oracle", ".pieces"}
    assert imported_by(reference) == own - {"._arrays"}
    others = {"numpy", "numpy.lib.array_utils", "numpy.typing"} | own
    shared = {"..", ".._cache", ".._norm_checks", ".._types"}
    for name in own:
        module = import_module(name, reference.__name__)
        assert imported_by(module) <= (others | shared if name == ".norms" else others)


def imported_by(module):
    """The modules that its source names, but for the standard library's."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
