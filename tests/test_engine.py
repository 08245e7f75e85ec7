"""The engine's own laws: its files use only what stands above them, its schedule changes no bit."""

import re
from pathlib import Path

import numpy as np
import pytest

from bn_fast import (
    batchnorm_backward,
    batchnorm_forward,
    instancenorm_backward,
    instancenorm_forward,
    layernorm_backward,
    layernorm_forward,
    moments,
)
from bn_fast._cache import Axes, NormCache
from bn_fast._core import core, isa
from bn_fast._norm_checks import NormCall

from .arrays import normal
from .judge import assert_same_bits
from .problems import engine

SOURCES = Path(__file__).parent.parent / "bn_fast" / "engine"


def _code(path):
    """Without docstrings and comments."""
    text = re.sub(r'"""(.|\n)*?"""', "", path.read_text())
    return "\n".join(line.split("#")[0] for line in text.splitlines())


@pytest.mark.skipif(not SOURCES.exists(), reason="the tests are away from the sources")
def test_each_file_uses_only_what_stands_above_it():
    names = re.findall(r'^include "(.+)"', (SOURCES / "engine.pxi").read_text(), re.MULTILINE)
    assert sorted(names) == sorted({p.name for p in SOURCES.iterdir()} - {"engine.pxi"})
    code = {name: _code(SOURCES / name) for name in names}
    functions = r"^(?:cdef|cpdef|def)[\w\s*]*?(\w+)\("
    defined = {name: re.findall(functions, text, re.MULTILINE) for name, text in code.items()}
    assert all(defined.values())
    for i, name in enumerate(names):
        later = {function for other in names[i + 1 :] for function in defined[other]}
        assert later.isdisjoint(re.findall(r"(?<![.\w])(\w+)[\[(]", code[name])), name


CACHES = [
    (2**12, 2**12, 2**12), (2**15, 2**18, 2**20), (2**15, 2**21, 2**25), (2**30, 2**30, 2**30),
]  # fmt: skip
SIZES = [
    ((300, 70), 1), ((40, 1300), 1), ((5000, 3), 1), ((6, 33, 7, 7), 1), ((3, 5, 30, 30), 1),
    ((40, 20, 300), 1),  # long runs that take turns, of which a block has more than are at hand
]  # fmt: skip


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(("shape", "axis"), SIZES, ids=str)
def test_the_size_of_the_caches_changes_no_bit(shape, axis, dtype, activation):
    x, dout = normal(shape, dtype), normal(shape, dtype, 1)
    gamma, beta = normal(shape[axis], np.float32, 2), normal(shape[axis], np.float32, 3)

    def results():
        out, cache = batchnorm_forward(x, gamma, beta, axis=axis, activation=activation)
        m = moments(x, axis=axis)
        return [out, *batchnorm_backward(dout, cache), m.mean, m.m2]

    expected = results()
    for caches in CACHES:
        old = core.set_caches(*caches)
        try:
            for n_threads in (1, 2, 3):
                with engine(isa, n_threads):
                    assert_same_bits(results(), expected)
        finally:
            core.set_caches(*old)


NORMS = [  # shape, axes of a statistic, axes of the parameters: two are the channels of groups
    ((70, 300), (1,), (1,)), ((1000, 96), (1,), (1,)), ((3000, 8), (1,), (1,)),
    ((33, 1300), (0,), (0,)), ((40, 3000), (1,), (1,)), ((6, 64, 7, 7), (1,), (1,)),
    ((10, 6, 3, 70), (2, 3), (1, 2)), ((6, 8, 4, 9, 11), (2, 3, 4), (1, 2)),
    ((6, 11, 9, 3), (1, 2), (3,)), ((6, 11, 9, 4, 5), (1, 2, 4), (3, 4)),
    ((6, 900, 3), (1,), (2,)), ((6, 9, 4, 5, 11), (3, 4), (1,)),
]  # fmt: skip


@pytest.mark.parametrize("has_mean", [True, False])
@pytest.mark.parametrize("scale", [1, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(("shape", "over", "along"), NORMS, ids=str)
def test_neither_caches_nor_threads_change_a_bit_of_a_norm(
    shape, over, along, dtype, scale, has_mean
):
    """scale: of one statistic's values, which need wide lanes then."""
    if dtype is np.float16 and scale > 1:
        pytest.skip("out of its range")
    x, dout = normal(shape, dtype), normal(shape, dtype, 1)
    first = tuple(slice(None) if d in over else 0 for d in range(len(shape)))
    x[first] *= scale
    dout[first] *= scale
    n = int(np.prod([shape[d] for d in along]))
    x, dout = (a.reshape(*shape[: along[0]], n, *shape[along[-1] + 1 :]) for a in (x, dout))
    kind = np.float64 if dtype is np.float64 else np.float32
    gamma, beta = normal(n, kind, 2), normal(n, kind, 3)

    def results(n_threads):
        axes = Axes(shape, over, along)
        norm = "layernorm" if has_mean else "rmsnorm"
        call = NormCall(x, gamma, beta, axes, 1e-5, None)
        out, stats = core.norm_forward(norm, call, n_threads)
        cache = NormCache(norm, x, gamma, beta.shape, axes, stats, 1e-5)
        return [out, stats, *core.norm_backward(dout, cache, None, None, n_threads)]

    expected = results(1)
    for caches in (None, *CACHES):
        old = core.set_caches(*caches) if caches else None
        try:
            for n_threads in (1, 2, 3, 7):
                assert_same_bits(results(n_threads), expected)
        finally:
            if old:
                core.set_caches(*old)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [16, 100, 256, 300, 512, 1500, 2100, 5000])
def test_rows_go_past_the_caches_wherever_they_begin(width, dtype):
    """In lines that they break, which are put together from two rows; nothing beside is written."""
    x, dout = normal((1, 7, width), dtype), normal((1, 7, width), dtype, 1)
    gamma, own = normal(width, dtype, 2), normal(7, dtype, 3)

    def results(outs):
        y, cache = layernorm_forward(x, gamma, gamma, out=outs[0])
        z, other = instancenorm_forward(x, own, own, out=outs[1])
        return [
            y, *layernorm_backward(dout, cache, out=outs[2]),
            z, *instancenorm_backward(dout, other, out=outs[3]),
        ]  # fmt: skip

    expected = results([None] * 4)
    old = core.set_caches(*CACHES[0])
    try:
        for place in (0, 1, 4, 7, 15, 16):
            memory = np.full((4, x.size + 64), 7, dtype)
            outs = [row[place : place + x.size].reshape(x.shape) for row in memory]
            assert_same_bits(results(outs), expected)
            assert (memory[:, :place] == 7).all()
            assert (memory[:, place + x.size :] == 7).all()
    finally:
        core.set_caches(*old)


def test_arrays_lie_out_of_step_with_pages():
    """Eight of the engine's arrays, side by side, each begin in a set of L1 of their own: those of
    powers of two fell into one."""
    for n in range(1, 5000):
        apart = core.pitch(n)
        assert n <= apart < n + 128
        assert n < 128 or len({8 * apart * k // 64 % 64 for k in range(8)}) == 8
