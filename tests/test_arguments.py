"""What the functions take, what they refuse and how; a refusal leaves everything as it was."""

import copy
import re

import numpy as np
import pytest

import bn_fast
from bn_fast import (
    batchnorm_backward,
    batchnorm_backward_alt,
    batchnorm_forward,
    spatial_batchnorm_backward,
    spatial_batchnorm_forward,
)

from .arrays import DTYPES, normal, restepped, unaligned
from .judge import assert_same_bits


def masked(a):
    return np.ma.masked_array(a, mask=False)


def good_forward():
    x = normal((6, 4), np.float64)
    ones = np.ones(4)
    param = {"mode": "train", "eps": 1e-3, "momentum": 0.5}
    param |= {"running_mean": np.zeros(4), "running_var": np.ones(4)}
    return {"x": x, "gamma": ones, "beta": ones.copy(), "bn_param": param, "axis": 1, "out": None}


def bits(value):
    """What can be compared afterwards: arrays by identity and content."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return id(value), value.dtype, value.shape, value.strides, value.tobytes()
    return id(value)


KINDS = {  # wrong in any array argument
    "None": None,
    "str": "abc",
    "bytes": b"abcd",
    "dict": {},
    "object": np.array([[object()] * 4] * 6),
    "None inside": [[None, 1.0], [1.0, 2.0]],
    "complex": np.ones((6, 4), complex),
    "datetime": np.zeros((6, 4), "M8[s]"),
    "timedelta": np.zeros((6, 4), "m8[s]"),
    "strings": np.zeros((6, 4), "U3"),
    "structured": np.zeros((6, 4), [("a", "f4"), ("b", "f4")]),
    "ragged": [[1.0, 2.0], [3.0]],
    "masked": masked(np.ones((6, 4))),
    "generator": (row for row in ([1.0], [2.0])),
}
X = good_forward()["x"]
BROADCAST = np.lib.stride_tricks.as_strided(np.zeros(4), (6, 4), (0, 8))

# (argument or key of bn_param, value, error, words of the message besides the name)
REFUSED = [
    *[("x", value, TypeError, "real numbers") for value in KINDS.values()],
    ("x", np.float64(1.0), ValueError, "2 or more dimensions"),
    ("x", np.ones(4), ValueError, r"2 or more dimensions.*\(4,\)"),
    ("x", np.ones((6, 4), np.longdouble), TypeError, "longdouble|float128"),
    *[(name, value, TypeError, "real numbers") for name in ("gamma", "beta")
      for key, value in KINDS.items() if key != "None"],
    *[(name, value, ValueError, r"\(4,\)") for name in ("gamma", "beta")
      for value in (np.ones(3), np.ones(5), np.ones(1), np.ones((4, 1)), np.ones((1, 1)),
                    np.ones((1, 1, 4)), np.ones((6, 4)), [], [1, 2])],
    *[("axis", value, TypeError, "integer") for value in (None, 1.0, "1", [1])],
    *[("axis", value, ValueError, r"\[-2, 2\)") for value in (2, -3, 2**70)],
    ("out", "abc", TypeError, "ndarray"),
    ("out", [[0.0] * 4] * 6, TypeError, "ndarray"),
    ("out", masked(np.zeros((6, 4))), TypeError, "ndarray"),
    ("out", np.zeros((6, 4), "f4"), TypeError, "float64.*float32"),
    ("out", np.zeros((6, 4), int), TypeError, "float64.*int"),
    ("out", np.zeros((6, 4), ">f8"), TypeError, ">f8"),
    ("out", np.zeros((4, 6)), ValueError, r"\(6, 4\).*\(4, 6\)"),
    ("out", np.zeros((1, 4)), ValueError, r"\(6, 4\).*\(1, 4\)"),
    ("out", np.zeros(24), ValueError, r"\(6, 4\).*\(24,\)"),
    ("out", np.broadcast_to(0.0, (6, 4)), ValueError, "read-only"),
    ("out", BROADCAST, ValueError, "overlap itself"),
    ("out", unaligned(np.zeros((6, 4))), ValueError, "unaligned"),
    *[("bn_param", value, TypeError, "dict") for value in ("train", [("mode", "train")], 1)],
    *[("mode", value, ValueError, "train.*test") for value in
      ("Train", "eval", "", None, True, 1, ["train"], b"train")],
    *[("eps", value, ValueError, "finite") for value in (-1e-9, np.nan, np.inf, -np.inf)],
    *[("momentum", value, ValueError, "finite") for value in (np.nan, np.inf)],
    *[("ddof", value, ValueError, "0 or 1, got") for value in (2, -1, 0.5, np.nan)],
    *[(name, value, TypeError, "real number") for name in ("eps", "momentum", "ddof") for value in
      (None, "0.1", b"1", 1j, np.complex64(1), [0.1], np.array([0.1, 1]), np.timedelta64(1),
       np.True_, {})],
    *[(name, value, TypeError, "real numbers") for name in ("running_mean", "running_var")
      for key, value in KINDS.items() if key != "None"],
    *[(name, value, ValueError, r"\(4,\)") for name in ("running_mean", "running_var")
      for value in (0.0, np.ones(3), np.ones((4, 1)), [])],
    ("running_var", np.array([1, 1, -1e-3, 1]), ValueError, "-0.001.*feature 2"),
    ("running_var", np.array([1, 1, 1, -1], np.float32), ValueError, "feature 3"),
    ("running_var", [1, -2, 1, 1], ValueError, "feature 1"),
]  # fmt: skip


def label(value):
    """A test's name, the same in every process: tests run side by side are told apart by it."""
    return re.sub(r" at 0x\w+", "", repr(value))[:30]


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize(("name", "value", "error", "words"), REFUSED, ids=label)
def test_forward_refuses(name, value, error, words, mode):
    arguments = good_forward()
    arguments["bn_param"]["mode"] = mode
    if name in arguments:
        arguments[name] = value
    else:
        arguments["bn_param"][name] = value
    if name != "out":
        arguments["out"] = np.full((6, 4), 7.0)
    before = bits(arguments)
    with pytest.raises(error, match=rf"(?s)\b{name}\b.*({words})"):
        batchnorm_forward(**arguments)
    assert bits(arguments) == before


