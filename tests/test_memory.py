"""Memory: what happens when there is none, and that nothing is left behind."""

import copy
import gc
import pickle
import resource
import sys

import numpy as np
import pytest

import bn_fast
from bn_fast import batchnorm_backward, batchnorm_forward, reference

from .arrays import normal
from .process import run

SANITIZED = "-fsanitize" in bn_fast.build_info()["flags"]

# Under a limit on the address space, 3 MiB more than there is, every call is tried many times.
LIMITED = """
    import resource, sys
    import numpy as np, bn_fast
    from bn_fast import batchnorm_backward, batchnorm_forward

    threads, warm = int(sys.argv[1]), sys.argv[2] == "warm"
    bn_fast.set_num_threads(threads)
    n = 2**19  # scratch of 50 MB, which free() gives back at once
    x = np.random.default_rng(0).standard_normal((8, n))
    gamma, out = np.ones(n), np.empty_like(x)
    param = {"mode": "train", "running_mean": np.zeros(n)}
    _, cache = batchnorm_forward(x[:, :2], gamma[:2], gamma[:2])
    if warm:  # OpenMP's threads have their memory before the limit is set
        batchnorm_forward(x, gamma, gamma, out=out)
    out[...] = 7
    integers = np.zeros((9, n), np.int8)

    def size():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()

    def limit(room):
        resource.setrlimit(resource.RLIMIT_AS, (size() + room if room else -1, -1))

    def state():
        arrays = sys.getrefcount(x), sys.getrefcount(gamma), sys.getrefcount(cache)
        return arrays, dict(param), bool(out.min() == out.max() == 7)

    def refused(name, call):
        def fails():
            try:
                call()
            except MemoryError as error:
                return bool(str(error))
            return False

        before = state()
        assert all([fails() for _ in range(20)]), name  # Python and NumPy set up what they keep
        full = size()
        assert all([fails() for _ in range(200)]), name
        assert size() == full, (name, size() - full)
        assert state() == before, (name, before, state())
        small = batchnorm_forward(x[:, :2], gamma[:2], gamma[:2])[0]
        assert abs(small.mean(0) - 1).max() < 1e-12, name

    limit(3 * 2**20)
    refused("out", lambda: batchnorm_forward(x, gamma, gamma, param))
    refused("scratch", lambda: batchnorm_forward(x, gamma, gamma, param, out=out))
    refused("integers", lambda: batchnorm_forward(integers, gamma, gamma))

    limit(0)
    _, cache = batchnorm_forward(x, gamma, gamma)
    expected = batchnorm_backward(x, cache)
    limit(3 * 2**20)
    refused("dx", lambda: batchnorm_backward(x, cache))
    refused("backward's scratch", lambda: batchnorm_backward(x, cache, out=out))
    # Whatever it is that fails, out and param are as before, or all is done.
    limit(0)
    normalized, ended = batchnorm_forward(x, gamma, gamma)[0], 0
    for room in range(1, 180, 15):
        for name in ("forward", "backward"):
            out[...] = 7
            param = {"mode": "train", "running_mean": np.zeros(n)}
            before = state()
            limit(room * 2**20)
            done = False
            try:
                if name == "forward":
                    batchnorm_forward(x, gamma, gamma, param, out=out)
                else:
                    same = batchnorm_backward(x, cache, out=out)
                done = True
            except MemoryError:
                pass
            limit(0)
            ended += done
            if not done:
                assert state() == before, (name, room)
            elif name == "forward":
                assert (out == normalized).all()
                assert len(param) == 3
            else:
                assert all((a == b).all() for a, b in zip(same, expected))
    assert 0 < ended < 24, ended
    print("well")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer takes 20 TiB of addresses for itself")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("warm", ["warm", "cold"])
def test_no_memory(threads, warm):
    """A MemoryError; nothing is lost, nothing half-done, and the next call works.

    Cold, OpenMP's threads cannot be started either, for which libgomp would end the process.
    """
    assert run(LIMITED, args=[str(threads), warm]).endswith("well")


def caches():
    """Every kind of cache, and a dout for it."""
    x, gamma, beta = normal((12, 5), np.float64), np.ones(5), np.zeros(5)
    wide = np.full((12, 5), 1e300)
    wide[::2] *= -1
    images = normal((3, 5, 4, 4), np.float32)
    test = {"mode": "test", "running_var": np.ones(5)}
    yield "train", x, lambda: batchnorm_forward(x, gamma, beta)[1]
    yield "running", x, lambda: batchnorm_forward(x, gamma, beta, {"mode": "train"})[1]
    yield "test", x, lambda: batchnorm_forward(x, gamma, beta, dict(test))[1]
    yield "images", images, lambda: batchnorm_forward(images, gamma, beta)[1]
    yield "wide", x, lambda: batchnorm_forward(wide, gamma, beta)[1]
    yield "integers", x, lambda: batchnorm_forward([[1, 2]] * 3, [1, 2], [3, 4])[1]
    yield "tuple", x, lambda: tuple(batchnorm_forward(x, gamma, beta)[1])
    yield "reference", x, lambda: reference.batchnorm_forward(x, gamma, beta)[1]
    yield "out", x, lambda: batchnorm_forward(x, gamma, beta, out=np.empty_like(x))[1]
    yield "empty", x[:0], lambda: batchnorm_forward(x[:0], gamma, beta)[1]


X, PARAMETERS = normal((12, 5), np.float64), (np.ones(5), np.zeros(5))
HUGE = np.where(np.arange(60).reshape(12, 5) % 2, 1e300, -1e300)
IMAGES = normal((3, 5, 4, 4), np.float32)
LARGE = normal((3, 5, 160, 160), np.float32)  # for two threads

# Every kind of cache, as forward makes it anew at every call, and what leads to it.
CACHES = {
    "train": lambda: batchnorm_forward(X, *PARAMETERS)[1],
    "running averages": lambda: batchnorm_forward(X, *PARAMETERS, {"mode": "train"})[1],
    "test": lambda: batchnorm_forward(X, *PARAMETERS, {"mode": "test", "eps": 1})[1],
    "images": lambda: batchnorm_forward(IMAGES, *PARAMETERS)[1],
    "gathered": lambda: batchnorm_forward(IMAGES[:, ::-1, ::2], *PARAMETERS)[1],
    "wide": lambda: batchnorm_forward(HUGE, *PARAMETERS)[1],
    "converted": lambda: batchnorm_forward([[1, 2], [3, 4]], [1, 2], [3, 4])[1],
    "five-tuple": lambda: tuple(batchnorm_forward(X, *PARAMETERS)[1]),
    "reference": lambda: reference.batchnorm_forward(X, *PARAMETERS)[1],
    "out": lambda: batchnorm_forward(X, *PARAMETERS, out=np.empty_like(X))[1],
    "in place": lambda: batchnorm_forward(X, *PARAMETERS, out=X.copy())[1],
    "empty": lambda: batchnorm_forward(X[:0], *PARAMETERS)[1],
    "pickled": lambda: pickle.loads(pickle.dumps(batchnorm_forward(X, *PARAMETERS)[1])),
    "copied": lambda: copy.deepcopy(batchnorm_forward(X, *PARAMETERS)[1]),
    "large": lambda: batchnorm_forward(LARGE, *PARAMETERS)[1],
    "activation": lambda: batchnorm_forward(X, *PARAMETERS, activation="relu")[1],
    "residual": lambda: batchnorm_forward(X, *PARAMETERS, activation="relu", residual=X)[1],
    "weights": lambda: batchnorm_forward(X, *PARAMETERS, weights=X[:, :1] > 0)[1],
    "float16": lambda: batchnorm_forward(IMAGES.astype(np.float16), *PARAMETERS)[1],
}
LAYER = bn_fast.BatchNorm(5, dtype=np.float64)
# What makes no cache, or more of it.
OTHERS = {
    "second order": lambda: bn_fast.batchnorm_double_backward(X, None, None, X, CACHES["train"]()),
    "layer": lambda: (LAYER.forward(X), LAYER.backward(X)),
    "state": lambda: LAYER.load_state_dict(LAYER.state_dict()),
}
REFUSED = {
    "parameter": lambda: batchnorm_forward(X, np.ones(4), np.zeros(5)),
    "x": lambda: batchnorm_forward(X.astype(complex), *PARAMETERS),
    "out": lambda: batchnorm_forward(X, *PARAMETERS, out=X[::-1]),
    "eps": lambda: batchnorm_forward(X, *PARAMETERS, {"mode": "train", "eps": -1}),
    "dout": lambda: batchnorm_backward(X[1:], CACHES["train"]()),
    "cache": lambda: batchnorm_backward(X, (1, 2, 3)),
}


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
@pytest.mark.parametrize("n", [1000, pytest.param(100_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", [*CACHES, *OTHERS, *(f"refused {name}" for name in REFUSED)])
def test_nothing_is_left_behind(kind, n):
    """As many objects, references and pages after n calls as before."""
    made = CACHES.get(kind, tuple)()
    dout = np.ones(np.shape(made[2])) if made else None  # once: NumPy 2.4 leaks their dtype
    del made

    def call():
        if kind in OTHERS:
            OTHERS[kind]()
            return
        if kind in CACHES:
            batchnorm_backward(dout, CACHES[kind]())
            return
        try:
            REFUSED[kind.removeprefix("refused ")]()
        except (TypeError, ValueError):
            return
        raise AssertionError("not refused")

    shared = [X, HUGE, IMAGES, LARGE, *PARAMETERS, np.ndarray, None]  # no dtype: see dout
    if kind == "large":
        n //= 10
    counts = []
    for repeat in (n // 10 + 100, n):
        for _ in range(repeat):
            call()
        gc.collect()
        references = [sys.getrefcount(a) for a in shared]
        counts.append((resident(), sys.getallocatedblocks(), references))
    (pages, blocks, references), after = counts
    # Python takes its memory by the MiB.
    assert after[0] - pages <= max(2**20, 10 * n) or SANITIZED  # ASan keeps what is freed
    # What Python sets up but once: after 200 calls up to 104 blocks still came with pickles.
    assert after[1] - blocks <= max(250, n / 10)
    assert np.abs(np.subtract(after[2], references)).max() <= n / 10
