"""bn_fast.sklearn is a scikit-learn transformer, and right where StandardScaler loses digits."""

import inspect
import pickle
from importlib.util import find_spec, module_from_spec
from unittest import mock

import numpy as np
import pytest

from .arrays import DTYPES, LAYOUTS, normal
from .judge import LIMIT, check, roundings

pytest.importorskip("sklearn")

from scipy.sparse import issparse
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from bn_fast.sklearn import BatchNormalizer

from . import oracle


@parametrize_with_checks(
    [
        BatchNormalizer(),
        BatchNormalizer(eps=0),
        BatchNormalizer(with_mean=False),
        BatchNormalizer(with_std=False),
    ]
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


# -- scikit-learn's own tests of StandardScaler, with ours in its place


class Scaler(BatchNormalizer):
    """StandardScaler's settings. Sparse matrices are refused: most of those tests have no such
    cases here, and what is left of them is skipped."""

    def __init__(self, *, copy=True, with_mean=True, with_std=True):
        super().__init__(eps=0, copy=copy, with_mean=with_mean, with_std=with_std)

    def fit(self, X, y=None, sample_weight=None):
        self.skip_sparse(X)
        return super().fit(X, y, sample_weight)

    def partial_fit(self, X, y=None, sample_weight=None):
        self.skip_sparse(X)
        return super().partial_fit(X, y, sample_weight)

    def skip_sparse(self, X):
        if issparse(X):
            with pytest.raises(TypeError, match="Sparse data was passed"):
                super().partial_fit(X)
            pytest.skip("sparse matrices are refused")


NOT_OURS = {
    "array_api": "arrays of other libraries become NumPy's",
    "callback": "callbacks, new in scikit-learn 1.9, are for loops, of which there are none here",
    "sparse": "sparse matrices are refused",
}


def scikit_learns_tests(module):
    """Those of its tests that have to do with StandardScaler."""
    try:
        spec = find_spec(f"sklearn.preprocessing.tests.{module}")
    except ModuleNotFoundError:  # some distributions leave the tests out
        return
    tests = module_from_spec(spec)
    no_containers = {name: [] for name in ("CSC_CONTAINERS", "CSR_CONTAINERS")}
    with (
        mock.patch("sklearn.preprocessing.StandardScaler", Scaler),
        mock.patch.multiple("sklearn.utils.fixes", **no_containers),
    ):
        spec.loader.exec_module(tests)
    for name, test in vars(tests).items():
        ours = not any(part in name for part in NOT_OURS)
        if name.startswith("test_") and ours and "StandardScaler" in inspect.getsource(test):
            yield f"test_scikit_learns_{name.removeprefix('test_')}", test


globals().update(scikit_learns_tests("test_data"))
globals().update(scikit_learns_tests("test_common"))


@pytest.fixture
def global_random_seed():
    """scikit-learn's own, of its conftest.py."""
    return 0


# -- and ours


@pytest.fixture(scope="module")
def digits():
    """Real images, in which some pixels are always 0."""
    return load_digits(return_X_y=True)


def in_parts(estimator, x, rows):
    for start in range(0, len(x), rows):
        estimator.partial_fit(x[start : start + rows])
    return estimator


@pytest.mark.parametrize("rows", [1, 100, 1000])
def test_any_split_of_the_rows_is_the_whole(digits, rows):
    x, _ = digits
    whole, parts = BatchNormalizer().fit(x), in_parts(BatchNormalizer(), x, rows)
    assert parts.n_samples_seen_ == len(x)
    for name in ("mean_", "var_", "scale_"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-14, atol=0)


def test_without_eps_it_is_the_standard_scaler(digits):
    x, _ = digits
    ours, theirs = BatchNormalizer(eps=0).fit(x), StandardScaler().fit(x)
    other = x[::-1] + 1  # the pixels that were constant in x are not 0 here
    for name in ("mean_", "var_", "scale_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-13)
    np.testing.assert_allclose(ours.transform(other), theirs.transform(other), atol=1e-12)
    back = ours.inverse_transform(x), theirs.inverse_transform(x)
    np.testing.assert_allclose(*back, rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("kind", [int, float])
def test_sample_weights_are_the_standard_scalers(digits, kind):
    x, _ = digits
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 4, len(x)) if kind is int else rng.exponential(size=len(x))
    ours = BatchNormalizer(eps=0).fit(x, sample_weight=weights)
    theirs = StandardScaler().fit(x, sample_weight=weights)
    parts = BatchNormalizer(eps=0)
    for rows in np.array_split(np.arange(len(x)), 7):
        parts.partial_fit(x[rows], sample_weight=weights[rows])
    for name in ("mean_", "var_", "scale_", "n_samples_seen_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-12)
        np.testing.assert_allclose(getattr(parts, name), getattr(ours, name), rtol=1e-12)
    if kind is int:
        repeated = BatchNormalizer(eps=0).fit(np.repeat(x, weights, axis=0))
        np.testing.assert_allclose(ours.transform(x), repeated.transform(x), atol=1e-12)


def test_sample_weights_and_none(digits):
    x, _ = digits
    plain = BatchNormalizer().fit(x)
    ones = BatchNormalizer().fit(x, sample_weight=np.ones(len(x)))
    assert ones.moments_ == plain.moments_
    assert type(plain.n_samples_seen_) is int
    assert type(ones.n_samples_seen_) is float
    mixed = BatchNormalizer().fit(x[:9], sample_weight=[1.0] * 9).partial_fit(x[9:])
    assert type(mixed.n_samples_seen_) is float
    assert type(mixed.fit(x).n_samples_seen_) is int


def test_sample_weights_refused(digits):
    x, _ = digits
    norm = BatchNormalizer().fit(x)
    before = norm.moments_
    for wrong, message in (
        (np.zeros(len(x)), "[Ss]ample.weight"),
        (-np.ones(len(x)), "[Nn]egative"),
        (np.ones(3), r"sample_weight must have shape \(1797,\), one for each row, got \(3,\)"),
        (np.ones((len(x), 1)), "sample_weight must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            norm.fit(x, sample_weight=wrong)
        assert norm.moments_ is before


@pytest.mark.parametrize("empty", [0, 1, 3])
def test_a_part_may_have_no_weight(digits, empty):
    x, _ = digits
    weights = np.random.default_rng(0).exponential(size=len(x))
    rows = np.array_split(np.arange(len(x)), 4)
    weights[rows[empty]] = 0
    parts = BatchNormalizer()
    for part in rows:
        parts.partial_fit(x[part], sample_weight=weights[part])
        if empty == 0 and part is rows[0]:
            with pytest.raises(NotFittedError):
                parts.transform(x)
    whole = BatchNormalizer().fit(x, sample_weight=weights)
    for name in ("mean_", "var_", "scale_", "n_samples_seen_"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-13)


def test_a_weight_for_all_rows(digits):
    x, _ = digits
    norm = BatchNormalizer().fit(x, sample_weight=0.5)
    np.testing.assert_array_equal(norm.var_, BatchNormalizer().fit(x).var_)
    assert norm.n_samples_seen_ == len(x) / 2


# scikit-learn takes byte-swapped float32 for something else, and makes it float64.
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"byte-swapped"}))
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_to_roundings(dtype, layout):
    x = LAYOUTS[layout](3 + 2 * normal((300, 40), dtype))
    norm = in_parts(BatchNormalizer(), x, 64)
    y = norm.transform(x)
    check("y", y, oracle.forward(x, np.ones(40), np.zeros(40)), x)
    assert roundings(norm.inverse_transform(y), x.astype(np.longdouble)) <= LIMIT


def test_far_from_zero():
    """Offsets of 1e9 deviations, in parts: the variance keeps its digits."""
    x = normal((1000, 5), np.float64) + 1e9
    norm = in_parts(BatchNormalizer(eps=0), x, 37)
    exact = x.astype(np.longdouble)
    np.testing.assert_allclose(norm.var_, exact.var(axis=0).astype(float), rtol=1e-15)
    shifted = exact - exact[0]
    mean = shifted.mean(axis=0)
    assert np.abs((norm.mean_ - exact[0]) - mean).max() <= np.spacing(1e9)
    check("y", norm.transform(x), (shifted - mean) / shifted.std(axis=0), x)


@pytest.mark.parametrize(
    ("power", "eps"), [(-1000, 0), (-600, 0), (500, 1e-5), (700, 1e-5), (1015, 1e-5)]
)
def test_any_size(power, eps):
    """The variance leaves the range, its root and what is divided by it do not."""
    near_one = normal((300, 4), np.float64) + 3
    x = np.ldexp(near_one, power)
    norm = in_parts(BatchNormalizer(eps=eps), x, 37)
    with np.errstate(all="raise"):
        y = norm.transform(x)
        back = norm.inverse_transform(y)
    check("y", y, oracle.normalized(near_one, eps=0)[0], x)
    np.testing.assert_allclose(np.ldexp(norm.scale_, -power), near_one.std(axis=0), rtol=1e-14)
    assert roundings(np.ldexp(back, -power), near_one.astype(np.longdouble)) <= LIMIT


@pytest.mark.parametrize("eps", [0, 1e-5])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e9 + 0.1])
def test_constant_features(value, eps):
    x = np.full((1001, 2), value)
    norm = in_parts(BatchNormalizer(eps=eps), x, 10)
    np.testing.assert_array_equal(norm.mean_, value)
    np.testing.assert_array_equal(norm.var_, 0)
    y = norm.transform(x)
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(norm.inverse_transform(y), x)
    if eps == 0:
        np.testing.assert_array_equal(norm.transform(x + 1), (x + 1) - x)


