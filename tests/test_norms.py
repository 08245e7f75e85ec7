"""Layer, RMS, group and instance norm: numbers, arguments, caches, of every implementation."""

import copy
import inspect
import itertools
import pickle
from typing import NamedTuple

import numpy as np
import pytest

import bn_fast
from bn_fast import reference

from . import oracle
from .arrays import DTYPES, HALVES, LAYOUTS, normal, restepped
from .judge import LIMIT, assert_same_bits, check, slopes

IMPLEMENTATIONS = {"reference": reference, "bn_fast": bn_fast}
# NumPy adds up what lies along the first axis one after the other, which costs digits.
LIMITS = {reference: 2 * LIMIT}


@pytest.fixture(params=IMPLEMENTATIONS)
def norms(request):
    """A module that has the functions."""
    return IMPLEMENTATIONS[request.param]


class Case(NamedTuple):
    norm: str
    shape: tuple
    axis: int | tuple
    num_groups: int | None = None

    @property
    def parameter_shape(self):
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return tuple(self.shape[d] for d in sorted(a % len(self.shape) for a in axes))

    @property
    def is_of_rows(self):
        return self.norm in ("layernorm", "rmsnorm")

    @property
    def n_values(self):
        """M, those of a statistic."""
        if self.is_of_rows:
            return int(np.prod(self.parameter_shape))
        n_groups = self.num_groups or self.shape[self.axis]
        return int(np.prod(self.shape)) // self.shape[0] // n_groups

    @property
    def n_samples(self):
        """Those that do not depend on each other along the first axis."""
        axes = np.atleast_1d(self.axis) % len(self.shape)
        return 1 if 0 in axes else self.shape[0]

    def options(self):
        groups = {} if self.num_groups is None else {"num_groups": self.num_groups}
        return {"axis": self.axis} | groups

    def forward(self, norms, x, gamma, beta, **options):
        parameters = (gamma,) if self.norm == "rmsnorm" else (gamma, beta)
        function = getattr(norms, f"{self.norm}_forward")
        return function(x, *parameters, **self.options() | options)

    def alone(self, norms, x, gamma, beta, **options):
        given = {"gamma": gamma} if self.norm == "rmsnorm" else {"gamma": gamma, "beta": beta}
        function = getattr(norms, self.norm.replace("norm", "_norm"))
        return function(x, **given | self.options() | options)

    def backward(self, norms, dout, cache, **options):
        """Three gradients; RMS norm's third is None."""
        gradients = getattr(norms, f"{self.norm}_backward")(dout, cache, **options)
        return (*gradients, None) if self.norm == "rmsnorm" else gradients

    def problem(self, dtype, seed=0):
        x = (3 + 2 * normal(self.shape, np.float64, seed + 1)).astype(dtype)
        dout = (normal(self.shape, np.float64, seed + 2) + 0.5).astype(dtype)
        kind = dtype if np.dtype(dtype).itemsize > 2 else np.float32
        gamma = 1 + normal(self.parameter_shape, kind, seed + 3) / 4
        beta = normal(self.parameter_shape, kind, seed + 4)
        return x, dout, gamma, 0 * beta if self.norm == "rmsnorm" else beta

    def judge(self, norms, x, dout, gamma, beta, eps=1e-5):
        """Forward and backward within the limit; returns the results."""
        out, cache = self.forward(norms, x, gamma, beta, eps=eps)
        gradients = self.backward(norms, dout, cache)
        expected, mean, inv_std, expected_gradients = oracle.norm(
            self.norm, x, gamma, beta, dout, self.axis, eps, self.num_groups
        )
        limit = LIMITS.get(norms, LIMIT)
        check("out", out, expected, x, limit)
        few = self.n_values < 10  # dx is projected on what few values have left: judged by a term
        scale = few * expected_gradients.dx_scale
        check("dx", gradients[0], expected_gradients.dx, x, limit, scale)
        like = gamma.astype(np.float32) if x.dtype.itemsize == 2 else x
        for name, got in zip(("dgamma", "dbeta"), gradients[1:], strict=True):
            if got is not None:
                scale = getattr(expected_gradients, f"{name}_scale")
                check(name, got, getattr(expected_gradients, name), like, limit, scale)
        prefix = "" if self.is_of_rows else "group_"
        for name, known in (("mean", mean), ("inv_std", inv_std)):
            check(name, getattr(cache, prefix + name).reshape(-1), known, like, limit)
        return out, cache, gradients


CASES = [
    *(Case(norm, shape, axis) for norm in ("layernorm", "rmsnorm") for shape, axis in (
        ((40,), -1),
        ((9, 33), -1),
        ((9, 33), 0),
        ((300, 4), 1),
        ((1, 288), -1),
        ((3, 4, 50), -1),
        ((3, 4, 50), (1, 2)),
        ((3, 4, 50), (0, 2)),  # not side by side
        ((3, 24, 5, 4), 1),  # channels of images
        ((3, 6, 5, 4), (-1, -2, -3)),
        ((3, 6, 5, 4), (3, 1)),
        ((5, 4), (0, 1)),
    )),
    *(Case("groupnorm", shape, axis, num_groups) for shape, axis, num_groups in (
        ((5, 30), 1, 2),  # no places
        ((4, 6, 10), 1, 3),
        ((2, 6, 4, 5), 1, 1),
        ((2, 6, 4, 5), 1, 2),
        ((2, 6, 4, 5), 1, 6),
        ((3, 4, 5, 8), -1, 2),
        ((3, 4, 8, 5), 2, 4),
        ((1, 4, 2, 3, 7), 1, 2),
    )),
    *(Case("instancenorm", shape, axis) for shape, axis in (
        ((3, 4, 20), 1),
        ((2, 3, 5, 6), 1),
        ((2, 5, 6, 3), -1),
        ((2, 5, 3, 6), 2),
        ((1, 2, 3, 4, 5), 1),
    )),
]  # fmt: skip
FIRST = [next(case for case in CASES if case.norm == norm and len(case.shape) > 2)
         for norm in ("layernorm", "rmsnorm", "groupnorm", "instancenorm")]  # fmt: skip

BATCHES = [case for case in CASES if case.n_samples > 1]


def label(case):
    return "-".join(str(value).replace(" ", "") for value in case if value is not None)


all_cases = pytest.mark.parametrize("case", CASES, ids=label)
each_norm = pytest.mark.parametrize("case", FIRST, ids=lambda case: case.norm)


# Numbers


