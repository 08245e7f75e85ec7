"""The pieces of batch normalization: any split, merged, is the whole."""

import copy
import functools
import operator
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bn_fast
from bn_fast import Moments, backward_apply, backward_reduce, moments, normalize, reference
from bn_fast._core import core
from bn_fast.reference import oracle_forward

from . import oracle
from .arrays import DTYPES, LAYOUTS, SHAPES, TALL, normal, problem, spread_weights
from .judge import assert_same_bits, check, roundings

few = settings(max_examples=60, deadline=None, database=None, derandomize=True)
EPS64 = np.finfo(np.float64).eps


def exact_moments(x, axis=1, weights=None):
    n = x.shape[axis]
    _, mean, var = oracle_forward(x, np.ones(n), np.zeros(n), axis=axis, weights=weights)
    m = x.size // n
    if weights is not None:
        each = np.moveaxis(np.broadcast_to(weights, x.shape), axis, 0).reshape(n, -1)
        m = each.sum(axis=1, dtype=np.longdouble)
        m = m[0] if weights.shape[axis] == 1 else m
    return m, mean, var * m


def assert_moments(got, x, axis=1, limit=4, weights=None):
    """float64 results: the mean to roundings of itself or of the deviation, m2 of itself."""
    m, mean, m2 = exact_moments(x, axis, weights)
    near = 2 * EPS64 * m
    assert got.count == m if weights is None else (np.abs(got.count - m) <= near).all()
    assert got.mean.dtype == got.m2.dtype == np.float64
    tolerance = limit * np.finfo(x.dtype).eps  # lanes are of x's dtype
    size = np.maximum(np.abs(mean), np.sqrt(m2 / m))
    assert (np.abs(got.mean - mean) <= tolerance * size).all()
    # m2 = S2 - S1^2/M, whose terms are up to 10 m2 (a shift 3 deviations from the mean)
    assert (np.abs(got.m2 - m2) <= 3 * tolerance * m2).all()


