"""Process pools, the packages that share OpenMP, and Ctrl-C: right answers and no hang."""

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from .process import run

# Each script does this job in this process, on two threads, before and after others do it.
JOB = """
import os, sys, threading
import numpy as np
import bn_fast

bn_fast.set_num_threads(2)

def job(seed):
    x = np.random.default_rng(seed).standard_normal((2**12, 64))
    out, cache = bn_fast.batchnorm_forward(x, np.ones(64), np.zeros(64))
    dx, dgamma, dbeta = bn_fast.batchnorm_backward(x[::-1], cache)
    return [a.tobytes() for a in (out, dx, dgamma, dbeta)]

def after_use(seed):  # the child of a process that has used its threads
    bn_fast.set_num_threads(2)
    return job(seed)
"""

POOL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

def main():
    method = sys.argv[1]
    expected = [job(seed) for seed in range(8)]
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        assert pool.map(after_use, range(8)) == expected
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert list(pool.map(after_use, range(8))) == expected
    assert [job(seed) for seed in range(8)] == expected
    print("well")

if __name__ == "__main__":
    main()
"""

FORK_IN_THREAD = """
import signal

def fork(results):
    expected = job(1)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a hang ends as a signal
        os._exit(0 if job(1) == expected and after_use(1) == expected else 1)
    results.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert job(1) == expected

results = []
job(0)
threads = [threading.Thread(target=fork, args=(results,)) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(results)
"""

JOBLIB = """
import joblib

def main():
    backend = sys.argv[1]
    expected = [job(seed) for seed in range(8)]
    with joblib.parallel_config(backend, n_jobs=2):
        for work in (job, after_use):
            assert joblib.Parallel()(joblib.delayed(work)(seed) for seed in range(8)) == expected
    assert [job(seed) for seed in range(8)] == expected
    print("well")

if __name__ == "__main__":
    main()
"""

# The neighbor takes its threads before and after us, and forks in between.
NEIGHBOR = """
def torch_work():
    import torch
    a = torch.ones(1 << 21).sqrt().sum().item()
    assert a == 1 << 21

def sklearn_work():
    from sklearn.cluster import KMeans
    x = np.random.default_rng(0).standard_normal((3000, 20))
    KMeans(3, n_init=1, max_iter=3).fit(x)

work = {"torch": torch_work, "sklearn": sklearn_work}[sys.argv[1]]
if sys.argv[2] == "before":
    work()
expected = [job(seed) for seed in range(3)]
work()
assert [job(seed) for seed in range(3)] == expected
child = os.fork()
if child == 0:
    import signal
    signal.alarm(20)
    os._exit(0 if job(0) == expected[0] else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
work()
assert [job(seed) for seed in range(3)] == expected
print(*expected[0][2:])
"""


def script(tmp_path, code):
    """A file, because workers that are spawned import it."""
    path = tmp_path / "script.py"
    path.write_text(JOB + textwrap.dedent(code))
    return path


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_process_pool(tmp_path, method):
    assert run(script(tmp_path, POOL), args=[method]) == "well"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_in_a_thread(tmp_path):
    assert run(script(tmp_path, FORK_IN_THREAD)) == "[0, 0, 0]"


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_joblib(tmp_path, backend):
    pytest.importorskip("joblib")
    assert run(script(tmp_path, JOBLIB), args=[backend]) == "well"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("neighbor", ["torch", "sklearn"])
def test_neighbor(tmp_path, neighbor, order):
    """Imported and used before us or after: one libgomp is shared, or there are two."""
    if importlib.util.find_spec(neighbor) is None:
        pytest.skip(f"no {neighbor}")
    alone = run(script(tmp_path, "print(*job(0)[2:])"))
    assert run(script(tmp_path, NEIGHBOR), args=[neighbor, order]) == alone


INTERRUPTED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
x = np.ones((2**14, 64))
print("ready", flush=True)
n = 0
try:
    while True:
        out, cache = bn_fast.batchnorm_forward(x, np.ones(64), np.zeros(64))
        bn_fast.batchnorm_backward(x, cache)
        n += 1
except KeyboardInterrupt:
    same = job(0) == job(0) and n > 0
    print("interrupted", same, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c(tmp_path):
    """It ends a loop of calls at once, between two of them, and the next call works."""
    child = subprocess.Popen(
        [sys.executable, "-P", script(tmp_path, INTERRUPTED)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=20)[0] == "interrupted True\n"
        assert child.returncode == 0
    finally:
        child.kill()


STARTS = """
import resource
np.random.default_rng(0)  # the imports that it needs may not be readable afterwards
if "processes" in sys.argv[1]:
    os.setgid(65534)
    os.setuid(65534)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
if "addresses" in sys.argv[1]:
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (300 << 20),) * 2)

expected = job(1)
thread = threading.Thread(target=lambda: results.append(job(1)))
results = []
try:
    thread.start()
    thread.join()
except RuntimeError:  # Python cannot start one either
    pass
bn_fast.set_num_threads(1)
assert [job(1)] * len(results) == results and job(1) == expected
print("well")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize(
    ("limit", "stack"),
    [
        pytest.param(
            "processes", None,
            marks=pytest.mark.skipif(os.getuid() != 0, reason="takes root to become nobody"),
        ),
        ("addresses", None),
        ("addresses", "1G"),
        ("addresses", " 1 g "),
        ("stack", "16k"),
        ("stack", "32"),
        ("stack", "65536B"),
        ("stack", "0"),
        ("stack", "4M"),
        ("stack", "much"),
    ],
)  # fmt: skip
def test_threads_that_cannot_be_started(limit, stack):
    """libgomp would end the process, or a thread overflow its stack: the call runs on one."""
    env = {} if stack is None else {"OMP_STACKSIZE": stack}
    assert run(JOB + STARTS, args=[limit], **env).endswith("well")


def test_a_small_stack_of_the_system():
    prefix = ["bash", "-c", 'ulimit -s 256; exec "$@"', "bash"]
    assert run(JOB + STARTS, prefix=prefix, args=["stack"]).endswith("well")
