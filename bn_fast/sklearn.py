"""Batch normalization as a scikit-learn transformer, which learns its statistics part by part."""

from numbers import Real
from typing import Any, Self

try:
    from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
    from sklearn.utils.validation import check_array, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("bn_fast.sklearn needs scikit-learn 1.6: pip install scikit-learn") from error

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _checks
from ._moments import deviation, mean_low
from ._types import Array
from .pieces import Moments, moments, normalize, normalize_by

__all__ = ["BatchNormalizer"]


class BatchNormalizer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    r"""Every feature to mean 0 and variance 1, by the statistics of all data seen by the fit.

    The test mode of batch normalization. With ``eps=0`` it is scikit-learn's ``StandardScaler``;
    with the default, features that hardly vary stay small instead of being blown up.

    Parameters
    ----------
    eps : float, default 1e-5
        Added to the variance; finite and at least 0.

    Attributes
    ----------
    moments_ : Moments
        Count, mean and sum of squared deviations of all data seen.
    mean_, var_ : ndarray, float64, shape (n_features_in_,)
        Mean and biased variance (÷M), from `moments_`.
    scale_ : ndarray, float64, shape (n_features_in_,)
        What is divided by: ``sqrt(var_ + eps)``, or 1 where that is 0; also where var_ is beyond
        float64's range and its root is not.
    n_samples_seen_ : int or float
        M, the number of rows seen; with weights their sum.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Only where the columns of X have names.

    See Also
    --------
    bn_fast.moments : the statistics alone, also for data that no estimator should hold

    Notes
    -----
    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}

    `partial_fit` merges the moments of each part [1]_, so that any split of the rows gives the
    statistics of the whole, to a few roundings. float32 is computed and returned as such, with
    statistics in float64, and weights of rows too. NaN, infinity and sparse input are refused.

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
    mean_: NDArray[np.float64]
    var_: NDArray[np.float64]
    scale_: NDArray[np.float64]
    n_samples_seen_: float

    def __init__(self, *, eps: float = 1e-5) -> None:
        self.eps = eps

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
        eps = _checks.epsilon(self.eps)
        x = validate_data(self, X, dtype=_DTYPES)
        seen = _row_moments(x, sample_weight)
        if seen.count == 0:
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
        eps = _checks.epsilon(self.eps)
        first = not hasattr(self, "moments_")
        x = validate_data(self, X, reset=first, dtype=_DTYPES)
        seen = _row_moments(x, sample_weight)
        if first:
            return self._keep(seen, eps, sample_weight is None)
        whole = sample_weight is None and isinstance(self.n_samples_seen_, int)
        return self._keep(self.moments_ + seen, eps, whole)

    def _keep(self, seen: Moments, eps: float, whole: bool) -> Self:
        """Take the statistics of all that was seen, of `whole` rows or of weights."""
        scale = deviation(seen, eps)
        self.moments_ = seen
        self.mean_ = seen.mean
        self.var_ = seen.var()
        self.scale_ = np.where(scale == 0, 1.0, scale)
        self.n_samples_seen_ = int(seen.count) if whole else seen.count
        return self

    def transform(self, X: ArrayLike) -> Array:
        """Normalize X.

        Parameters
        ----------
        X : array_like, shape (n_samples, n_features)

        Returns
        -------
        ndarray, shape (n_samples, n_features)
            A new array (or what `set_output` chose), float32 for float32 and else float64.
        """
        x = self._seen(X)
        stats = np.array([self.mean_, mean_low(self.moments_), 1 / self.scale_, self.var_])
        return normalize_by(stats, x, None, None, 1, None)

    def inverse_transform(self, X: ArrayLike) -> Array:
        """Undo `transform`.

        Parameters
        ----------
        X : array_like, shape (n_samples, n_features)
            Normalized values.

        Returns
        -------
        ndarray, shape (n_samples, n_features)
            ``X * scale_ + mean_``, float32 for float32 and else float64.
        """
        x = self._seen(X)
        zero, one = np.zeros_like(self.mean_), np.ones_like(self.mean_)
        return normalize(x, zero, one, self.scale_, self.mean_, eps=0)

    def _seen(self, X: ArrayLike) -> Array:
        check_is_fitted(self)
        x: Array = validate_data(self, X, reset=False, dtype=_DTYPES)
        return x

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "moments_") and self.moments_.count > 0

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _row_moments(x: Array, sample_weight: ArrayLike | None) -> Moments:
    if sample_weight is None:
        return moments(x)
    if isinstance(sample_weight, Real):
        sample_weight = np.full(len(x), sample_weight)
    weights = check_array(sample_weight, ensure_2d=False, dtype=_DTYPES, input_name="sample_weight")
    if weights.shape != (len(x),):
        raise ValueError(
            f"sample_weight must have shape ({len(x)},), one for each row, got {weights.shape}"
        )
    if (weights < 0).any():
        raise ValueError(f"sample_weight must not be negative, got {weights.min()}")
    return moments(x, weights=weights[:, np.newaxis])


_DTYPES = (np.float64, np.float32)  # the first is what others become