def gradients_fit(got, dout, x, gamma, axis=1, limit=6):
    """As check_gradients, but dx by the size of dout: sum_dout is rounded to float64, so a dout
    that repeats itself leaves a rounding where batchnorm_backward has 0."""
    # And dgamma by the sum of |dout|: a common offset of dout cannot be taken off a part's sums.
    dx, dgamma, dbeta = got
    expected = oracle.backward(dout, x, gamma, axis)
    std = np.sqrt(exact_moments(x, axis)[2] / (x.size // x.shape[axis]) + 1e-5)
    scale = float((np.abs(gamma) / std).max() * np.abs(dout).max())
    check("dx", dx, expected.dx, x, limit, scale)
    check("dgamma", dgamma.astype(x.dtype), expected.dgamma, x, limit, expected.dbeta_scale)
    check("dbeta", dbeta.astype(x.dtype), expected.dbeta, x, limit, expected.dbeta_scale)


def split(x, cuts, axis=0):
    return np.split(x, sorted(cuts), axis)


def in_pieces(x, dout, gamma, beta, cuts, eps=1e-5, axis=1, along=0):
    """out, dx, dgamma, dbeta of a batch in parts."""
    parts, gradients = split(x, cuts, along), split(dout, cuts, along)
    whole = sum(moments(part, axis=axis) for part in parts)
    inv_std = 1 / np.sqrt(whole.var() + eps)
    out = [normalize(part, whole, gamma=gamma, beta=beta, eps=eps, axis=axis) for part in parts]
    pairs = list(zip(gradients, parts, strict=True))
    sums = [backward_reduce(g, part, whole, inv_std, axis=axis) for g, part in pairs]
    s, p = (functools.reduce(operator.add, column) for column in zip(*sums, strict=True))
    dx = [
        backward_apply(g, part, whole, inv_std, gamma, s, p, whole.count, axis=axis)
        for g, part in pairs
    ]
    return np.concatenate(out, along), np.concatenate(dx, along), p * inv_std, s


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES + TALL, ids=str)
def test_any_shape_in_three_parts(shape, axis, dtype):
    x, dout, gamma, beta = problem(shape, axis, dtype)
    along = 1 if axis % x.ndim == 0 else 0
    cuts = shape[along] // 3, shape[along] // 3 + 1
    out, dx, dgamma, dbeta = in_pieces(x, dout, gamma, beta, cuts, axis=axis, along=along)
    check("out", out, oracle.forward(x, gamma, beta, axis), x)
    gradients_fit((dx, dgamma, dbeta), dout, x, gamma, axis)
    assert_moments(moments(x, axis=axis), x, axis)


@pytest.mark.parametrize("dtype", [*DTYPES, np.int16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(300, 7), (40, 5, 6, 6), (3, 4, 200)], ids=str)
def test_any_layout(shape, layout, dtype):
    x, dout, gamma, beta = problem(shape, 1, np.float64, layout)
    x = LAYOUTS[layout]((8 * np.asarray(x)).astype(dtype))
    before = x.tobytes()
    native = np.array(x, dtype, order="C") if dtype != np.int16 else np.array(x, np.float64)
    m = moments(x)
    assert_moments(m, native)
    inv_std = 1 / np.sqrt(m.var() + 1e-5)
    out = normalize(x, m.mean, m.var(), gamma, beta)
    check("out", out, oracle.forward(native, gamma, beta), native)
    g = np.array(dout, native.dtype)
    s, p = backward_reduce(dout, x, m.mean, inv_std)
    dx = backward_apply(dout, x, m.mean, inv_std, gamma, s, p, m.count)
    gradients_fit((dx, p * inv_std, s), g, native, gamma)
    assert x.tobytes() == before


@st.composite
def splits(draw):
    shape = draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    along = draw(st.sampled_from([d for d in range(len(shape)) if d != axis]))
    shape[along] = draw(st.integers(1, 60))
    cuts = draw(st.lists(st.integers(0, shape[along]), max_size=6))
    return tuple(shape), axis, along, cuts


@few
@given(
    splits(),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 3, 1000, 1e6, 1e9]),
    st.integers(0, 2**16),
)
def test_any_split_is_the_whole(parts, dtype, offset, seed):
    shape, axis, along, cuts = parts
    x = normal(shape, dtype, seed) + dtype(offset)
    dout = normal(shape, dtype, seed + 1)
    gamma, beta = normal(shape[axis], dtype, 2), normal(shape[axis], dtype, 3)
    pieces = [moments(part, axis=axis) for part in split(x, cuts, along)]
    assert_moments(sum(pieces), x, axis)
    assert_moments(functools.reduce(lambda a, b: b.merge(a), pieces), x, axis)
    out, dx, dgamma, dbeta = in_pieces(x, dout, gamma, beta, cuts, axis=axis, along=along)
    terms = np.abs(gamma).max() + np.abs(beta).max()
    check("out", out, oracle.forward(x, gamma, beta, axis), x, 6, terms)
    gradients_fit((dx, dgamma, dbeta), dout, x, gamma, axis, 6)


@pytest.mark.parametrize("offset", [0, 1e3, 1e9])
def test_rows_one_by_one_lose_nothing(offset):
    """10 000 merges of one row each, in float64: better than one rounding a merge by far."""
    x = normal((10_000, 3), np.float64) + offset
    total = sum(Moments(1, row, np.zeros(3)) for row in x)
    _, mean, m2 = exact_moments(x)
    assert (np.abs(total.mean - mean) <= EPS64 * np.maximum(np.abs(mean), 1e-2)).all()
    assert roundings(total.m2, m2) <= 2


@pytest.mark.parametrize("sizes", [(3, 5), (1, 1), (1, 10**9), (10**12, 3), (0.25, 0.5)])
@pytest.mark.parametrize("distance", [0.0, 1.0, 1e9, 1e150, -1e-150])
def test_merge_of_parts_far_apart(sizes, distance):
    """Against exact fractions."""
    (na, nb), one = map(Fraction, sizes), Fraction(1)
    a, b = Moments(sizes[0], [0.1], [2.0]), Moments(sizes[1], [0.1 + distance], [3.0])
    ma, mb = (one * Fraction(float(m.mean[0])) for m in (a, b))
    merged = a + b
    mean = (na * ma + nb * mb) / (na + nb)
    m2 = 5 + (mb - ma) ** 2 * na * nb / (na + nb)
    assert merged.count == na + nb
    assert abs(Fraction(float(merged.mean[0])) - mean) <= Fraction(EPS64) * abs(mean)
    assert abs(Fraction(float(merged.m2[0])) - m2) <= Fraction(EPS64) * m2


