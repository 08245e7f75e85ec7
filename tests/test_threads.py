"""Threads: the rules of set_num_threads, the default, the neighbors who share OpenMP, and fork."""

import os
import threading
import time
import types

import numpy as np
import pytest

import bn_fast
import bn_fast.functional
from bn_fast import _threads

from .process import cgroup, run

OPENMP = bn_fast.build_info()["openmp"]
LLVM = bn_fast.build_info()["compiler"].startswith("clang")
needs_openmp = pytest.mark.skipif(not OPENMP, reason="built without OpenMP: always one thread")


@pytest.fixture(autouse=True)
def _default_afterwards():
    yield
    bn_fast.set_num_threads(None)


@needs_openmp
@pytest.mark.parametrize("n", [1, 2, 7, np.int64(3), np.uint8(4)])
def test_set_is_what_get_returns(n):
    bn_fast.set_num_threads(n)
    assert bn_fast.get_num_threads() == n
    assert type(bn_fast.get_num_threads()) is int


def test_none_returns_to_the_default():
    before = bn_fast.get_num_threads()
    bn_fast.set_num_threads(before + 3)
    bn_fast.set_num_threads(None)
    assert bn_fast.get_num_threads() == before


@needs_openmp
def test_none_comes_while_another_thread_asks():
    class Globals(dict):
        def __getitem__(self, name):
            value = super().__getitem__(name)
            if name == "_chosen":
                self[name] = None
            return value

    globals_ = Globals(vars(_threads), _chosen=3)
    assert types.FunctionType(_threads.get_num_threads.__code__, globals_)() == 3
    assert globals_["_chosen"] is None


@pytest.mark.parametrize("n", [0, -1, 4097, 2**70])
def test_value_out_of_range(n):
    bn_fast.set_num_threads(1)
    with pytest.raises(ValueError, match=rf"n must be between 1 and 4096, got {n}"):
        bn_fast.set_num_threads(n)
    assert bn_fast.get_num_threads() == 1


@pytest.mark.parametrize("n", [1.0, "2", True, np.True_, [1], 1j])
def test_not_an_int(n):
    with pytest.raises(TypeError, match=r"n must be an int or None, got .* of type "):
        bn_fast.set_num_threads(n)


@pytest.mark.skipif(OPENMP, reason="built with OpenMP")
def test_without_openmp_there_is_one_thread():
    bn_fast.set_num_threads(4)
    assert bn_fast.get_num_threads() == 1


def test_default_stays_within_the_affinity():
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    default = run("import bn_fast; print(bn_fast.get_num_threads())")
    assert 1 <= int(default) <= cpus


@needs_openmp
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_is_noticed_before_and_after_import():
    one = min(os.sched_getaffinity(0))
    code = """
        import os
        {}
        import bn_fast
        {}
        print(bn_fast.get_num_threads())
    """
    pin = f"os.sched_setaffinity(0, [{one}])"
    assert run(code.format(pin, "")) == "1"
    assert run(code.format("", pin)) == "1"


@needs_openmp
def test_omp_num_threads_is_obeyed():
    code = "import bn_fast; print(bn_fast.get_num_threads())"
    assert run(code, OMP_NUM_THREADS="1") == "1"
    assert run(code, OMP_NUM_THREADS="5") == "5"


@needs_openmp
def test_threadpoolctl_is_obeyed():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    before = bn_fast.get_num_threads()
    with threadpoolctl.threadpool_limits(1):
        assert bn_fast.get_num_threads() == 1
    assert bn_fast.get_num_threads() == before


@needs_openmp
def test_setting_is_ours_alone():
    """omp_set_num_threads would change PyTorch's threads too."""
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def openmp_sizes():
        pools = threadpoolctl.threadpool_info()
        return [pool["num_threads"] for pool in pools if pool["user_api"] == "openmp"]

    before = openmp_sizes()
    assert before
    bn_fast.set_num_threads(3)
    bn_fast.batchnorm_forward(np.ones((1 << 15, 32)), np.ones(32), np.zeros(32))
    assert openmp_sizes() == before


V1 = "cpu/{}cpu.cfs_quota_us={}\ncpu/{}cpu.cfs_period_us=100000"


@pytest.mark.parametrize(
    ("table", "files", "cpus"),
    [
        ("0::/", "", None),
        ("0::/", "cpu.max=max 100000", None),
        ("0::/", "cpu.max=200000 100000", 2),
        ("0::/", "cpu.max=150000 100000", 2),
        ("0::/", "cpu.max=1000 100000", 1),
        ("0::/a/b", "a/b/cpu.max=max 100000\na/cpu.max=300000 100000\ncpu.max=max 100000", 3),
        ("0::/not/mounted/here", "cpu.max=400000 100000", 4),
        ("4:cpu,cpuacct:/\n0::/", V1.format("", 250000, ""), 3),
        ("4:cpu,cpuacct:/a\n1:memory:/b", V1.format("a/", 100000, "a/"), 1),
        ("4:cpu,cpuacct:/", V1.format("", -1, ""), None),
        ("5:cpuset:/a", V1.format("a/", 100000, "a/"), None),
        ("", "cpu.max=200000 100000", None),
    ],
)
def test_cgroup_quota(tmp_path, table, files, cpus):
    assert _threads._cgroup_cpus(*cgroup(tmp_path, table, files)) == cpus


