"""The same bits for every number of threads, every instruction set and every run."""

import json
import math
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import bn_fast
import bn_fast.functional
from bn_fast import batchnorm_backward, batchnorm_double_backward, batchnorm_forward
from bn_fast._core import core, isa_available

from . import oracle
from .arrays import DTYPES, HALVES, SHAPES, TALL, hostile, normal, problem, spread_weights
from .judge import assert_same_bits, check, check_gradients, one_nan
from .problems import OPTIONS, assert_same_on_any_threads, engine

LAYOUTS = ["C", "Fortran", "sliced", "features last"]
MODES = ["train", "hostile", "test"]
SHAPES_OF_ROADS = [  # each of the engine's ways to cut an array, and sizes that threads share
    *SHAPES[::3],
    *TALL,
    ((3000, 40), 1),
    ((500, 600), 1),
    ((64, 48, 9, 9), 1),
    ((8, 40, 28, 28), 1),
    ((40000, 2), 1),
    *(((n, 3, 1), 1) for n in (1, 2)),
    *((shape, 1) for shape in ((0, 5), (4, 0), (3, 5, 0))),  # nothing to do
]


def results(shape, axis, dtype, layout, mode, kind="plain"):
    """All that a kind of call computes: one of KINDS."""
    x, dout, gamma, beta = problem(shape, axis, dtype, layout)
    with np.errstate(all="ignore"):
        if mode == "hostile" and axis == 1:
            x = hostile(x)
        param = {"mode": "test" if mode == "test" else "train", "running_var": np.abs(gamma)}
        arrays = KINDS[kind](x, dout, gamma, beta, param, axis, OPTIONS.get(kind))
    return [*map(one_nan, arrays)]


def plain(x, dout, gamma, beta, param, axis, _):
    out, cache = batchnorm_forward(x, gamma, beta, param, axis=axis)
    return [out, *batchnorm_backward(dout, cache), param["running_mean"], param["running_var"]]


def with_options(x, dout, gamma, beta, param, axis, options):
    activation, has_residual, kind = options
    residual = normal(x.shape, x.dtype, 7) if has_residual else None
    weights = spread_weights(x.shape, axis, kind)
    given = {"activation": activation, "residual": residual, "weights": weights}
    out, cache = batchnorm_forward(x, gamma, beta, param, axis=axis, **given)
    gradients = batchnorm_backward(dout, cache)
    names = ("dx", "dgamma", "dbeta", "dresidual")[: len(gradients)]
    for needs in (names[:1], names[1:3], names[3:]):
        chosen = batchnorm_backward(dout, cache, needs=needs)
        assert_same_bits(  # one NaN: kernels differ in its sign, and threads choose kernels
            [one_nan(a) for a in chosen if a is not None],
            [one_nan(a) for a, name in zip(gradients, names, strict=True) if name in needs],
        )
    return [out, *gradients, param["running_mean"], param["running_var"]]


def second_order(x, dout, gamma, beta, param, axis, _):
    _, cache = batchnorm_forward(x, gamma, beta, param, axis=axis)
    ddx = normal(x.shape, x.dtype, 8)
    return [
        *batchnorm_double_backward(ddx, beta, gamma, dout, cache),
        *batchnorm_double_backward(None, beta, gamma, dout, cache),
        *batchnorm_double_backward(ddx, None, None, dout, cache),
    ]


def pieces(x, dout, gamma, beta, _, axis, __):
    m = bn_fast.moments(x, axis=axis)
    parts = np.array_split(x, 3, axis=axis - 1)
    merged = sum(bn_fast.moments(part, axis=axis) for part in parts)
    inv_std = 1 / np.sqrt(m.var() + 1e-5)
    sums = bn_fast.backward_reduce(dout, x, m.mean, inv_std, axis=axis)
    given = (dout, x, m.mean, inv_std, gamma, *sums, m.count)
    return [
        m.m2,
        *m.__reduce__()[1][1:5],  # the mean's low part, too
        *merged.__reduce__()[1][1:5],
        bn_fast.normalize(x, m.mean, m.var(), gamma, beta, axis=axis),
        bn_fast.normalize(x, m, gamma=gamma, beta=beta, axis=axis),
        *sums,
        *bn_fast.backward_reduce(dout, x, m, inv_std, axis=axis),
        bn_fast.backward_apply(*given, axis=axis),
        bn_fast.backward_apply(dout, x, m, *given[3:], axis=axis),
    ]