@pytest.fixture
def holed(digits):
    """The images with missing values, some features without; and one that is missing throughout."""
    x, _ = digits
    x = x.copy()
    x[:, 1::3][np.random.default_rng(0).random(x[:, 1::3].shape) < 0.2] = np.nan
    x[:, 7] = np.nan
    return x


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("rows", [50, 2000])
def test_missing_values(holed, rows, with_weights):
    """Each feature is as if alone, without its missing rows; and as in StandardScaler."""
    weights = np.random.default_rng(1).integers(0, 3, len(holed)) if with_weights else None
    norm, theirs = BatchNormalizer(eps=0), StandardScaler()
    with np.errstate(all="ignore"):  # StandardScaler's own, of the feature without values
        for start in range(0, len(holed), rows):
            part = slice(start, start + rows)
            given = None if weights is None else weights[part]
            norm.partial_fit(holed[part], sample_weight=given)
        theirs.fit(holed, sample_weight=weights)
    assert norm.n_samples_seen_.dtype == (float if with_weights else np.int64)
    for name in ("mean_", "var_", "scale_", "n_samples_seen_"):
        np.testing.assert_allclose(getattr(norm, name), getattr(theirs, name), rtol=1e-12)
    y = norm.transform(holed)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(holed))
    np.testing.assert_allclose(y, theirs.transform(holed), atol=1e-12)
    np.testing.assert_allclose(norm.inverse_transform(y), holed, atol=1e-12)
    for j in (0, 1, 8, 10):
        there = ~np.isnan(holed[:, j])
        alone = BatchNormalizer(eps=0).fit(
            holed[there, j : j + 1], sample_weight=None if weights is None else weights[there]
        )
        np.testing.assert_allclose(norm.var_[j], alone.var_[0], rtol=1e-13)
        assert norm.n_samples_seen_[j] == alone.n_samples_seen_


