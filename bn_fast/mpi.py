"""The layer over many processes: one batch norm for the union of all ranks' batches (mpi4py).

One collective each way: forward gathers every rank's moments, backward every rank's two sums. Each
rank merges them in rank order, so all ranks hold the same bits. The first number that a rank sends
says whether it could take part: nobody waits for a rank that raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

try:
    from mpi4py import MPI
except ImportError as error:
    raise ImportError("bn_fast.mpi needs mpi4py: pip install mpi4py mpich") from error

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _checks, _results
from ._cache import Cache
from ._core import core
from ._moments import merge_packed, pack, statistics
from ._types import Array, parameter_dtype
from .functional import n_threads_for
from .layer import BatchNorm
from .pieces import moments

__all__ = ["SyncBatchNorm"]


class _Batch(NamedTuple):
    x: Array
    gamma: Array
    stats: Array
    total: float  # values of each feature on all ranks


class SyncBatchNorm(BatchNorm):
    """`bn_fast.BatchNorm` of the union of all ranks' batches.

    Parameters
    ----------
    num_features : int
        C, the same on all ranks.
    comm : mpi4py.MPI.Intracomm, optional
        Who takes part; None: ``MPI.COMM_WORLD``.
    **settings
        Those of `bn_fast.BatchNorm`, the same on all ranks.

    Raises
    ------
    TypeError, ValueError
        As `bn_fast.BatchNorm`.

    See Also
    --------
    bn_fast.BatchNorm : attributes and the other methods, which do not communicate
    bn_fast.moments : the pieces that it is made of

    Notes
    -----
    ``forward(x)`` in training and the ``backward(dout)`` after it are collective: every rank calls
    them, a rank without data with an x of no rows. Batches may be of any sizes. Output, running
    statistics, dx and the gradients of gamma and beta are those of one process with the whole
    batch, in rank order, to roundings. dgamma and dbeta are sums over all ranks already, with the
    same bits on every rank: do not add them again. ``forward(x, training=False)`` and the
    ``backward`` after it are local.

    Where one rank cannot take part, because of a wrong x for example, it raises its own error and
    all others a RuntimeError that names it; the layer is then as it was on every rank. (A rank that
    does not call at all is waited for: ``python -m mpi4py script.py`` ends all when one has ended.)
    Copies share the communicator; pickles need one that mpi4py can pickle, as COMM_WORLD.

    Examples
    --------
    >>> import numpy as np
    >>> from bn_fast.mpi import SyncBatchNorm
    >>> layer = SyncBatchNorm(1, momentum=None)
    >>> layer.forward(np.array([[1.0], [3.0]])).round(3)  # with one process
    array([[-1.],
           [ 1.]])
    """

    def __init__(self, num_features: int, comm: Any = None, **settings: Any) -> None:
        super().__init__(num_features, **settings)
        if comm is None:
            comm = MPI.COMM_WORLD
        if not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"comm must be an mpi4py.MPI.Intracomm, got {type(comm).__name__}")
        self.comm = comm

    def forward(
        self,
        x: ArrayLike,
        training: bool = True,
        *,
        update_running: bool = True,
        weights: ArrayLike | None = None,
    ) -> Array:
        """As `bn_fast.BatchNorm.forward`, in training of all ranks' batches together; no weights.

        `update_running` is the same on all ranks.
        """
        options: dict[str, Any] = {"update_running": update_running, "weights": weights}
        if isinstance(training, (bool, np.bool_)) and not training:
            return super().forward(x, training, **options)
        with self._together(1 + 5 * self.num_features):
            return super().forward(x, training, **options)

    def backward(self, dout: ArrayLike) -> Array:
        """As `bn_fast.BatchNorm.backward`, after training of all ranks' batches together."""
        if self._cache is not None and not self._trained:
            return super().backward(dout)
        with self._together(2 * self.num_features):
            return super().backward(dout)

    @contextmanager
    def _together(self, n_values: int) -> Iterator[None]:
        """See to it that this rank meets the others, once, whatever happens to it."""
        self._has_met = False
        try:
            yield
        except BaseException:
            if not self._has_met:
                self._meet(0, np.zeros(n_values))
            raise
        finally:
            del self._has_met

    def _meet(self, taking_part: float, values: Array) -> NDArray[np.float64]:
        """Every rank's flag and values, a row for each."""
        gathered = np.empty((self.comm.Get_size(), 1 + values.size))
        self._has_met = True
        self.comm.Allgather(np.concatenate([[taking_part], values]), gathered)
        return gathered

    def _gather(self, values: Array) -> NDArray[np.float64]:
        """Every rank's values, a row for each."""
        gathered = self._meet(1, values)
        failed = np.flatnonzero(gathered[:, 0] != 1)
        if failed.size:
            raise RuntimeError(f"rank {failed[0]} could not take part: its own error says why")
        return gathered[:, 1:]

    def _forward_batch(
        self, x: Array, out: Array | None, weights: ArrayLike | None
    ) -> tuple[Array, Any, int, float, NDArray[np.float64], NDArray[np.float64]]:
        if weights is not None:
            raise ValueError(
                "weights must be None in training over several processes: leave out what has weight"
                " 0 before the call, or take moments(x, weights=...) and normalize"
            )
        axis = self.axis % x.ndim
        # No memory: before the others count on it.
        out = _results.empty_like(x) if out is None else out
        whole = merge_packed(self._gather(pack(moments(x, axis=axis))))
        gamma = self._gamma.copy()
        stats = statistics(whole, self.eps)
        core.normalize(x, gamma, self._beta, axis, stats, out, n_threads_for(x))
        total: Any = whole.count  # a number: no weights
        count = int(total)
        return out, _Batch(x, gamma, stats, total), count, count, stats[0], stats[3]

    def _backward_batch(
        self, dout: ArrayLike, cache: Any, out: Array | None
    ) -> tuple[Array, Array, Array]:
        x, gamma, stats, total = cache
        dout = _checks.gradient(dout, x)
        axis = self.axis % x.ndim
        out = _results.empty_like(x) if out is None else out
        sums = core.backward_sums(dout, x, stats, axis, n_threads_for(x), True)
        gathered = self._gather(sums.reshape(-1))
        sums = np.zeros(sums.size)
        for row in gathered:  # in rank order; MPI's own sum may add in another
            sums = sums + row
        sums = sums.reshape(2, -1)
        batch = Cache(x, gamma, None, stats, axis, self.eps)
        dx = core.backward_dx(dout, batch, sums, total, out, n_threads_for(x))
        dgamma, dbeta = sums.astype(parameter_dtype(x.dtype))
        return dx, dgamma, dbeta