def test_missing_mode():
    for param in ({}, {"eps": 1e-3}):
        before = dict(param)
        with pytest.raises(KeyError, match=r"'mode'.*'train' or 'test'"):
            batchnorm_forward(X, np.ones(4), np.ones(4), param)
        assert param == before


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("epsilon", "eps"),
        ("EPS", "eps"),
        ("running_variance", "running_var"),
        ("runningMean", "running_mean"),
        ("moving_mean", "running_mean"),
        ("Momentum", "momentum"),
        ("DDOF", "ddof"),
    ],
)
def test_keys_that_look_like_others(key, meant):
    param = {"mode": "train", key: np.float64(0.5)}
    before = dict(param)
    with pytest.raises(ValueError, match=f"{key}.*{meant}"):
        batchnorm_forward(X, np.ones(4), np.ones(4), param)
    assert param == before


def test_other_keys_are_ignored():
    """They are the course's way: the same dict goes to every layer."""
    param = {"mode": "train", "num_groups": 2, 7: None, "layer": "first"}
    out, _ = batchnorm_forward(X, np.ones(4), np.ones(4), param)
    assert_same_bits([out], [batchnorm_forward(X, np.ones(4), np.ones(4))[0]])
    assert param.keys() == {"mode", "num_groups", 7, "layer", "running_mean", "running_var"}


class Stubborn(dict):
    """Takes so many values and no more."""

    def __init__(self, room, **items):
        super().__init__(**items)
        self.room = room

    def __setitem__(self, key, value):
        if self.room == 0:
            raise RuntimeError("full")
        self.room -= 1
        super().__setitem__(key, value)


@pytest.mark.parametrize("room", [0, 1])
@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize("old", [{}, {"running_mean": np.ones(4), "running_var": np.ones(4)}])
def test_a_dict_that_refuses_what_is_stored(old, mode, room):
    param = Stubborn(room, mode=mode, **old)
    out = np.full((6, 4), 7.0)
    with pytest.raises(RuntimeError, match="full"):
        batchnorm_forward(X, np.ones(4), np.zeros(4), param, out=out)
    np.testing.assert_array_equal(out, 7)
    assert param.keys() == {"mode", *old}
    for name, value in old.items():
        if room == 0:  # else it is full before it can be put back
            assert param[name] is value


@pytest.mark.parametrize("name", ["eps", "momentum", "negative_slope"])
@pytest.mark.parametrize("value", [10**400, -(10**400), 10**5000], ids=["400", "-400", "5000"])
def test_integers_beyond_float64(name, value):
    arguments = {"bn_param": {"mode": "train", name: value}}
    if name == "negative_slope":
        arguments = {"activation": "leaky_relu", name: value}
    with pytest.raises(ValueError, match=rf"{name}.* range of float64"):
        batchnorm_forward(X, np.ones(4), np.zeros(4), **arguments)


def test_all_three_of_a_train_call_are_refused_before_anything_is_done():
    """bn_param is looked at after the arrays, but before they are computed with."""
    x = normal((6, 4), np.float32)
    kept = x.copy()
    with pytest.raises(ValueError, match="eps"):
        batchnorm_forward(x, np.ones(4), np.ones(4), {"mode": "train", "eps": -1}, out=x)
    np.testing.assert_array_equal(x, kept)


