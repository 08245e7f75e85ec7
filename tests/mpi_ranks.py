"""Run by test_mpi.py on each rank: a batch in parts against the whole batch in one process."""

import copy
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
from mpi4py import MPI

from bn_fast import BatchNorm
from bn_fast.mpi import SyncBatchNorm

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()
rng = np.random.default_rng(7)


def same_bits(values):
    assert len(set(comm.allgather(values.tobytes()))) == 1


# Even, uneven, one row each, and one rank with all: the others are empty.
for cuts in ([20] * (size - 1), [1, 13][: size - 1], list(range(1, size)), [0] * (size - 1)):
    for shape, axis in (((40, 5), 1), ((40, 3, 4, 4), 1), ((40, 6, 5), -1)):
        for dtype, limit in ((np.float64, 1e-12), (np.float32, 3e-6)):
            settings = {"axis": axis, "dtype": dtype, "ddof": 1}
            n = shape[axis]
            whole, sync = BatchNorm(n, **settings), SyncBatchNorm(n, comm, **settings)
            for layer in (whole, sync):
                layer.gamma, layer.beta = np.linspace(0.5, 2, n), np.linspace(-1, 1, n)
            for _ in range(2):
                x, dout = ((rng.standard_normal(shape) + 3).astype(dtype) for _ in range(2))
                part, gradient = (np.split(a, cuts)[rank] for a in (x, dout))
                got = [sync.forward(part), sync.backward(gradient)]
                expected = [
                    np.split(a, cuts)[rank] for a in (whole.forward(x), whole.backward(dout))
                ]
                got += [sync.dgamma, sync.dbeta, sync.running_mean, sync.running_var]
                expected += [whole.dgamma, whole.dbeta, whole.running_mean, whole.running_var]
                for a, b in zip(got, expected, strict=True):
                    assert a.shape == b.shape
                    scale = np.abs(b).max(initial=0)
                    assert (np.abs(a - b) <= limit * max(scale, 1)).all(), (cuts, shape, dtype)
                for values in got[2:]:
                    same_bits(values)
            assert sync.num_batches == whole.num_batches == 2

# A feature that is constant on every rank gives beta, without eps too.
layer = SyncBatchNorm(2, comm, eps=0)
out = layer.forward(np.full((3, 2), 0.1, np.float32))
assert (out == 0).all()
assert (layer.backward(out + 1) == 0).all()

# A large offset costs no digits: the mean is merged, and taken off, beyond float64.
for offset in (1e3, 1e6, 1e9):
    whole, sync = BatchNorm(4, dtype=float), SyncBatchNorm(4, comm, dtype=float)
    x, dout = rng.standard_normal((2, 500, 4)) * [[[1.0]], [[0.3]]]
    x += offset
    rows = slice(500 * rank // size, 500 * (rank + 1) // size)
    pairs = [
        (sync.forward(x[rows]), whole.forward(x)[rows]),
        (sync.backward(dout[rows]), whole.backward(dout)[rows]),
        (sync.dgamma, whole.dgamma),
    ]
    for a, b in pairs:
        assert np.abs(a - b).max() <= 1e-12 * max(1, np.abs(b).max()), (offset, np.abs(a - b).max())

# Nor does any size of the deviations, though their squares leave float64's range.
for power in (-1000, -600, 509, 600, 1020):
    settings = {"eps": 0 if power < 0 else 1e-5, "dtype": float, "bad_batch": "propagate"}
    whole, sync = BatchNorm(2, **settings), SyncBatchNorm(2, comm, **settings)
    x, dout = rng.standard_normal((2, 50, 2)) + 1
    x, dout = np.ldexp(x, power), 1000 * dout
    rows = slice(50 * rank // size, 50 * (rank + 1) // size)
    pairs = [
        (sync.forward(x[rows]), whole.forward(x)[rows]),
        (np.ldexp(sync.backward(dout[rows]), power), np.ldexp(whole.backward(dout)[rows], power)),
        (sync.dgamma, whole.dgamma),
        (sync.dbeta, whole.dbeta),
    ]
    for a, b in pairs:
        assert np.abs(a - b).max() <= 1e-13 * np.abs(b).max(), (power, np.abs(a - b).max())
    np.testing.assert_allclose(sync.running_var, whole.running_var, rtol=1e-14)


# What one rank does wrong raises there, and RuntimeError elsewhere; the layer stays as it was.
def fails(call, own_error, by):
    others = RuntimeError, f"rank {by} could not take part"
    error, message = (own_error, None) if rank == by else others
    with pytest.raises(error, match=message):
        call()


for by in range(size):
    layer = SyncBatchNorm(3, comm, momentum=None)
    with pytest.raises(RuntimeError, match="backward needs a forward"):
        layer.backward(np.ones((4, 3)))
    x = np.arange(12.0).reshape(4, 3) + rank
    layer.forward(x)
    before = pickle.dumps(layer.state_dict())
    for bad, error in ((np.ones((4, 2)), ValueError), (None, TypeError), (1j * x, TypeError)):
        fails(partial(layer.forward, bad if rank == by else x), error, by)
    fails(partial(layer.forward, x, "test" if rank == by else True), TypeError, by)
    mask = np.ones((4, 1)) if rank == by else None
    fails(partial(layer.forward, x, weights=mask), ValueError, by)  # they would be this rank's
    layer.forward(x, update_running=False)
    fails(partial(layer.backward, x[1:] if rank == by else x), ValueError, by)
    assert layer.dgamma is None
    layer.backward(x)  # of the last forward that went well, and all is well again
    assert pickle.dumps(layer.state_dict()) == before
    assert "_has_met" not in vars(layer)

# Statistics that are bad on one rank are bad on all.
bad = SyncBatchNorm(3, comm, bad_batch="raise")
with pytest.raises(ValueError, match="bad_batch='raise'"):
    bad.forward(np.full((4, 3), np.nan if rank == size - 1 else 1.0))
assert bad.num_batches == 0
quiet = SyncBatchNorm(3, comm)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    quiet.forward(np.ones((0, 3)))
assert [w.filename for w in seen] == [__file__]

# Copies take part too; settings are checked.
for twin in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
    assert twin.comm == comm
    twin.forward(x)
    assert twin.num_batches == 2
with pytest.raises(TypeError, match=r"comm must be an mpi4py\.MPI\.Intracomm, got str"):
    SyncBatchNorm(3, "world")

print(f"ok-{size}", end=" ", flush=True)
