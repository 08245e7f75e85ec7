"""The code of docs/recipes.md, as it stands there."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from bn_fast import batchnorm_forward

from .arrays import normal
from .process import run

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
MEMORY_MAP, DASK = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


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


def test_dask():
    array = pytest.importorskip("dask.array", reason="needs dask: pip install dask")
    x = normal((100, 6), np.float64) + 3
    names = {"x": array.from_array(x, chunks=((30, 1, 69), 6))}
    exec(DASK, names)
    expected = batchnorm_forward(x, np.ones(6), np.zeros(6))[0]
    assert np.abs(names["y"].compute() - expected).max() <= 1e-14 * np.abs(expected).max() * 4
