"""bn_fast.autograd is a primitive whose derivatives are those of the NumPy expression."""

import pytest
from numpy.testing import assert_allclose

from .arrays import DTYPES, normal
from .judge import check, check_gradients

pytest.importorskip("autograd")

import autograd.numpy as np
from autograd import elementwise_grad, grad, jacobian, make_jvp, value_and_grad
from autograd.test_util import check_grads

import bn_fast
from bn_fast import autograd as doors
from bn_fast.autograd import batch_norm

from . import oracle, test_norms

CASES = [((5, 3), 1), ((5, 3), -1), ((4, 2, 3), 1), ((3, 4), 0), ((2, 3, 2, 2), 1)]


def expression(x, gamma, beta, mean=None, var=None, *, axis=1, eps=1e-5):
    """What users of autograd write."""
    others = tuple(d for d in range(x.ndim) if d != axis % x.ndim)
    shape = [-1 if d == axis % x.ndim else 1 for d in range(x.ndim)]
    if mean is None:
        mean, var = np.mean(x, axis=others), np.var(x, axis=others)
    x_hat = (x - np.reshape(mean, shape)) / np.sqrt(np.reshape(var, shape) + eps)
    return np.reshape(gamma, shape) * x_hat + np.reshape(beta, shape)


def problem(shape, axis, dtype=np.float64):
    n = shape[axis]
    x = 3 + 2 * normal(shape, dtype)
    return x, 1 + normal(n, dtype, 1) / 4, normal(n, dtype, 2), normal(n, dtype, 3)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_check_grads(shape, axis, frozen):
    x, gamma, beta, mean = problem(shape, axis)
    statistics = (mean, mean**2 + 0.5) if frozen else ()

    def function(x, gamma, beta):
        return batch_norm(x, gamma, beta, *statistics, axis=axis)

    check_grads(function, (0, 1, 2), modes=["rev"], order=2)(x, gamma, beta)


@pytest.mark.parametrize("shapes", [(None, (3,)), ((1, 3, 1), (3,)), ((3, 1), (1, 3, 1))])
def test_given_statistics_have_gradients(shapes):
    """Once, and in the shapes given."""
    x, gamma, beta, mean = problem((6, 3, 2), 1)
    given = [mean, mean**2 + 0.5]
    given = [a if shape is None else a.reshape(shape) for a, shape in zip(given, shapes)]

    def function(x, gamma, mean, var):
        return batch_norm(x, gamma, beta, mean, var, eps=1e-3)

    check_grads(function, (0, 1, 2, 3), modes=["rev"], order=1)(x, gamma, *given)
    with pytest.raises(NotImplementedError, match="no second derivative with respect to mean"):
        check_grads(function, 2, modes=["rev"], order=2)(x, gamma, *given)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("shape", "axis"), CASES)
def test_agrees_with_the_expression(shape, axis, frozen):
    x, gamma, beta, mean = problem(shape, axis)
    statistics = (mean, mean**2 + 0.5) if frozen else ()

    def loss(norm, *given):
        return np.sum(np.tanh(norm(*given, *statistics, axis=axis, eps=1e-3)))

    for argnums in ((1,), (2,), (3,), (1, 2, 3), (3, 1)):
        gradient = grad(loss, argnums)
        for a, b in zip(*(gradient(norm, x, gamma, beta) for norm in (batch_norm, expression))):
            assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("argnums", [(0,), (1,), (0, 1, 2)])
