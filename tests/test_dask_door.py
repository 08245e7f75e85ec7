"""bn_fast.dask against one process with the whole array, and its bits against any schedule."""

import os
import pickle
import signal
from functools import reduce

import numpy as np
import pytest

import bn_fast
from bn_fast import batchnorm_backward, batchnorm_forward

from .arrays import DTYPES, LAYOUTS, normal
from .judge import LIMIT, assert_same_bits, check, check_gradients, roundings

pytest.importorskip("dask", reason="needs dask: pip install dask")

import dask
import dask.array as da

import bn_fast.dask as door

from . import oracle

# (shape, axis, chunks): along the features, uneven, empty, one for all, more than one task merges.
CUTS = [
    ((40, 30), 1, (7, 5)),
    ((40, 30), 1, (-1, -1)),
    ((40, 30), 1, ((0, 39, 0, 1), (1, 0, 29))),
    ((100, 6), 1, (3, 4)),
    ((40, 30), 0, (4, 9)),
    ((12, 10, 7, 6), 1, (5, 3, 4, 5)),
    ((6, 2, 4, 5), -1, (2, 1, 3, 2)),
]


@pytest.fixture(autouse=True)
def one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def problem(shape, axis, dtype=np.float64, offset=3):
    n = shape[axis]
    x = (offset + 2 * normal(shape, np.float64, 1)).astype(dtype)
    dout = normal(shape, np.float64, 2).astype(dtype)
    return x, dout, normal(n, np.float64, 3), normal(n, np.float64, 4)


def both_ways(x, dout, gamma, beta, axis, **settings):
    out, cache = door.batchnorm_forward(x, gamma, beta, axis=axis, **settings)
    return out, *door.batchnorm_backward(dout, cache)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis", "chunks"), CUTS)
def test_blocks_together_are_the_whole(shape, axis, chunks, dtype):
    x, dout, gamma, beta = problem(shape, axis, dtype)
    blocks = da.from_array(x, chunks=chunks)
    results = both_ways(blocks, da.from_array(dout), gamma, beta, axis, eps=1e-3)
    assert results[0].chunks == results[1].chunks == blocks.chunks
    promised = [(a.shape, a.dtype) for a in results]
    out, *gradients = dask.compute(*results)
    assert promised == [(a.shape, a.dtype) for a in (out, *gradients)]
    check("out", out, oracle.forward(x, gamma, beta, axis, 1e-3), x)
    check_gradients(gradients, oracle.backward(dout, x, gamma, axis, 1e-3), x)
    found, expected = door.moments(blocks, axis=axis).compute(), bn_fast.moments(x, axis=axis)
    assert found.count == expected.count
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(found.var(), expected.var(), rtol=8 * eps)
    assert np.abs(found.mean - expected.mean).max() <= 4 * eps * np.abs(x).max()


@pytest.mark.parametrize("dtype", [np.float16, np.int64, bool])
def test_other_dtypes(dtype):
    x, dout, gamma, beta = problem((40, 6), 1, dtype)
    dout = dout.astype(np.float64)
    expected, cache = batchnorm_forward(x, gamma, beta)
    expected = expected, *batchnorm_backward(dout, cache)
    blocks = [da.from_array(a, chunks=(7, 4)) for a in (x, dout)]
    for got, want in zip(both_ways(*blocks, gamma, beta, 1), expected, strict=True):
        assert got.dtype == want.dtype
        assert roundings(got.compute(), want.astype(np.longdouble)) <= LIMIT


def test_offsets_and_constants_and_nan():
    """What one process promises: an offset of 1e9 deviations, exactly beta, NaN within its own."""
    x, dout, gamma, beta = problem((200, 4), 1, offset=1e9)
    x[:, 1] = 0.1
    x[3, 2] = np.nan
    blocks = [da.from_array(a, chunks=(7, 3)) for a in (x, dout)]
    out, dx, dgamma, _ = dask.compute(*both_ways(*blocks, gamma, beta, 1))
    exact = x - np.longdouble(x[0])
    for j in (0, 3):
        centered = exact[:, j] - exact[:, j].mean()
        x_hat = centered / np.sqrt((centered**2).mean() + np.longdouble(1e-5))
        assert roundings(out[:, j], gamma[j] * x_hat + beta[j]) <= LIMIT
        assert roundings(dgamma[j], (x_hat * dout[:, j]).sum()) <= 2 * LIMIT
    assert (out[:, 1] == beta[1]).all()
    assert np.isnan(out[:, 2]).all()
    assert np.isfinite(dx[:, [0, 1, 3]]).all()
    out, _ = door.batchnorm_forward(blocks[0], gamma, beta, eps=0)
    assert (out[:, 1].compute() == beta[1]).all()


