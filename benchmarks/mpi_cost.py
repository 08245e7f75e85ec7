"""Time what many processes cost: mpirun -n 2 python benchmarks/mpi_cost.py

Every rank has a part of the given shape, float32, on one thread. A row compares one step of
SyncBatchNorm, forward and backward, with that of BatchNorm on the rank's part alone, and gives the
time of the two bare collectives: of the slowest rank, in the fastest round.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from results import milliseconds

import bn_fast

try:
    from mpi4py import MPI

    from bn_fast.mpi import SyncBatchNorm
except ImportError as error:
    sys.exit(f"mpi_cost.py needs mpi4py and an MPI: {error}")

SHAPES = [(64, 256), (4096, 256), (16, 64, 32, 32), (32, 256, 28, 28)]
COMM = MPI.COMM_WORLD


def slowest(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each call, the slowest rank's in the fastest round; the calls take turns."""
    spent = np.zeros((rounds, len(calls)))
    for call in calls.values():
        call()
    for row in spent:
        for i, call in enumerate(calls.values()):
            COMM.Barrier()
            start = MPI.Wtime()
            call()
            row[i] = MPI.Wtime() - start
    COMM.Allreduce(MPI.IN_PLACE, spent, MPI.MAX)
    return dict(zip(calls, spent.min(axis=0), strict=True))


def collectives(n_features: int) -> Callable[[], Any]:
    """The two messages of a step, as long as those of SyncBatchNorm."""
    pairs = [
        (np.zeros(n), np.empty((COMM.size, n))) for n in (2 + 4 * n_features, 1 + 2 * n_features)
    ]
    return lambda: [COMM.Allgather(own, everyone) for own, everyone in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=201, metavar="N", help="default: 201")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")

    bn_fast.set_num_threads(1)
    if COMM.rank == 0:
        library = MPI.Get_library_version().split(",")[0].split("\n")[0].strip("\0 ")
        print(f"ranks: {COMM.size}, CPUs: {os.cpu_count()}, {library}; ms, forward and backward\n")
        print("| part of each rank | BatchNorm | SyncBatchNorm | collectives alone | share |")
        print("|---|--:|--:|--:|--:|")
    for shape in SHAPES:
        rng = np.random.default_rng(COMM.rank)
        x, dout = rng.standard_normal((2, *shape), np.float32)
        layers = {
            "alone": bn_fast.BatchNorm(shape[1], reuse_buffers=True),
            "together": SyncBatchNorm(shape[1], COMM, reuse_buffers=True),
        }

        def step(layer: bn_fast.BatchNorm, x: np.ndarray = x, dout: np.ndarray = dout) -> None:
            layer.forward(x)
            layer.backward(dout)

        calls = {name: lambda layer=layer, step=step: step(layer) for name, layer in layers.items()}
        seconds = slowest({**calls, "collectives": collectives(shape[1])}, options.rounds)
        if COMM.rank == 0:
            times = " | ".join(milliseconds(s) for s in seconds.values())
            share = seconds["collectives"] / seconds["together"]
            print(f"| {' x '.join(map(str, shape))} | {times} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
