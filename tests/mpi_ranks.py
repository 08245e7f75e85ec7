"""Run by test_mpi.py on each rank: a batch in parts against the whole batch in one process."""

import numpy as np
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

print(f"ok-{size}", end=" ", flush=True)