def test_the_bits_are_those_of_the_blocks_in_their_order():
    """Up to 16 along one axis: their moments' sum, and their sums of dout. (Merged in another order
    they have other digits: some cancel all but 26 bits of twice float64's.)"""
    x, dout, gamma, beta = problem((40, 6), 1)
    x[1], x[20] = 1e24, -1e24
    dout[1], dout[20] = 1e9, -1e9
    blocks = da.from_array(x, chunks=(3, 4))
    parts = [
        sum(bn_fast.moments(x[i : i + 3, features].copy()) for i in range(0, 40, 3))
        for features in (slice(4), slice(4, 6))
    ]
    found = door.moments(blocks).compute()
    assert_same_bits([found.mean], [np.concatenate([m.mean for m in parts])])
    assert_same_bits([found.m2], [np.concatenate([m.m2 for m in parts])])
    out, *_, dbeta = both_ways(blocks, da.from_array(dout), gamma, beta, 1)
    expected = bn_fast.normalize(x, found, gamma=gamma, beta=beta)
    assert_same_bits([out.compute()], [expected])
    rows = [slice(i, i + 3) for i in range(0, 40, 3)]
    sums = [bn_fast.backward_reduce(dout[r], x[r], found, np.ones(6))[0] for r in rows]
    assert_same_bits([dbeta.compute()], [reduce(np.add, sums)])


def send(block):
    return pickle.loads(pickle.dumps(block))


@pytest.mark.parametrize(("shape", "axis", "chunks"), CUTS)
def test_no_schedule_changes_a_bit(shape, axis, chunks):
    """Neither threads, nor dask's settings, nor how the blocks lie in memory, which it changes by
    sending them."""
    x, dout, gamma, beta = problem(shape, axis)
    for layout in ("C", "Fortran", "sliced", "permuted"):
        blocks = [da.from_array(LAYOUTS[layout](a), chunks=chunks) for a in (x, dout)]
        sent = [b.map_blocks(send, dtype=b.dtype, meta=b._meta) for b in blocks]
        results = [dask.compute(*both_ways(*b, gamma, beta, axis)) for b in (blocks, sent)]
        for settings in ({"scheduler": "threads", "num_workers": 3}, {"split_every": 2}):
            with dask.config.set(settings):
                results.append(dask.compute(*both_ways(*blocks, gamma, beta, axis)))
        for result in results:
            assert_same_bits(result, results[0])


def test_nothing_is_computed_before_it_is_asked_for_and_x_once():
    x, dout, gamma, beta = problem((40, 6), 1)
    reads = []

    def read(block):
        reads.append(block.shape)
        return block

    blocks = da.from_array(x, chunks=(7, 4)).map_blocks(read, dtype=x.dtype, meta=x[:0, :0])
    results = both_ways(blocks, da.from_array(dout), gamma, beta, 1)
    lazy = door.moments(blocks)
    normalized = door.normalize(blocks, lazy, gamma=gamma, beta=beta)
    assert reads == []
    gamma[...] = 7  # it was that of the call
    beta[...] = 7
    out, *_, again, found = dask.compute(*results, normalized, lazy)
    assert len(reads) == blocks.npartitions
    assert_same_bits([again], [out])
    assert found.count == 40
    assert np.abs(out).max() < 20


def test_given_statistics():
    x, _, gamma, beta = problem((40, 6), 1)
    blocks = da.from_array(x, chunks=(7, 4))
    lazy = door.moments(blocks)
    moments = lazy.compute()
    expected = bn_fast.normalize(x, moments, gamma=gamma, eps=0.5)
    for given in (lazy, moments, door.batchnorm_forward(blocks)[1].moments):
        got = door.normalize(blocks, given, gamma=da.from_array(gamma), eps=0.5)
        assert got.chunks == blocks.chunks
        assert_same_bits([got.compute()], [expected])
    mean, var = moments.mean, moments.var()
    counted = bn_fast.moments(x, weights=np.arange(x.size).reshape(x.shape))
    got = door.normalize(blocks, counted).compute()
    assert_same_bits([got], [bn_fast.normalize(x, counted)])
    expected = bn_fast.normalize(x, mean, var, gamma, beta)
    for given in ((mean, var), (da.from_array(mean, chunks=1), da.from_array(var, chunks=5))):
        assert_same_bits([door.normalize(blocks, *given, gamma, beta).compute()], [expected])


def test_without_gamma_or_beta():
    x, dout, _, _ = problem((40, 6), 1)
    blocks = [da.from_array(a, chunks=(7, 4)) for a in (x, dout)]
    full = dask.compute(*both_ways(*blocks, np.ones(6), np.zeros(6), 1))
    out, dx, dgamma, dbeta = both_ways(*blocks, None, None, 1)
    assert dgamma is dbeta is None
    assert_same_bits(dask.compute(out, dx), full[:2])
    _, _, dgamma, dbeta = both_ways(*blocks, np.ones(6), None, 1)
    assert dbeta is None
    assert_same_bits([dgamma.compute()], [full[2]])
    _, _, dgamma, dbeta = both_ways(*blocks, None, np.zeros(6), 1)
    assert dgamma is None
    assert_same_bits([dbeta.compute()], [full[3]])