KINDS = {
    "plain": plain,
    **dict.fromkeys(OPTIONS, with_options),
    "second order": second_order,
    "pieces": pieces,
}


@pytest.mark.parametrize(("shape", "axis"), SHAPES_OF_ROADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_threads(threads_always, shape, axis, dtype, mode):
    if mode == "hostile" and axis != 1:
        pytest.skip("features are made hostile on axis 1")
    for layout in LAYOUTS if np.prod(shape) < 1e5 else LAYOUTS[:1]:
        bn_fast.set_num_threads(1)
        expected = results(shape, axis, dtype, layout, mode)
        for n_threads in (1, 2, 3, min(shape[axis] + 1, 40)):
            bn_fast.set_num_threads(n_threads)
            assert_same_bits(results(shape, axis, dtype, layout, mode), expected)


@pytest.mark.parametrize("shape", [(500, 600), (300, 1100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_features_that_lie_the_other_way(shape, dtype, mode):
    """Their sums are taken as they lie, and are those of the others."""
    expected = results(shape, 1, dtype, "C", mode)
    assert_same_bits(results(shape, 1, dtype, "reversed", mode), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_sums_that_cancel(threads_always, dtype):
    """One value a block, of any size, and later its negative: compensated sums lose what lies 106
    bits below, and so tell how the blocks are cut into chunks."""
    rng = np.random.default_rng(0)
    terms = rng.standard_normal((64, 130)) * 10.0 ** rng.uniform(-30, 30, (64, 130))
    rows = np.concatenate([terms, rng.permuted(-terms, axis=0)]).astype(dtype)
    sparse = np.zeros((128 * len(rows), 130), dtype)
    sparse[::128] = rows
    x = normal(sparse.shape, dtype)
    ones = np.ones(130, dtype)
    expected = None
    for n_threads in (1, 2, 3, 5):
        bn_fast.set_num_threads(n_threads)
        dbeta = batchnorm_backward(sparse, batchnorm_forward(x, ones, ones)[1])[2]
        mean = batchnorm_forward(sparse, ones, ones)[1][0]
        expected = expected or [dbeta, mean]
        assert_same_bits([dbeta, mean], expected)
    assert np.any(expected[0])  # rests of what cancels


FAR_ELEMENTS = core.boundaries["FAR_BYTES"] // 4
ROWS_OF_FAR = [
    (FAR_ELEMENTS // math.prod(row) + more * core.boundaries["BLOCK_ROWS"], *row)
    for row in [(130,), (33,), (40, 7, 7)]
    for more in (0, 1)
]


@pytest.mark.parametrize("shape", ROWS_OF_FAR, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, np.float16])
def test_on_either_side_of_what_comes_from_memory(shape, dtype):
    """There trees have other numbers of rows: the same everywhere, and as exact at an offset."""
    if dtype is np.float64:
        shape = (shape[0] // 2, *shape[1:])
    x, dout = normal(shape, dtype) + dtype(1000), normal(shape, dtype, 1)
    gamma, beta = normal(shape[1], np.float32, 2), normal(shape[1], np.float32, 3)

    def everything():
        out, cache = batchnorm_forward(x, gamma, beta)
        return [out, *batchnorm_backward(dout, cache)]

    with engine(isa_available[0], 1):
        expected = everything()
    for k, isa in enumerate(isa_available):
        for n_threads in (1, 2, 3) if k == len(isa_available) - 1 else (2 + k % 2,):
            with engine(isa, n_threads):
                assert_same_bits(everything(), expected)
    out, dx, dgamma, dbeta = expected
    f = [0, shape[1] // 2]  # long double takes its time
    check("out", out[:, f], oracle.forward(x[:, f], gamma[f], beta[f]), x)
    exact = oracle.backward(dout[:, f], x[:, f], gamma[f])
    check_gradients((dx[:, f], dgamma[f], dbeta[f]), exact, x)


def some_cases():
    """Each shape with each kind of call; dtypes, layouts and modes take turns."""
    for number, (shape, axis) in enumerate(SHAPES_OF_ROADS):
        for k, kind in enumerate(KINDS):
            turn = number + k
            dtypes = (DTYPES[turn % 2], HALVES[turn // 2 % len(HALVES)])
            mode = MODES[turn // 4 % 3]
            yield pytest.param(
                shape, axis, kind, dtypes, LAYOUTS[turn % 4], mode, id=f"{shape} {axis} {kind}"
            )


@pytest.mark.parametrize(("shape", "axis", "kind", "dtypes", "layout", "mode"), list(some_cases()))
def test_threads_and_options(threads_always, shape, axis, kind, dtypes, layout, mode):
    for dtype in dtypes:
        bn_fast.set_num_threads(1)
        expected = results(shape, axis, dtype, layout, mode, kind)
        for n_threads in (2, 3, min(shape[axis] + 1, 40)):
            bn_fast.set_num_threads(n_threads)
            assert_same_bits(results(shape, axis, dtype, layout, mode, kind), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_agree(kind):
    """What is left in memory by one call does not reach the next."""
    case = ((300, 33), 1, np.float32, "sliced", "train", kind)
    expected = results(*case)
    for _ in range(5):
        results((31, 700), 1, np.float64, "C", "hostile", kind)
        assert_same_bits(results(*case), expected)


def digests():
    """A digest of the results of each case."""
    bn_fast.set_num_threads(2)
    table = {"isa": bn_fast.build_info()["isa"]}
    for shape, axis in SHAPES_OF_ROADS:
        for dtype in (*DTYPES, *HALVES):
            for k, kind in enumerate(KINDS):
                turn = k + shape[0]
                for mode in MODES if k == 0 else (MODES[turn % 3],):
                    arrays = results(shape, axis, dtype, "C", mode, kind)
                    text = b"".join(a.tobytes() for a in arrays)
                    key = f"{shape} {axis} {np.dtype(dtype)} {mode} {kind}"
                    table[key] = sha256(text).hexdigest()
    return table


HERE = Path(__file__).parent
# pytest alone can import the tests as a package: they are on nobody's path.
CHILD = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location(
    "tests", {str(HERE / "__init__.py")!r}, submodule_search_locations=[{str(HERE)!r}]
)
sys.modules["tests"] = importlib.util.module_from_spec(spec)
from tests.test_bits import digests
print(json.dumps(digests()))
"""


def test_instruction_sets():
    tables = {}
    for isa in bn_fast.build_info()["isa_available"]:
        done = subprocess.run(
            [sys.executable, "-P", "-c", CHILD],
            env=os.environ | {"BN_FAST_ISA": isa},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        tables[isa] = json.loads(done.stdout)
        assert tables[isa].pop("isa") == isa
    expected = tables.pop("base")
    assert len(expected) > 100
    for isa, table in tables.items():
        different = [key for key in expected if table[key] != expected[key]]
        assert not different, f"{isa} differs from base"


def test_chunks_are_added_in_one_order():
    """Sums of three sizes, more than two float64 hold: what is left of them tells the order."""
    sizes = [s * 2.0**e for e in (133, 132, 70, 69, 68) for s in (1, -1)] + [1, 3, 5, 7, 9, 11]
    rng = np.random.default_rng(0)
    by_feature = rng.permuted(np.tile(sizes, (512, 1)), axis=1).T
    x = np.repeat(by_feature, 128, axis=0)  # a chunk has 128 rows
    assert_same_on_any_threads(lambda: [bn_fast.moments(x).mean, bn_fast.moments(x).m2])
