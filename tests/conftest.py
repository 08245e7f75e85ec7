"""Fixtures that several test modules use."""

import gc
import os

# Before OpenMP is loaded: its workers sleep while they wait. Tests start small regions of many
# sizes on few CPUs, where workers that spin take the others' turn (up to 40 times slower).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

import bn_fast
import bn_fast.functional


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