def test_out_over_gamma():
    """The cache keeps gamma for the backward call, which would take what was written over it."""
    x, memory = normal((6, 4), np.float64), np.ones((6, 4))
    for gamma in (memory[2], memory[2, ::-1], memory[2:, 1]):
        with pytest.raises(ValueError, match="out must be apart from gamma"):
            batchnorm_forward(x, gamma, np.ones(4), out=memory)
        _, cache = batchnorm_forward(x, gamma, np.ones(4))
        with pytest.raises(ValueError, match="out must be apart from gamma"):
            batchnorm_backward(x, cache, out=memory)
    np.testing.assert_array_equal(memory, 1)


def test_out_over_what_is_not_kept():
    """beta and the running averages: they are read before anything is written."""
    x, memory = normal((6, 4), np.float64), np.ones((6, 4)) + np.arange(6).reshape(6, 1)
    for mode in ("train", "test"):
        beta, mean, var = (memory[k].copy() for k in range(3))
        apart = {"mode": mode, "running_mean": mean, "running_var": var}
        expected, _ = batchnorm_forward(x, np.ones(4), beta, apart)
        over = memory.copy()
        param = {"mode": mode, "running_mean": over[1], "running_var": over[2]}
        got, _ = batchnorm_forward(x, np.ones(4), over[0], param, out=over)
        assert_same_bits([got], [expected])
        for name in ("running_mean", "running_var"):
            assert_same_bits([param[name]], [apart[name]])