def outliers(x):
    """In the first statistic's first value, the last's last one, and one in between."""
    x.flat[[0, x.size // 2, -1]] += np.array([1e6, -1e5, 1e4]).astype(x.dtype)
    return x


HOSTILE = {
    "ordinary": lambda x: x,
    "offset": lambda x: x + x.dtype.type(1e6 if x.dtype == np.float32 else 1e9),
    "outliers": outliers,
    "drift": lambda x: x + np.linspace(0, 1e6, x.size, dtype=x.dtype).reshape(x.shape),
    "huge": lambda x: x * x.dtype.type(1e25),
    "tiny": lambda x: x * x.dtype.type(1e-25),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("dtype", DTYPES)
@all_cases
def test_against_long_double(norms, case, dtype, kind):
    x, dout, gamma, beta = case.problem(dtype)
    case.judge(norms, HOSTILE[kind](x), dout, gamma, beta, eps=0 if kind == "tiny" else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@all_cases
def test_far_below_eps(norms, case, dtype):
    x, dout, gamma, beta = case.problem(dtype)
    beta[...] = 0
    case.judge(norms, x * dtype(1e-30 if dtype == np.float32 else 1e-200), dout, gamma, beta)


@pytest.mark.parametrize("shape", [(20000, 4), (2000, 33)])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_many_rows(norms, norm, shape):
    """The sums down the rows keep float32's digits."""
    case = Case(norm, shape, -1)
    case.judge(norms, *case.problem(np.float32))


EQUAL = [
    *(Case("layernorm", (n, 5), -1) for n in (144, 513)),
    *(Case(norm, (n, 40), -1) for norm in ("layernorm", "rmsnorm") for n in (36, 144, 2100)),
    *(Case("layernorm", (40, n), 0) for n in (36, 513)),
    Case("layernorm", (3, 4, 300), 1),
    *(Case("groupnorm", (n, 64), 1, 2) for n in (36, 144, 513)),
    *(Case("groupnorm", (2, 4, n), 1, 2) for n in (3, 36, 144, 2100)),
    *(Case("groupnorm", (n, 4, 33), 1, 2) for n in (36, 144)),
    *(Case("groupnorm", (2, n, 40), -1, 2) for n in (36, 144, 2100)),
    *(Case("instancenorm", (2, 4, n), 1) for n in (36, 144, 2100)),
]


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", EQUAL, ids=label)
def test_equal_values_of_dout(case, dtype, repeated):
    """The roundings of a sum of equal terms all go one way, be they in memory once or often."""
    x, _, gamma, beta = case.problem(dtype)
    for value in (0.1, 0.7, -1e5 / 3):
        dout = np.broadcast_to(dtype(value), case.shape)
        case.judge(bn_fast, x, dout if repeated else dout.copy(), gamma, beta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 6, 4), (3, 6, 40), (2, 40, 6), (3, 6, 16, 20)])
def test_groups_whose_channels_differ(norms, shape, dtype):
    """What the channels of a group have in common is not what each of them has."""
    case = Case("groupnorm", shape, shape.index(6), 2)
    x, dout, gamma, beta = case.problem(dtype)
    lengths = [6 if n == 6 else 1 for n in shape]
    far_x = np.array([0, 0, 1e3, -1e5, -3e5, 1], dtype).reshape(lengths)
    far_dout = np.array([1e4, 0, 1, 0, -1e5, 3e5], dtype).reshape(lengths)
    for a, b in ((x, dout + far_dout), (x + far_x, dout), (x + far_x, dout + far_dout)):
        case.judge(norms, a, b, gamma, beta)
    one_channel = [slice(None)] * len(shape)
    one_channel[case.axis] = slice(1, 2)
    for value in (0, 0.3):
        dout[tuple(one_channel)] = value
        case.judge(norms, x, dout, gamma, beta)
    dout[...] = 0.3
    dx = case.backward(norms, dout, case.forward(norms, x, None, None)[1])[0]
    if norms is bn_fast:
        np.testing.assert_array_equal(dx, 0)


@pytest.mark.parametrize("dtype", HALVES)
@all_cases
def test_half_types(norms, case, dtype):
    """Computed in float32, to which gamma is applied, and rounded once."""
    case.judge(norms, *case.problem(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@each_norm
def test_layouts(norms, case, dtype, layout):
    x, dout, gamma, beta = case.problem(dtype)
    x, dout = LAYOUTS[layout](x), LAYOUTS["Fortran" if "cast" in layout else layout](dout)
    before = x.tobytes(), dout.tobytes()
    out, _, gradients = case.judge(norms, x, dout, gamma, beta)
    assert before == (x.tobytes(), dout.tobytes())
    for result in (out, gradients[0]):
        assert result.strides == np.empty_like(x).strides


def test_the_oracle_against_known_answers():
    """x_hat is 1, -1, 1, -1, and t = 1, 1, -1, -1 is all of dout that comes through to dx."""
    x_hat, t = np.array([[1, -1, 1, -1]]), np.array([[1, 1, -1, -1]])
    x, dout, two = 1e12 + 2.0**-10 * x_hat, 5 + 3 * x_hat + t, 2 * np.ones(4)
    known = oracle.norm("layernorm", x, two, two + 1, dout, -1, eps=0)
    out, mean, inv_std, (dx, dgamma, dbeta, *_) = known
    np.testing.assert_array_equal(out, 2 * x_hat + 3)
    np.testing.assert_array_equal([mean[0], inv_std[0]], [1e12, 2.0**10])
    np.testing.assert_array_equal(dx, 2**11 * t)
    np.testing.assert_array_equal(dgamma, (dout * x_hat)[0])
    np.testing.assert_array_equal(dbeta, dout[0])
    # rows of (4, 1): x_hat is x, and dx what is orthogonal to it
    known = oracle.norm("rmsnorm", 4.0 * x_hat, two, 0 * two, dout, -1, eps=0)
    np.testing.assert_array_equal(known[0], 2 * x_hat)
    np.testing.assert_array_equal(known[3].dx, (5 + t) / 2)
    # a group of two channels is a row; gamma differs in it
    gamma = np.array([1, 1, 2, 2])
    known = oracle.norm("groupnorm", x, gamma, 0 * gamma, dout, 1, 0, num_groups=2)
    np.testing.assert_array_equal(known[0], gamma * x_hat)
    np.testing.assert_array_equal(known[1], [1e12, 1e12])


@all_cases
def test_finite_differences(norms, case):
    case = case._replace(shape=tuple(min(n, 8) for n in case.shape))
    x, dout, gamma, beta = case.problem(np.float64)

    def loss():
        return (dout * case.forward(norms, x, gamma, beta)[0]).sum()

    gradients = case.backward(norms, dout, case.forward(norms, x, gamma, beta)[1])
    moved = (x, gamma) if case.norm == "rmsnorm" else (x, gamma, beta)
    for got, a in zip(gradients, moved, strict=False):
        expected = slopes(loss, a)
        np.testing.assert_allclose(got, expected, atol=1e-6 * max(1, np.abs(got).max()))


# The notebooks of CS231n's assignment 2: what they print, for a right solution.


def test_notebook_layer_norm(norms):
    random = np.random.RandomState(231)
    x, w1, w2 = random.randn(4, 50), random.randn(50, 60), random.randn(60, 3)
    a = np.maximum(0, x.dot(w1)).dot(w2)
    np.testing.assert_allclose(
        a.mean(axis=1), [-59.06673243, -47.60782686, -43.31137368, -26.40991744]
    )
    np.testing.assert_allclose(a.std(axis=1), [10.07429373, 28.39478981, 35.28360729, 4.01831507])
    for gamma, beta, stds in (
        (1.0, 0.0, [0.99999995, 0.99999999, 1.0, 0.99999969]),
        (3.0, 5.0, [2.99999985, 2.99999998, 2.99999999, 2.99999907]),
    ):
        param = {"mode": "train"}
        out, _ = norms.layernorm_forward(a, np.full(3, gamma), np.full(3, beta), param)
        np.testing.assert_allclose(out.mean(axis=1), beta, atol=1e-14)
        np.testing.assert_allclose(out.std(axis=1), stds, atol=5.1e-9)
        assert param == {"mode": "train"}


def test_notebook_layer_norm_gradients(norms):
    random = np.random.RandomState(231)
    x = 5 * random.randn(4, 5) + 12
    gamma, beta, dout = random.randn(5), random.randn(5), random.randn(4, 5)

    def forward():
        return norms.layernorm_forward(x, gamma, beta, {})

    gradients = norms.layernorm_backward(dout, forward()[1])
    for got, a in zip(gradients, (x, gamma, beta), strict=True):
        expected = slopes(lambda: (dout * forward()[0]).sum(), a, 1e-5)
        error = np.abs(got - expected) / np.maximum(1e-8, np.abs(got) + np.abs(expected))
        assert error.max() < 1e-8  # "about e-9" is what the notebook expects


def test_notebook_spatial_group_norm(norms):
    random = np.random.RandomState(231)
    x = 4 * random.randn(2, 6, 4, 5) + 10
    rows = x.reshape(4, -1)
    np.testing.assert_allclose(rows.mean(axis=1), [9.72505327, 8.51114185, 8.9147544, 9.43448077])
    np.testing.assert_allclose(rows.std(axis=1), [3.67070958, 3.09892597, 4.27043622, 3.97521327])
    out, _ = norms.spatial_groupnorm_forward(
        x, np.ones((1, 6, 1, 1)), np.zeros((1, 6, 1, 1)), 2, {"mode": "train"}
    )
    rows = out.reshape(4, -1)
    np.testing.assert_allclose(rows.mean(axis=1), 0, atol=1e-14)
    stds = [0.99999963, 0.99999948, 0.99999973, 0.99999968]
    np.testing.assert_allclose(rows.std(axis=1), stds, atol=5.1e-9)


def test_notebook_spatial_group_norm_gradients(norms):
    random = np.random.RandomState(231)
    x = 5 * random.randn(2, 6, 4, 5) + 12
    gamma, beta = random.randn(1, 6, 1, 1), random.randn(1, 6, 1, 1)
    dout = random.randn(2, 6, 4, 5)

    def forward():
        return norms.spatial_groupnorm_forward(x, gamma, beta, G=2, gn_param={})

    gradients = norms.spatial_groupnorm_backward(dout, forward()[1])
    for got, a in zip(gradients, (x, gamma, beta), strict=True):
        assert got.shape == a.shape
        expected = slopes(lambda: (dout * forward()[0]).sum(), a, 1e-5)
        error = np.abs(got - expected) / np.maximum(1e-8, np.abs(got) + np.abs(expected))
        assert error.max() < 1e-6  # "e-7 or below"


# Edges


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("eps", [0, 1e-5])
@pytest.mark.parametrize("dtype", DTYPES)
@all_cases
def test_constant_rows(norms, case, dtype, eps):
    """Exactly beta; of RMS norm rows of zeros."""
    x, dout, gamma, beta = case.problem(dtype)
    x[...] = 0 if case.norm == "rmsnorm" else dtype(0.1)
    out, cache = case.forward(norms, x, gamma, beta, eps=eps)
    np.testing.assert_array_equal(out, case.forward(norms, 0 * x, 0 * gamma, beta)[0])
    axes = np.atleast_1d(case.axis) % x.ndim
    shape = [n if d in axes else 1 for d, n in enumerate(x.shape)]
    np.testing.assert_array_equal(out, np.broadcast_to(beta.reshape(shape), x.shape))
    dx, dgamma, _ = case.backward(norms, dout, cache)
    assert np.isfinite(dx).all()
    np.testing.assert_array_equal(dgamma, 0)
    if eps == 0:
        np.testing.assert_array_equal(dx, 0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("eps", [0, 1e-5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [
    Case("layernorm", (5, 1), -1),
    Case("layernorm", (3, 1, 4), 1),
    Case("groupnorm", (4, 6), 1, 6),
    Case("instancenorm", (3, 5), 1),
    Case("instancenorm", (3, 5, 1), 1),
], ids=label)  # fmt: skip
def test_one_value_for_each_statistic(norms, case, dtype, eps):
    x, dout, gamma, beta = case.problem(dtype)
    out, cache = case.forward(norms, x, gamma, beta, eps=eps)
    assert out.shape == x.shape
    expected = case.forward(norms, np.zeros_like(x), gamma, beta)[0]
    np.testing.assert_array_equal(out, expected)
    dx, dgamma, dbeta = case.backward(norms, dout, cache)
    np.testing.assert_array_equal(dx, 0)
    np.testing.assert_array_equal(dgamma, 0)
    assert np.abs(dbeta).sum() > 0


@pytest.mark.filterwarnings("error")
@all_cases
def test_gamma_zero(norms, case):
    x, dout, gamma, beta = case.problem(np.float64)
    gamma[...] = 0
    _, _, (dx, dgamma, _) = case.judge(norms, x, dout, gamma, beta)
    np.testing.assert_array_equal(dx, 0)
    assert (dgamma != 0).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", [
    *(Case(norm, shape, axis) for norm in ("layernorm", "rmsnorm") for shape, axis in (
        ((0,), -1), ((0, 5), -1), ((4, 0), -1), ((4, 0), 0), ((2, 0, 3), (1, 2)), ((2, 0, 3), -1),
    )),
    *(Case("groupnorm", shape, 1, 3) for shape in ((0, 6), (0, 6, 3), (2, 6, 0), (2, 0, 3))),
    *(Case("instancenorm", shape, 1) for shape in ((0, 6), (0, 6, 3), (2, 6, 0), (2, 0, 3))),
], ids=label)  # fmt: skip
def test_no_values(norms, case):
    x, _, gamma, beta = case.problem(np.float32)
    out, cache = case.forward(norms, x, gamma, beta)
    dx, *parameter_gradients = case.backward(norms, x, cache)
    in_place, spent = case.forward(norms, x, gamma, beta, out=x)
    assert in_place is x
    assert case.backward(norms, x, spent, out=x)[0] is x  # nothing has been overwritten
    for result in (out, dx, cache.x_hat):
        assert (result.shape, result.dtype) == (x.shape, x.dtype)
    for gradient in parameter_gradients:
        if gradient is not None:
            np.testing.assert_array_equal(gradient, np.zeros(case.parameter_shape, np.float32))
    mean, inv_std, *_ = cache
    assert np.broadcast_shapes(mean.shape, inv_std.shape, x.shape) == x.shape


HOSTILES = {"constant": 0.0, "NaN": np.nan, "inf": np.inf, "1e30": 1e30, "1e-30": 1e-30}


ONE_CHANNEL = [
    *(Case("groupnorm", (3, 1, n), 1, 1) for n in (3, 5, 40)),
    *(Case("instancenorm", (3, 1, n), 1) for n in (3, 5, 40)),
]


@pytest.mark.parametrize("case", [*BATCHES, *ONE_CHANNEL], ids=label)
def test_batch_invariance_of_any_strides(case):
    """The samples may lie side by side, and be the one axis that is longer than 1."""
    x, dout, gamma, beta = case.problem(np.float32)
    alone = case._replace(shape=(1, *case.shape[1:]))
    for order in itertools.permutations(range(x.ndim)) if x.ndim < 5 else ():
        x, dout = (laid_out(a, order) for a in (x, dout))
        out, cache = case.forward(bn_fast, x, gamma, beta)
        dx = case.backward(bn_fast, dout, cache)[0]
        for n in range(len(x)):
            own_out, own_cache = alone.forward(bn_fast, x[n : n + 1], gamma, beta)
            own_dx = alone.backward(bn_fast, dout[n : n + 1], own_cache)[0]
            assert_same_bits([own_out, own_dx], [out[n : n + 1], dx[n : n + 1]])


def laid_out(a, order):
    """The same values, whose axes follow one another in memory in that order."""
    return a.transpose(order).copy().transpose(np.argsort(order))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN and infinity, as NumPy's
@pytest.mark.parametrize("kind", HOSTILES)
@pytest.mark.parametrize("case", BATCHES, ids=label)
def test_batch_invariance(norms, case, kind):
    """A sample has the same bits alone and beside others, whatever they are."""
    x, dout, gamma, beta = case.problem(np.float32)
    x[0] = HOSTILES[kind] * x[0] if kind != "inf" else np.inf
    out, cache = case.forward(norms, x, gamma, beta)
    dx = case.backward(norms, dout, cache)[0]
    alone = case._replace(shape=(1, *case.shape[1:]))
    for n in range(1, len(x)):
        own_out, own_cache = alone.forward(norms, x[n : n + 1], gamma, beta)
        own_dx = alone.backward(norms, dout[n : n + 1], own_cache)[0]
        assert_same_bits([own_out, own_dx], [out[n : n + 1], dx[n : n + 1]])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@each_norm
def test_not_finite_values_spread_as_in_numpy(norms, case):
    x, dout, gamma, beta = case.problem(np.float64)
    x[0, 0, 0] = np.nan
    x[1, -1, -1] = np.inf
    out, cache = case.forward(norms, x, gamma, beta)
    dx = case.backward(norms, dout, cache)[0]
    _, inv_std, _, _, _ = cache
    lost = ~np.isfinite(np.broadcast_to(inv_std, x.shape)) | (inv_std == 0)
    assert np.isnan(out[0, 0, 0]).any()
    assert np.isfinite(out[~lost]).all()
    assert np.isfinite(dx[~lost]).all()
    assert 0 < lost.sum() < lost.size


# Arguments


CONTRACT = {
    "layernorm_forward": "x, gamma=None, beta=None, ln_param=None, *, axis=-1, eps=None, out=None",
    "rmsnorm_forward": "x, gamma=None, rms_param=None, *, axis=-1, eps=None, out=None",
    "groupnorm_forward": "x, gamma, beta, num_groups, gn_param=None, *, axis=1, eps=None, out=None",
    "instancenorm_forward":
        "x, gamma=None, beta=None, in_param=None, *, axis=1, eps=None, out=None",
    "spatial_groupnorm_forward": "x, gamma, beta, G, gn_param=None, *, eps=None, out=None",
    "layernorm_backward": "dout, cache, *, out=None, needs=('dx', 'dgamma', 'dbeta')",
    "rmsnorm_backward": "dout, cache, *, out=None, needs=('dx', 'dgamma')",
    "groupnorm_backward": "dout, cache, *, out=None, needs=('dx', 'dgamma', 'dbeta')",
    "instancenorm_backward": "dout, cache, *, out=None, needs=('dx', 'dgamma', 'dbeta')",
    "spatial_groupnorm_backward": "dout, cache, *, out=None, needs=('dx', 'dgamma', 'dbeta')",
    "layer_norm": "x, gamma=None, beta=None, *, eps=1e-05, axis=-1, out=None",
    "rms_norm": "x, gamma=None, *, eps=1e-05, axis=-1, out=None",
    "group_norm": "x, num_groups, gamma=None, beta=None, *, eps=1e-05, axis=1, out=None",
    "instance_norm": "x, gamma=None, beta=None, *, eps=1e-05, axis=1, out=None",
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRACT)
def test_signatures(norms, name):
    parameters = inspect.signature(getattr(norms, name)).parameters.values()
    bare = [p.replace(annotation=p.empty) for p in parameters]
    assert str(inspect.Signature(bare)) == f"({CONTRACT[name]})"
    assert name in norms.__all__


X = normal((2, 6, 3, 4), np.float64)
FOUR, SIX = np.ones(4), np.ones(6)
LN, RMS, GN, IN, SGN = list(CONTRACT)[:5]

# (function, its arguments, error, what the message has: the name, what was expected, what came)
REFUSED = [
    (LN, {"x": None}, TypeError, "x must be .*real numbers, got None"),
    (LN, {"x": X.astype(complex)}, TypeError, "x must be .*complex128"),
    (LN, {"x": np.ma.masked_array(X)}, TypeError, "x must be .*masked"),
    (LN, {"x": 1.0}, ValueError, "x must have 1 or more dimensions"),
    (LN, {"gamma": "abc"}, TypeError, "gamma must be .*real numbers, got str"),
    (LN, {"gamma": FOUR[:3]}, ValueError,
     r"gamma must have shape \(4,\), that of axis 3 of x, got \(3,\)$"),
    (LN, {"beta": 1.0}, ValueError, r"beta must have shape \(4,\).*got \(\)$"),
    (LN, {"gamma": np.ones((6, 3, 4))}, ValueError,
     r"gamma must have shape \(4,\).*got \(6, 3, 4\).*axis=tuple\(range\(1, x\.ndim\)\)"),
    (LN, {"beta": np.ones((3, 4)), "axis": 2}, ValueError,
     r"beta must have shape \(3,\).*got \(3, 4\).*axis=tuple\(range\(2, x\.ndim\)\)"),
    (LN, {"gamma": np.ones((6, 2)), "axis": (0, 1)}, ValueError,
     r"gamma must have shape \(2, 6\), that of axes \(0, 1\) of x, got \(6, 2\)$"),
    (LN, {"gamma": np.ones((2, 1, 1, 4))}, ValueError,
     r"gamma must have shape \(4,\).*got \(2, 1, 1, 4\).*multiply the result.*gamma=None"),
    (LN, {"gamma": np.ones((1, 4))}, ValueError, r"gamma must have shape \(4,\).*got \(1, 4\)$"),
    (RMS, {"gamma": np.ones((2, 6, 3, 4))}, ValueError, "multiply .*gamma=None"),
    (RMS, {"gamma": np.ones(3)}, ValueError, r"gamma must have shape \(4,\).*got \(3,\)"),
    (LN, {"axis": 1.0}, TypeError, "axis must be an integer or a tuple.*got float 1.0"),
    (LN, {"axis": None}, TypeError, "axis must be an integer or a tuple.*got None"),
    (LN, {"axis": [1, 2]}, TypeError, r"axis must be an integer or a tuple.*list \[1, 2\]"),
    (LN, {"axis": (1, 2.0)}, TypeError, "axis must be an integer, got float 2.0"),
    (LN, {"axis": ()}, ValueError, r"axis must name one or more axes.*got \(\)"),
    (LN, {"axis": (1, -3)}, ValueError, r"axis must name .*each once, got \(1, -3\)"),
    *((function, {"axis": 4}, np.exceptions.AxisError, r"axis must be in \[-4, 4\).*got 4")
      for function in (LN, RMS, GN, IN)),
    *((function, {"axis": axis}, ValueError, rf"axis must not be 0.*batch, got {axis}.*x\[np\.new")
      for function in (GN, IN) for axis in (0, -4)),
    *((function, {"x": FOUR}, ValueError, r"x must have 2 or more dimensions.*got shape \(4,\)")
      for function in (GN, IN)),
    (GN, {"axis": (1, 2)}, TypeError, "axis must be an integer, got tuple"),
    *((GN, {"num_groups": g}, ValueError,
       f"num_groups must be at least 1 and divide the 6 channels of axis 1.*got {g}")
      for g in (0, -1, 4, 12)),
    *((GN, {"num_groups": g}, TypeError, f"num_groups must be an integer, got .*{g}")
      for g in (2.0, True, np.True_, None, "2")),
    (GN, {"num_groups": SIX}, TypeError, "num_groups must be an integer, got an array"),
    (GN, {"gamma": np.ones(2)}, ValueError,
     r"gamma must have shape \(6,\), one value for each channel along axis 1 of x, got \(2,\).*"
     r"opset 18 of ONNX.*np\.repeat\(value, 3\)"),
    (GN, {"beta": np.ones(3)}, ValueError, r"beta must have shape \(6,\).*got \(3,\)$"),
    (GN, {"gamma": np.ones((2, 6))}, ValueError, r"got \(2, 6\).*multiply .*gamma=None"),
    (GN, {"beta": np.ones((2, 6))}, ValueError, r"got \(2, 6\).*add .*beta=None"),
    (GN, {"gamma": np.ones((1, 6, 1, 1))}, ValueError, r"\(6,\).*got \(1, 6, 1, 1\)$"),
    (IN, {"gamma": np.ones((2, 6))}, ValueError, r"got \(2, 6\).*multiply .*gamma=None"),
    (IN, {"gamma": FOUR}, ValueError, r"gamma must have shape \(6,\).*got \(4,\)$"),
    (SGN, {"x": X[0]}, ValueError, r"x must have 4 dimensions \(N, C, H, W\), got shape"),
    (SGN, {"G": 4}, ValueError, "^G must be .* divide the 6 channels.*got 4"),
    (SGN, {"G": 2.0}, TypeError, "^G must be an integer, got float 2.0"),
    (SGN, {"gamma": np.ones((6, 1, 1))}, ValueError,
     r"gamma must have shape \(6,\) or \(1, 6, 1, 1\).*got \(6, 1, 1\)$"),
    (LN, {"eps": "1"}, TypeError, "eps must be a real number, got str"),
    *((LN, {"eps": eps}, ValueError, f"eps must be finite and at least 0, got {eps}")
      for eps in (-1e-5, np.inf, np.nan)),
    *((LN, {name: X}, TypeError, f"layernorm_forward takes no {name}: .*(before|result)")
      for name in ("weights", "mask", "residual", "activation")),
    ("group_norm", {"weights": X}, TypeError, "group_norm takes no weights"),
    (LN, {"epsilon": 1}, TypeError, "unexpected keyword"),
    *((alone, {"eps": None}, TypeError, "eps must be a real number, got None")
      for alone in ("layer_norm", "rms_norm", "group_norm", "instance_norm")),
    (LN, {"out": [[0.0]]}, TypeError, "out must be an ndarray"),
    (LN, {"out": np.zeros(4)}, ValueError, r"out must have the shape of x.*got \(4,\)"),
    (GN, {"out": X.astype(np.float32)}, TypeError, "out must have the dtype of x.*float32"),
    (IN, {"out": np.broadcast_to(1.0, X.shape)}, ValueError, "out must be writable"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "wrong", "error", "message"), REFUSED)
def test_refuses(norms, function, wrong, error, message):
    arguments = {"x": X, "out": np.full(X.shape, 7.0)}
    if function in (GN, SGN, "group_norm"):
        arguments["G" if function == SGN else "num_groups"] = 2
    if function in (GN, SGN):
        arguments |= {"gamma": None, "beta": None}
    with pytest.raises(error, match=f"(?s){message}"):
        getattr(norms, function)(**arguments | wrong)
    assert (arguments["out"] == 7).all()


PARAMS = {LN: "ln_param", RMS: "rms_param", GN: "gn_param", IN: "in_param", SGN: "gn_param"}


@pytest.mark.parametrize("function", PARAMS)
def test_the_dict(norms, function):
    """It may have eps and is not written to; what else is in it is others' business."""
    name = PARAMS[function]
    first = (X, None, None, 2) if function in (GN, SGN) else (X,)

    def forward(param, **options):
        return getattr(norms, function)(*first, **{name: param}, **options)[0]

    param = {"eps": 0.5, "mode": "train", "momentum": 0.9, 7: None, "Mode": 1}
    before = dict(param)
    by_name = forward(None, eps=0.5)
    assert_same_bits([forward(param), forward({}, eps=0.5)], [by_name, by_name])
    assert param == before
    assert_same_bits([forward(None), forward({})], [forward(None, eps=1e-5)] * 2)
    assert np.abs(by_name - forward(None)).max() > 0.01

    with pytest.raises(ValueError, match=rf"eps must be given once.* 0\.1 .*{name}\['eps'\] 0\.5"):
        forward(param, eps=0.1)
    for key in ("epsilon", "EPS"):
        with pytest.raises(ValueError, match=f"{name} has a key '{key}': 'eps' must be meant"):
            forward({key: 1e-3})
    for wrong, kind in ((1e-5, "float 1e-05"), (np.float32(1), "float32"), ("a", "str"), (X, "an")):
        with pytest.raises(TypeError, match=f"{name} must be a dict or None, got {kind}.*eps="):
            forward(wrong)
    for eps in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=rf"{name}\['eps'\] must be finite and at least 0"):
            forward({"eps": eps})
    with pytest.raises(TypeError, match=rf"{name}\['eps'\] must be a real number, got None"):
        forward({"eps": None})


@each_norm
def test_the_dict_by_position(norms, case):
    """Where the course has it."""
    x, _, gamma, beta = case.problem(np.float64)
    before = {"rmsnorm": (gamma,), "groupnorm": (gamma, beta, case.num_groups)}
    function = getattr(norms, f"{case.norm}_forward")
    got, _ = function(x, *before.get(case.norm, (gamma, beta)), {"eps": 0.25}, axis=case.axis)
    assert_same_bits([got], [case.forward(norms, x, gamma, beta, eps=0.25)[0]])


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint64, np.float16, ">f4", ">f8"])
@each_norm
def test_dtypes(norms, case, dtype):
    """Integers as float64; parameters of any real dtype; results native."""
    x, dout, gamma, beta = (np.abs(3 * a).astype(dtype) for a in case.problem(np.float64))
    wide = np.dtype(np.float64) if x.dtype.kind in "biu" else x.dtype.newbyteorder("=")
    out, cache = case.forward(norms, x, gamma, beta)
    dx, dgamma, _ = case.backward(norms, dout, cache)
    assert out.dtype == dx.dtype == wide
    assert dgamma.dtype == (np.float32 if wide == np.float16 else wide)
    expected, *_ = oracle.norm(case.norm, x, gamma, beta, dout, case.axis, 1e-5, case.num_groups)
    check("out", out, expected, np.empty(0, wide), LIMITS.get(norms, LIMIT))


def given(gradients):
    return [a for a in gradients if a is not None]


@each_norm
def test_parameters_are_rounded_to_the_computation(norms, case):
    x, dout, gamma, beta = case.problem(np.float32)
    expected, cache = case.forward(norms, x, gamma, beta)
    out, other_cache = case.forward(norms, x, gamma.astype(np.float64), beta.tolist())
    assert_same_bits([out], [expected])
    gradients = given(case.backward(norms, dout.astype(np.float64), other_cache))
    assert_same_bits(gradients, given(case.backward(norms, dout, cache)))


@all_cases
def test_without_parameters(norms, case):
    """None is 1 and 0, together or alone; its gradient is None."""
    x, dout, gamma, beta = case.problem(np.float64)
    for some in ((gamma, None), (None, beta), (None, None)):
        out, cache = case.forward(norms, x, *some)
        gradients = case.backward(norms, dout, cache)
        assert (list(cache)[4] is None) == (some[0] is None)
        all_given = [np.ones_like(gamma) if some[0] is None else gamma,
                     np.zeros_like(beta) if some[1] is None else beta]  # fmt: skip
        expected, cache = case.forward(norms, x, *all_given)
        expected_gradients = case.backward(norms, dout, cache)
        assert_same_bits([out + 0.0, gradients[0]], [expected + 0.0, expected_gradients[0]])
        beta_there = some[1] is not None and case.norm != "rmsnorm"
        assert [a is not None for a in gradients[1:]] == [some[0] is not None, beta_there]
        for got, known in zip(gradients[1:], expected_gradients[1:], strict=True):
            if got is not None:
                assert_same_bits([got], [known])


def test_parameters_of_images(norms):
    """(C,) and (1, C, 1, 1) mean the same, and gradients come in the shape given."""
    case = Case("groupnorm", (2, 6, 4, 5), 1, 2)
    x, dout, gamma, beta = case.problem(np.float64)
    expected, cache = case.forward(norms, x, gamma, beta)
    gradients = case.backward(norms, dout, cache)
    gammas, betas = ((p, p.reshape(1, 6, 1, 1)) for p in (gamma, beta))
    for g, b in ((g, b) for g in gammas for b in betas):
        out, cache = norms.spatial_groupnorm_forward(x, g, b, 2, {})
        dx, dgamma, dbeta = norms.spatial_groupnorm_backward(dout, cache)
        assert (dgamma.shape, dbeta.shape) == (g.shape, b.shape)
        assert list(cache)[4].shape == (6, 1, 1)
        assert_same_bits([out, dx, dgamma.ravel(), dbeta.ravel()], [expected, *gradients])


@all_cases
def test_forward_alone(norms, case):
    x, _, gamma, beta = case.problem(np.float32)
    for eps in (1e-5, 0.1):
        out = np.empty_like(x)
        assert case.alone(norms, x, gamma, beta, eps=eps, out=out) is out
        expected, _ = case.forward(norms, x, gamma, beta, eps=eps)
        assert_same_bits([out, case.alone(norms, x, gamma, beta, eps=eps)], [expected] * 2)
    assert_same_bits([case.alone(norms, x, gamma, beta)], [case.forward(norms, x, gamma, beta)[0]])


@each_norm
def test_needs(norms, case):
    x, dout, gamma, beta = case.problem(np.float64)
    _, cache = case.forward(norms, x, gamma, beta)
    expected = case.backward(norms, dout, cache)
    names = ["dx", "dgamma", "dbeta"][: len(given(expected))]
    for wanted in ([], *([name] for name in names), names[::-1], names[1:]):
        got = case.backward(norms, dout, cache, needs=iter(wanted))
        for name, a, known in zip(names, got, expected, strict=False):
            assert (a is not None) == (name in wanted)
            if a is not None:
                assert_same_bits([a], [known])
    for wrong, error in ((["dresidual"], ValueError), ("dx", TypeError), (None, TypeError)):
        with pytest.raises(error, match="needs must be"):
            case.backward(norms, dout, cache, needs=wrong)
    if case.norm == "rmsnorm":
        with pytest.raises(ValueError, match="needs must be of dx, dgamma, got 'dbeta'"):
            case.backward(norms, dout, cache, needs=["dbeta"])
    with pytest.raises(ValueError, match="out is for dx"):
        case.backward(norms, dout, cache, needs=["dgamma"], out=np.empty_like(x))


# out, and in place


@pytest.mark.parametrize("over", [np.asarray, restepped])
@pytest.mark.parametrize("dtype", [np.float16, *DTYPES])
@all_cases
def test_in_place(norms, case, dtype, over):
    x, dout, gamma, beta = case.problem(dtype)
    expected, cache = case.forward(norms, x, gamma, beta)
    gradients = given(case.backward(norms, dout, cache))

    own = x.copy()
    target = over(own)
    out, spent = case.forward(norms, own, gamma, beta, out=target)
    assert out is target
    assert_same_bits([out], [expected])
    with pytest.raises(ValueError, match=f"cache cannot be used: {case.norm}_forward wrote"):
        case.backward(norms, dout, spent)
    with pytest.raises(ValueError, match="x_hat is lost"):
        list(spent)

    own = dout.copy()
    target = over(own)
    got = case.backward(norms, own, cache, out=target)
    assert got[0] is target
    assert_same_bits(given(got), gradients)

    own = x.copy()
    target = over(own)
    _, cache = case.forward(norms, own, gamma, beta)
    got = case.backward(norms, dout, cache, out=target)
    assert got[0] is target
    assert_same_bits(given(got), gradients)
    with pytest.raises(ValueError, match=f"cache cannot be used: {case.norm}_backward wrote"):
        case.backward(norms, dout, cache)


@each_norm
def test_overlaps(norms, case):
    x, dout, gamma, beta = case.problem(np.float64)
    memory = np.zeros((x.shape[0] + 1, *x.shape[1:]))
    memory[1:] = x
    with pytest.raises(ValueError, match="out must be x itself or apart from it"):
        case.forward(norms, memory[1:], gamma, beta, out=memory[:-1])
    _, cache = case.forward(norms, memory[1:], gamma, beta)
    with pytest.raises(ValueError, match="out must be x itself or apart from it"):
        case.backward(norms, dout, cache, out=memory[:-1])
    np.testing.assert_array_equal(memory[1:], x)


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_out_is_no_parameter(norms, name):
    """Where they have x's shape out could lie over one, and the cache keeps gamma."""
    x, parameter = normal(5, np.float64), normal(5, np.float64, 1)
    for own in (x, parameter):
        with pytest.raises(ValueError, match=f"out must be apart from {name}, got .* shares"):
            norms.layernorm_forward(x, **{name: own}, out=own)
    _, cache = norms.layernorm_forward(x, parameter)
    with pytest.raises(ValueError, match="out must be apart from gamma"):
        norms.layernorm_backward(x, cache, out=parameter)


@each_norm
def test_wrong_dout(norms, case):
    x, dout, gamma, beta = case.problem(np.float32)
    _, cache = case.forward(norms, x, gamma, beta)
    with pytest.raises(ValueError, match=r"dout must have the shape of x, .*, got \(\d"):
        case.backward(norms, dout[:, :1], cache)
    with pytest.raises(TypeError, match=r"dout must be .*real numbers, got None"):
        case.backward(norms, None, cache)


# Caches


@pytest.mark.parametrize("dtype", [np.float16, *DTYPES])
@all_cases
def test_cache_unpacks_as_five(norms, case, dtype):
    x, _, gamma, beta = case.problem(dtype)
    out, cache = case.forward(norms, x, gamma, beta)
    mean, inv_std, cached_x, x_hat, cached_gamma = cache
    assert len(cache) == 5
    assert cached_x is x
    kind = np.float32 if dtype == np.float16 else dtype
    assert {a.dtype for a in (mean, inv_std, cached_gamma)} == {np.dtype(kind)}
    assert x_hat.dtype == dtype
    assert mean.shape == inv_std.shape
    assert np.broadcast_shapes(mean.shape, cached_gamma.shape, x.shape) == x.shape
    near = {"rtol": 0, "atol": 16 * np.finfo(dtype).eps * np.abs(out).max()}
    np.testing.assert_allclose(x_hat, (x.astype(kind) - mean) * inv_std, **near)
    lengths = [1] * x.ndim
    for d in np.atleast_1d(case.axis):
        lengths[d] = x.shape[d]
    np.testing.assert_allclose(cached_gamma * x_hat + beta.reshape(lengths), out, **near)
    if case.norm == "rmsnorm":
        np.testing.assert_array_equal(mean, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@all_cases
def test_x_hat_of_the_cache(norms, case, dtype):
    """At an offset, where the mean in one number has lost digits."""
    x, dout, gamma, beta = case.problem(dtype)
    x = HOSTILE["offset"](x)
    _, cache = case.forward(norms, x, gamma, beta)
    expected, mean, *_ = oracle.norm(
        case.norm, x, 0 * gamma + 1, 0 * beta, dout, case.axis, num_groups=case.num_groups
    )
    check("x_hat", cache.x_hat, expected, x, LIMITS.get(norms, LIMIT))
    near, low = cache.stats[:2]  # the first has float64's digits, also of the mean of float32
    assert np.abs(near - mean).max(initial=0) <= 1e-12 * np.abs(mean).max()
    assert np.abs(low).max() <= 1e-12 * np.abs(mean).max()


@all_cases
def test_shapes_of_statistics(norms, case):
    """Of groups as (N, G), and repeated for each channel; of rows as keepdims has them."""
    x, _, gamma, beta = case.problem(np.float64)
    _, cache = case.forward(norms, x, gamma, beta)
    if case.is_of_rows:
        axes = np.atleast_1d(case.axis) % x.ndim
        assert cache.mean.shape == tuple(1 if d in axes else n for d, n in enumerate(x.shape))
        assert not hasattr(cache, "group_mean")
        assert not hasattr(cache, "group_inv_std")
        return
    n, c = x.shape[0], x.shape[case.axis]
    g = case.num_groups or c
    lengths = [1] * x.ndim
    lengths[0], lengths[case.axis] = n, c
    for groups, channels in ((cache.group_mean, cache.mean), (cache.group_inv_std, cache.inv_std)):
        assert groups.shape == (n, g)
        assert channels.shape == tuple(lengths)
        np.testing.assert_array_equal(channels.reshape(n, c), np.repeat(groups, c // g, axis=1))


@pytest.mark.parametrize("offset", [0, 1e9])
@pytest.mark.parametrize("case", [case for case in CASES if case.is_of_rows], ids=label)
def test_plain_tuples(norms, case, offset):
    """As NumPy code makes them, with keepdims; what their mean has lost is found again."""
    x, dout, gamma, beta = case.problem(np.float64)
    x += offset
    axes = np.atleast_1d(case.axis) % x.ndim
    _, mean, inv_std, expected = oracle.norm(case.norm, x, gamma, beta, dout, case.axis)
    keepdims = [1 if d in axes else n for d, n in enumerate(x.shape)]
    mean, inv_std = (a.astype(np.float64).reshape(keepdims) for a in (mean, inv_std))
    broadcast = gamma.reshape([n if d in axes else 1 for d, n in enumerate(x.shape)])
    limit = LIMITS.get(norms, LIMIT)
    for five in (
        (mean, inv_std, x, None, gamma),
        [mean, inv_std, x, np.full_like(x, np.nan), broadcast],
    ):
        dx, *others = case.backward(norms, dout, five)
        check("dx", dx, expected.dx, x, limit, (case.n_values < 10) * expected.dx_scale)
        for name, got in zip(("dgamma", "dbeta"), others, strict=True):
            if got is not None:
                assert got.shape == five[4].shape
                scale = getattr(expected, f"{name}_scale")
                known = getattr(expected, name).reshape(got.shape)
                check(name, got, known, x, limit, scale)
    expected = case.backward(norms, dout, case.forward(norms, x, None, beta)[1])
    dx, dgamma, _ = case.backward(norms, dout, (mean, inv_std, x, None, None))
    assert dgamma is None
    np.testing.assert_allclose(dx, expected[0], rtol=0, atol=1e-14 * expected_size(dout, inv_std))


def expected_size(dout, inv_std):
    return np.abs(dout).max() * inv_std.max()


def five(**changed):
    x = normal((4, 6), np.float64)
    parts = {"mean": np.zeros((4, 1)), "inv_std": np.ones((4, 1)), "x": x, "x_hat": x, "gamma": SIX}
    return tuple((parts | changed).values())


FROM = "cache must come from layernorm_forward or be a tuple"


@pytest.mark.parametrize(("cache", "error", "message"), [
    (None, TypeError, f"{FROM}.*got None"),
    (five()[:4], TypeError, FROM),
    ({}, TypeError, f"{FROM}.*got dict"),
    (bn_fast.batchnorm_forward(X, SIX, SIX)[1], TypeError, FROM),
    (reference.batchnorm_forward(X, SIX, SIX)[1], TypeError, FROM),
    (five(mean=np.zeros(4)), ValueError, r"cache's mean .*\(4, 6\).*keepdims=True.*got \(4,\)"),
    (five(inv_std=np.ones((1, 4))), ValueError, r"cache's inv_std .*keepdims=True.*got \(1, 4\)"),
    (five(mean=np.ones((1, 6))), ValueError, r"one shape, got \(1, 6\) and \(4, 1\)"),
    (five(mean="abc"), TypeError, "cache's mean must be .*real numbers"),
    (five(inv_std=None), TypeError, "cache's inv_std must be .*real numbers"),
    (five(gamma=np.ones(4)), ValueError, r"cache's gamma must have shape \(6,\).*got \(4,\)"),
    (five(gamma=np.ones((4, 1))), ValueError, r"cache's gamma .*got \(4, 1\)"),
    (five(x=np.ones((4, 4)), gamma=np.ones((4, 1))), ValueError, r"cache's gamma .*got \(4, 1\)"),
    (five(x=None), TypeError, "cache's x must be .*real numbers, got None"),
])  # fmt: skip
def test_other_caches_are_refused(norms, cache, error, message):
    with pytest.raises(error, match=message):
        norms.layernorm_backward(np.ones((4, 6)), cache)


@each_norm
def test_caches_of_other_norms_are_refused(norms, case):
    x, dout, gamma, beta = case.problem(np.float64)
    _, cache = case.forward(norms, x, gamma, beta)
    for other in FIRST:
        if other.norm != case.norm:
            message = f"cache must come from {other.norm}_forward, got that of {case.norm}_forward"
            with pytest.raises(ValueError, match=message):
                other.backward(norms, dout, cache)
    if not case.is_of_rows:
        message = f"cache must come from {case.norm}_forward: no other says what the groups are"
        for plain in (tuple(cache), list(cache), None):
            with pytest.raises(TypeError, match=message):
                case.backward(norms, dout, plain)


def test_a_tuple_of_layer_norm_is_not_one_of_rms_norm(norms):
    with pytest.raises(ValueError, match="cache's mean must be 0 for RMS norm"):
        norms.rmsnorm_backward(np.ones((4, 6)), five(mean=np.ones((4, 1))))
    norms.rmsnorm_backward(np.ones((4, 6)), five(mean=0.0))


@each_norm
def test_copies_and_pickles_of_caches(norms, case):
    x, dout, gamma, beta = case.problem(np.float64)
    _, cache = case.forward(norms, x, gamma, beta)
    expected = given(case.backward(norms, dout, cache))
    for again in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert_same_bits(given(case.backward(norms, dout, again)), expected)
    assert case.norm in repr(cache)
    state = cache.__reduce_ex__(2)[2][1]
    del state["eps"]
    with pytest.raises(ValueError, match="pickled by another version"):
        cache.__setstate__((None, state))


@pytest.mark.parametrize(("name", "wrong"), [
    ("x", lambda x: x[:1]),
    ("x", lambda x: x.astype(int)),
    ("x", lambda x: None),
    ("gamma", lambda gamma: gamma.ravel()[:-1]),
    ("gamma", lambda gamma: gamma.astype(int)),
    ("gamma", lambda gamma: 1.0),
    ("stats", lambda stats: stats[:3]),
    ("stats", lambda stats: stats[:, ::-1]),
    ("stats", lambda stats: stats.astype(np.float32)),
    ("stats", lambda stats: stats[:, :-1].copy()),
    ("beta_shape", lambda shape: (77,)),
    ("beta_shape", lambda shape: 7),
    ("axes", lambda axes: axes[0]),
    ("axes", lambda axes: axes._replace(shape=axes.shape[::-1])),
    ("axes", lambda axes: axes._replace(shape=(*axes.shape, 1))),
    ("axes", lambda axes: axes._replace(shape=None)),
    ("axes", lambda axes: axes._replace(shape=(axes.shape[0], 4, 1, *axes.shape[3:]))),
    ("axes", lambda axes: axes._replace(along=(9,))),
    ("axes", lambda axes: axes._replace(along=())),
    ("axes", lambda axes: axes._replace(along=(0, 1))),
    ("axes", lambda axes: axes._replace(over=())),
    ("axes", lambda axes: axes._replace(along=("a",))),
    ("axes", lambda axes: axes._replace(over=axes.over * 2)),
    ("eps", lambda eps: None),
])  # fmt: skip
@each_norm
def test_a_cache_that_was_changed_is_refused(norms, case, name, wrong):
    x, dout, gamma, beta = case.problem(np.float64)
    _, cache = case.forward(norms, x, gamma, beta)
    setattr(cache, name, wrong(getattr(cache, name)))
    with pytest.raises(ValueError, match=f"cache cannot be used: its ({name}|axes) must be"):
        case.backward(norms, dout, cache)


@pytest.mark.parametrize("out", [None, "new", "x", "dout"])
@pytest.mark.parametrize("given", ["gamma and beta", "gamma", "beta", "neither"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@all_cases
def test_the_straight_road_leads_where_the_other_does(case, dtype, given, out, monkeypatch):
    """A small call whose arguments need no conversion, and the same where every one is checked."""

    def results(forward, backward):
        x, dout, gamma, beta = case.problem(dtype)
        gamma = gamma if "gamma" in given else None
        beta = beta if "beta" in given else None
        y, cache = case.forward(bn_fast, x, gamma, beta, **forward)
        where = {"x": x, "dout": dout, "new": np.empty_like(x)}.get(out)
        dx, dgamma, dbeta = case.backward(bn_fast, dout, cache, out=where, **backward)
        assert where is None or dx is where
        return [a for a in (y, cache.stats, dx, dgamma, dbeta) if a is not None], cache.overwritten

    param = {"layernorm": "ln_param", "rmsnorm": "rms_param", "groupnorm": "gn_param"}
    names = ["dx", "dgamma"] if case.norm == "rmsnorm" else ["dx", "dgamma", "dbeta"]
    checked, overwritten = results({param.get(case.norm, "in_param"): {}}, {"needs": names})
    assert overwritten == (f"{case.norm}_backward" if out == "x" else "")
    if case.axis in (-1, len(case.shape) - 1) if case.is_of_rows else case.axis > 0:
        monkeypatch.setattr(bn_fast._norm_checks, "call", None)
    if out != "x":  # which is spent, and looked at
        monkeypatch.setattr(bn_fast._norm_checks, "backward", None)
    straight, also_overwritten = results({}, {})
    assert also_overwritten == overwritten
    assert_same_bits(straight, checked)


@all_cases
def test_results_are_no_views(case):
    """Of an array of other axes, say: `resize` would refuse."""
    x, dout, gamma, beta = case.problem(np.float64)
    out, cache = case.forward(bn_fast, x, gamma, beta)
    for result in (out, case.alone(bn_fast, x, gamma, beta), *case.backward(bn_fast, dout, cache)):
        assert result is None or result.base is None


@each_norm
def test_each_takes_the_cache_of_the_others(norms, case):
    x, dout, gamma, beta = case.problem(np.float64)
    _, cache = case.forward(norms, x, gamma, beta)
    expected = case.backward(norms, dout, cache)
    for other in IMPLEMENTATIONS.values():
        for got, known in zip(case.backward(other, dout, cache), expected, strict=True):
            if known is not None:
                np.testing.assert_allclose(got, known, rtol=0, atol=1e-13 * np.abs(known).max())


# Another's numbers


def torch_results(torch, function, dout, *arrays):
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    out = function(*tensors)
    out.backward(torch.tensor(dout))
    return [out.detach().numpy(), *(t.grad.numpy() for t in tensors)]


def test_agrees_with_torch(norms):
    """In float64, which shares nothing with these functions nor with the oracle."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    for case, theirs in (
        (Case("layernorm", (3, 6, 4, 5), (2, 3)),
         lambda x, *affine: functional.layer_norm(x, (4, 5), *affine)),
        (Case("rmsnorm", (3, 6, 4, 5), (2, 3)),
         lambda x, gamma: functional.rms_norm(x, (4, 5), gamma, 1e-5)),
        (Case("groupnorm", (3, 6, 4, 5), 1, 3),
         lambda x, *affine: functional.group_norm(x, 3, *affine)),
        (Case("instancenorm", (3, 6, 4, 5), 1),
         lambda x, *affine: functional.instance_norm(x, None, None, *affine)),
    ):  # fmt: skip
        x, dout, *affine = case.problem(np.float64)
        out, cache = case.forward(norms, x, *affine)
        got = [out, *given(case.backward(norms, dout, cache))]
        expected = torch_results(torch, theirs, dout, x, *affine[: len(got) - 2])
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * np.abs(b).max())


def test_rms_norm_of_half_types_as_torch_rounds(norms):
    """gamma in float32, then one rounding: rounded before gamma every fourth would differ.

    Where float32's own roundings differ, few fall on the other side of a half type's.
    """
    torch = pytest.importorskip("torch")
    x = torch.tensor(normal((200, 288), np.float32)).to(torch.float16)
    gamma = torch.tensor(1 + normal(288, np.float32, 1) / 4).to(torch.float16)
    expected = torch.nn.functional.rms_norm(x, (288,), gamma, 1e-5).numpy()
    got = norms.rms_norm(x.numpy(), gamma.numpy())
    assert (got != expected).mean() < 1e-3