def test_missing_values_keep_the_digits():
    """An offset of 1e9 deviations, parts with and without NaN, in each order."""
    x = normal((1000, 3), np.float64) + 1e9
    x[:400, 1][::3] = np.nan
    exact = x.astype(np.longdouble) - x[1]
    y = BatchNormalizer(eps=0).partial_fit(x[:400]).partial_fit(x[400:]).transform(x)
    expected = (exact - np.nanmean(exact, axis=0)) / np.nanstd(exact, axis=0)
    check("y", np.nan_to_num(y), np.nan_to_num(expected), x)
    again = BatchNormalizer(eps=0).partial_fit(x[400:]).partial_fit(x[:400]).transform(x)
    np.testing.assert_allclose(again, y, rtol=0, atol=1e-15)


def test_missing_under_weight_0_is_not_missing():
    x = normal((20, 3), np.float64)
    weights = np.r_[np.zeros(5), np.ones(15)]
    expected = BatchNormalizer().fit(x, sample_weight=weights)
    x[:5, 1] = np.nan
    norm = BatchNormalizer().fit(x, sample_weight=weights)
    assert norm.n_samples_seen_ == 15
    np.testing.assert_array_equal(norm.mean_, expected.mean_)


# Sums have a rounding for each value: M u |mean| is what StandardScaler expects of them.
@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 2])
@pytest.mark.parametrize("power", [-900, 0, 900])
def test_what_is_constant_up_to_roundings(power, factor):
    step = factor * 1000 * 2.0**-52 * 3
    x = np.ldexp(np.where(np.arange(1000) % 2, 3 + step, 3 - step)[:, np.newaxis], power)
    constant = factor < 1
    norm = in_parts(BatchNormalizer(eps=0), x, 100)
    assert (norm.scale_[0] == 1) == constant
    if power == 0:
        np.testing.assert_allclose(norm.scale_, StandardScaler().fit(x).scale_, rtol=1e-3)
    expected = x - np.ldexp(3, power) if constant else np.where(np.arange(1000) % 2, 1, -1)[:, None]
    np.testing.assert_allclose(norm.transform(x), expected, rtol=1e-3)


