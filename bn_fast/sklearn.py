"""Batch normalization as a scikit-learn transformer, which learns its statistics part by part."""

from __future__ import annotations

from numbers import Real
from typing import Any, Self

try:
    from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
    from sklearn.utils.validation import check_array, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("bn_fast.sklearn needs scikit-learn 1.6: pip install scikit-learn") from error

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _checks, _layer_checks
from ._moments import deviation, mean_low
from ._types import Array
from .pieces import Moments, moments, normalize, normalize_by

__all__ = ["BatchNormalizer"]


class BatchNormalizer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    r"""Every feature to mean 0 and variance 1, by the statistics of all data seen by the fit.

    The test mode of batch normalization. With ``eps=0`` it is scikit-learn's ``StandardScaler`` of
    arrays that are not sparse; with the default, features that hardly vary stay small instead of
    being blown up.

    Parameters
    ----------
    eps : float, default 1e-5
        Added to the variance; finite and at least 0.
    copy : bool, default True
        False: the results are written over X where it is a writable array of floats.
    with_mean, with_std : bool, default True
        Whether to subtract the mean, and to divide by `scale_`.

    Attributes
    ----------
    moments_ : Moments
        Count, mean and sum of squared deviations of all data seen. Once values were missing, the
        count is an array.
    mean_, var_ : ndarray, float64, shape (n_features,), or None
        Mean and biased variance (÷M), from `moments_`. As in StandardScaler, `var_` is None without
        `with_std`, and `mean_` with neither.
    scale_ : ndarray, float64, shape (n_features,), or None without `with_std`
        What is divided by: ``sqrt(var_ + eps)``; also where the variance is beyond float64's range
        and its root is not. With ``eps=0`` it is 1 for a feature that is constant up to roundings,
        as StandardScaler says it: of M values, with u = 2**-52,
        ``var <= M u var + (M u mean)**2``.
    n_samples_seen_ : int or float, or ndarray of shape (n_features,)
        M, the number of rows seen; with weights their sum. An array where features miss different
        numbers of values.
    n_features_in_ : int
        C, the number of columns of X.
    feature_names_in_ : ndarray of str
        Only where the columns of X have names.

    See Also
    --------
    bn_fast.moments : the statistics alone, also for data that no estimator should hold

    Notes
    -----
    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}

    `partial_fit` merges the moments of each part [1]_, so that any split of the rows gives the
    statistics of the whole, to a few roundings. float32 and float16 are computed and returned as
    by `batchnorm_forward`, with statistics in float64, and weights of rows too. NaN is a missing
    value: `fit` leaves it out, `transform` leaves it as it is. Infinity and sparse input are
    refused.

    References
    ----------
    .. [1] T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample Variance:
       Analysis and Recommendations", The American Statistician 37(3), 1983.

    Examples
    --------
    >>> from bn_fast.sklearn import BatchNormalizer
    >>> X = [[1.0, 10.0], [3.0, 10.0], [5.0, 10.0]]
    >>> norm = BatchNormalizer().partial_fit(X[:1]).partial_fit(X[1:])
    >>> norm.mean_, norm.n_samples_seen_
    (array([ 3., 10.]), 3)
    >>> norm.transform(X).round(3)
    array([[-1.225,  0.   ],
           [ 0.   ,  0.   ],
           [ 1.225,  0.   ]])
    """

    moments_: Moments
    mean_: NDArray[np.float64] | None
    var_: NDArray[np.float64] | None
    scale_: NDArray[np.float64] | None
    n_samples_seen_: float | NDArray[Any]

    def __init__(
        self,
        *,
        eps: float = 1e-5,
        copy: bool = True,
        with_mean: bool = True,
        with_std: bool = True,
    ) -> None:
        self.eps = eps
        self.copy = copy
        self.with_mean = with_mean
        self.with_std = with_std

    def fit(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> Self:
        """Learn the statistics of X, and forget what was learnt before.

        Parameters
        ----------
        X : array_like, shape (n_samples, n_features)
        y : ignored
        sample_weight : array_like, shape (n_samples,), optional
            Weight of each row, at least 0; integers say how often it occurs.

        Returns
        -------
        BatchNormalizer
            This one.
        """
        eps = self._checked_eps()
        x = validate_data(self, X, dtype=_DTYPES, ensure_all_finite="allow-nan")
        seen = _row_moments(x, sample_weight)
        if not _has_seen(seen):
            raise ValueError("sample_weight must not be zero for all rows")
        return self._keep(seen, eps, sample_weight is None)

    def partial_fit(
        self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None
    ) -> Self:
        """Learn the statistics of X and of what was learnt before, as if it were one array.

        Parameters
        ----------
        X : array_like, shape (n_samples, n_features)
            One row or more.
        y : ignored
        sample_weight : array_like, shape (n_samples,), optional
            As for `fit`; a part may have weight 0 throughout.

        Returns
        -------
        BatchNormalizer
            This one.
        """
        eps = self._checked_eps()
        first = not hasattr(self, "moments_")
        x = validate_data(self, X, reset=first, dtype=_DTYPES, ensure_all_finite="allow-nan")
        seen = _row_moments(x, sample_weight)
        if first:
            return self._keep(seen, eps, sample_weight is None)
        whole = sample_weight is None and np.asarray(self.n_samples_seen_).dtype.kind == "i"
        return self._keep(self.moments_ + seen, eps, whole)

    def _checked_eps(self) -> float:
        for name in ("copy", "with_mean", "with_std"):
            _layer_checks.flag(getattr(self, name), name)
        return _checks.epsilon(self.eps)

    def _keep(self, seen: Moments, eps: float, whole: bool) -> Self:
        """Take the statistics of all that was seen, of `whole` rows or of weights."""
        mean, std = seen.mean.copy(), deviation(seen, eps)
        count = np.full(mean.shape, seen.count)
        if eps == 0:
            unit = count * np.finfo(float).eps
            # var <= unit var + (unit mean)**2, where var may leave float64's range.
            constant = std * np.sqrt(np.maximum(1 - unit, 0)) <= unit * np.abs(mean)
            std = np.where(constant, 1.0, std)
        self.moments_ = seen
        self.mean_ = mean if self.with_mean or self.with_std else None
        self.var_ = seen.var() if self.with_std else None
        self.scale_ = std if self.with_std else None
        count = count.astype(np.int64) if whole else count
        self.n_samples_seen_ = count if (count != count[0]).any() else count[0].item()
        return self

    def transform(self, X: ArrayLike, copy: bool | None = None) -> Array:
        """Normalize X.

        Parameters
        ----------
        X : array_like, shape (n_samples, n_features)
        copy : bool, optional
            In place of the constructor's.

        Returns
        -------
        ndarray, shape (n_samples, n_features)
            A new array, unless `copy` is False (or what `set_output` chose); float32 and float16
            for themselves, and else float64.
        """
        check_is_fitted(self)
        x = validate_data(self, X, reset=False, dtype=_DTYPES, ensure_all_finite="allow-nan")
        stats = np.zeros((4, x.shape[1]))
        stats[2] = 1
        if self.with_mean:
            stats[:2] = self.mean_, mean_low(self.moments_)
        if self.scale_ is not None:
            stats[2:] = 1 / self.scale_, self.var_
        return normalize_by(stats, x, None, None, 1, self._output(x, copy))

    def inverse_transform(self, X: ArrayLike, copy: bool | None = None) -> Array:
        """Undo `transform`.

        Parameters
        ----------
        X : array_like, shape (n_samples, n_features)
            Normalized values.
        copy : bool, optional
            In place of the constructor's.

        Returns
        -------
        ndarray, shape (n_samples, n_features)
            ``X * scale_ + mean_``; float32 and float16 for themselves, and else float64.
        """
        check_is_fitted(self)
        x = check_array(X, dtype=_DTYPES, ensure_all_finite="allow-nan", input_name="X")
        n = self.n_features_in_
        if x.shape[1] != n:  # as validate_data says it, which would ask for names, too
            raise ValueError(
                f"X has {x.shape[1]} features, but {type(self).__name__} is expecting {n} features"
                " as input"
            )
        scale = np.ones(n) if self.scale_ is None else self.scale_
        mean = self.mean_ if self.with_mean else None
        out = self._output(x, copy)
        return normalize(x, np.zeros(n), np.ones(n), scale, mean, eps=0, out=out)

    def _output(self, x: Array, copy: bool | None) -> Array | None:
        copy = self.copy if copy is None else _layer_checks.flag(copy, "copy")
        return x if not copy and x.flags.behaved else None

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "moments_") and _has_seen(self.moments_)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32", "float16"]
        return tags


def _row_moments(x: Array, sample_weight: ArrayLike | None) -> Moments:
    if sample_weight is None:
        return _present_moments(x, None)
    if isinstance(sample_weight, Real):
        sample_weight = np.full(len(x), sample_weight)
    weights = check_array(sample_weight, ensure_2d=False, dtype=_DTYPES, input_name="sample_weight")
    if weights.shape != (len(x),):
        raise ValueError(
            f"sample_weight must have shape ({len(x)},), one for each row, got {weights.shape}"
        )
    if (weights < 0).any():
        raise ValueError(f"sample_weight must not be negative, got {weights.min()}")
    return _present_moments(x, weights[:, np.newaxis])


def _present_moments(x: Array, weights: Array | None) -> Moments:
    """Moments of the values that are not NaN, of rows with weights."""
    whole = moments(x, weights=weights)
    if whole.count == 0 or not np.isnan(whole.mean).any():
        return whole
    present = ~np.isnan(x)
    return moments(x, weights=present if weights is None else present * weights)


def _has_seen(seen: Moments) -> bool:
    """Whether a row had weight, be it one of NaN alone."""
    return isinstance(seen.count, np.ndarray) or seen.count > 0


_DTYPES = (np.float64, np.float32, np.float16)  # the first is what others become
