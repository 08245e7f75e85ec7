"""The layer over many processes: one batch norm for the union of all ranks' batches (mpi4py).

One collective each way: forward gathers every rank's moments, backward every rank's two sums. Each
rank merges them in rank order, so all ranks hold the same bits.
"""

from typing import Any, NamedTuple

try:
    from mpi4py import MPI
except ImportError as error:
    raise ImportError("bn_fast.mpi needs mpi4py: pip install mpi4py mpich") from error

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _checks
from ._core import core
from ._moments import merge_packed, pack
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
    """`BatchNorm` of the union of all ranks' batches.

    Parameters
    ----------
    num_features : int
        C, the same on all ranks.
    comm : mpi4py.MPI.Comm, optional
        Who takes part; None: ``MPI.COMM_WORLD``.
    **settings
        Those of `BatchNorm`, the same on all ranks.

    Raises
    ------
    TypeError, ValueError
        As `BatchNorm`.

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

    An argument that one rank refuses raises there alone, and the others wait: run
    ``python -m mpi4py script.py``, which ends all of them.

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
        self.comm = MPI.COMM_WORLD if comm is None else comm

    def _gather(self, values: Array) -> NDArray[np.float64]:
        """Every rank's values, a row for each."""
        gathered = np.empty((self.comm.Get_size(), values.size))
        self.comm.Allgather(np.ascontiguousarray(values), gathered)
        return gathered

    def _forward_batch(
        self, x: Array, out: Array | None
    ) -> tuple[Array, Any, int, NDArray[np.float64], NDArray[np.float64]]:
        axis = self.axis % x.ndim
        whole = merge_packed(self._gather(pack(moments(x, axis=axis))))
        mean, var = whole.mean, whole.var()
        # As in one process: without eps, a feature that is constant on all ranks becomes beta.
        spread = np.where(var + self.eps == 0, np.inf, var)
        gamma = self._gamma.copy()
        out, stats = core.forward(
            x, gamma, self._beta, axis, self.eps, out, mean, spread, n_threads_for(x)
        )
        stats[3] = var
        return out, _Batch(x, gamma, stats, whole.count), int(whole.count), mean, var

    def _backward_batch(
        self, dout: ArrayLike, cache: Any, out: Array | None
    ) -> tuple[Array, Array, Array]:
        x, gamma, stats, total = cache
        dout = _checks.gradient(dout, x)
        axis = self.axis % x.ndim
        sums = core.backward_sums(dout, x, stats, axis, n_threads_for(x))
        sums[0] *= stats[2]
        gathered = self._gather(sums.reshape(-1))
        sums = np.zeros(sums.size)
        for row in gathered:  # in rank order; MPI's own sum may add in another
            sums = sums + row
        sums = sums.reshape(2, -1)
        dx = core.backward_dx(dout, x, gamma, stats, sums, total, axis, out, n_threads_for(x))
        dgamma, dbeta = sums.astype(parameter_dtype(x.dtype))
        return dx, dgamma, dbeta
