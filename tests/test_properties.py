"""Any shape, axis, strides, dtype and parameters, against the oracle; and finite differences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bn_fast
from bn_fast import batchnorm_backward, batchnorm_forward
from bn_fast._core import isa

from . import oracle
from .arrays import normal, strided
from .judge import assert_same_bits, check, check_gradients, slopes
from .problems import engine
from .strategies import EPS, MODES, few, norm_problems, problems
from .test_norms import Case


def check_problem(problem, mode, eps):
    """Against the oracle: new arrays, two threads, arrays of the caller and in place."""
    x, dout, gamma, beta, axis = problem
    before = x.tobytes(), dout.tobytes(), gamma.tobytes(), beta.tobytes()
    settings = {"mode": mode, "eps": eps}
    mean = var = None
    if mode == "test":
        mean = settings["running_mean"] = normal(x.shape[axis], np.float32)
        var = settings["running_var"] = 1 + normal(x.shape[axis], np.float64) ** 2

    def run(x, dout, out=None, dx=None):
        y, cache = batchnorm_forward(x, gamma, beta, {**settings}, axis=axis, out=out)
        return y, *batchnorm_backward(dout, cache, out=dx)

    out, *gradients = run(x, dout)
    dtype = np.float64 if x.dtype.kind == "i" else x.dtype.newbyteorder("=")
    like = np.broadcast_to(np.zeros((), dtype), x.shape)
    with np.errstate(over="ignore"):
        converted = dout.astype(dtype)
    terms = np.abs(gamma).max() + np.abs(beta).max()
    check("out", out, oracle.forward(x, gamma, beta, axis, eps, mean, var), like, 6, terms)
    expected = oracle.backward(converted, x, gamma, axis, eps, mean, var)
    check_gradients(gradients, expected, like, 6, cancels=True)

    apart = np.full((2, *x.shape), np.nan, dtype)
    results = [out, *gradients]
    with engine(isa, 3):
        assert_same_bits(run(x, dout, *apart), results)
    assert before == (x.tobytes(), dout.tobytes(), gamma.tobytes(), beta.tobytes())

    view = x.astype(dtype)
    batchnorm_forward(view, gamma, beta, {**settings}, axis=axis, out=view)
    check("in place", view, oracle.forward(x, gamma, beta, axis, eps, mean, var), like, 6, terms)


@few
@given(problems(), st.sampled_from(MODES), st.sampled_from(EPS))
def test_any_problem(problem, mode, eps):
    check_problem(problem, mode, eps)


def check_norm_problem(problem, eps):
    """The same for a norm whose statistics lie within a sample."""
    (norm, axis, num_groups), x, dout, gamma, beta = problem
    case = Case(norm, x.shape, axis, num_groups)
    before = x.tobytes(), dout.tobytes()

    def run(x, dout, out=None, dx=None):
        y, cache = case.forward(bn_fast, x, gamma, beta, eps=eps, out=out)
        return [a for a in (y, *case.backward(bn_fast, dout, cache, out=dx)) if a is not None]

    results = run(x, dout)
    dtype = np.float64 if x.dtype.kind == "i" else x.dtype.newbyteorder("=")
    like = np.broadcast_to(np.zeros((), dtype), x.shape)
    with np.errstate(over="ignore"):
        converted = dout.astype(dtype)
    some_gamma = np.ones(case.parameter_shape) if gamma is None else gamma.astype(dtype)
    some_beta = np.zeros(case.parameter_shape) if beta is None else beta
    expected, _, inv_std, gradients = oracle.norm(
        norm, x, some_gamma, some_beta, converted, axis, eps, num_groups
    )
    if (
        gamma is not None
    ):  # gamma*dout is rounded before what its values have in common is taken off
        sizes = [oracle.largest(a) for a in (some_gamma, converted, inv_std)]
        gradients = gradients._replace(dx_scale=gradients.dx_scale + float(np.prod(sizes)) / 4)
    names = ["dx", *["dgamma"] * (gamma is not None), *["dbeta"] * (beta is not None)]
    terms = np.abs(some_gamma).max() + np.abs(some_beta).max()
    check("out", results[0], expected, like, 6, terms)
    for name, got in zip(names, results[1:], strict=True):
        scale = getattr(gradients, f"{name}_scale")
        check(name, got, getattr(gradients, name), like, 6, scale)

    apart = np.full((2, *x.shape), np.nan, dtype)
    with engine(isa, 3):
        assert_same_bits(run(x, dout, *apart), results)
    assert before == (x.tobytes(), dout.tobytes())

    view = x.astype(dtype)
    case.alone(bn_fast, view, gamma, beta, eps=eps, out=view)
    check("in place", view, expected, like, 6, terms)


@few
@given(norm_problems(), st.sampled_from(EPS))
def test_any_norm(problem, eps):
    check_norm_problem(problem, eps)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), [((5, 3), 1), ((3, 2, 4), 1), ((2, 3, 2, 2), -1)])
def test_finite_differences(shape, axis, mode):
    """Truncation and rounding near 1e-9."""
    n = shape[axis]
    x, dout = 1 + normal(shape, np.float64), normal(shape, np.float64, 1)
    gamma, beta = normal(n, np.float64, 2), normal(n, np.float64, 3)

    def forward():
        param = {"mode": mode, "running_var": np.full(n, 0.5)}
        return batchnorm_forward(x, gamma, beta, param, axis=axis)

    gradients = batchnorm_backward(dout, forward()[1])
    for values, gradient in zip((x, gamma, beta), gradients, strict=True):
        expected = slopes(lambda: (forward()[0] * dout).sum(), values, 1e-5)
        assert gradient == pytest.approx(expected, rel=1e-7, abs=1e-8)


def test_layouts_of_the_same_values_agree():
    """To within roundings, and exactly where the memory order is the same."""
    x, gamma, beta = normal((30, 8), np.float32), np.ones(8), np.zeros(8)
    out = batchnorm_forward(x, gamma, beta)[0]
    gap = strided(x, (0, 1), (1, 1))
    assert_same_bits([batchnorm_forward(gap, gamma, beta)[0]], [out])
    check("transposed", batchnorm_forward(x.T.copy(), gamma, beta, axis=0)[0].T, out, x)
