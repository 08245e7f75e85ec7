"""The layer: its state against a plain simulation in long double, and its manners."""

import copy
import pickle
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bn_fast
from bn_fast import BatchNorm, batchnorm_backward, batchnorm_forward

from . import oracle
from .arrays import DTYPES, LAYOUTS, normal, problem
from .judge import LIMIT, assert_same_bits, check, check_gradients

STATE = ["gamma", "beta", "running_mean", "running_var", "num_batches"]


def batch(n_rows=20, n_features=3, dtype=np.float32, seed=0):
    return 2 + 3 * normal((n_rows, n_features), dtype, seed)


def trained(n_features=3, dtype=np.float32, **settings):
    """A layer with no number in it that is there by default."""
    layer = BatchNorm(n_features, dtype=dtype, **settings)
    if layer.affine:
        layer.gamma = 1 + normal(n_features, dtype, 11) / 4
        layer.beta = normal(n_features, dtype, 12)
    for seed in range(3):
        x = batch(20, n_features, dtype, seed)
        layer.forward(np.moveaxis(x, 1, layer.axis))
        layer.backward(np.ones((20, n_features), dtype))
    return layer


def snapshot(layer):
    arrays = [layer.running_mean, layer.running_var, np.array(layer.num_batches)]
    return [a.copy() for a in (layer.gamma, layer.beta, *arrays) if a is not None]


def simulated(batches, momentum, ddof):
    """running_mean and running_var by the formulas, in long double."""
    one = np.longdouble(1)
    n_features = batches[0].shape[1]
    mean, var = np.zeros(n_features, np.longdouble), np.ones(n_features, np.longdouble)
    for n, x in enumerate(batches):
        x = x.astype(np.longdouble)
        m = n * one / (n + 1) if momentum is None else np.longdouble(momentum)
        mean = m * mean + (1 - m) * x.mean(axis=0)
        var = m * var + (1 - m) * x.var(axis=0, ddof=ddof)
    return mean, var


# -- values


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=12),
    n_features=st.integers(1, 40),
    momentum=st.one_of(st.none(), st.floats(0, 1)),
    ddof=st.sampled_from([0, 1]),
    dtype=st.sampled_from(DTYPES),
)
def test_running_statistics_follow_a_simulation(sizes, n_features, momentum, ddof, dtype):
    layer = BatchNorm(n_features, momentum=momentum, ddof=ddof, dtype=dtype)
    batches = [batch(n, n_features, dtype, seed) for seed, n in enumerate(sizes)]
    for x in batches:
        layer.forward(x)
    mean, var = simulated(batches, momentum, ddof)
    # A batch's statistics have roundings of its dtype; averaging them in double adds next to none.
    # A variance adds up to 40 squares, and may be off by four times of what its root, in out, is.
    eps = np.finfo(dtype).eps
    largest = max(np.abs(x).max() for x in batches)
    assert np.abs(layer.running_mean - mean).max() <= LIMIT * eps * largest
    assert np.abs(layer.running_var - var).max() <= 4 * LIMIT * eps * var.max()
    assert layer.num_batches == len(sizes)


def test_a_long_cumulative_average_does_not_stall():
    """The step of 1e-8 would be lost in float32."""
    layer = BatchNorm(1, momentum=None)
    layer.running_mean, layer.num_batches = [1.0], 10**8
    layer.forward(np.array([[1.0], [3.0]], np.float32))
    np.testing.assert_allclose(layer.running_mean - 1, 1 / (10**8 + 1), rtol=1e-7)