@needs_openmp
def test_quota_bounds_the_default_but_not_what_is_asked(monkeypatch):
    monkeypatch.setattr(_threads, "_QUOTA", 1)
    monkeypatch.setattr(_threads, "_OPENMP_KNOWS", False)
    assert bn_fast.get_num_threads() == 1
    bn_fast.set_num_threads(3)
    assert bn_fast.get_num_threads() == 3
    bn_fast.set_num_threads(None)
    monkeypatch.setattr(_threads, "_OPENMP_KNOWS", True)
    assert bn_fast.get_num_threads() == bn_fast._core.cpu.max_threads()


FORK = """
    import os, signal, numpy as np, bn_fast
    from bn_fast import _threads
    {change}
    bn_fast.set_num_threads(2)
    x = np.random.default_rng(0).standard_normal((2**20 // 64, 64))
    job = lambda: bn_fast.batchnorm_forward(x, np.ones(64), np.zeros(64))[0].sum().hex()
    expected = job()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a hang ends as a signal
        same = job() == expected and bn_fast.get_num_threads() == {threads}
        os._exit(0 if same else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), job() == expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child_works_and_so_does_its_parent():
    """libgomp alone hangs here: the child waits for workers that were not forked with it."""
    assert run(FORK.format(change="", threads=2 if OPENMP else 1)) == "0 True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("ready", ["FALSE", "TRUE"])
def test_forked_child_of_llvm_openmp(ready):
    """It hangs where the runtime is told to do nothing about a fork, as joblib tells it."""
    threads = 1 if not OPENMP or (LLVM and ready == "FALSE") else 2
    assert run(FORK.format(change="", threads=threads), KMP_INIT_AT_FORK=ready) == "0 True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child_is_serial_where_the_workers_cannot_be_ended():
    change = "_threads.cpu.pause = lambda: False"
    assert run(FORK.format(change=change, threads=1)) == "0 True"


_LEARN = """
import time
from bn_fast._core import core
MS = 10**6
assert core.coming(4) == 4
core.note_wait(0, MS // 2)  # short
core.note_wait(3 * MS, 5 * MS)  # shares of different sizes
core.note_wait(MS, 5 * MS)  # one in a while
core.note_wait(MS, 5 * MS)  # the same, as another thread saw it
assert core.coming(4) == 4
time.sleep(6e-3)
pauses = []
for _ in range(8):
    core.note_wait(MS, 5 * MS)
    core.note_wait(MS, 5 * MS)  # once a call, whoever waited
    began = time.monotonic()
    while core.coming(4) == 1:
        assert core.coming(1) == 1
        time.sleep(1e-4)
    pauses.append(time.monotonic() - began)
assert core.coming(4) == 4
assert all(p >= 0.9 * q for p, q in zip(pauses, [0.02, 0.04, 0.08, 0.16, 0.32, 0.4, 0.4, 0.4]))
"""


def test_calls_after_a_long_wait_use_one_thread():
    """As beside a busy process; each time for longer, 0.4 s at last."""
    run(_LEARN)


@pytest.mark.parametrize("seconds", [2, pytest.param(30, marks=pytest.mark.long)])
def test_16_python_threads_call_at_once(monkeypatch, seconds):
    """On one input and on their own, small and large, while the number of threads changes."""
    shared = np.random.default_rng(1).standard_normal((1 << 12, 48))
    own = [np.random.default_rng(k).standard_normal((40 * k + 9, 7), np.float32) for k in range(16)]
    param = {"mode": "train", "running_mean": np.zeros(48), "running_var": np.ones(48)}

    def job(k):
        results = []
        for x in (shared, own[k]):
            ones = np.ones(x.shape[1])
            given = dict(param) if x is shared else None
            out, cache = bn_fast.batchnorm_forward(x, ones, ones, given)
            results += [out, *bn_fast.batchnorm_backward(x, cache)]
            results += [given["running_var"]] if given else []
        return [a.tobytes() for a in results]

    expected = [job(k) for k in range(16)]
    monkeypatch.setattr(bn_fast.functional, "_SERIAL_SIZE", 1000)
    end = time.monotonic() + seconds
    done, wrong = [0] * 16, []

    def work(k):
        while done[k] == 0 or time.monotonic() < end:
            if job(k) != expected[k]:
                wrong.append(k)
            done[k] += 1

    workers = [threading.Thread(target=work, args=(k,)) for k in range(16)]
    for worker in workers:
        worker.start()
    turn = 0
    while any(worker.is_alive() for worker in workers):
        turn += 1
        bn_fast.set_num_threads([1, 2, 3, None, 7][turn % 5])
        time.sleep(0.002)
    assert not wrong
    assert min(done) > 0
    assert turn > 0
    assert [job(k) for k in range(16)] == expected