@pytest.mark.parametrize("shape", [(16, 4096), (8, 64, 28, 28)], ids=str)
def test_out_over_a_beta_that_is_read_tile_by_tile(shape):
    x, n = normal(shape, np.float32), shape[1]
    out = normal(shape, np.float32, 1)
    beta = out.reshape(-1)[n // 2 : n // 2 + n]
    expected, _ = batchnorm_forward(x, np.ones(n), beta.copy())
    assert_same_bits([batchnorm_forward(x, np.ones(n), beta, out=out)[0]], [expected])


PARAMS = [
    None,
    {"mode": "train"},
    {"mode": "test", "eps": 1e-3},
    {"mode": "train", "momentum": 0.5, "running_mean": None, "running_var": np.ones(5)},
    {"mode": "test", "running_mean": np.arange(5.0), "running_var": np.ones(5, np.float32)},
    {"mode": "train", "eps": 0.0, "running_mean": np.arange(5, dtype=np.float32), "other": 1},
]


@pytest.mark.parametrize("param", PARAMS, ids=str)
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("residual", [None, True])
@pytest.mark.parametrize("out", [None, "new", "x", "residual"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_straight_road_leads_where_the_other_does(
    param, activation, residual, out, dtype, monkeypatch
):
    """A small call whose arguments need no conversion, and the same where every one is checked."""

    def results():
        x, dout, r = (normal((6, 5), dtype, seed) for seed in range(3))
        gamma, beta = normal(5, np.float32, 3), normal(5, np.float64, 4)
        where = {"x": x, "residual": r, "new": np.empty_like(x)}.get(out)
        given = None if param is None else dict(param)
        y, cache = batchnorm_forward(
            x, gamma, beta, given, out=where, activation=activation,
            negative_slope=0.25, residual=r if residual else None,
        )  # fmt: skip
        assert where is None or y is where
        said = [cache.axis, cache.eps, cache.frozen, cache.overwritten, cache.options and (
            cache.activation, cache.negative_slope, cache.options.residual_overwritten
        )]  # fmt: skip
        averages = [] if given is None else [given["running_mean"], given["running_var"]]
        try:
            gradients = batchnorm_backward(dout, cache)
            into = np.empty_like(dout)
            assert batchnorm_backward(dout, cache, out=into)[0] is into
            said.append(cache.overwritten)
            gradients = [*gradients, into]
        except ValueError as error:
            gradients = []
            said.append(str(error))
        return [y, cache.stats, *averages, *gradients], said

    straight, said = results()
    monkeypatch.setattr(bn_fast.functional, "_SERIAL_SIZE", 0)
    checked, also_said = results()
    assert said == also_said
    assert_same_bits(straight, checked)


class Refusing:
    """As a tensor on another device, or one that records its gradient."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("call detach() first")


class Elsewhere:
    def __dlpack__(self, **options):
        raise BufferError("not in this memory")

    def __dlpack_device__(self):
        return 2, 0


@pytest.mark.parametrize("value", [Refusing(), Elsewhere()], ids=["__array__", "__dlpack__"])
def test_what_refuses_to_be_read_is_named(value):
    ones = np.ones(4)
    with pytest.raises(TypeError, match=r"x must .*(detach|memory)"):
        batchnorm_forward(value, ones, ones)
    with pytest.raises(TypeError, match=r"gamma must .*(detach|memory)"):
        batchnorm_forward(X, value, ones)
    with pytest.raises(TypeError, match=r"dout must .*(detach|memory)"):
        batchnorm_backward(value, good_cache())


PARTIAL = {  # views of a buffer of 48 elements that share a part of x = its first 24 as (6, 4)
    "shifted": lambda b: b[4:28].reshape(6, 4),
    "by one": lambda b: b[1:25].reshape(6, 4),
    "backwards": lambda b: b[23::-1].reshape(6, 4),
    "reordered": lambda b: b[:24].reshape(4, 6).T,
    "gaps": lambda b: b[::2].reshape(6, 4),
    "rows reversed": lambda b: b[:24].reshape(6, 4)[::-1],
}


@pytest.mark.parametrize("view", PARTIAL.values(), ids=PARTIAL)
def test_partial_overlap(view):
    buffer = normal(48, np.float64)
    x = buffer[:24].reshape(6, 4)
    kept = buffer.copy()
    with pytest.raises(ValueError, match=r"out .*x.*partial overlap"):
        batchnorm_forward(x, np.ones(4), np.ones(4), out=view(buffer))
    _, cache = batchnorm_forward(x, np.ones(4), np.ones(4))
    with pytest.raises(ValueError, match=r"out .*x.*partial overlap"):
        batchnorm_backward(np.ones((6, 4)), cache, out=view(buffer))
    _, cache = batchnorm_forward(x.copy(), np.ones(4), np.ones(4))
    with pytest.raises(ValueError, match=r"out .*dout.*partial overlap"):
        batchnorm_backward(x, cache, out=view(buffer))
    np.testing.assert_array_equal(buffer, kept)


@pytest.mark.parametrize("shape", [(6, 4), (1, 4), (6, 1), (1, 1), (1, 4, 6, 1)], ids=str)
def test_the_same_memory_with_other_steps_of_length_1(shape):
    x, dout, residual = (normal(shape, np.float32, seed) for seed in range(3))
    out, cache = batchnorm_forward(x)
    gradients = batchnorm_backward(dout, cache)
    own = x.copy()
    got, spent = batchnorm_forward(own, out=restepped(own))
    assert_same_bits([got], [out])
    with pytest.raises(ValueError, match="batchnorm_forward wrote its output over the x"):
        batchnorm_backward(dout, spent)
    own = dout.copy()
    assert_same_bits([batchnorm_backward(own, cache, out=restepped(own))[0]], [gradients[0]])
    own = x.copy()
    _, spent = batchnorm_forward(own)
    assert_same_bits([batchnorm_backward(dout, spent, out=restepped(own))[0]], [gradients[0]])
    with pytest.raises(ValueError, match="batchnorm_backward wrote its output over the x"):
        batchnorm_backward(dout, spent)
    given = {"activation": "relu", "residual": residual}
    expected, _ = batchnorm_forward(x, **given)
    got, spent = batchnorm_forward(x, **given, out=restepped(residual))
    assert_same_bits([got], [expected])
    with pytest.raises(ValueError, match="wrote its output over the residual"):
        batchnorm_backward(dout, spent)


def test_interleaved_arrays_do_not_overlap():
    buffer = normal((6, 8), np.float64)
    x, out = buffer[:, ::2], buffer[:, 1::2]
    kept = x.copy()
    expected, cache = batchnorm_forward(kept, np.ones(4), np.ones(4))
    _, interleaved = batchnorm_forward(x, np.ones(4), np.ones(4), out=out)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(x, kept)
    dout = normal((6, 4), np.float64, 1)
    gradients = batchnorm_backward(dout, cache)
    assert_same_bits(batchnorm_backward(dout, interleaved), gradients)
    assert_same_bits(batchnorm_backward(dout, interleaved, out=out), gradients)
    assert_same_bits(batchnorm_backward(dout, interleaved), gradients)


def good_cache():
    return batchnorm_forward(X, np.ones(4), np.ones(4))[1]


BACKWARD_REFUSED = [
    *[("dout", value, TypeError, "real numbers") for key, value in KINDS.items()],
    *[("dout", np.ones(shape), ValueError, r"\(6, 4\)")
      for shape in ((4, 6), (6,), (6, 5), (1, 4), (6, 4, 1), ())],
    ("dout", np.ones((6, 4), np.longdouble), TypeError, "longdouble|float128"),
    *[("out", value, error, words) for name, value, error, words in REFUSED if name == "out"],
    *[("cache", value, TypeError, "batchnorm_forward") for value in
      (None, 5, "abcd", (), (1, 2, 3, 4), [np.ones(4)] * 6, object())],
    ("cache", (np.zeros(4), np.ones(4), None, None, np.ones(4)), TypeError, "x must"),
    ("cache", "abcde", TypeError, "x must"),
    ("cache", ("abc", np.ones(4), X, None, np.ones(4)), TypeError, "mean must"),
    ("cache", (np.zeros(4), None, X, None, np.ones(4)), TypeError, "inv_var must"),
    ("cache", (np.zeros(4), np.ones(4), X, None, masked(np.ones(4))), TypeError, "gamma must"),
    ("cache", (np.zeros(3), np.ones(4), X, None, np.ones(4)), ValueError, "mean must"),
    ("cache", (np.zeros((6, 4)), np.ones(4), X, None, np.ones(4)), ValueError, "mean must"),
    ("cache", (np.zeros(4), np.ones(3), X, None, np.ones(4)), ValueError, "inv_var must"),
    ("cache", (np.zeros(4), np.ones(4), X, None, np.ones(5)), ValueError, "gamma must"),
    ("cache", (np.zeros(4), np.ones(4), X[0], None, np.ones(4)), ValueError, "x must"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "words"), BACKWARD_REFUSED)
def test_backward_refuses(name, value, error, words):
    arguments = {"dout": normal((6, 4), np.float64, 1), "cache": good_cache(), "out": None}
    if name != "out":
        arguments["out"] = np.full((6, 4), 7.0)
    arguments[name] = value
    before, x = bits(arguments), X.copy()
    with pytest.raises(error, match=rf"(?s)\b{name}\b.*({words})"):
        batchnorm_backward(**arguments)
    assert bits(arguments) == before
    np.testing.assert_array_equal(X, x)


class WithArray:
    def __init__(self, a):
        self.a = a

    def __array__(self, dtype=None, copy=None):
        return self.a


class WithDlpack:
    def __init__(self, a):
        self.a = a

    def __dlpack__(self, **options):
        return self.a.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.a.__dlpack_device__()


class Subclass(np.ndarray):
    def __array_ufunc__(self, *args, **kwargs):
        raise AssertionError("the values are read, nothing is called")


ACCEPTED = {
    "list": lambda a: a.tolist(),
    "tuple of arrays": tuple,
    "subclass": lambda a: a.view(Subclass),
    "__array__": WithArray,
    "__dlpack__": WithDlpack,
    "read-only": lambda a: np.broadcast_to(a, a.shape),
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "unaligned": unaligned,
}


@pytest.mark.parametrize("convert", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(convert):
    x, dout = normal((6, 4), np.float64), normal((6, 4), np.float64, 1)
    gamma, beta, mean = normal(4, np.float64, 2), normal(4, np.float64, 3), np.arange(4.0)

    def run(convert):
        param = {"mode": "train", "running_mean": convert(mean), "running_var": convert(mean)}
        out, cache = batchnorm_forward(convert(x), convert(gamma), convert(beta), param)
        gradients = batchnorm_backward(convert(dout), cache)
        return [out, *gradients, param["running_mean"], param["running_var"]]

    results = run(convert)
    assert all(type(a) is np.ndarray for a in results)
    assert_same_bits(results, run(lambda a: a))


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_matrix():
    x = normal((6, 4), np.float64)
    out, _ = batchnorm_forward(np.matrix(x), np.ones(4), np.ones(4))
    assert type(out) is np.ndarray
    assert_same_bits([out], [batchnorm_forward(x, np.ones(4), np.ones(4))[0]])
    row = np.matrix(normal(4, np.float64, 1))
    results = [batchnorm_forward(x, a, a)[0] for a in (row, row.A1)]
    assert_same_bits(results[:1], results[1:])


# gamma or beta for x of shape (6, 4, 3, 2), whose features are on the axis; None and numbers too.
SHAPED = [
    *((1, shape) for shape in [None, (), (4, 1, 1), (1, 4, 1, 1)]),
    *((0, shape) for shape in [(6, 1, 1, 1), ()]),
    *((-1, shape) for shape in [(1, 2), (1, 1, 2), (1, 1, 1, 2), None]),
]


def in_shape(values, shape):
    """The values as a caller gives them, and each feature's own."""
    if shape is None:
        return None, None
    if shape == ():
        return float(values[0]), np.full_like(values, values[0])
    return values.reshape(shape), values


@pytest.mark.parametrize("module", [bn_fast, bn_fast.reference])
@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("axis", "shape"), SHAPED)
@pytest.mark.parametrize("beta_shape", ["same", "own", None])
def test_parameters_in_other_shapes(axis, shape, beta_shape, activation, mode, module):
    x, dout, ddx = (normal((6, 4, 3, 2), np.float64, seed) for seed in range(3))
    n = x.shape[axis]
    beta_shape = {"same": shape, "own": (n,)}.get(beta_shape, beta_shape)
    given, each = zip(
        in_shape(normal(n, np.float64, 3), shape), in_shape(normal(n, np.float64, 4), beta_shape),
        strict=True,
    )  # fmt: skip
    full = [default if a is None else a for a, default in zip(each, (np.ones(n), np.zeros(n)))]

    def run(parameters, second):
        """What has x's size, and what has the parameters' shapes."""
        options = {"activation": activation, "axis": axis}
        y, cache = module.batchnorm_forward(x, *parameters, {"mode": mode}, **options)
        dx, dgamma, dbeta = module.batchnorm_backward(dout, cache)
        large, small = [y, dx], [dgamma, dbeta]
        if activation is None:
            dx, dgamma, ddout = module.batchnorm_double_backward(ddx, *second, dout, cache)
            large, small = [*large, dx, ddout], [*small, dgamma]
        other = bn_fast.reference if module is bn_fast else bn_fast
        return large, small, other.batchnorm_backward(dout, cache)[1:]

    got, should = run(given, given), run(full, each)
    assert_same_bits(got[0], should[0])
    found, expected = [*got[2], *got[1]], [*should[2], *should[1]]
    for a, b, parameter in zip(found, expected, (*given, *given, given[0]), strict=False):
        if parameter is None:
            assert a is None
        else:
            assert a.shape == np.shape(parameter)
            b = b.reshape(a.shape) if np.ndim(parameter) else b.sum()
            np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(6, 4), (300, 500), (40, 7, 20, 20)], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, *DTYPES])