def test_gradient_penalty_agrees_with_the_expression(argnums):
    """Second derivatives, also where only some of the arguments are differentiated."""
    given = problem((6, 3, 2), 1)[:3]

    def penalty(norm, *given):
        gradients = grad(lambda *given: np.sum(np.sin(norm(*given))), argnums)(*given)
        return sum(np.sum(g**2) for g in gradients)

    wanted = tuple(i + 1 for i in range(3))
    for a, b in zip(*(grad(penalty, wanted)(norm, *given) for norm in (batch_norm, expression))):
        assert_allclose(a, b, rtol=0, atol=1e-12 * np.max(np.abs(b)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("gamma_shape", "beta_shape"),
    [(None, None), (None, (3,)), ((1, 3, 1), None), ((), (3, 1)), ((3,), ())],
)
def test_parameters_of_other_shapes_or_none(gamma_shape, beta_shape, frozen):
    x, gamma, beta, mean = problem((6, 3, 2), 1)
    statistics = (mean, mean**2 + 0.5) if frozen else ()
    given = [
        shape if shape is None else a[0] if shape == () else a.reshape(shape)
        for a, shape in ((gamma, gamma_shape), (beta, beta_shape))
    ]
    places = [i for i, a in enumerate(given) if a is not None]

    def function(x, *some):
        parameters = [None, None]
        for i, a in zip(places, some, strict=True):
            parameters[i] = a
        return batch_norm(x, *parameters, *statistics)

    some = [given[i] for i in places]
    argnums = tuple(range(1 + len(some)))
    check_grads(function, argnums, modes=["rev"], order=2)(x, *some)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_dtypes(dtype):
    x, gamma, beta, _ = problem((40, 6), 1, dtype)
    dout = normal(x.shape, dtype, 5)

    def loss(x, gamma, beta):
        return np.sum(batch_norm(x, gamma, beta) * dout)

    check("y", batch_norm(x, gamma, beta), oracle.forward(x, gamma, beta), x)
    got = grad(loss, (0, 1, 2))(x, gamma, beta)
    check_gradients(got, oracle.backward(dout, x, gamma), x)


def test_parameters_of_another_dtype():
    x, gamma, beta, _ = problem((40, 6), 1, np.float32)
    given = x, gamma.astype(np.float64), beta.astype(np.float64)
    for argnum in range(3):
        gradient = grad(lambda *given: np.sum(batch_norm(*given) ** 3), argnum)(*given)
        assert gradient.dtype == given[argnum].dtype


def test_jacobian_has_the_symmetry_of_batch_norm():
    x, gamma, beta, _ = problem((4, 1), 1)
    matrix = jacobian(lambda x: batch_norm(x, gamma, beta))(x).reshape(4, 4)
    assert_allclose(matrix, matrix.T, atol=1e-14)
    assert_allclose(matrix.sum(axis=0), 0, atol=1e-14)


def test_one_backward_pass_for_all_arguments(monkeypatch):
    import bn_fast.autograd as door

    calls = []
    backward = door.batchnorm_backward

    def spy(*args, needs):
        calls.append(needs)
        return backward(*args, needs=needs)

    monkeypatch.setattr(door, "batchnorm_backward", spy)
    x, gamma, beta, dout = problem((5, 3), 1)

    def loss(*given):
        return np.sum(batch_norm(*given) * dout)

    whole = grad(loss, (0, 1, 2))(x, gamma, beta)
    assert calls == [("dx", "dgamma", "dbeta")]
    # Without x none of its size: no second pass over x and dout.
    for argnums in ((1, 2), (2, 1), (1,), (2,)):
        found = grad(loss, argnums)(x, gamma, beta)
        assert "dx" not in calls.pop()
        for i, gradient in zip(argnums, found, strict=True):
            assert (gradient == whole[i]).all()
    check_grads(lambda *given: batch_norm(x, *given), modes=["rev"], order=2)(gamma, beta)


def test_trains_on_digits_as_the_expression_does():
    """A network on real images: the same losses at every step."""
    images, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    x, y = images[:512] / 16, np.eye(10)[labels[:512]]

    def losses(norm):
        rng = np.random.default_rng(0)
        params = [rng.normal(0, 0.2, (64, 32)), np.ones(32), np.zeros(32)]
        params.append(rng.normal(0, 0.2, (32, 10)))

        def loss(params, x, y):
            first, gamma, beta, second = params
            hidden = np.maximum(norm(np.dot(x, first), gamma, beta), 0)
            scores = np.dot(hidden, second)
            scores = scores - np.max(scores, axis=1, keepdims=True)
            log_p = scores - np.log(np.sum(np.exp(scores), axis=1, keepdims=True))
            return -np.mean(np.sum(log_p * y, axis=1))

        found = []
        step = value_and_grad(loss)
        for i in range(24):
            rows = slice(i % 4 * 128, (i % 4 + 1) * 128)
            value, gradients = step(params, x[rows], y[rows])
            params = [p - 0.5 * g for p, g in zip(params, gradients)]
            found.append(value)
        return found

    got = losses(batch_norm)
    assert_allclose(got, losses(expression), rtol=1e-10)
    assert got[-1] < 0.5 < got[0]


def test_errors():
    x, gamma, beta, mean = problem((5, 3), 1)
    with pytest.raises(ValueError, match="both be given or both be None, got var=None"):
        batch_norm(x, gamma, beta, mean)
    with pytest.raises(ValueError, match=r"gamma must have shape \(3,\)"):
        batch_norm(x, gamma[:2], beta)
    with pytest.raises(TypeError, match="x must be an array of real numbers"):
        batch_norm(None, gamma, beta)
    of_mean = grad(lambda mean: np.sum(batch_norm(x, gamma, beta, mean, mean**2) ** 2))
    with pytest.raises(NotImplementedError, match="no second derivative with respect to mean"):
        grad(lambda mean: np.sum(of_mean(mean)))(mean)
    with pytest.raises(NotImplementedError, match="not defined"):
        make_jvp(lambda x: batch_norm(x, gamma, beta))(x)(x)
    first = elementwise_grad(lambda x: batch_norm(x, gamma, beta) ** 2)
    second = elementwise_grad(lambda x: first(x) ** 2)
    with pytest.raises(NotImplementedError, match="VJP of _double_backward"):
        grad(lambda x: np.sum(second(x) ** 2))(x)


# The other norms: the cases of `test_norms`, made small.

NORMS = [
    case._replace(shape=tuple(n if n < 9 else 6 for n in case.shape)) for case in test_norms.CASES
]
each_norm = pytest.mark.parametrize("case", dict.fromkeys(NORMS), ids=test_norms.label)


def norm_problem(case, dtype=np.float64):
    """The door as a function of x, gamma and, but for RMS norm, beta; and these."""
    x, dout, *parameters = case.problem(dtype)
    name = case.norm.replace("norm", "_norm")
    options = case.options()

    def door(x, *parameters):
        return getattr(doors, name)(x, **options, **dict(zip(("gamma", "beta"), parameters)))

    return door, (x, *parameters[: 1 if case.norm == "rmsnorm" else 2]), dout


@each_norm
def test_check_grads_of_the_norms(case):
    door, given, _ = norm_problem(case)
    for n in range(1, len(given) + 1):
        check_grads(lambda *given: door(*given), modes=["rev"], order=1)(*given[:n])


@pytest.mark.parametrize("dtype", DTYPES)
@each_norm
def test_values_and_gradients_of_the_norms(case, dtype):
    """Those of the pair, whatever is asked for."""
    door, given, dout = norm_problem(case, dtype)
    x, gamma, beta = (*given, None)[:3]
    out, cache = case.forward(bn_fast, x, gamma, beta)
    expected = case.backward(bn_fast, dout, cache)
    assert (door(*given) == out).all()
    for argnums in ((0,), (1,), (1, 0), tuple(range(len(given)))):
        found = grad(lambda *given: np.sum(door(*given) * dout), argnums)(*given)
        for i, gradient in zip(argnums, found, strict=True):
            assert gradient.dtype == dtype
            assert (gradient == expected[i]).all()


@pytest.mark.parametrize("case", test_norms.FIRST, ids=lambda case: case.norm)
def test_errors_of_the_norms(case):
    door, given, _ = norm_problem(case)
    with pytest.raises(ValueError, match="gamma must have shape"):
        door(given[0], given[1][:-1])
    first = grad(lambda *given: np.sum(door(*given) ** 2))
    for argnum in range(2):
        with pytest.raises(NotImplementedError, match="second derivatives of batch_norm alone"):
            grad(lambda *given: np.sum(first(*given)), argnum)(*given)
    with pytest.raises(NotImplementedError, match="not defined"):
        make_jvp(door)(given[0])(given[0])
