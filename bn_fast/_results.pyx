"""The arrays that are returned where no `out` is given, one pool for all instruction sets."""

cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_New

cdef extern from "numpy/arrayobject.h":
    cnp.ndarray PyArray_NewLikeArray(cnp.ndarray, cnp.NPY_ORDER, void*, int)
    void* PyDataMem_DefaultHandler  # borrowed, as the next
    void* PyArray_HANDLER(cnp.ndarray) noexcept

cdef extern from "_pool.h" nogil:
    size_t BN_SMALLEST
    cnp.PyDataMem_Handler bn_handler
    void bn_start_pool()
    void bn_set_pool(size_t limit, bint sparing)
    size_t bn_pool_limit()
    size_t bn_pool_held()
    bint bn_touch(void* data)
    double bn_usable_memory()

cnp.import_array()
bn_start_pool()

smallest = BN_SMALLEST

cdef object handler = PyCapsule_New(&bn_handler, "mem_handler", NULL)
mem_handler = handler


cdef cnp.ndarray new_result(cnp.ndarray x):
    """A new array with the type, the shape and the order of x."""
    if <size_t> cnp.PyArray_NBYTES(x) < BN_SMALLEST or bn_pool_limit() == 0:
        return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    current = cnp.PyDataMem_GetHandler()
    if <void*> current != PyDataMem_DefaultHandler:  # the user's own
        return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    cnp.PyDataMem_SetHandler(handler)
    try:
        return PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, 0)
    finally:
        cnp.PyDataMem_SetHandler(current)


def empty_like(cnp.ndarray x not None):
    """new_result for Python."""
    return new_result(x)


cdef bint is_untouched(cnp.ndarray array) noexcept:
    """Whether the array (or None) is a result in memory that is new from the system; but once, as
    who asks will write to it."""
    return (
        array is not None and PyArray_HANDLER(array) == <void*> handler
        and bn_touch(cnp.PyArray_DATA(array))
    )


def set_limit(size_t limit, bint sparing):
    """Hold so many bytes of released results; sparing: no more than the two largest of late."""
    bn_set_pool(limit, sparing)


def get_limit():
    return bn_pool_limit()


def held():
    """Bytes of released results that wait for the next ones."""
    return bn_pool_held()


def usable_memory():
    """Bytes that the machine has and this process may address; 0 where nothing is ever held."""
    return bn_usable_memory()