def test_means_farther_apart_than_the_range():
    a, b = Moments(1, [-1.5e308], [0]), Moments(3, [1.5e308], [0])
    merged = a + b
    assert merged.mean[0] == pytest.approx(0.75e308, rel=1e-15)
    assert merged.m2[0] == merged.var()[0] == np.inf
    assert merged.std()[0] == pytest.approx(1.5e308 * 0.75**0.5, rel=1e-15)


# Powers of two that values are multiplied by: their squares leave the range at -537 and 512.
POWERS = [-1060, -1000, -700, -530, -500, 0, 490, 509, 515, 700, 1020]


@pytest.mark.parametrize("power", POWERS)
def test_deviations_of_any_size(power):
    """Variances that leave the range go to infinity and to 0; nothing else is lost with them."""
    x = np.ldexp(normal((300, 4), np.float64) + np.array([0, 3, -1, 0]), power)
    x[:, 3] = x[0, 3]
    near_one = np.ldexp(x, -power)
    _, mean, m2 = map(np.float64, exact_moments(near_one))
    whole, empty = moments(x), moments(x[:0])
    of_parts = sum([empty, *map(moments, split(x, [2, 100])), empty])
    of_rows = sum(Moments(1, row, np.zeros(4)) for row in x)
    least = np.nextafter(0, 1)  # below the normal numbers, digits end there
    for m in (whole, of_parts, of_rows, moments(x, weights=np.full((300, 1), 3.0))):
        for ddof in (0, 1):
            var = m2 / (m.count - ddof) * (m.count / 300)
            with np.errstate(over="ignore"):
                pairs = ((m.std, np.sqrt(var), power), (m.var, var, 2 * power))
                for found, expected, scale in pairs:
                    expected = np.ldexp(expected, scale)
                    np.testing.assert_allclose(found(ddof), expected, 8 * EPS64, least)
        tolerance = np.maximum(4 * EPS64 * m.std(), 300 * least)
        assert (np.abs(m.mean - np.ldexp(mean, power)) <= tolerance + np.spacing(m.mean)).all()
        assert pickle.loads(pickle.dumps(m)) == m
    if power >= -1020:  # else 1/std is beyond the range
        check("out", normalize(x, of_parts, eps=0), oracle.normalized(near_one, eps=0)[0], x)