@pytest.mark.parametrize("with_std", [False, True])
@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_halves_of_it(with_mean, with_std, dtype):
    """To subtract, to divide, both or neither; in place on request; and back."""
    x = (3 + 2 * normal((50, 4), np.float64)).astype(dtype)
    norm = BatchNormalizer(eps=0.1, with_mean=with_mean, with_std=with_std).fit(x)
    exact = x.astype(np.longdouble)
    mean, scale = exact.mean(axis=0), np.sqrt(exact.var(axis=0) + np.longdouble(0.1))
    expected = (exact - with_mean * mean) / np.where(with_std, scale, 1)
    y = norm.transform(x)
    assert y.dtype == dtype
    assert not np.shares_memory(y, x)
    assert roundings(y, expected) <= LIMIT
    assert roundings(norm.inverse_transform(y), exact) <= LIMIT
    assert (norm.mean_ is None) == (not with_mean and not with_std)
    assert (norm.scale_ is None) == (norm.var_ is None) == (not with_std)
    for in_place in (norm, norm.set_params(copy=False)):
        copy = {} if in_place.copy is False else {"copy": False}
        mine = x.copy()
        assert norm.transform(mine, **copy) is mine
        np.testing.assert_array_equal(mine, y)
        assert norm.inverse_transform(mine, **copy) is mine
        assert roundings(mine, exact) <= LIMIT
    read_only = x.copy()
    read_only.flags.writeable = False
    np.testing.assert_array_equal(norm.transform(read_only), y)


def test_in_a_pipeline(digits):
    x_train, x_test, y_train, y_test = train_test_split(*digits, random_state=0)
    model = make_pipeline(BatchNormalizer(), LogisticRegression(max_iter=200))
    assert model.fit(x_train, y_train).score(x_test, y_test) > 0.95


def test_names_and_output_of_pandas():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"length": [1.0, 2.0, 6.0], "width": [3.0, 3.0, 3.0]}, index=[7, 8, 9])
    norm = BatchNormalizer().set_output(transform="pandas").fit(frame)
    assert list(norm.get_feature_names_out()) == ["length", "width"]
    y = norm.transform(frame)
    assert list(y.columns) == ["length", "width"]
    assert list(y.index) == [7, 8, 9]
    with pytest.raises(ValueError, match="feature names"):
        norm.partial_fit(frame[["width", "length"]])


def test_clone_and_pickle():
    x = normal((20, 3), np.float32)
    norm = BatchNormalizer(eps=0.5).fit(x)
    again = pickle.loads(pickle.dumps(norm))
    np.testing.assert_array_equal(again.transform(x), norm.transform(x))
    again.partial_fit(x)
    assert (again.n_samples_seen_, norm.n_samples_seen_) == (40, 20)
    assert clone(norm).eps == 0.5
    assert not hasattr(clone(norm), "mean_")


def test_fit_forgets():
    x = normal((20, 3), np.float64)
    norm = BatchNormalizer().fit(normal((5, 7), np.float64)).fit(x)
    assert norm.n_samples_seen_ == 20
    np.testing.assert_array_equal(norm.mean_, BatchNormalizer().fit(x).mean_)


def test_errors_leave_it_as_it_was():
    sparse = pytest.importorskip("scipy.sparse")
    x = normal((20, 3), np.float64)
    norm = BatchNormalizer()
    with pytest.raises(NotFittedError):
        norm.transform(x)
    norm.fit(x)
    before = dict(vars(norm))
    bad = [
        (x[:, :2], ValueError, "2 features"),
        (x[:0], ValueError, "0 sample"),
        (x * np.inf, ValueError, "infinity"),
        (sparse.csr_array(x), TypeError, "[Ss]parse"),
        ([["a", "b", "c"]], ValueError, "convert string"),
    ]
    for wrong, error, message in bad:
        for method in (norm.partial_fit, norm.transform, norm.inverse_transform):
            with pytest.raises(error, match=message):
                method(wrong)
    assert vars(norm).keys() == before.keys()
    assert all(vars(norm)[name] is value for name, value in before.items())


@pytest.mark.parametrize(
    ("eps", "error"), [(-1, ValueError), (np.inf, ValueError), ("1", TypeError), (True, TypeError)]
)
def test_bad_eps(eps, error):
    with pytest.raises(error, match=r"eps must be .*, got"):
        BatchNormalizer(eps=eps).fit([[1.0]])


@pytest.mark.parametrize("name", ["copy", "with_mean", "with_std"])
def test_bad_flags(name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
        BatchNormalizer(**{name: "no"}).fit([[1.0]])
