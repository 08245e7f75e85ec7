"""New arrays for results: memory that is used again, and is nobody's business but its owner's."""

import ctypes
import gc
import pickle
import queue
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from numpy._core.multiarray import get_handler_name

import bn_fast
from bn_fast import _memory, _results

from .arrays import normal
from .process import cgroup, run

pytestmark = pytest.mark.skipif(_results.usable_memory() == 0, reason="this build keeps nothing")
ours, numpys = "bn_fast_results", get_handler_name(np.ones(1))
MIB = 2**20


@pytest.fixture(autouse=True)
def _empty():
    """Nothing is held, and nothing has been asked for of late."""
    gc.collect()
    bn_fast.set_result_cache(0)
    bn_fast.set_result_cache(None)
    yield
    bn_fast.set_result_cache(None)


def result(mib, value=None):
    """A result of so many MiB (float32, rows of 1 KiB), all `value` if one is given."""
    x = np.broadcast_to(np.float32(1), (int(mib * 1024), 256))
    value = np.full(256, np.float32(0 if value is None else value))
    return bn_fast.batchnorm_forward(x, np.ones(256, np.float32), value)[0]


def address(array):
    return array.__array_interface__["data"][0]


# ---------------------------------------------------------------- used again


@pytest.mark.parametrize("mib", [0.125, 1, 3.75, 4, 9.5])
def test_the_next_result_is_where_the_last_one_was(mib):
    first = result(mib, 1)
    where = address(first)
    assert first.flags.owndata
    assert first.base is None
    assert get_handler_name(first) == ours
    assert where % 4096 == 0
    assert where % (2 * MIB) == 0 or mib < 4
    assert _results.held() == 0
    del first
    assert _results.held() == mib * MIB
    again = result(mib, 2)
    assert address(again) == where
    assert _results.held() == 0
    assert (again == 2).all()


def test_one_that_is_a_little_smaller_fits():
    where = address(result(9))
    small = result(8.5)
    assert address(small) == where
    much_smaller = result(7)
    assert address(much_smaller) != where


def test_small_results_are_as_ever():
    assert get_handler_name(result(0.124)) == numpys
    empty = np.ones((0, 2**20), np.float32)
    one = np.ones(2**20)
    assert get_handler_name(bn_fast.batchnorm_forward(empty, one, one)[0]) == numpys
    assert _results.held() == 0


def test_all_functions_recycle():
    x = normal((2**12, 32), np.float32)
    one, zero = np.ones(32, np.float32), np.zeros(32, np.float32)
    out, cache = bn_fast.batchnorm_forward(x, one, zero, activation="relu", residual=x)
    dx, _, _, dresidual = bn_fast.batchnorm_backward(x, cache)
    plain = bn_fast.batchnorm_forward(x, one, zero)[1]
    second = bn_fast.batchnorm_double_backward(x, one, zero, x, plain)
    m = bn_fast.moments(x)
    parts = (
        bn_fast.normalize(x, m, gamma=one, beta=zero),
        bn_fast.backward_apply(x, x, zero, one, one, zero, zero, m.count),
    )
    test = bn_fast.batchnorm_forward(x, one, zero, {"mode": "test"})[0]
    norm, kept = bn_fast.layernorm_forward(x, one, zero)
    norms = norm, bn_fast.layernorm_backward(x, kept)[0], bn_fast.rms_norm(x)
    for array in (out, dx, dresidual, second[0], second[2], *parts, test, *norms):
        owner = array if array.base is None else array.base  # norms see x in a shape of their own
        assert get_handler_name(owner) == ours
    layer = bn_fast.BatchNorm(32)
    assert get_handler_name(layer.forward(x)) == get_handler_name(layer.backward(x)) == ours


def test_bits_do_not_depend_on_where_a_result_lies():
    """New pages are written to by other stores, where arrays are beyond the caches."""
    core = bn_fast._core.core
    x, dout = normal((2**12, 65), np.float32), normal((2**12, 65), np.float32, 1)
    old = core.set_caches(2**12, 2**12, 2**18)
    try:
        results = []
        for out in (None, None, np.empty_like(x)):
            dx = None if out is None else np.empty_like(x)
            y, cache = bn_fast.batchnorm_forward(x, np.ones(65), np.zeros(65), out=out)
            dx = bn_fast.batchnorm_backward(dout, cache, out=dx)[0]
            results.append([y.tobytes(), dx.tobytes()])
            del y, dx
        assert _results.held() > 0
    finally:
        core.set_caches(*old)
    assert results[0] == results[1] == results[2]


# ---------------------------------------------------------------- how much is held