def test_without_parameters(shape, dtype):
    """No others than with ones and zeros, on whatever road."""
    x, dout, n = normal(shape, dtype), normal(shape, dtype, 1), shape[1]
    for options in ({}, {"activation": "relu", "residual": dout}):
        y, cache = batchnorm_forward(x, **options)
        should, plain = batchnorm_forward(x, np.ones(n, "f4"), np.zeros(n, "f4"), **options)
        dx, dgamma, dbeta, *rest = batchnorm_backward(dout, cache)
        expected = batchnorm_backward(dout, plain)
        assert dgamma is dbeta is None
        assert_same_bits([y, dx, *rest], [should, expected[0], *expected[3:]])
        assert cache.gamma is cache.beta is tuple(cache)[4] is None
        assert batchnorm_backward(dout, cache, needs=("dgamma", "dbeta"))[:3] == (None,) * 3
    assert_same_bits(
        batchnorm_backward(dout, (*tuple(plain)[:4], None))[:1],
        batchnorm_backward(dout, tuple(plain))[:1],
    )


def test_gradients_of_parameters_that_there_are_not():
    x = normal((6, 4), np.float64)
    for module in (bn_fast, bn_fast.reference):
        _, cache = module.batchnorm_forward(x, None, np.ones((1, 4)))
        with pytest.raises(ValueError, match="ddgamma must"):
            module.batchnorm_double_backward(x, np.ones(4), None, x, cache)
        with pytest.raises(ValueError, match=r"ddbeta must have shape \(1, 4\).*got \(4,\)"):
            module.batchnorm_double_backward(x, None, np.ones(4), x, cache)