@few
@given(
    st.lists(
        st.tuples(
            st.integers(1, 4),
            st.sampled_from(POWERS[1:]),
            st.sampled_from([-900, -30, 0, 30, 900]),
            st.integers(0, 2**16),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_parts_of_any_size_and_weight(parts):
    """Against exact fractions."""
    total, terms = 0, []
    for n, power, weight, seed in parts:
        x = np.ldexp(normal((n, 1), np.float64, seed), power)
        total = total + moments(x, weights=np.full((n, 1), 2.0**weight))
        terms += [(Fraction(2) ** weight, Fraction(float(v))) for v in x[:, 0]]
    count = sum(w for w, _ in terms)
    mean = sum(w * v for w, v in terms) / count
    var = sum(w * (v - mean) ** 2 for w, v in terms) / count
    assert abs(Fraction(float(total.std()[0])) ** 2 - var) <= 16 * Fraction(EPS64) * var
    if Fraction(1e-307) < var < Fraction(1.7e308):
        assert abs(Fraction(float(total.var()[0])) - var) <= 16 * Fraction(EPS64) * var


def test_more_values_than_float64_counts():
    total = Moments(1e308, [1.0], [1.0]) + Moments(1e308, [1.0], [1.0])
    assert repr(total) == "Moments(count=inf, mean=[nan], m2=[nan])"
    assert np.isnan(total.var()).all()


def test_moments_normalize_with_all_their_digits():
    """At an offset of 1e9 deviations a mean in float64 says 7 digits of the result."""
    x, _, gamma, beta = problem((4096, 8), 1, np.float64)
    x += 1e9
    total = sum(map(moments, np.array_split(x, 4)))
    out = np.concatenate(
        [normalize(part, total, gamma=gamma, beta=beta) for part in np.array_split(x, 4)]
    )
    check("out", out, oracle.forward(x, gamma, beta), x)
    rounded = normalize(x, total.mean, total.var(), gamma, beta)
    assert roundings(rounded, oracle.forward(x, gamma, beta)) > 1e6
    np.testing.assert_allclose(
        reference.normalize(x, reference.moments(x)), normalize(x, moments(x)), atol=1e-6
    )


@pytest.mark.parametrize("eps", [0, 1e-5])
def test_moments_of_constant_features_normalize_to_beta(eps):
    x = np.full((7, 2), [0.1, 1e300])
    out = normalize(x, moments(x), gamma=[2, 3], beta=[4, 5], eps=eps)
    np.testing.assert_array_equal(out, np.full((7, 2), [4.0, 5.0]))


def _with(state, index, value):
    return (*state[:index], value, *state[index + 1 :])


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s[:5],  # as before the exponents were kept
        lambda s: (*s, s[5]),
        lambda s: _with(s, 0, -1.0),
        lambda s: _with(s, 0, np.ones(3)),
        lambda s: _with(s, 0, np.array([1.0, np.nan])),
        lambda s: _with(s, 0, np.nan),
        lambda s: _with(s, 1, s[1][:1]),
        lambda s: _with(s, 1, s[1].astype(np.float32)),
        lambda s: _with(s, 3, -s[3]),
        lambda s: _with(s, 3, "m2"),
        lambda s: _with(s, 4, s[4].reshape(1, 2)),
        lambda s: _with(s, 5, s[5] / 2),
    ],
)
def test_pickles_that_do_not_fit_are_refused(change):
    load, state = moments(normal((7, 2), np.float64)).__reduce__()
    load(*state)
    with pytest.raises(ValueError, match="pickle of Moments does not fit itself"):
        load(*change(state))


def test_statistics_of_another_shape_never_reach_the_kernels():
    stats = np.ones((4, 3))
    for wrong in (stats[:, :2], stats[:3], stats.T, stats[:, ::-1], stats.astype(np.float32)):
        with pytest.raises(ValueError, match=r"stats must be float64, contiguous and of shape"):
            core.normalize(X, V, V, 1, wrong, None, 1)


def test_not_finite_values_spread_in_their_feature():
    x = normal((9, 4), np.float64)
    x[2, 0], x[7, 1] = np.inf, np.nan
    merged = moments(x[:4]) + moments(x[4:])
    assert merged.mean[0] == np.inf
    assert np.isnan(merged.m2[:2]).all()
    assert np.isnan(merged.mean[1])
    clean = moments(x[:4, 2:]) + moments(x[4:, 2:])
    assert_same_bits([merged.mean[2:], merged.m2[2:]], [clean.mean, clean.m2])


def test_empty_parts_change_nothing():
    x = normal((5, 3), np.float32)
    m, empty = moments(x), moments(x[:0])
    assert empty.count == 0
    assert np.isnan(empty.mean).all()
    assert np.isnan(empty.var()).all()
    assert empty + m == m + empty == m
    assert empty + empty == empty
    assert 0 + m == m
    out = normalize(x[:0], m.mean, m.var())
    assert out.shape == (0, 3)
    s, p = backward_reduce(x[:0], x[:0], m.mean, m.std())
    assert_same_bits([s, p], [np.zeros(3), np.zeros(3)])
    dx = backward_apply(x[:0], x[:0], m.mean, m.std(), np.ones(3), s, p, 0)
    assert dx.shape == (0, 3)


@pytest.mark.parametrize("kind", ["mask", "integers", "real", "mask each", "real each"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), [((300, 7), 1), ((5, 8, 40), 0), ((6, 5, 9, 9), 1)])
def test_weighted_in_any_split(shape, axis, dtype, kind):
    x = normal(shape, dtype) + dtype(100)
    weights = spread_weights(shape, axis, kind)
    along = 1 if axis == 0 else 0
    cuts = shape[along] // 3, shape[along] // 3 + 1
    whole = moments(x, axis=axis, weights=weights)
    assert_moments(whole, x, axis, weights=weights)
    pairs = zip(split(x, cuts, along), split(weights, cuts, along), strict=True)
    merged = sum(moments(part, axis=axis, weights=w) for part, w in pairs)
    assert_moments(merged, x, axis, weights=weights)
    twin = reference.moments(x, axis=axis, weights=weights)
    np.testing.assert_allclose(twin.count, whole.count, rtol=1e-14)
    np.testing.assert_allclose(twin.mean, whole.mean, rtol=20 * np.finfo(dtype).eps)
    np.testing.assert_allclose(twin.m2, whole.m2, rtol=20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-700, 2.0**700])