def test_no_more_than_the_two_largest_of_late():
    alive = [result(1) for _ in range(20)]
    assert _results.held() == 0
    del alive
    assert _results.held() == 2 * MIB
    alive = [result(mib) for mib in (3, 5, 1, 1)]
    del alive
    assert _results.held() == 8 * MIB  # the small ones gain least
    for _ in range(256):
        result(0.25)
    assert _results.held() == 0.25 * MIB


def test_what_nobody_takes_makes_room():
    """After a change of sizes, long before the large ones are forgotten."""
    alive = [result(5), result(5)]
    del alive
    for _ in range(34):
        result(1)
    assert _results.held() == 6 * MIB  # one of the large ones has gone
    where = address(result(1))
    assert address(result(1)) == where


def test_what_is_not_wanted_goes():
    bn_fast.set_result_cache(10 * MIB)
    result(3)
    for _ in range(256):
        assert _results.held() >= 3 * MIB
        result(1)
    result(1)
    assert _results.held() == MIB


def test_a_list_that_grows_holds_nothing_beyond_itself():
    alive = []
    for _ in range(50):
        alive.append(result(1))
        result(1)
        assert _results.held() <= 2 * MIB
    assert len({address(array) for array in alive}) == 50


def test_the_limit_is_kept():
    bn_fast.set_result_cache(5 * MIB)
    alive = [result(1) for _ in range(20)]
    del alive
    assert _results.held() == 5 * MIB
    bn_fast.set_result_cache(int(2.5 * MIB))
    assert _results.held() == 2 * MIB
    result(3)
    assert _results.held() == 2 * MIB
    bn_fast.set_result_cache(0)
    assert _results.held() == 0
    assert get_handler_name(result(1)) == numpys


def test_what_was_made_before_the_limit_was_0_is_given_back():
    alive = result(1, 3)
    bn_fast.set_result_cache(0)
    assert (alive == 3).all()
    del alive
    assert _results.held() == 0


def test_not_more_mappings_than_there_is_room_for():
    bn_fast.set_result_cache(2**30)
    alive = [result(0.125) for _ in range(100)]
    del alive
    assert _results.held() == 64 * MIB / 8


RESIDENT = """
    import resource, numpy as np, bn_fast

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20

    x, one = np.ones((2**14, 256), np.float32), np.ones(256)
    call = lambda: bn_fast.batchnorm_forward(x, one, one)
    call()
    bn_fast.set_result_cache(0)
    start = resident()
    bn_fast.set_result_cache(None)
    alive = [call() for _ in range(10)]
    assert 160 < resident() - start < 165, resident() - start
    del alive
    assert resident() - start < 34, resident() - start
    for _ in range(100):
        out = call()
    assert resident() - start < 34, resident() - start
    del out
    bn_fast.set_result_cache(0)
    assert resident() - start < 2, resident() - start
    print("well")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
def test_resident_memory():
    assert run(RESIDENT) == "well"


OFFERED = """
    import numpy as np, bn_fast

    def offered():
        with open("/proc/self/smaps") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("LazyFree")) / 1024

    def call(mib):
        x = np.broadcast_to(np.float32(1), (int(mib * 1024), 256))
        return bn_fast.batchnorm_forward(x, np.ones(256), np.ones(256))[0]

    call(8)
    assert offered() == 0  # in a loop it is taken again at once
    for _ in range(32):
        call(0.25)
    assert offered() == 0
    call(0.25)
    assert offered() == 8
    out = call(8)
    assert offered() == 0 and out.min() == out.max() == 1
    call(64)
    assert offered() == 64
    print("well")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the pages of the process from /proc")
def test_what_nobody_takes_is_offered_to_the_kernel():
    assert run(OFFERED) == "well"