@pytest.mark.parametrize("mode", ["train", "test"])
@pytest.mark.parametrize("module", [bn_fast, bn_fast.reference])
def test_running_averages_keep_their_shape(module, mode):
    x = normal((6, 4, 3), np.float32)
    results = []
    for shape in ((4,), (4, 1), (1, 4, 1)):
        mean, var = np.arange(4.0).reshape(shape), np.arange(4.0, 8).reshape(shape)
        param = {"mode": mode, "running_mean": mean, "running_var": var.tolist()}
        y, _ = module.batchnorm_forward(x, bn_param=param)
        averages = [param[name] for name in ("running_mean", "running_var")]
        assert [a.shape for a in averages] == [shape] * 2
        results.append([y, *(a.reshape(-1) for a in averages)])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("module", [bn_fast, bn_fast.reference])
def test_pieces_take_statistics_in_other_shapes(module):
    x, dout = normal((6, 4, 3), np.float64), normal((6, 4, 3), np.float64, 1)
    mean, var = (f(axis=(0, 2), keepdims=True) for f in (x.mean, x.var))
    gamma = normal((4, 1), np.float64, 2)

    def run(*given):
        mean, var, gamma = given
        y = module.normalize(x, mean, var, gamma)
        s, t = module.backward_reduce(dout, x, mean, var)
        return y, s, t, module.backward_apply(dout, x, mean, var, gamma, s, t, 18)

    assert_same_bits(run(mean, var, gamma), run(*(a.reshape(-1) for a in (mean, var, gamma))))
    each = np.zeros(4), np.full(4, 2.0), np.ones(4)
    assert_same_bits(run(0, 2.0, None), run(*each))


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.int64, np.uint64])
def test_integers_become_float64(dtype):
    x = np.random.default_rng(0).integers(0, 2, (6, 4)).astype(dtype)
    gamma, beta = np.ones(4), np.zeros(4)
    out, cache = batchnorm_forward(x, gamma, beta)
    expected, expected_cache = batchnorm_forward(x.astype(float), gamma, beta)
    assert_same_bits([out], [expected])
    assert_same_bits(batchnorm_backward(x, cache), batchnorm_backward(x * 1.0, expected_cache))
    assert out.dtype == np.float64


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint64, "f2", "f4", "f8", "g", ">f4", ">i2"])
def test_parameters_of_any_real_dtype(x_dtype, dtype):
    """Their values count, their dtype does not: everything comes back in that of x."""
    x, dout = normal((6, 4), x_dtype), normal((6, 4), np.float64 if x_dtype is np.float32 else "f4")
    values = np.array([0, 1, 1, 0])

    def run(a):
        param = {"mode": "train", "running_mean": a, "running_var": a}
        out, cache = batchnorm_forward(x, a, a, param)
        return [out, *batchnorm_backward(dout, cache)], param["running_mean"]

    results, mean = run(values.astype(dtype))
    assert_same_bits(results, run(values.astype(x_dtype))[0])
    assert all(a.dtype == x_dtype for a in results)
    narrow = np.dtype(dtype).kind == "f" and np.dtype(dtype).itemsize <= 4
    assert mean.dtype == (np.float32 if x_dtype is np.float32 and narrow else np.float64)


