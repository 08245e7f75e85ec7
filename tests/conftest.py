"""Fixtures that several test modules use."""

import gc
import os
from importlib import import_module

# Before OpenMP is loaded: its workers sleep while they wait. Tests start small regions of many
# sizes on few CPUs, where workers that spin take the others' turn (up to 40 times slower).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

import bn_fast
import bn_fast.functional
from bn_fast._core import isa_available

# Beside other processes waits are long, after which calls would stay on one thread: of the bits on
# several threads nothing would be tested.
for _isa in isa_available:
    import_module(f"bn_fast._core_{_isa}").be_patient(True)


def pytest_collection_finish():
    """All that has been made for 39,000 tests stays: no collection of garbage looks at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def threads_always(monkeypatch):
    """Small arrays on several threads too."""
    monkeypatch.setattr(bn_fast.functional, "_SERIAL_SIZE", 0)
    yield
    bn_fast.set_num_threads(None)