def test_integer_weights_are_repeated_rows(dtype, scale):
    x = normal((60, 5), dtype)
    counts = np.random.default_rng(0).integers(0, 5, 60)
    weighted = moments(x, weights=scale * counts[:, None])
    repeated = moments(np.repeat(x, counts, axis=0))
    assert weighted.count == scale * repeated.count == scale * counts.sum()
    np.testing.assert_allclose(weighted.mean, repeated.mean, 0, 2 * np.finfo(dtype).eps)
    np.testing.assert_allclose(weighted.m2 / scale, repeated.m2, 12 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_weights_have_the_bits_of_none(dtype):
    x = normal((60, 5), dtype)
    plain = moments(x)
    assert moments(x, weights=np.ones((60, 1))) == moments(x, weights=[[True]]) == plain
    half = moments(x, weights=np.full((60, 1), 0.5))
    assert half.count == 30
    assert_same_bits([half.mean, half.var()], [plain.mean, plain.var()])


@pytest.mark.parametrize("module", [bn_fast, reference], ids=["bn_fast", "reference"])
def test_weight_0_hides_everything(module):
    x = normal((60, 5), np.float64)
    weights = spread_weights(x.shape, 1, "integers")
    calm = module.moments(x, weights=weights)
    for bad in (np.nan, np.inf, 1e300):
        spoiled = np.where(weights == 0, bad, x)
        got = module.moments(spoiled, weights=weights)
        assert got.count == calm.count
        np.testing.assert_allclose(got.mean, calm.mean, rtol=1e-13)
        np.testing.assert_allclose(got.m2, calm.m2, rtol=1e-13)
    nothing = module.moments(x, weights=np.zeros((60, 1)))
    assert nothing.count == 0
    assert np.isnan(nothing.mean).all()
    assert (nothing.m2 == 0).all()
    assert calm.merge(nothing).count == calm.count
    assert module.moments(x[:0], weights=weights[:0]).count == 0


@pytest.mark.parametrize("module", [bn_fast, reference], ids=["bn_fast", "reference"])
def test_counts_of_features_merge(module):
    """Of parts in which some features have nothing, or all of them as many."""
    x = normal((40, 4), np.float64) + 100
    w = np.random.default_rng(0).integers(0, 3, x.shape)
    w[:10, 1], w[10:, 2], w[:, 3] = 0, 0, 0
    w[30:] = 1  # a part whose moments have one count
    parts = [module.moments(x[a:b], weights=w[a:b]) for a, b in ((0, 10), (10, 30))]
    parts.append(module.moments(x[30:]))
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        merged = parts[order[0]].merge(parts[order[1]]).merge(parts[order[2]])
        np.testing.assert_array_equal(merged.count, w.sum(axis=0))
        for f in range(4):
            values = np.repeat(x[:, f], w[:, f])
            np.testing.assert_allclose(merged.mean[f], values.mean(), rtol=1e-14)
            np.testing.assert_allclose(merged.var(1)[f], values.var(ddof=1), rtol=1e-12)
    nothing = module.moments(x, weights=np.zeros(x.shape))
    for whole in (merged.merge(nothing), nothing.merge(merged)):
        np.testing.assert_array_equal(whole.count, merged.count)
        np.testing.assert_array_equal(whole.mean, merged.mean)


def test_moments_with_counts_of_features_are_values():
    m = moments(normal((7, 2), np.float64), weights=np.arange(14).reshape(7, 2))
    np.testing.assert_array_equal(m.count, [42, 49])
    for twin in (pickle.loads(pickle.dumps(m)), copy.copy(m), copy.deepcopy(m)):
        assert twin == m
    assert Moments(m.count, m.mean, m.m2) == m
    assert m != Moments(m.count + np.arange(2), m.mean, m.m2)
    assert Moments(3, [1, 2], [3, 4]) == Moments(np.full(2, 3), [1, 2], [3, 4])
    assert Moments(3, [1, 2], [3, 4]) != Moments(3, [1], [3])
    with pytest.raises(ValueError, match="read-only"):
        m.count[0] = 3
    counts = np.array([3.0, 0])
    made = Moments(counts, [1, 2], [0.5, 7])
    assert repr(made) == "Moments(count=[3. 0.], mean=[ 1. nan], m2=[0.5 0. ])"
    counts[0] = 5
    assert made.count[0] == 3
    assert_same_bits([made.var(3), made.std(1)], [np.full(2, np.nan), np.array([0.5, np.nan])])
    for wrong in (np.ones(3), np.ones((1, 2))):
        with pytest.raises(ValueError, match=r"count must be a number, or have the shape of mean"):
            Moments(wrong, [1, 2], [3, 4])
    with pytest.raises(ValueError, match="count must be finite and at least 0, got -1"):
        Moments(np.array([1, -1]), [1, 2], [3, 4])


@pytest.mark.parametrize("module", [bn_fast, reference], ids=["bn_fast", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_takes_counts_of_features(module, dtype):
    """Each feature's dx as with that number for all."""
    x, dout, gamma, _ = problem((30, 4), 1, dtype)
    m = module.moments(x)
    inv_std = 1 / np.sqrt(m.var() + 1e-5)
    given = dout, x, m.mean, inv_std, gamma, *module.backward_reduce(dout, x, m.mean, inv_std)
    counts = np.array([30.0, 25, 1, 200])
    dx = module.backward_apply(*given, counts)
    for f, count in enumerate(counts):
        assert_same_bits([dx[:, f]], [module.backward_apply(*given, count)[:, f]])
    if module is bn_fast:
        with pytest.raises(ValueError, match=r"count must be a number, or of shape \(4,\)"):
            backward_apply(*given, np.ones(3))
        with pytest.raises(ValueError, match=r"count must be finite.*got inf for feature 1"):
            backward_apply(*given, np.array([1, np.inf, 1, 1]))


def test_moments_are_values():
    m = moments(normal((7, 2), np.float64)) + moments(normal((3, 2), np.float64, 5))
    for twin in (pickle.loads(pickle.dumps(m)), copy.copy(m), copy.deepcopy(m)):
        assert twin == m
        more = moments(normal((3, 2), np.float64, 6))
        assert_same_bits([(twin + more).m2, (twin + more).mean], [(m + more).m2, (m + more).mean])
    assert m != Moments(m.count + 1, m.mean, m.m2)
    assert m != Moments(m.count, m.mean + 1, m.m2)
    assert m != Moments(m.count, m.mean, m.m2 + 1)
    assert m != "moments"
    with pytest.raises(TypeError, match="unhashable"):
        hash(m)
    with pytest.raises(AttributeError, match="count cannot be set"):
        m.count = 3
    with pytest.raises(ValueError, match="read-only"):
        m.mean[0] = 3
    assert repr(Moments(3, [1, 2], [0.5, 0])) == "Moments(count=3, mean=[1. 2.], m2=[0.5 0. ])"
    assert len(repr(moments(normal((2, 5000), np.float64)))) < 120


def test_var_and_std():
    x = normal((6, 2), np.float64)
    m = moments(x)
    for ddof in (0, 1, 2.5):
        np.testing.assert_allclose(m.var(ddof), x.var(0, ddof=ddof), rtol=1e-14)
        np.testing.assert_allclose(m.std(ddof), x.std(0, ddof=ddof), rtol=1e-14)
    assert np.isnan(m.var(6)).all()


def test_bits_do_not_depend_on_threads():
    x, dout, gamma, beta = problem((3000, 60), 1, np.float32)
    results = []
    for n in (1, 2):
        before = bn_fast.get_num_threads()
        bn_fast.set_num_threads(n)
        try:
            m = moments(x)
            results.append([m.mean, m.m2, *in_pieces(x, dout, gamma, beta, [100, 2000])])
        finally:
            bn_fast.set_num_threads(before)
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out(dtype):
    x, dout, gamma, beta = problem((50, 6), 1, dtype)
    m = moments(x)
    expected = normalize(x, m.mean, m.var(), gamma, beta)
    out = np.empty_like(x)
    assert normalize(x, m.mean, m.var(), gamma, beta, out=out) is out
    view = x.copy()
    normalize(view, m.mean, m.var(), gamma, beta, out=view)
    assert_same_bits([out, view], [expected, expected])
    arguments = m.mean, m.std(), gamma, *backward_reduce(dout, x, m.mean, m.std()), m.count
    expected = backward_apply(dout, x, *arguments)
    over_dout, over_x = dout.copy(), x.copy()
    backward_apply(over_dout, x, *arguments, out=over_dout)
    backward_apply(dout, over_x, *arguments, out=over_x)
    assert_same_bits([over_dout, over_x], [expected, expected])
    with pytest.raises(ValueError, match="out must be dout itself or apart from it"):
        backward_apply(dout, x, *arguments, out=dout[::-1])


def test_parameters_of_any_real_dtype():
    x, dout = problem((50, 3), 1, np.float32)[:2]
    given = [[1, 2, 3], np.array([1, 4, 9], np.uint8), np.array([2, 1, 1], np.float16)]
    out = normalize(x, given[0], given[1], given[2], np.ones(3, np.longdouble))
    expected = reference.normalize(x, *np.array(given[:2], float), given[2], np.ones(3))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    sums = backward_reduce(dout, x, given[0], given[1])
    dx = backward_apply(dout, x, given[0], given[1], given[2], *sums, np.int32(50))
    expected = reference.backward_apply(dout, x, *given, *sums, 50)
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-4)


def test_twins_agree():
    x, dout, gamma, beta = problem((20, 4, 3), 1, np.float64)
    ours, plain = moments(x), reference.moments(x)
    merged = reference.moments(x[:7]).merge(reference.moments(x[7:]))
    for twin in (plain, merged):
        np.testing.assert_allclose(ours.mean, twin.mean, rtol=1e-13)
        np.testing.assert_allclose(ours.std(1), twin.std(1), rtol=1e-13)
    given = ours.mean, 1 / ours.std()
    sums = backward_reduce(dout, x, *given)
    np.testing.assert_allclose(sums, reference.backward_reduce(dout, x, *given), rtol=1e-12)
    arguments = *given, gamma, *sums, 60
    dx = reference.backward_apply(dout, x, *arguments)
    np.testing.assert_allclose(backward_apply(dout, x, *arguments), dx, atol=1e-13)
    np.testing.assert_allclose(
        normalize(x, *given, gamma, beta), reference.normalize(x, *given, gamma, beta), atol=1e-13
    )


def test_half_types_keep_their_dtype():
    x = normal((30, 4), np.float16)
    m = moments(x)
    assert_same_bits([m.mean, m.m2], [moments(x.astype(np.float32)).mean, m.m2])
    assert normalize(x, m.mean, m.var()).dtype == np.float16
    sums = backward_reduce(x, x, m.mean, 1 / m.std())
    dx = backward_apply(x, x, m.mean, 1 / m.std(), np.ones(4), *sums, m.count)
    assert dx.dtype == np.float16


X = np.ones((4, 3))
V = np.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: moments(None), TypeError, "x must be an array of real numbers, got None"),
        (lambda: moments(V), ValueError, "x must have 2 or more dimensions"),
        (lambda: moments(X, axis=2), ValueError, r"axis must be in \[-2, 2\)"),
        (
            lambda: moments(X, weights=X[0]),
            ValueError,
            r"weights must broadcast to \(4, 1\), which is x without axis 1, or .*got \(3,\)",
        ),
        (lambda: moments(X, weights=-1), ValueError, "weights must be finite and at least 0"),
        (lambda: moments(X, weights="a"), TypeError, "weights must be an array of real numbers"),
        (lambda: moments(X, weights=1e308), ValueError, "weights must have a finite sum"),
        (lambda: Moments(-1, V, V), ValueError, "count must be finite and at least 0, got -1"),
        (lambda: Moments(1, 1.0, 1.0), ValueError, "mean must have one or more dimensions"),
        (lambda: Moments(1, V, V[:2]), ValueError, r"m2 must have the shape of mean, \(3,\)"),
        (lambda: Moments(1, V, -V), ValueError, "m2 must not be negative, got -1.0 for feature 0"),
        (lambda: Moments(1, "a", V), TypeError, "mean must be an array of real numbers"),
        (lambda: moments(X).merge(3), TypeError, "other must be Moments, got int"),
        (lambda: moments(X).merge(moments(X[:, :2])), ValueError, r"of shape \(3,\), got \(2,\)"),
        (lambda: moments(X) + 3, TypeError, "unsupported operand"),
        (lambda: 3 + moments(X), TypeError, "unsupported operand"),
        (lambda: moments(X).var("1"), TypeError, "ddof must be a real number"),
        (lambda: normalize(X, V, -V), ValueError, "var must not be negative"),
        (lambda: normalize(X, V[:2], V), ValueError, r"mean must have shape \(3,\)"),
        (lambda: normalize(X, V), TypeError, "var must be an array of real numbers, got None"),
        (lambda: normalize(X, moments(X), V), TypeError, "var must be left out where mean is a Mo"),
        (
            lambda: normalize(X, moments(X[:, :2])),
            ValueError,
            "moments must have 3 features.*got 2",
        ),
        (lambda: normalize(X, moments(X), beta=V[:2]), ValueError, r"beta must have shape \(3,\)"),
        (lambda: backward_reduce(X, X, moments(X[:, :2]), V), ValueError, "mean must have shape"),
        (lambda: Moments(10**400, V, V), ValueError, "count must be in the range of float64"),
        (lambda: moments(X).var(10**400), ValueError, "ddof must be in the range of float64"),
        (
            lambda: normalize(X, V, V, eps=10**400),
            ValueError,
            "eps must be in the range of float64",
        ),
        (lambda: normalize(X, V, V, eps=-1), ValueError, "eps must be finite and at least 0"),
        (lambda: normalize(X, V, V, V[:2]), ValueError, r"gamma must have shape \(3,\)"),
        (lambda: normalize(X, V, V, out=np.ones(3)), ValueError, "out must have the shape of x"),
        (lambda: backward_reduce(X[:2], X, V, V), ValueError, "dout must have the shape of x"),
        (lambda: backward_reduce(X, X, V, -V), ValueError, "inv_std must not be negative"),
        (lambda: backward_apply(X, X, V, V, V, V, V, 0), ValueError, "count must be finite and at"),
        (
            lambda: backward_apply(X, X, V, V, V, V, V, "4"),
            TypeError,
            "count must be a real number",
        ),
        (
            lambda: backward_apply(X, X, V, V, V, V, V, X),
            ValueError,
            "count must be a number, or of",
        ),
        (
            lambda: backward_apply(X, X, V, V, V, V, 1j * V, 4),
            TypeError,
            "sum_dout_xmu must be an array of real numbers",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_sum_is_not_lost_where_inv_std_is_0(dtype):
    """As in NumPy's formula: 0 times infinity is not a number, and no dx of 0."""
    x, dout = normal((20, 3), dtype), normal((20, 3), dtype, 1)
    zeros, ones = np.zeros(3), np.ones(3)
    dx = backward_apply(dout, x, zeros, zeros, ones, ones, np.full(3, np.inf), 20)
    assert np.isnan(dx).all()


@pytest.mark.parametrize("given", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_that_are_not_finite_are_not_lost_where_gamma_is_0(dtype, given):
    """Nor where gamma is: a fused call knows what its own sums hide, but nobody what came."""
    x, dout = normal((20, 3), dtype), normal((20, 3), dtype, 1)
    ones, sums = np.ones(3), np.array([1.0, given, 1.0])
    dx = backward_apply(dout, x, np.zeros(3), ones, np.zeros(3), ones, sums, 20)
    np.testing.assert_array_equal(np.isnan(dx), np.broadcast_to([False, True, False], (20, 3)))
    np.testing.assert_array_equal(dx[:, ::2], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_small_dout_is_not_lost_beside_an_x_that_is_not_finite(bad):
    """dgamma is not finite then, and for that dout was made smaller: its sum sank to 0."""
    x = np.array([[bad, 1.0], [0.5, 2.0], [1.5, 4.0]])
    dout = np.array([[3, 5], [7, 11], [13, 17]]) * 5e-324
    sum_dout, sum_dout_xmu = bn_fast.backward_reduce(dout, x, np.full(2, 0.5), np.ones(2))
    np.testing.assert_array_equal(sum_dout, dout.sum(axis=0))
    assert not np.isfinite(sum_dout_xmu[0])
    _, cache = bn_fast.batchnorm_forward(x, np.ones(2), np.zeros(2))
    np.testing.assert_array_equal(bn_fast.batchnorm_backward(dout, cache)[2], dout.sum(axis=0))