@pytest.mark.parametrize("layout", ["C", "Fortran", "sliced", "permuted", "byte-swapped"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"), [((30, 7), 1), ((4, 3, 7, 7), 1), ((5, 6, 7), -1), ((6, 50), 0)]
)
def test_forward_and_backward(shape, axis, dtype, layout):
    x, dout, gamma, beta = problem(shape, axis, dtype, layout)
    layer = BatchNorm(shape[axis], axis=axis, eps=1e-3, dtype=dtype)
    layer.gamma, layer.beta = gamma, beta
    check("out", layer.forward(x), oracle.forward(x, gamma, beta, axis, 1e-3), x)
    got = layer.backward(dout), layer.dgamma, layer.dbeta
    check_gradients(got, oracle.backward(dout, x, gamma, axis, 1e-3), x)

    layer.running_mean, layer.running_var = np.full_like(beta, 2.5), np.full_like(beta, 3)
    given = layer.running_mean, layer.running_var
    out = layer.forward(x, training=False)
    check("out", out, oracle.forward(x, gamma, beta, axis, 1e-3, *given), x)
    got = layer.backward(dout), layer.dgamma, layer.dbeta
    check_gradients(got, oracle.backward(dout, x, gamma, axis, 1e-3, *given), x)


def test_it_is_the_functions():
    x, dout, gamma, beta = problem((40, 5), 1, np.float32)
    layer = BatchNorm(5)
    layer.gamma, layer.beta = gamma, beta
    out, cache = batchnorm_forward(x, gamma, beta)
    assert_same_bits([layer.forward(x)], [out])
    expected = batchnorm_backward(dout, cache)
    assert_same_bits([layer.backward(dout), layer.dgamma, layer.dbeta], expected)


@pytest.mark.parametrize("training", [True, False])
def test_finite_differences(training):
    layer = trained(3, np.float64)
    x, dout = batch(6, 3, np.float64), normal((6, 3), np.float64, 5)
    layer.forward(x, training)
    dx = layer.backward(dout)
    h = 1e-5
    for i in range(6):
        for j in range(3):
            ends = []
            for sign in (1, -1):
                moved = x.copy()
                moved[i, j] += sign * h
                ends.append((copy.deepcopy(layer).forward(moved, training) * dout).sum())
            assert abs((ends[0] - ends[1]) / (2 * h) - dx[i, j]) < 1e-8


def test_without_affine():
    x, dout, ones, zeros = batch(), batch(seed=1), np.ones(3), np.zeros(3)
    layer = BatchNorm(3, affine=False)
    out, cache = batchnorm_forward(x, ones, zeros)
    assert_same_bits([layer.forward(x)], [out])
    assert_same_bits([layer.backward(dout)], [batchnorm_backward(dout, cache)[0]])
    assert layer.gamma is layer.beta is layer.dgamma is layer.dbeta is None
    with pytest.raises(AttributeError, match=r"gamma cannot be set.*affine=False"):
        layer.gamma = ones


def test_a_new_layer_evaluates_with_mean_0_and_variance_1():
    x = batch(dtype=np.float64)
    np.testing.assert_array_equal(BatchNorm(3, eps=0).forward(x, training=False), x)


def test_integers_are_computed_in_double():
    x = np.arange(12).reshape(4, 3)
    layer = BatchNorm(3)
    assert layer.forward(x).dtype == np.float64
    assert layer.backward(x).dtype == np.float64
    assert layer.dgamma.dtype == layer.dbeta.dtype == np.float32  # those of gamma and beta


def test_half_types_are_storage():
    """The parameters and their gradients stay float32, as do the running statistics' digits."""
    x, dout = batch().astype(np.float16), batch(seed=1).astype(np.float16)
    layer, single = BatchNorm(3), BatchNorm(3)
    for training in (True, False):
        expected = single.forward(x.astype(np.float32), training).astype(np.float16)
        assert_same_bits([layer.forward(x, training)], [expected])
        expected = single.backward(dout.astype(np.float32)).astype(np.float16)
        assert_same_bits([layer.backward(dout)], [expected])
        assert_same_bits([layer.dgamma, layer.dbeta], [single.dgamma, single.dbeta])
    assert_same_bits(snapshot(layer), snapshot(single))


# -- the order of calls


def test_backward_needs_forward():
    with pytest.raises(RuntimeError, match="backward needs a forward"):
        BatchNorm(3).backward(batch())


def test_backward_twice_and_after_a_step():
    """A step of gamma in place between two backward calls changes nothing in the second."""
    layer = trained()
    for training in (True, False):
        layer.forward(batch(), training)
        first = layer.backward(batch(seed=1)), layer.dgamma, layer.dbeta
        layer.gamma -= 0.5 * layer.dgamma
        layer.beta -= 0.5 * layer.dbeta
        assert_same_bits([layer.backward(batch(seed=1)), layer.dgamma, layer.dbeta], first)


def test_a_step_in_place_keeps_the_array():
    layer = BatchNorm(3)
    gamma = layer.gamma
    layer.gamma -= np.float32(0.5)
    assert layer.gamma is gamma
    assert (gamma == 0.5).all()


def test_eval_changes_no_state():
    layer = trained()
    before = snapshot(layer)
    layer.forward(batch(seed=9), training=False)
    layer.backward(batch(seed=8))
    assert_same_bits(snapshot(layer), before)


def test_states_handed_out_are_not_written_to():
    layer = trained()
    mean, var = layer.running_mean, layer.running_var
    before = mean.copy(), var.copy()
    layer.forward(batch(seed=7))
    assert_same_bits((mean, var), before)
    assert layer.running_mean is not mean


def test_another_layer_replaces_the_two_hooks_and_no_more():
    """As one does whose batch lies in several places: the state follows its statistics."""

    class Elsewhere(BatchNorm):
        def _forward_batch(self, x, out, weights):
            out, cache, *_ = super()._forward_batch(x, out, weights)
            return out, cache, 5, 5, np.full(3, 2.0), np.full(3, 8.0)

        def _backward_batch(self, dout, cache, out):
            return np.full_like(dout, 7), np.full(3, 8), np.full(3, 9)

    layer, plain = Elsewhere(3, momentum=None, ddof=1), BatchNorm(3)
    assert_same_bits([layer.forward(batch())], [plain.forward(batch())])
    assert (layer.running_mean == 2).all()
    assert (layer.running_var == 8 * 5 / 4).all()
    assert (layer.backward(batch()) == 7).all()
    assert (layer.dgamma == 8).all()
    assert (layer.dbeta == 9).all()
    layer.load_state_dict(plain.state_dict())
    layer.forward(batch(), training=False), plain.forward(batch(), training=False)
    assert_same_bits([layer.backward(batch())], [plain.backward(batch())])


# -- weights, calls without a trace, and layer(x)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("differ", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((20, 3), 1), ((4, 3, 5, 5), 1), ((4, 5, 3), -1)])
def test_weights_are_those_of_the_function(shape, axis, training, ddof, differ):
    x, dout, gamma, beta = problem(shape, axis, np.float32)
    weights = np.random.default_rng(0).integers(
        0, 3, x.shape if differ else x.take([0], axis).shape
    )
    x[np.broadcast_to(weights == 0, shape)] = np.nan
    layer = BatchNorm(3, axis=axis, ddof=ddof, momentum=0.75)
    layer.gamma, layer.beta = gamma, beta
    layer.running_mean, layer.running_var = [0.5, 1, 2], [1, 2, 3]
    param = {"mode": "train" if training else "test", "momentum": 0.75, "ddof": ddof}
    param |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
    out, cache = batchnorm_forward(x, gamma, beta, param, axis=axis, weights=weights)
    assert_same_bits([layer(x, training, weights=weights)], [out])
    assert_same_bits(
        [layer.running_mean, layer.running_var], [param["running_mean"], param["running_var"]]
    )
    expected = batchnorm_backward(dout, cache)
    assert_same_bits([layer.backward(dout), layer.dgamma, layer.dbeta], expected)


@pytest.mark.parametrize(
    ("weights", "ddof", "message"),
    [
        ([[0], [0], [0]], 0, "has 0 values"),
        ([[0], [2], [0]], 0, "has 1 values"),
        ([[0.25], [0.5], [0.25]], 1, "weights sum to 1, and an unbiased variance needs more"),
        ([[1, 0, 1], [1, 0, 1], [1, 1, 1]], 0, "has 1 values for feature 1"),
        ([[1, 1, 0], [1, 1, 0], [1, 1, 0]], 0, "has 0 values for feature 2"),
        ([[1, 0.5, 1], [1, 0.2, 1], [1, 0.1, 1]], 1, r"weights of feature 1 sum to 0.8, .* more"),
    ],
)
def test_weights_may_leave_a_bad_batch(weights, ddof, message):
    layer, x = trained(ddof=ddof, bad_batch="raise"), batch(3)
    before = snapshot(layer)
    with pytest.raises(ValueError, match=message):
        layer.forward(x, weights=weights)
    assert_same_bits(snapshot(layer), before)
    out = layer.forward(x, weights=weights, update_running=False)
    assert_same_bits([out], [batchnorm_forward(x, layer.gamma, layer.beta, weights=weights)[0]])
    assert_same_bits(snapshot(layer), before)
    layer.bad_batch = "propagate"
    layer.forward(x, weights=weights)
    count = np.broadcast_to(weights, x.shape).sum(axis=0)
    np.testing.assert_array_equal(np.isnan(layer.running_var), (count == 0) | (count <= ddof))
    np.testing.assert_array_equal(np.isnan(layer.running_mean), count == 0)


def test_weights_that_sum_to_1_are_no_single_value():
    layer = BatchNorm(3, momentum=0)
    layer.forward(batch(4), weights=[[0.25]] * 4)
    np.testing.assert_allclose(layer.running_var, batch(4).astype(float).var(axis=0), rtol=1e-6)
    assert layer.num_batches == 1


@pytest.mark.parametrize("reuse_buffers", [False, True])
def test_a_training_call_without_a_trace(reuse_buffers):
    """The output and gradients of training; the running statistics of before."""
    layer, other = (trained(reuse_buffers=reuse_buffers) for _ in range(2))
    before = snapshot(layer)
    x = batch(seed=7)
    results = layer(x, update_running=False), layer.backward(x), layer.dgamma
    assert_same_bits(snapshot(layer), before)
    assert_same_bits(results, [other(x), other.backward(x), other.dgamma])
    assert other.num_batches == layer.num_batches + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(with_nan(np.nan), update_running=False)  # nothing is averaged, and so nothing bad
    with pytest.raises(TypeError, match="update_running must be True or False, got 0"):
        layer(x, update_running=0)
    assert_same_bits(snapshot(layer), before)


@pytest.mark.parametrize("call", [BatchNorm.__call__, BatchNorm.forward])
def test_a_warning_is_about_the_code_that_called(call):
    with pytest.warns(RuntimeWarning, match="left as they were") as found:
        call(BatchNorm(3), batch(1))
    assert found[0].filename == __file__
    names = {"call": call, "layer": BatchNorm(3), "x": batch(1)}  # of no module
    with pytest.warns(RuntimeWarning, match="left as they were") as found:
        exec(compile("call(layer, x)", "here", "exec"), names)
    assert found[0].filename == "here"


# -- bad batches


def with_nan(value):
    x = batch()
    x[4, 1] = value
    return x


BAD = {
    "empty": batch(0),
    "one row": batch(1),
    "NaN": with_nan(np.nan),
    "Inf": with_nan(np.inf),
    "overflow": np.array([[1e200], [-1e200]]) * np.ones(3),
}


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("x", BAD.values(), ids=BAD)
def test_a_bad_batch_is_skipped_with_one_warning(x, ddof, momentum):
    layer = trained(dtype=np.float64, ddof=ddof, momentum=momentum)
    before = snapshot(layer)
    with pytest.warns(RuntimeWarning, match="are left as they were") as record:
        out = layer.forward(x)
    assert record[0].filename == __file__
    expected, cache = batchnorm_forward(x, layer.gamma, layer.beta)
    assert_same_bits([out], [expected])
    assert_same_bits([layer.backward(x)], [batchnorm_backward(x, cache)[0]])
    assert_same_bits(snapshot(layer), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.forward(x)
        copy.deepcopy(layer).forward(x)
    assert_same_bits(snapshot(layer), before)
    layer.forward(batch(seed=5))
    assert layer.num_batches == 4


@pytest.mark.parametrize("x", BAD.values(), ids=BAD)
@pytest.mark.parametrize("bad_batch", ["raise", "skip"])
def test_a_bad_batch_that_raises_leaves_the_layer_as_it_was(x, bad_batch):
    """Under 'skip' when warnings are errors: again and again, not once."""
    layer = trained(bad_batch=bad_batch)
    layer.forward(batch(), training=False)
    expected = layer.backward(batch(seed=1)), layer.dgamma, layer.dbeta
    before = snapshot(layer)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            error = ValueError if bad_batch == "raise" else RuntimeWarning
            with pytest.raises(error, match=r"needs 2|feature [01] is not finite"):
                layer.forward(x)
    assert_same_bits(snapshot(layer), before)
    assert_same_bits([layer.backward(batch(seed=1)), layer.dgamma, layer.dbeta], expected)


def test_a_bad_batch_propagates_on_request():
    layer = trained(bad_batch="propagate")
    old_mean, old_var = layer.running_mean, layer.running_var
    layer.forward(batch(1, dtype=float))
    np.testing.assert_allclose(
        layer.running_mean, 0.9 * old_mean + 0.1 * batch(1, dtype=float)[0], rtol=1e-14
    )
    np.testing.assert_allclose(layer.running_var, 0.9 * old_var, rtol=1e-14)
    layer.forward(with_nan(np.nan))
    np.testing.assert_array_equal(np.isnan(layer.running_mean), [False, True, False])
    np.testing.assert_array_equal(np.isnan(layer.running_var), [False, True, False])
    layer.forward(batch(0))
    assert np.isnan([layer.running_mean, layer.running_var]).all()
    layer = trained(bad_batch="propagate", ddof=1)
    layer.forward(batch(1))
    assert np.isnan(layer.running_var).all()


# -- buffers


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_buffers_are_reused_on_request(dtype):
    x, dout = (10 * batch()).astype(dtype), batch(seed=1)
    plain, layer = trained(), trained(reuse_buffers=True)
    out, dx = layer.forward(x), layer.backward(dout)
    assert_same_bits([out, dx], [plain.forward(x), plain.backward(dout)])
    again = layer.forward(x + x), layer.backward(dout)
    assert again[0] is out
    assert again[1] is dx
    assert_same_bits(again, [plain.forward(x + x), plain.backward(dout)])
    assert plain.forward(x) is not plain.forward(x)
    for other in (x[:10], x.T.copy().T, x.astype(np.float64) if dtype == np.float32 else x[::-1]):
        result = layer.forward(other)
        assert not np.shares_memory(result, out)
        assert_same_bits([result], [plain.forward(other)])
        assert result.strides == plain.forward(other).strides


def test_a_buffer_that_is_an_input_is_not_written_to():
    """The layer's own results given back to it: chained layers, applied twice."""
    plain, layer = trained(), trained(reuse_buffers=True)
    expected = plain.forward(plain.forward(batch()))
    out = layer.forward(batch())
    assert_same_bits([layer.forward(out)], [expected])
    expected = plain.backward(plain.backward(batch(seed=1)))
    assert_same_bits([layer.backward(layer.backward(batch(seed=1)))], [expected])
    expected = plain.backward(batch(seed=1))
    plain.forward(expected[::-1]), layer.forward(layer.backward(batch(seed=1))[::-1])
    assert_same_bits([layer.backward(batch(seed=2))], [plain.backward(batch(seed=2))])


@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
def test_a_buffer_that_an_array_of_the_layer_lies_in_is_given_up(name):
    """A view of the output becomes gamma, say: the next output must not be written over it."""
    n_features = 3000  # several tiles
    x = np.abs(normal((50, n_features), np.float32)).astype(np.float64)
    plain, layer = (BatchNorm(n_features, dtype=np.float64, reuse_buffers=r) for r in (False, True))
    plain.forward(x)
    view = layer.forward(x).reshape(-1)[7 * n_features + 600 :][:n_features]
    view[...] = np.abs(view)
    setattr(layer, name, view)
    setattr(plain, name, view.copy())
    for training in (True, False):
        assert_same_bits([layer.forward(x, training)], [plain.forward(x, training)])
    assert_same_bits(snapshot(layer), snapshot(plain))


def test_buffers_end_where_they_are_switched_off():
    layer = trained(reuse_buffers=True)
    out = layer.forward(batch())
    layer.reuse_buffers = False
    layer.backward(batch())  # what forward left is still there
    assert layer.forward(batch()) is not out
    layer.reuse_buffers = True
    assert layer.forward(batch()) is not out


# -- state, copies, text


@pytest.mark.parametrize("affine", [True, False])
def test_state_round_trip(affine, tmp_path):
    layer, other = trained(affine=affine), BatchNorm(3, affine=affine)
    state = layer.state_dict()
    assert list(state) == [name for name in STATE if affine or name not in ("gamma", "beta")]
    np.savez(tmp_path / "state.npz", **state)
    with np.load(tmp_path / "state.npz") as loaded:
        other.load_state_dict(loaded)
    assert_same_bits(snapshot(other), snapshot(layer))
    assert_same_bits([other.forward(batch(seed=6))], [layer.forward(batch(seed=6))])
    assert_same_bits(snapshot(other), snapshot(layer))


def test_state_shares_no_memory():
    layer = trained()
    before = snapshot(layer)
    state = layer.state_dict()
    for value in state.values():
        value[...] = 7
    assert_same_bits(snapshot(layer), before)
    layer.load_state_dict(state)
    for value in state.values():
        value[...] = 8
    assert all((a == 7).all() for a in snapshot(layer))


def test_a_state_is_loaded_into_the_arrays_of_the_layer():
    """An optimizer keeps references to gamma and beta; the running statistics are snapshots."""
    layer, other = trained(), BatchNorm(3)
    parameters, mean = [other.gamma, other.beta], other.running_mean
    other.load_state_dict(layer.state_dict())
    assert other.gamma is parameters[0]
    assert other.beta is parameters[1]
    assert (mean == 0).all()
    other.load_state_dict(layer.state_dict() | {"gamma": other.beta, "beta": other.gamma})
    assert_same_bits([other.gamma, other.beta], [layer.beta, layer.gamma])


def test_a_state_is_not_loaded_through_one_array_into_another():
    """Where gamma cannot be written to, or only together with beta, there are new arrays."""
    layer, state = BatchNorm(3), trained().state_dict()
    shared = np.zeros(6, np.float32)
    for gamma, beta in [
        (shared[:3], shared[:3]),
        (shared[:3], shared[2:5]),
        (np.broadcast_to(np.float32(1), 3), shared[:3]),
    ]:
        layer.gamma, layer.beta = gamma, beta
        layer.load_state_dict(state)
        assert_same_bits([layer.gamma, layer.beta], [state["gamma"], state["beta"]])


def test_a_state_that_does_not_fit_changes_nothing():
    layer = trained()
    before = snapshot(layer)
    good = BatchNorm(3).state_dict()
    bad = {
        "'beta' is missing": {k: v for k, v in good.items() if k != "beta"},
        "'moving_mean' is unexpected": good | {"moving_mean": np.ones(3)},
        "'gamma' and 'weight' are the same": good | {"weight": np.ones(3)},
        r"'gamma' must have shape \(3,\), .*got \(4,\)": good | {"gamma": np.ones(4)},
        "'running_var' must not be negative, got -1.0 for feature 1": good
        | {"running_var": [1.0, -1.0, 1.0]},
        "'num_batches' must be one integer.*got -1": good | {"num_batches": -1},
        "'num_batches' must be one integer.*got 1.5": good | {"num_batches": 1.5},
        "'num_batches' must be .* at most 9223372036854775807, got 9223372036854775808": good
        | {"num_batches": np.uint64(2**63)},
        "'beta' must fit float32, got 1e[+]39 at 2, which would be inf": good
        | {"beta": [0, 0, 1e39]},
        "'running_mean' must be an array of real numbers, got None": good | {"running_mean": None},
    }
    for message, state in bad.items():
        with pytest.raises(ValueError, match=rf"state does not fit BatchNorm\(3, .*: {message}"):
            layer.load_state_dict(state)
    everything = {"a": 1} | {k: v for k, v in good.items() if k != "beta"} | {"gamma": 1}
    with pytest.raises(ValueError, match="'beta' is missing; 'a' is unexpected; 'gamma' must have"):
        layer.load_state_dict(everything)
    with pytest.raises(ValueError, match="'gamma' must have"):
        layer.load_state_dict(everything, strict=False)
    with pytest.raises(TypeError, match="state must be a mapping, got list"):
        layer.load_state_dict([1])
    with pytest.raises(TypeError, match="strict must be True or False, got None"):
        layer.load_state_dict(good, strict=None)
    assert_same_bits(snapshot(layer), before)


def test_part_of_a_state():
    layer, other = trained(), BatchNorm(3)
    state = layer.state_dict()
    assert other.load_state_dict(state) == ([], [])
    before = snapshot(layer)
    gamma = layer.gamma
    part = {"beta": [1, 2, 3], "a": 1, "num_batches": 7, "b": None}
    keys = layer.load_state_dict(part, strict=False)
    assert keys == (["gamma", "running_mean", "running_var"], ["a", "b"])
    assert (keys.missing_keys, keys.unexpected_keys) == tuple(keys)
    assert layer.gamma is gamma
    assert_same_bits(snapshot(layer)[:1], before[:1])
    assert_same_bits(snapshot(layer)[2:4], before[2:4])
    assert (layer.beta == [1, 2, 3]).all()
    assert layer.num_batches == 7
    keys = BatchNorm(3, affine=False).load_state_dict(state, strict=False)
    assert keys == ([], ["gamma", "beta"])


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))],
    ids=["deepcopy", "pickle"],
)
def test_copies(duplicate):
    layer = trained(momentum=None, ddof=1, bad_batch="raise", reuse_buffers=True)
    other = duplicate(layer)
    assert repr(other) == repr(layer)
    assert_same_bits(snapshot(other), snapshot(layer))
    assert_same_bits([other.dgamma, other.dbeta], [layer.dgamma, layer.dbeta])
    with pytest.raises(RuntimeError):
        other.backward(batch())
    before = snapshot(layer)
    other.gamma -= 1
    other.forward(batch(seed=4))
    assert_same_bits(snapshot(layer), before)