def test_axis_counts_from_either_end():
    x = normal((3, 4, 5), np.float32)
    for axis, n in enumerate(x.shape):
        expected = batchnorm_forward(x, np.ones(n), np.zeros(n), axis=axis)[0]
        for same in (axis - 3, np.int8(axis)):
            out = batchnorm_forward(x, np.ones(n), np.zeros(n), axis=same)[0]
            assert_same_bits([out], [expected])
    with pytest.raises(IndexError):  # as NumPy's AxisError is both
        batchnorm_forward(x, np.ones(4), np.zeros(4), axis=3)


def test_second_names():
    assert batchnorm_backward_alt is batchnorm_backward
    x, dout = normal((3, 4, 5, 6), np.float32), normal((3, 4, 5, 6), np.float32, 1)
    gamma, beta, param = np.arange(4), np.ones(4), {"mode": "train"}
    out, cache = spatial_batchnorm_forward(x, gamma, beta, param)
    expected, expected_cache = batchnorm_forward(x, gamma, beta, {"mode": "train"}, axis=1)
    assert_same_bits([out], [expected])
    got = spatial_batchnorm_backward(dout, cache)
    assert_same_bits(got, batchnorm_backward(dout, expected_cache))
    assert param.keys() == {"mode", "running_mean", "running_var"}
    assert spatial_batchnorm_forward(x, gamma, beta, out=x)[0] is x


@pytest.mark.parametrize("value", KINDS.values(), ids=KINDS)
def test_spatial_refuses_kinds(value):
    with pytest.raises(TypeError, match=r"x must be"):
        spatial_batchnorm_forward(value, np.ones(4), np.zeros(4))


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (3, 4, 5), (2, 3, 4, 5, 6)])
def test_spatial_refuses_shapes(shape):
    with pytest.raises(ValueError, match=rf"x .*\(N, C, H, W\).*{re.escape(str(shape))}"):
        spatial_batchnorm_forward(np.ones(shape), np.ones(4), np.zeros(4))


# bn_param, to the letter


