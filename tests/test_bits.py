"""The same bits for every number of threads, every instruction set and every run."""

import json
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

from .arrays import DTYPES, SHAPES, TALL, problem
from .judge import assert_same_bits

LAYOUTS = ["C", "Fortran", "sliced", "features last"]
SHAPES_OF_ROADS = [  # each of the engine's ways to cut an array, and sizes that threads share
    *SHAPES[::3],
    *TALL,
    ((3000, 40), 1),
    ((500, 600), 1),
    ((64, 48, 9, 9), 1),
    ((8, 40, 28, 28), 1),
    ((40000, 2), 1),
]


def hostile(x):
    """Some features that take the wide road: huge, tiny, not finite, constant."""
    first = np.moveaxis(x, 1, 0)
    for f, value in enumerate([1e30, 1e-30, np.inf, np.nan, 0]):
        if len(first) > 3 * f + 1:
            first[3 * f + 1] *= x.dtype.type(value)
    return x


def results(shape, axis, dtype, layout, mode):
    x, dout, gamma, beta = problem(shape, axis, dtype, layout)
    if mode == "hostile":
        x = hostile(x)
    param = {"mode": "test" if mode == "test" else "train", "running_var": np.abs(gamma)}
    with np.errstate(all="ignore"):
        out, cache = batchnorm_forward(x, gamma, beta, param, axis=axis)
        second = batchnorm_double_backward(dout, gamma, beta, dout, cache)
    # NaN - NaN has the sign of one of them: which one, IEEE 754 leaves to the CPU.
    second = [np.where(np.isnan(a), a.dtype.type(np.nan), a) for a in second]
    averages = param["running_mean"], param["running_var"]
    return [out, *batchnorm_backward(dout, cache), *averages, *second]


@pytest.fixture
def threads_always(monkeypatch):
    """Small arrays on several threads too."""
    monkeypatch.setattr(bn_fast.functional, "_SERIAL_SIZE", 0)
    yield
    bn_fast.set_num_threads(None)


@pytest.mark.parametrize(("shape", "axis"), SHAPES_OF_ROADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["train", "test", "hostile"])
def test_threads(threads_always, shape, axis, dtype, mode):
    if mode == "hostile" and axis != 1:
        pytest.skip("features are made hostile on axis 1")
    for layout in LAYOUTS if np.prod(shape) < 1e5 else LAYOUTS[:1]:
        bn_fast.set_num_threads(1)
        expected = results(shape, axis, dtype, layout, mode)
        for n_threads in (1, 2, 3, min(shape[axis] + 1, 40)):
            bn_fast.set_num_threads(n_threads)
            assert_same_bits(results(shape, axis, dtype, layout, mode), expected)


def test_runs_agree():
    """What is left in memory by one call does not reach the next."""
    case = ((300, 33), 1, np.float32, "sliced", "train")
    expected = results(*case)
    for _ in range(20):
        results((31, 700), 1, np.float64, "C", "hostile")
        assert_same_bits(results(*case), expected)


def digests():
    """A digest of the results of each case."""
    bn_fast.set_num_threads(2)
    table = {"isa": bn_fast.build_info()["isa"]}
    for shape, axis in SHAPES_OF_ROADS:
        for dtype in (*DTYPES, np.float16):
            for mode in ("train", "test", "hostile") if axis == 1 else ("train", "test"):
                arrays = results(shape, axis, dtype, "C", mode)
                # The sign bit of NaN is the one thing that IEEE 754 leaves to the CPU.
                text = b"".join(np.where(np.isnan(a), np.nan, a).tobytes() for a in arrays)
                key = f"{shape} {axis} {np.dtype(dtype)} {mode}"
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
