"""The engine's own laws: its files use only what stands above them, its schedule changes no bit."""

import re
from pathlib import Path

import numpy as np
import pytest

from bn_fast import batchnorm_backward, batchnorm_forward, moments
from bn_fast._core import core, isa

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


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((300, 70), 1), ((40, 1300), 1), ((5000, 3), 1), ((6, 33, 7, 7), 1), ((3, 5, 30, 30), 1)],
    ids=str,
)
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