LIMITED = """
    import resource, numpy as np, bn_fast
    from bn_fast import _results

    one = np.ones(256)
    x = np.ones((2**15, 256), np.float32)

    def limit(room):
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + room, -1))

    bn_fast.set_num_threads(1)
    bn_fast.batchnorm_forward(x[:2**14], one, one)
    assert _results.held() == 2**24
    limit(2**24 + 2**22)
    out = bn_fast.batchnorm_forward(x, one, one)[0]  # 32 MiB: with what was held there is room
    assert _results.held() == 0 and out.min() == out.max() == 1
    resize = lambda: out.resize((2**16, 256), refcheck=False)  # 3.14: a global's is refused
    for call in (lambda: bn_fast.batchnorm_forward(x, one, one), resize):
        try:
            call()
        except MemoryError as error:
            assert "llocate" in str(error), error
        else:
            raise AssertionError
    assert out.shape == x.shape and out.min() == out.max() == 1
    print("well")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
def test_what_is_held_is_given_back_before_memory_is_missing():
    assert run(LIMITED) == "well"


# ---------------------------------------------------------------- arrays like any other


def test_resize():
    array = result(1, 3)
    for rows in (2048, 4096, 100, 1, 300):
        before = array.copy()
        array.resize((rows, 256))
        kept = min(rows, len(before))
        assert (array[:kept] == before[:kept]).all()
        assert (array[kept:] == 0).all()
    array.resize((0, 256))
    assert array.size == 0
    del array
    assert _results.held() <= 2 * 4 * MIB


def test_views_keep_their_base():
    whole = result(1, 3)
    where, view, memory = address(whole), whole[1::2, ::-1], memoryview(whole)
    del whole
    assert _results.held() == 0
    del view
    assert _results.held() == 0
    assert memory[5, 5] == 3
    memory.release()
    del memory
    assert _results.held() == MIB
    assert address(result(1)) == where


def test_tensors_keep_their_base():
    torch = pytest.importorskip("torch")
    for tensor in (torch.from_numpy(result(1, 3)), torch.from_dlpack(result(1, 3))):
        result(1, 4)
        assert bool((tensor == 3).all())
    del tensor
    assert _results.held() == 2 * MIB


def test_pickles_and_copies_are_numpys():
    array = result(1, 3)
    for copy in (array.copy(), array + 0, pickle.loads(pickle.dumps(array)), np.empty_like(array)):
        assert get_handler_name(copy) != ours
    assert (pickle.loads(pickle.dumps(array)) == array).all()


def test_tracemalloc_counts_results():
    tracemalloc.start()
    try:
        array = result(3)
        assert 3 * MIB <= tracemalloc.get_traced_memory()[0] < 3.5 * MIB
        del array
        assert tracemalloc.get_traced_memory()[0] < 0.5 * MIB
    finally:
        tracemalloc.stop()


def test_at_exit():
    """Arrays that outlive every module."""
    code = """
        import os, sys, numpy as np, bn_fast

        class Late:
            def __init__(self):
                self.array = bn_fast.batchnorm_forward(x, one, one)[0]

            def __del__(self, write=os.write):
                self.array.resize((2**13, 64), refcheck=False)
                write(1, b"late " if self.array[5, 5] == 1 else b"wrong ")

        x, one = np.ones((2**12, 64)), np.ones(64)
        np.late, bn_fast.late, bn_fast._results.late = Late(), Late(), Late()
        sys.late = Late()
    """
    assert run(code) == "late late late late"


# ---------------------------------------------------------------- handlers


class Handler(ctypes.Structure):
    """NumPy's PyDataMem_Handler."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("ctx", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("malloc", "calloc", "realloc", "free")),
    )


USERS = []  # arrays may need theirs for as long as Python runs
MEM_HANDLER = ctypes.create_string_buffer(b"mem_handler")  # the capsules' name


def pointer(capsule, name):
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return get(capsule, name)


def set_handler(capsule):
    """PyDataMem_SetHandler, which gives back the one before."""
    table = pointer(np._core._multiarray_umath._ARRAY_API, None)
    function = ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))[304]
    return ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(function)(capsule)


@pytest.fixture
def handler():
    """A handler of the user's own: NumPy's functions under another name."""
    default = set_handler(_results.mem_handler)
    numpys_own = Handler.from_address(pointer(default, MEM_HANDLER.value))
    USERS.append(Handler.from_buffer_copy(numpys_own))
    USERS[-1].name = b"users"
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
    set_handler(default)
    yield new(ctypes.addressof(USERS[-1]), ctypes.addressof(MEM_HANDLER), None)
    set_handler(default)


def test_the_users_handler_makes_results_too(handler):
    old = set_handler(handler)
    assert get_handler_name() == "users"
    assert get_handler_name(result(1)) == "users"
    assert get_handler_name() == "users"
    set_handler(old)
    assert get_handler_name() == numpys
    assert get_handler_name(result(1)) == ours
    assert get_handler_name() == numpys


def test_numpys_handler_is_back_when_there_is_no_memory():
    x = np.broadcast_to(np.float32(1), (2**50, 256))
    with pytest.raises(MemoryError):
        bn_fast.normalize(x, np.zeros(256), np.ones(256), np.ones(256), np.zeros(256))
    assert get_handler_name() == numpys
    assert get_handler_name(np.ones(1)) == numpys


def test_our_handler_does_all_that_numpy_may_ask_of_it():
    result(1, 7)
    default = set_handler(_results.mem_handler)
    try:
        zeros, dirty = np.zeros((1024, 256), np.float32), np.empty(3)
        small = np.zeros(5)
    finally:
        set_handler(default)
    for array in (zeros, dirty, small):
        assert get_handler_name(array) == ours
    assert not zeros.any()
    assert not small.any()
    dirty.resize(7)
    del zeros, dirty, small
    assert _results.held() <= 2 * MIB


# ---------------------------------------------------------------- threads and processes