def test_running_averages():
    """momentum is the weight of the old value, and the variance is divided by M."""
    x = normal((10, 4), np.float64)
    mean, var = np.arange(4.0), np.arange(4.0) + 1
    param = {"mode": "train", "momentum": 0.75, "running_mean": mean, "running_var": var}
    batchnorm_forward(x, np.ones(4), np.zeros(4), param)
    np.testing.assert_allclose(param["running_mean"], 0.75 * np.arange(4) + 0.25 * x.mean(0))
    np.testing.assert_allclose(param["running_var"], 0.75 * (np.arange(4) + 1) + 0.25 * x.var(0))
    np.testing.assert_array_equal(mean, np.arange(4.0))
    np.testing.assert_array_equal(var, np.arange(4.0) + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_defaults(dtype):
    """eps 1e-5, momentum 0.9, running averages from 0 in the dtype of x."""
    x = 3 + normal((10, 4), dtype) / 100
    param, spelled = {"mode": "train"}, {"mode": "train", "eps": 1e-5, "momentum": 0.9}
    spelled |= {"running_mean": np.zeros(4, dtype), "running_var": np.zeros(4, dtype)}
    out = batchnorm_forward(x, np.ones(4), np.zeros(4), param)[0]
    assert_same_bits([out], [batchnorm_forward(x, np.ones(4), np.zeros(4), spelled)[0]])
    assert_same_bits([out], [batchnorm_forward(x, np.ones(4), np.zeros(4))[0]])
    assert param.keys() == {"mode", "running_mean", "running_var"}
    for name in ("running_mean", "running_var"):
        assert_same_bits([param[name]], [spelled[name]])
        assert param[name].dtype == dtype
    np.testing.assert_allclose(param["running_mean"], 0.1 * x.mean(0, dtype=float), rtol=1e-6)


@pytest.mark.parametrize("module", [bn_fast, bn_fast.reference])
@pytest.mark.parametrize("weights", [None, [[0.5], [0], [2], [0.25], [0.75]], 0.5, 1e308])
@pytest.mark.parametrize("ddof", [0, 1, np.int64(1)])
def test_ddof_is_the_running_variances(module, ddof, weights):
    x = normal((5, 4), np.float64)
    param = {"mode": "train", "momentum": 0.75, "running_var": np.ones(4), "ddof": ddof}
    plain = {"mode": "train"}
    out, _ = module.batchnorm_forward(x, np.ones(4), np.zeros(4), param, weights=weights)
    expected, _ = module.batchnorm_forward(x, np.ones(4), np.zeros(4), plain, weights=weights)
    assert_same_bits([out], [expected])  # ddof is not the batch's
    w = np.broadcast_to(1.0 if weights is None else weights, (5, 1))
    moments = bn_fast.moments(x, weights=w / w.max())
    count = w.sum(dtype=np.longdouble)
    var = moments.var() * float(count / (count - int(ddof)))
    np.testing.assert_allclose(param["running_var"], 0.75 + 0.25 * var, rtol=1e-14)
    np.testing.assert_allclose(param["running_mean"], 0.25 * moments.mean, rtol=1e-13)


@pytest.mark.parametrize("module", [bn_fast, bn_fast.reference])
@pytest.mark.parametrize(("rows", "weights"), [(1, None), (3, 1 / 3), (3, [[0], [1], [0]])])
def test_a_batch_without_unbiased_variance(module, rows, weights):
    """Its running variance would be 0/0: refused, as by PyTorch; but not where there is no batch,
    nor in test mode."""
    x, out = X[:rows], np.full((rows, 4), 7.0)
    param = {"mode": "train", "ddof": 1, "running_mean": np.ones(4), "running_var": np.ones(4)}
    before = dict(param)
    arguments = np.ones(4), np.zeros(4), param
    with pytest.raises(ValueError, match=r"bn_param\['ddof'\] must be 0 .* has 1 values"):
        module.batchnorm_forward(x, *arguments, out=out, weights=weights)
    assert (out == 7).all()
    assert param.keys() == before.keys()
    assert all(param[key] is before[key] for key in param)
    module.batchnorm_forward(x[:0], *arguments)
    module.batchnorm_forward(x, *arguments, weights=0)
    module.batchnorm_forward(x, *arguments[:2], param | {"mode": "test"})
    np.testing.assert_array_equal([param["running_mean"], param["running_var"]], np.ones((2, 4)))


def test_test_mode_uses_the_running_averages_and_keeps_them():
    mean, var = np.arange(4), np.arange(4) + 1  # integers, too
    param = {"mode": "test", "eps": 0.5, "running_mean": mean, "running_var": var}
    before = copy.deepcopy(param)
    x = normal((5, 4), np.float64)
    out, _ = batchnorm_forward(x, np.full(4, 2), np.ones(4), param)
    np.testing.assert_allclose(out, 2 * (x - mean) / np.sqrt(var + 0.5) + 1, rtol=1e-13)
    assert param.keys() == before.keys()
    for name in ("running_mean", "running_var"):
        np.testing.assert_array_equal(param[name], before[name])
        assert not np.shares_memory(param[name], locals()["mean" if "mean" in name else "var"])


def test_test_mode_without_running_averages_takes_zeros():
    param = {"mode": "test", "eps": 4}
    out, _ = batchnorm_forward(X, np.ones(4), np.zeros(4), param)
    np.testing.assert_array_equal(out, X / 2)
    np.testing.assert_array_equal([param["running_mean"], param["running_var"]], np.zeros((2, 4)))


@pytest.mark.parametrize("mode", ["train", "test"])
def test_running_averages_are_new_arrays(mode):
    mean, var = np.zeros(4), np.ones(4)
    param = {"mode": mode, "running_mean": mean, "running_var": var}
    batchnorm_forward(X, np.ones(4), np.zeros(4), param)
    assert not np.shares_memory(param["running_mean"], mean)
    assert not np.shares_memory(param["running_var"], var)
    param["running_mean"] += 1  # ours to write to
    np.testing.assert_array_equal([mean, var], [np.zeros(4), np.ones(4)])


def test_momentum_at_its_ends():
    for momentum, expected in ((1, np.full(4, 5.0)), (0, X.mean(0))):
        param = {"mode": "train", "momentum": momentum, "running_mean": np.full(4, 5.0)}
        batchnorm_forward(X, np.ones(4), np.zeros(4), param)
        np.testing.assert_allclose(param["running_mean"], expected, rtol=1e-13)