TAMPERED = {
    "eps": (-1.0, ValueError, "eps must be finite"),
    "axis": (None, TypeError, "axis must be an integer"),
    "num_features": (4, ValueError, r"gamma must have shape \(4,\)"),
    "dtype": ("int8", TypeError, "dtype must be float32 or float64"),
    "gamma": (np.ones(2, np.float32), ValueError, r"gamma must have shape \(3,\)"),
    "beta": (np.ones((3, 1)), ValueError, r"beta must have shape \(3,\)"),
    "running_mean": (None, TypeError, "running_mean must be an array"),
    "running_var": (np.ones(3) - 2, ValueError, "running_var must not be negative"),
    "num_batches": ("3", TypeError, "num_batches must be one integer"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_pickle_is_checked_when_it_is_read(name):
    """Changed by hand, or by another version that meant something else, or had not all."""
    value, error, message = TAMPERED[name]
    layer, state = BatchNorm.__new__(BatchNorm), trained().__getstate__()
    with pytest.raises(error, match=message):
        layer.__setstate__(state | {name: value})
    del state[name]
    with pytest.raises(ValueError, match=f"state of a BatchNorm must have '{name}'.*version"):
        layer.__setstate__(state)


def test_a_pickle_brings_no_unchecked_array():
    """Under the names where the layer keeps what was checked."""
    layer, state = BatchNorm.__new__(BatchNorm), trained().__getstate__()
    layer.__setstate__(state | {"_gamma": np.ones(1), "_axis": "1", "_cache": 1, "more": 2})
    assert_same_bits([layer.forward(batch())], [trained().forward(batch())])
    assert layer.more == 2


@pytest.mark.parametrize("affine", [True, False])
def test_another_layer_is_pickled_with_what_it_has_more(affine):
    layer = Named(3, "first", affine=affine)
    layer.forward(batch())
    other = pickle.loads(pickle.dumps(layer))
    assert other.name == "first"
    assert_same_bits(snapshot(other), snapshot(layer))


class Named(BatchNorm):
    def __init__(self, num_features, name, **settings):
        super().__init__(num_features, **settings)
        self.name = name


def test_a_pickle_holds_nothing_of_the_size_of_x():
    layer = BatchNorm(3, reuse_buffers=True)
    layer.forward(batch(100_000))
    layer.backward(batch(100_000))
    assert len(pickle.dumps(layer)) < 2000


def test_a_shallow_copy_shares_the_parameters():
    layer = trained()
    other = copy.copy(layer)
    assert other.gamma is layer.gamma
    other.forward(batch(seed=4))
    assert other.num_batches == layer.num_batches + 1


def test_repr_is_what_makes_the_layer():
    for layer in (
        BatchNorm(3),
        BatchNorm(5, axis=-1, eps=0, momentum=None, affine=False, ddof=1, dtype=np.float64),
        BatchNorm(1, bad_batch="raise", reuse_buffers=True),
    ):
        assert repr(eval(repr(layer), vars(bn_fast))) == repr(layer)
    assert repr(BatchNorm(3)) == (
        "BatchNorm(3, axis=1, eps=1e-05, momentum=0.9, affine=True, ddof=0, dtype='float32')"
    )


# -- errors


HUGE = 10**400  # no float
BAD_SETTINGS = [
    ("num_features", 0, ValueError, "num_features must be at least 1, got 0"),
    ("num_features", 2.0, TypeError, "num_features must be an integer, got float 2.0"),
    ("num_features", True, TypeError, "num_features must be an integer, got bool True"),
    ("num_features", HUGE, ValueError, "num_features must be the size of an array, got 1000"),
    ("axis", None, TypeError, "axis must be an integer, got None"),
    ("eps", -1, ValueError, "eps must be finite and at least 0, got -1"),
    ("eps", "0", TypeError, "eps must be a real number"),
    ("eps", HUGE, ValueError, "eps must be in the range of float64, got a larger int"),
    ("momentum", 1.5, ValueError, r"momentum must be None or in \[0, 1\], got 1.5"),
    ("momentum", np.nan, ValueError, "momentum must be None or in"),
    ("momentum", "0.9", TypeError, "momentum must be a real number"),
    ("momentum", HUGE, ValueError, "momentum must be in the range of float64"),
    ("affine", 1, TypeError, "affine must be True or False, got 1"),
    ("ddof", 2, ValueError, r"ddof must be one of \(0, 1\), got 2"),
    ("ddof", True, ValueError, "ddof must be one of"),
    ("dtype", np.int64, TypeError, "dtype must be float32 or float64, got .*int64"),
    ("dtype", None, TypeError, "dtype must be float32 or float64, got None"),
    ("bad_batch", "ignore", ValueError, "bad_batch must be one of .*'raise'.*got 'ignore'"),
    ("reuse_buffers", None, TypeError, "reuse_buffers must be True or False, got None"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_SETTINGS)
def test_constructor_errors(name, value, error, message):
    with pytest.raises(error, match=message):
        BatchNorm(**({"num_features": 3} | {name: value}))


FIXED = "num_features", "affine", "dtype"  # the arrays are of them
BAD_ARRAYS = [
    ("gamma", np.ones(2), ValueError, r"gamma must have shape \(3,\)"),
    ("gamma", None, TypeError, "gamma must be an array of real numbers"),
    ("gamma", [1, 1e39, 1], ValueError, "gamma must fit float32, got 1e[+]39 at 1"),
    ("beta", np.ones((3, 1)), ValueError, r"beta must have shape \(3,\)"),
    ("beta", np.ones(3, complex), TypeError, "beta must be an array of real numbers"),
    ("running_mean", [0, HUGE, 0], TypeError, "running_mean must be an array of real numbers"),
    ("running_var", [1, -1, 1], ValueError, "running_var must not be negative"),
    ("num_batches", -1, ValueError, "num_batches must be one integer of at least 0.*got -1"),
    ("num_batches", 2**63, ValueError, "num_batches must be one integer.*at most"),
    ("num_batches", HUGE, ValueError, "num_batches must be one integer.*at most"),
    ("num_batches", 1.5, TypeError, "num_batches must be one integer.*got 1.5"),
    ("num_batches", True, TypeError, "num_batches must be one integer.*got True"),
    ("num_batches", [1], TypeError, "num_batches must be one integer"),
]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [case for case in BAD_SETTINGS if case[0] not in FIXED] + BAD_ARRAYS,
)
def test_what_is_set_later_is_checked_as_in_the_constructor(name, value, error, message):
    layer = trained()
    before, text = snapshot(layer), repr(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy's about a cast, say
        with pytest.raises(error, match=message):
            setattr(layer, name, value)
    assert repr(layer) == text
    assert_same_bits(snapshot(layer), before)


@pytest.mark.parametrize("name", FIXED)
def test_what_the_arrays_are_made_of_stays(name):
    layer = trained()
    with pytest.raises(AttributeError, match=f"{name} cannot be set"):
        setattr(layer, name, getattr(BatchNorm(4, affine=False, dtype=np.float64), name))
    assert repr(layer) == repr(BatchNorm(3))


def test_settings_may_change_later():
    x = batch(dtype=np.float64)
    settings = {"eps": 0.5, "momentum": None, "ddof": 1, "bad_batch": "raise", "axis": -1}
    layer, other = BatchNorm(3, dtype=np.float64), BatchNorm(3, dtype=np.float64, **settings)
    for name, value in settings.items():
        setattr(layer, name, value)
    assert repr(layer) == repr(other)
    assert_same_bits([layer.forward(x)], [other.forward(x)])
    assert_same_bits(snapshot(layer), snapshot(other))
    layer.axis = 0  # what forward left had its features along the last
    with pytest.raises(RuntimeError, match="backward needs a forward"):
        layer.backward(x)


def test_the_number_of_batches_ends_where_its_array_ends():
    layer = BatchNorm(3, momentum=None)
    layer.num_batches = np.array(2**63 - 1)
    layer.forward(batch())
    layer.load_state_dict(layer.state_dict())
    assert copy.deepcopy(layer).num_batches == 2**63 - 1


def test_settings_are_keywords():
    with pytest.raises(TypeError):
        BatchNorm(3, 1)


@pytest.mark.parametrize("training", [True, False])
def test_call_errors_leave_the_layer_as_it_was(training):
    layer = trained()
    x, dout = batch(), batch(seed=1)
    expected = layer.forward(x, training), layer.backward(dout), layer.dgamma, layer.dbeta
    before = snapshot(layer)
    for bad, error, message in [
        (batch(20, 4), ValueError, r"x must have num_features=3 features along axis 1, got 4"),
        (x[:, 0], ValueError, r"x must have 2 or more dimensions.*got shape \(20,\)"),
        (x.astype(complex), TypeError, "x must be an array of real numbers"),
        (None, TypeError, "x must be an array of real numbers, got None"),
    ]:
        with pytest.raises(error, match=message):
            layer.forward(bad, training)
    with pytest.raises(TypeError, match="training must be True or False, got 'test'"):
        layer.forward(x, "test")
    with pytest.raises(ValueError, match="dout must have the shape of x"):
        layer.backward(dout[1:])
    with pytest.raises(ValueError, match=r"gamma must have shape \(3,\)"):
        layer.gamma = np.ones(2)
    with pytest.raises(ValueError, match="running_var must not be negative"):
        layer.running_var = [-1, 1, 1]
    with pytest.raises(TypeError, match="running_mean must be an array of real numbers"):
        layer.running_mean = None
    assert_same_bits(snapshot(layer), before)
    assert_same_bits([layer.backward(dout), layer.dgamma, layer.dbeta], expected[1:])


def test_features_may_be_the_last_axis():
    layer = BatchNorm(3, axis=-1)
    for shape in [(4, 3), (4, 5, 3), (2, 4, 5, 3)]:
        layer.forward(normal(shape, np.float32))
    with pytest.raises(ValueError, match="one of them axis 2"):
        BatchNorm(3, axis=2).forward(batch())


# -- folding


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", ["C", "Fortran", "sliced"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_fold_into_linear(axis, layout, affine, bias):
    """weight @ x with one row for each feature, and x @ kernel with one column."""
    layer = trained(3, np.float64, affine=affine)
    weight, b = LAYOUTS[layout](normal((3, 5), np.float64, 1)), normal(3, np.float64, 2) * bias
    x = normal((30, 5), np.float64, 3)
    given = np.moveaxis(weight, 0, axis)
    folded, offset = layer.fold_into(given, b if bias else None, axis=axis)
    assert folded.shape == given.shape
    expected = layer.forward(x @ weight.T + b, training=False)
    kernel = np.moveaxis(folded, axis, -1)
    np.testing.assert_allclose(x @ kernel + offset, expected, rtol=0, atol=1e-13)


def convolve(x, weight, bias):
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))
    return np.einsum("nihwkl,oikl->nohw", windows, weight) + bias[:, None, None]


@pytest.mark.parametrize("order", ["oikl", "klio", "iokl", "kloi"])
def test_fold_into_convolution(order):
    """PyTorch's kernels, Keras', and the same of transposed convolutions."""
    layer = trained(3, np.float64)
    weight, bias = normal((3, 4, 3, 2), np.float64, 1), normal(3, np.float64, 2)
    x = normal((2, 4, 6, 7), np.float64, 3)
    expected = layer.forward(convolve(x, weight, bias), training=False)
    given = weight.transpose(["oikl".index(letter) for letter in order])
    folded, offset = layer.fold_into(given, bias, axis=order.index("o"))
    folded = folded.transpose([order.index(letter) for letter in "oikl"])
    np.testing.assert_allclose(convolve(x, folded, offset), expected, atol=1e-13)


def test_fold_is_computed_in_double():
    """With a mean far from zero: in float32 the bias would lose the difference."""
    layer = BatchNorm(1, eps=0)
    layer.running_mean, layer.running_var = [1e8 + 1], [1.0]
    weight, bias = layer.fold_into(np.ones((1, 1), np.float32), [1e8])
    assert weight.dtype == bias.dtype == np.float32
    assert bias == -1


def test_fold_keeps_what_it_is_given():
    layer = trained()
    weight, bias = np.ones((3, 2), np.int64), np.ones(3)
    before = snapshot(layer)
    assert layer.fold_into(weight, bias)[0].dtype == np.float64
    assert (weight == 1).all()
    assert (bias == 1).all()
    assert_same_bits(snapshot(layer), before)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"weight": np.ones((2, 3))},
            ValueError,
            r"weight must have 3 output channels along axis=0 .*\(2, 3\).* may be axis=1",
        ),
        ({"axis": 1}, ValueError, r"weight must have 3 .*axis=1 .*\(3, 2\).* may be axis=0"),
        ({"axis": -1}, ValueError, r"weight must have 3 output channels along axis=-1"),
        ({"axis": 2}, ValueError, r"one of them axis=2, got shape \(3, 2\)"),
        ({"axis": None}, TypeError, "axis must be an integer, got None"),
        ({"groups": 2}, ValueError, "groups must divide num_features=3, got 2"),
        ({"groups": 0}, ValueError, "groups must divide num_features=3, got 0"),
        ({"groups": 1.0}, TypeError, "groups must be an integer, got float 1.0"),
        (
            {"weight": np.ones((6, 3, 2)), "axis": 1, "groups": 3},
            ValueError,
            r"weight must have 1 output channels along axis=1 \(num_features=3, groups=3\)",
        ),
        (
            {"weight": np.ones((4, 1, 2)), "axis": 1, "groups": 3},
            ValueError,
            r"axis 0 that groups=3 divides, got shape \(4, 1, 2\)",
        ),
        ({"weight": np.ones(3)}, ValueError, "weight must have 2 or more dimensions"),
        ({"weight": None}, TypeError, "weight must be an array of real numbers"),
        ({"bias": np.ones(2)}, ValueError, r"bias must have shape \(3,\)"),
        ({"bias": "b"}, TypeError, "bias must be an array of real numbers"),
    ],
)
def test_fold_errors(changes, error, message):
    with pytest.raises(error, match=message):
        trained().fold_into(**({"weight": np.ones((3, 2))} | changes))


