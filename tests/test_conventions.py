"""The rows of docs/conventions.md that can be asked: one batch each, as the libraries come."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from bn_fast import BatchNorm, batchnorm_forward

PAGE = Path(__file__).resolve().parent.parent / "docs" / "conventions.md"
X = np.array([[9.0], [12.0]], np.float32)

os.environ.setdefault("KERAS_BACKEND", "torch")  # what is here anyway; a user's choice stands


def row(library):
    """momentum, weight of the old value, eps, ddof, initial mean and variance, as the page says."""
    page = PAGE.read_text().replace("\N{MINUS SIGN}", "-")
    line = next(line for line in page.splitlines() if line.startswith(f"| {library}"))
    _, name, old, eps, divisor, start = (cell.strip() for cell in line.strip("|").split("|"))
    momentum = float(re.search(r"` ([\d.]+)$", name)[1])
    old = {"momentum": momentum, "1 - momentum": 1 - momentum}[old]
    ddof = {"M": 0, "M - 1": 1, "M - `ddof`; 0 by default": 0}[divisor]
    return momentum, old, float(eps), ddof, *map(float, start.split(", "))


def course():
    param = {"mode": "train"}
    _, cache = batchnorm_forward(X, [1], [0], param)
    zero = np.zeros(1)
    return None, cache.eps, zero, zero, param["running_mean"], param["running_var"]


def own():
    layer = BatchNorm(1)
    start = layer.running_mean, layer.running_var
    layer.forward(X)
    return layer.momentum, layer.eps, *start, layer.running_mean, layer.running_var


def torch():
    torch = pytest.importorskip("torch")
    module = torch.nn.BatchNorm1d(1)
    start = module.running_mean.clone(), module.running_var.clone()
    module(torch.tensor(X))
    return module.momentum, module.eps, *start, module.running_mean, module.running_var


def keras():
    keras = pytest.importorskip("keras")
    layer = keras.layers.BatchNormalization()
    layer.build((None, 1))
    start = layer.get_weights()[2:]
    layer(X, training=True)
    return layer.momentum, layer.epsilon, *start, *layer.get_weights()[2:]


ROWS = {
    "`bn_fast.BatchNorm`": own,
    "`bn_fast.batchnorm_forward`, CS231n": course,
    "PyTorch": torch,
    "Keras 3": keras,
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' own
@pytest.mark.parametrize("library", ROWS)
def test_row(library):
    momentum, old, eps, ddof, mean, var = row(library)
    found = ROWS[library]()
    assert found[0] in (None, momentum)
    assert found[1] == eps
    new_mean = old * mean + (1 - old) * X.mean()
    new_var = old * var + (1 - old) * X.var(ddof=ddof)
    # Keras computes the variance as E[x^2] - E[x]^2 in float32.
    got = [float(value[0]) for value in found[2:]]
    assert got == pytest.approx([mean, var, new_mean, new_var], rel=2e-5)