def test_threads_free_what_others_made():
    """No two results that are alive share memory, whoever makes, reads and frees them."""
    made, errors = queue.Queue(8), []
    sizes = 0.125, 0.25, 1, 4

    def make(k):
        for i in range(60):
            value = 1000 * k + i
            made.put((result(sizes[i % 4], value), value))
        made.put(None)

    def free():
        while (item := made.get()) is not None:
            if not (item[0] == item[1]).all():
                errors.append(item[1])
            del item

    threads = [threading.Thread(target=make, args=[k]) for k in range(4)]
    threads += [threading.Thread(target=free) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert _results.held() <= 8 * MIB


FORK = """
    import os, signal, threading, numpy as np, bn_fast
    from bn_fast import _results

    one = np.ones(256)
    x = np.ones((2**13, 256), np.float32)
    call = lambda value: bn_fast.batchnorm_forward(x, one, np.full(256, value))[0]
    done = threading.Event()

    def work():
        while not done.is_set():
            assert (call(5.0) == 5).all()

    threads = [threading.Thread(target=work) for _ in range({threads})]
    for thread in threads:
        thread.start()
    alive = call(1.0)
    for i in range(20):
        call(2.0)
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a hang ends as a signal
            held = _results.held()
            alive[:] = 7
            same = (call(3.0) == 3).all() and (call(4.0) == 4).all() and (alive == 7).all()
            os._exit(0 if same and held == 0 else 1)
        mine = call(6.0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (alive == 1).all() and (mine == 6).all()
    done.set()
    for thread in threads:
        thread.join()
    print("well")
"""


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="no fork on this system")
@pytest.mark.parametrize("threads", [0, 2])
def test_fork(threads):
    """Neither sees what the other writes, and the lock is nobody's in the child."""
    assert run(FORK.format(threads=threads)) == "well"


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("n", [0, 1, 10**6, np.int64(3)])
def test_set_is_what_get_returns(n):
    bn_fast.set_result_cache(n)
    assert bn_fast.get_result_cache() == n
    assert type(bn_fast.get_result_cache()) is int


@pytest.mark.parametrize("n", [-1, 2**63])
def test_value_out_of_range(n):
    with pytest.raises(ValueError, match=rf"n_bytes must be between 0 and {sys.maxsize}, got {n}"):
        bn_fast.set_result_cache(n)


@pytest.mark.parametrize("n", [1.0, "2", True, np.True_, [1]])
def test_not_an_int(n):
    with pytest.raises(TypeError, match=r"n_bytes must be an int or None, got .* of type "):
        bn_fast.set_result_cache(n)


def test_environment():
    code = "import bn_fast; print(bn_fast.get_result_cache())"
    assert run(code, BN_FAST_RESULT_CACHE="0") == "0"
    assert run(code, BN_FAST_RESULT_CACHE="12345") == "12345"
    assert run(code, BN_FAST_RESULT_CACHE="") == run(code) != "0"
    code = "try:\n import bn_fast\nexcept ImportError as error: print(error)"
    for value in ("-1", "1e6", "all"):
        assert run(code, BN_FAST_RESULT_CACHE=value) == (
            f"BN_FAST_RESULT_CACHE must be a number of bytes, 0 or more, got {value!r}"
        )


@pytest.mark.parametrize(
    ("table", "files", "limit"),
    [
        ("0::/", "", None),
        ("0::/", "memory.max=max", None),
        ("0::/a/b", "a/b/memory.max=max\na/memory.max=3000\nmemory.max=5000", 3000),
        ("4:memory:/a\n0::/", "memory/a/memory.limit_in_bytes=700", 700),
        ("4:cpu:/a", "memory/a/memory.limit_in_bytes=700", None),
    ],
)
def test_the_default_is_an_eighth_of_the_cgroups_limit(tmp_path, table, files, limit):
    assert _memory._cgroup_bytes(*cgroup(tmp_path, table, files)) == limit


def test_the_default_is_an_eighth_of_what_there_is(monkeypatch):
    for usable, limit, expected in [
        (2**40, None, 512 * MIB), (2**30, None, 128 * MIB), (2**40, 800, 100), (800, 2**63, 100),
        (0, 800, 0),
    ]:  # fmt: skip
        monkeypatch.setattr(_results, "usable_memory", lambda usable=usable: float(usable))
        monkeypatch.setattr(_memory, "_cgroup_bytes", lambda limit=limit: limit)
        assert _memory._default() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads the machine's size from /proc")
def test_the_memory_that_this_process_may_use():
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (2**31, -1))
        import bn_fast
        print(bn_fast.get_result_cache())
    """
    assert int(run(code)) <= 2**28
    with open("/proc/meminfo") as file:
        assert _results.usable_memory() <= int(file.readline().split()[1]) * 1024
