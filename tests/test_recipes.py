"""The code of docs/recipes.md, as it stands there."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from bn_fast import batchnorm_backward, batchnorm_forward

from .arrays import normal
from .judge import LIMIT, roundings
from .process import run

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
MEMORY_MAP, DASK, DASK_STEP = re.findall(
    r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL
)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
def test_a_memory_map_larger_than_the_memory(tmp_path):
    """x and y of 96 MiB each, and no more than 32 MiB to allocate once all is imported."""
    pytest.importorskip("rich", reason="needs rich: pip install rich")
    x = np.tile(normal((4096, 256), np.float32) + 3, (24, 1))
    np.save(tmp_path / "x.npy", x)
    limit = """
import os, resource
os.chdir({folder!r})
import numpy as np, rich.progress, bn_fast
with open("/proc/self/status") as status:
    used = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + (32 << 20),) * 2)
try:
    np.ones(x_bytes := 96 << 20, np.uint8)
    raise SystemExit("the limit does not hold")
except MemoryError:
    pass
"""
    run(limit.format(folder=str(tmp_path)) + MEMORY_MAP, OMP_NUM_THREADS="1")
    y = np.load(tmp_path / "y.npy", mmap_mode="r")
    expected = batchnorm_forward(x, np.ones(256), np.zeros(256))[0]
    assert np.abs(y - expected).max() <= 4 * np.finfo(np.float32).eps * np.abs(expected).max()


# Dask's own chunks cut a large array along all axes, and so these do.
@pytest.mark.parametrize("chunks", ["auto", (7, 5), ((1, 38, 1), 30), (-1, -1)], ids=str)
@pytest.mark.parametrize("shape", [(40, 30), (40, 30, 3, 2)], ids=str)
def test_dask(shape, chunks):
    dask = pytest.importorskip("dask", reason="needs dask: pip install dask")
    array = pytest.importorskip("dask.array")
    x = normal(shape, np.float64) + 1e9
    chunks = chunks if chunks == "auto" else (*chunks, *shape[2:])
    with dask.config.set({"array.chunk-size": "512 B"}):
        names = {"x": array.from_array(x, chunks=chunks)}
        cuts_features = names["x"].numblocks[1] > 1
        assert cuts_features == (chunks == "auto" or chunks[1] == 5)
        exec(DASK, names)
        gamma, beta = names["gamma"], names["beta"] = np.linspace(1, 2, 30), np.arange(30.0)
        dout = normal(shape, np.float64, 1)
        names["dout"] = array.from_array(dout)
        exec(DASK_STEP, names)
    expected = batchnorm_forward(x, np.ones(30), np.zeros(30))[0]
    assert roundings(names["y"].compute(), expected) <= LIMIT
    expected, cache = batchnorm_forward(x, gamma, beta)
    expected = expected, *batchnorm_backward(dout, cache)
    for name, values in zip(("out", "dx", "dgamma", "dbeta"), expected, strict=True):
        assert roundings(names[name].compute(), values) <= LIMIT