def test_a_variance_of_zero_cannot_be_folded():
    layer = BatchNorm(3, eps=0)
    layer.running_var = [1, 0, 1]
    with pytest.raises(ValueError, match=r"running_var \+ eps must not be 0, got 0 for feature 1"):
        layer.fold_into(np.ones((3, 2)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_fold_stays_in_the_range_of_the_weight(dtype):
    """Nothing finite turns to infinity, and no feature's weights to 0, without a word."""
    finfo = np.finfo
    if dtype == "bfloat16":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        finfo, dtype = ml_dtypes.finfo, ml_dtypes.bfloat16
    largest, least = finfo(dtype).max, finfo(dtype).smallest_subnormal
    layer = BatchNorm(2, eps=0, dtype=np.float64)
    weight = np.ones((2, 3), dtype)
    weight[1, 2] = largest / 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded, _ = layer.fold_into(weight)
        assert_same_bits([folded], [weight])
        layer.gamma = [1, 4]
        with pytest.raises(ValueError, match=r"folded weight .*at \(1, 2\), which would be inf"):
            layer.fold_into(weight)
        layer.gamma, layer.running_mean = [1, 1], [0, float(largest)]
        with pytest.raises(ValueError, match=r"folded bias must fit .*at 1, which would be -inf"):
            layer.fold_into(weight, np.array([0, -largest], float))
        layer.running_mean, layer.gamma, weight[0] = [0, 0], [0.25, 1], least
        with pytest.raises(ValueError, match=r"folded weight must fit .*feature 0, which would"):
            layer.fold_into(weight)
        layer.gamma = [0, 1]  # and with what is 0 anyway nothing is lost
        folded, _ = layer.fold_into(weight)
        assert_same_bits([folded[0]], [np.zeros(3, dtype)])
        weight[0] = [0, np.inf, np.nan]  # these are the caller's
        with np.errstate(invalid="ignore"):
            folded, _ = layer.fold_into(weight)
        assert np.isnan(folded[0, 1:].astype(float)).all()


def test_statistics_that_are_not_finite_are_not_folded():
    layer = BatchNorm(2)
    layer.running_var = [1, np.nan]
    with pytest.raises(ValueError, match=r"folded weight .* got 1.0 at \(1, 0\).* would be nan"):
        layer.fold_into(np.ones((2, 3)))
