"""Run by test_mpi.py on each rank: data-parallel training has the loss curve of one process."""

import numpy as np
from mpi4py import MPI
from sklearn.datasets import load_digits

from bn_fast import BatchNorm
from bn_fast.mpi import SyncBatchNorm

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()
digits = load_digits()
images, labels = digits.data / 16, digits.target


def train(layer, part, total, steps=30, batch=128, rate=0.5):
    """Losses of a network with one hidden layer; `total` adds up over the processes."""
    rng = np.random.default_rng(0)
    w1, w2 = 0.1 * rng.standard_normal((64, 40)), 0.1 * rng.standard_normal((40, 10))
    losses = []
    for _ in range(steps):
        chosen = part(rng.permutation(len(images))[:batch])
        x, target = images[chosen], np.eye(10)[labels[chosen]]
        normed = layer.forward(x @ w1)
        hidden = np.maximum(normed, 0)
        p = np.exp(hidden @ w2)
        p /= p.sum(axis=1, keepdims=True)
        losses.append(total(-(target * np.log(p)).sum()) / batch)
        dscores = (p - target) / batch
        dx = layer.backward((dscores @ w2.T) * (normed > 0))
        w2 -= rate * total(hidden.T @ dscores)
        w1 -= rate * total(x.T @ dx)
        layer.gamma -= rate * layer.dgamma
        layer.beta -= rate * layer.dbeta
    return np.array(losses)


one = train(BatchNorm(40, dtype=np.float64), lambda rows: rows, lambda a: a)
many = train(
    SyncBatchNorm(40, comm, dtype=np.float64),
    lambda rows: np.split(rows, [50 * (r + 1) for r in range(size - 1)])[rank],  # uneven
    lambda a: comm.allreduce(a),
)
assert one[-1] < one[0] / 3  # it learned
# Each step rounds in another order, and training multiplies that.
assert np.abs(many / one - 1).max() < 1e-10, np.abs(many / one - 1).max()

print(f"ok-{size}", end=" ", flush=True)