def test_rows_of_unknown_number():
    """As a boolean mask leaves them."""
    x, dout, gamma, beta = problem((40, 6), 1)
    keep = normal(40, np.float64) > -1
    rows = da.from_array(keep, chunks=7)
    blocks = [da.from_array(a, chunks=(7, 4))[rows] for a in (x, dout)]
    got = dask.compute(*both_ways(*blocks, gamma, beta, 1))
    check("out", got[0], oracle.forward(x[keep], gamma, beta), x)
    check_gradients(got[1:], oracle.backward(dout[keep], x[keep], gamma), x)
    with pytest.raises(ValueError, match="x must have a known number of features along axis 0"):
        door.moments(blocks[0], axis=0)
    _, cache = door.batchnorm_forward(blocks[0])
    with pytest.raises(ValueError, match=r"dout must be cut as x .*\(6, 2\) blocks, got \(1, 1\)"):
        door.batchnorm_backward(da.from_array(dout), cache)


X = da.ones((6, 4), chunks=(2, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: door.moments(np.ones((6, 4))), TypeError, "x must be a dask array, got an array"),
        (lambda: door.moments(X[0]), ValueError, r"2 or more dimensions, got 1: shape \(4,\)"),
        (lambda: door.moments(X + 1j), TypeError, "x must be an array of real numbers.*complex"),
        (lambda: door.moments(X, axis=2), ValueError, r"axis must be in \[-2, 2\)"),
        (lambda: door.batchnorm_forward(X, np.ones(3)), ValueError, r"gamma .* \(4,\).*\(3,\)"),
        (lambda: door.batchnorm_forward(X, None, X), ValueError, r"beta .* \(4,\).*\(6, 4\)"),
        (lambda: door.batchnorm_forward(X, "one"), TypeError, "gamma must be an array"),
        (lambda: door.batchnorm_forward(X, eps=-1), ValueError, "eps must be finite"),
        (
            lambda: door.batchnorm_forward(X, None, None, {"mode": "train"}),
            ValueError,
            r"bn_param must be None: .* eps is an argument .* normalize\(x, mean, var",
        ),
        (lambda: door.normalize(X, None), TypeError, "mean must be an array"),
        (lambda: door.normalize(X, np.ones(4)), TypeError, "var must be an array.*None"),
        (lambda: door.normalize(X, np.ones(4), np.ones(5)), ValueError, r"var .*\(4,\).*\(5,\)"),
        (lambda: door.normalize(X, door.moments(X), 1), TypeError, "var must be left out"),
        (
            lambda: door.normalize(X, bn_fast.moments(np.ones((6, 3)))).compute(),
            ValueError,
            "moments must have 4 features, as x, got 3",
        ),
        (
            lambda: door.normalize(X, np.ones(4), -np.ones(4)).compute(),
            ValueError,
            "var must not be negative",
        ),
        (
            lambda: door.batchnorm_backward(X, bn_fast.batchnorm_forward(np.ones((6, 4)), *A)[1]),
            TypeError,
            "cache must come from bn_fast.dask.batchnorm_forward, got Cache",
        ),
        (
            lambda: door.batchnorm_backward(X[1:], door.batchnorm_forward(X)[1]),
            ValueError,
            r"dout must have the shape of x, \(6, 4\), got \(5, 4\)",
        ),
        (
            lambda: door.batchnorm_backward(np.ones((6, 4)), door.batchnorm_forward(X)[1]),
            TypeError,
            "dout must be a dask array",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


A = np.ones(4), np.zeros(4)


def test_two_processes_one_of_which_dies(tmp_path):
    """What it held is computed again, by another worker, from what was sent: to the same bits."""
    distributed = pytest.importorskip("distributed", reason="needs distributed")
    x, dout, gamma, beta = problem((300, 30, 4), 1)
    died = tmp_path / "died"

    def read(block, block_info):
        if block_info[0]["chunk-location"] == (3, 1, 0) and not died.exists():
            died.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return np.asfortranarray(block) if block_info[0]["chunk-location"][0] % 2 else block

    blocks = [da.from_array(a, chunks=(50, 11, 4)) for a in (x, dout)]
    blocks[0] = blocks[0].map_blocks(read, dtype=x.dtype, meta=x[:0, :0, :0])
    results = both_ways(*blocks, gamma, beta, 1)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        got = client.gather(client.compute(results))
    assert int(died.read_text()) != os.getpid()
    assert_same_bits(got, dask.compute(*results))
    check("out", got[0], oracle.forward(x, gamma, beta), x)
    check_gradients(got[1:], oracle.backward(dout, x, gamma), x)
